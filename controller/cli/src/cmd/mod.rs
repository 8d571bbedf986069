//! One module for each noun. Each function speaks to the controller through `muster_api::Client` and prints.

mod agent;
mod command;
mod export;
mod fleet;
mod group;
mod image;
mod stream;
mod top;
mod vm;

use std::io::IsTerminal;

use anyhow::{Context, bail};
use clap::CommandFactory;
use muster_api::{Client, ClientError, Endpoint};

use crate::{
    Ended,
    args::{Cli, Noun, Output},
};

/// What every command needs.
pub struct Session {
    pub client: Client,
    pub output: Output,
}

/// Carries the command line out.
pub async fn run(cli: Cli) -> anyhow::Result<Ended> {
    match cli.noun {
        Noun::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "muster", &mut script);
            crate::output::write_out(&String::from_utf8_lossy(&script))?;
            return Ok(Ended::AllDone);
        }
        Noun::Agent(verb) => return agent::run(verb, cli.output).await,
        _ => {}
    }
    let endpoint: Endpoint = cli.connect.parse()?;
    let session = Session { client: Client::connect(endpoint)?, output: cli.output };
    match cli.noun {
        Noun::Host(verb) => fleet::host(&session, verb).await,
        Noun::Store(verb) => fleet::store(&session, verb).await,
        Noun::Volume(verb) => fleet::volume(&session, verb).await,
        Noun::Backup(verb) => fleet::backup(&session, verb).await,
        Noun::Status => fleet::status(&session).await,
        Noun::Events(args) => fleet::events(&session, args).await,
        Noun::Vm(verb) => vm::run(&session, verb).await,
        Noun::Group(verb) => group::run(&session, verb).await,
        Noun::Image(verb) => image::run(&session, verb).await,
        Noun::Template(verb) => image::template(&session, verb).await,
        Noun::Command(verb) => command::run(&session, verb).await,
        Noun::Top(args) => top::run(&session, args).await,
        Noun::Agent(_) | Noun::Completions { .. } => Ok(Ended::AllDone),
    }
}

/// The whole chain in one line, and what to do about the usual mistakes.
pub fn explain(error: &anyhow::Error) -> String {
    let mut text = format!("{error:#}");
    if let Some(client) = error.chain().find_map(|e| e.downcast_ref::<ClientError>()) {
        match client {
            ClientError::Problem(problem) if !problem.near.is_empty() => {
                text += &format!("; did you mean {}?", problem.near.join(" or "));
            }
            ClientError::Connect { .. } => {
                text += "\nIs muster-controller running? --connect or MUSTER_CONNECT says where it listens.";
            }
            _ => {}
        }
    }
    text
}

/// Asks on a terminal; elsewhere `--yes` must have been given.
pub fn confirm(what: &str, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        bail!("{what}: say --yes to do this without being asked");
    }
    eprint!("{what}? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("read the answer")?;
    if !matches!(answer.trim(), "y" | "Y" | "yes") {
        bail!("not done");
    }
    Ok(())
}

/// `3 s ago`, `never`.
pub fn ago(now_us: u64, then_us: u64) -> String {
    match then_us {
        0 => "never".to_string(),
        then => format!("{} ago", crate::output::duration(now_us.saturating_sub(then))),
    }
}

/// The local clock, as the controller's times are.
pub fn now_us() -> u64 {
    use muster_common::Clock;
    muster_common::SystemClock.now_us()
}
