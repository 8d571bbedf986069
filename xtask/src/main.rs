//! The one command of this project, on a laptop and in CI: `cargo xtask VERB`.
//!
//! Each verb installs what it needs, can be run again at any time, and changes nothing when there is nothing to do.
//! Each child process is written to `target/xtask/VERB.log` with its output; the screen shows one line a step and the
//! output of what failed.

#![forbid(unsafe_code)]

mod check;
mod demo;
mod fuzz;
mod guest;
mod python_idl;
mod run;
mod sanitize;
mod setup;
mod test;

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use crate::run::Context;

const USAGE: &str = "\
usage: cargo xtask [--verbose] VERB

  setup              install what is missing (Debian packages, Python module, cargo tools)
  guest [PIECE…]     build the guest images under target/guest: kernel tiny debian debian-office (all by default)
  check [--advisories]
                     the fast part of the tests: formatting, clippy, layering, licences and bans, documentation
  test [FILTER…]     setup, check, guest images and every test (FILTER: passed on to the test runner, skips check)
  fuzz [--seconds N] [TARGET…]
                     look for inputs that break a parser, N seconds (60) for each: nbd_session virtqueue qcow2
  fuzz --keep [TARGET…]
                     add what such runs found, made small, to the committed corpus
  sanitize [FILTER…] the tests of the store and the export with AddressSanitizer
  python-types       write examples/python/muster_v1.py from the IDL
  bench [FILTER…]    the benches
  demo [--no-build]  a controller and three hosts on this machine run the main job; the fleet stays up
  demo down          end it and remove every trace
  demo status        what of it is up
";

fn main() -> ExitCode {
    let mut verbose = false;
    let mut words = Vec::new();
    for word in std::env::args().skip(1) {
        match word.as_str() {
            "--verbose" | "-v" => verbose = true,
            _ => words.push(word),
        }
    }
    match dispatch(verbose, &words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(verbose: bool, words: &[String]) -> Result<()> {
    let Some((verb, rest)) = words.split_first() else {
        print!("{USAGE}");
        return Ok(());
    };
    let context = |name: &str| Context::open(name, verbose);
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    match (verb.as_str(), rest.as_slice()) {
        ("setup", []) => setup::all(&context("setup")?),
        ("guest", []) => guest::build(&context("guest")?, &guest::Piece::ALL),
        ("guest", names) => {
            let pieces = names.iter().map(|name| guest::Piece::parse(name)).collect::<Result<Vec<_>>>()?;
            guest::build(&context("guest")?, &pieces)
        }
        ("check", []) => check::all(&context("check")?, false),
        ("check", ["--advisories"]) => check::all(&context("check")?, true),
        ("test", filters) => test::all(&context("test")?, filters),
        ("bench", filters) => test::bench(&context("bench")?, filters),
        ("fuzz", words) => {
            let context = context("fuzz")?;
            setup::for_fuzzing(&context)?;
            fuzz::run(&context, words)
        }
        ("sanitize", filters) => sanitize::run(&context("sanitize")?, filters),
        ("python-types", []) => python_types(&context("python-types")?),
        ("demo", []) => demo::up(&context("demo")?, true),
        ("demo", ["--no-build"]) => demo::up(&context("demo")?, false),
        ("demo", ["down"]) => demo::down(&context("demo-down")?),
        ("demo", ["status"]) => demo::status(&context("demo-status")?),
        ("help" | "--help" | "-h", _) => {
            print!("{USAGE}");
            Ok(())
        }
        _ => bail!("unknown command: {}\n{USAGE}", words.join(" ")),
    }
}

/// The Python classes are committed; a test of idl compares them with what this writes.
fn python_types(context: &Context) -> Result<()> {
    let idl = context.root.join("idl/idl/muster_v1.idl");
    let text = std::fs::read_to_string(&idl).with_context(|| format!("read {}", idl.display()))?;
    let target = context.root.join("examples/python/muster_v1.py");
    std::fs::write(&target, python_idl::generate(&text)).with_context(|| format!("write {}", target.display()))
}
