//! Every test, a short run of the fuzzers, and the benches.

use anyhow::Result;

use crate::guest::Piece;
use crate::run::Context;
use crate::{check, fuzz, guest, setup};

/// Where tests find what was built for them.
pub const GUEST_DIR_VARIABLE: &str = "MUSTER_GUEST_DIR";
pub const PYTHON_VARIABLE: &str = "MUSTER_PYTHON";

pub fn all(context: &Context, filters: &[&str]) -> Result<()> {
    setup::all(context)?;
    if filters.is_empty() {
        check::all(context, false)?;
    }
    if filters.is_empty() {
        // with locks and atomics of its own: another build of the store than the one below
        context.step("schedules of the store", || {
            let test = ["test", "--quiet", "--locked", "--package", "muster-store", "--features", "shuttle", "--lib"];
            context.cargo().args(test).arg("schedules").run()?;
            Ok(String::new())
        })?;
    }
    guest::build(context, &[Piece::Kernel, Piece::Tiny, Piece::Debian])?;
    // some tests start the programs as an operator would; a test build alone does not leave them behind
    context.step("build the programs", || {
        context.cargo().args(["build", "--workspace", "--bins", "--locked"]).run()?;
        Ok(String::new())
    })?;
    let nextest = context.command("cargo-nextest").arg("--version").succeeds();
    println!("  tests, with cargo {}:", if nextest { "nextest" } else { "test" });
    let runner = if nextest {
        context.cargo().args(["nextest", "run", "--workspace", "--locked", "--no-fail-fast"])
    } else {
        context.cargo().args(["test", "--workspace", "--locked", "--no-fail-fast"])
    };
    with_environment(context, runner).args(filters).stream()?;
    if nextest && filters.is_empty() {
        // nextest leaves out the examples in documentation
        context.step("examples in documentation", || {
            with_environment(context, context.cargo().args(["test", "--doc", "--workspace", "--locked", "--quiet"]))
                .run()?;
            Ok(String::new())
        })?;
    }
    if filters.is_empty() {
        fuzz::short(context)?;
    }
    Ok(())
}

pub fn bench(context: &Context, filters: &[&str]) -> Result<()> {
    setup::all(context)?;
    with_environment(context, context.cargo().args(["bench", "--workspace", "--locked", "--benches", "--"]))
        .args(filters)
        .stream()
}

fn with_environment<'a>(context: &Context, command: crate::run::Cmd<'a>) -> crate::run::Cmd<'a> {
    command.env(GUEST_DIR_VARIABLE, guest::dir(context)).env(PYTHON_VARIABLE, setup::python_path(context))
}
