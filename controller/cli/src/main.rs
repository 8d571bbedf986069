//! `muster`, the command line of the fleet. Thin: what a word means is in `args`, what it does in `cmd/`, how it looks
//! in `output`.
//!
//! Standard output carries the result and nothing else. Exit status: 0 all done, 1 some members failed, 2 could not run.
#![forbid(unsafe_code)]

mod args;
mod cmd;
mod output;
mod progress;

use std::process::ExitCode;

use clap::Parser;

use args::Cli;

/// How a run ended, when it could run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    AllDone,
    SomeFailed,
}

fn main() -> ExitCode {
    // clap ends with status 2 itself for a wrong command line, and 0 for --help
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("muster: start: {error}");
            return ExitCode::from(2);
        }
    };
    let outcome = runtime.block_on(cmd::run(cli));
    // a read of standard input that nobody answers any more must not hold the program
    runtime.shutdown_background();
    match outcome {
        Ok(Ended::AllDone) => ExitCode::SUCCESS,
        Ok(Ended::SomeFailed) => ExitCode::from(1),
        Err(error) => {
            eprintln!("muster: {}", cmd::explain(&error));
            ExitCode::from(2)
        }
    }
}
