//! The fast part of the tests: what a compiler, a linter and a table can tell.

use anyhow::{Context as _, Result};

use crate::run::Context;
use crate::setup;

pub fn all(context: &Context, advisories: bool) -> Result<()> {
    context.step("formatting", || {
        context.cargo().args(["fmt", "--all", "--check"]).run().context("run `cargo fmt --all`")?;
        Ok(String::new())
    })?;
    context.step("clippy", || {
        context
            .cargo()
            .args(["clippy", "--quiet", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])
            .run()
            .context("clippy has something to say (if it is that libvirt is not found: `cargo xtask setup`)")?;
        // what only one test is compiled with
        context
            .cargo()
            .args(["clippy", "--quiet", "--package", "muster-store", "--features", "shuttle", "--lib"])
            .args(["--profile", "test", "--locked", "--", "-D", "warnings"])
            .run()
            .context("clippy has something to say about agent/store/src/schedules")?;
        Ok(String::new())
    })?;
    context.step("layering", || {
        context
            .cargo()
            .args(["test", "--quiet", "--locked", "--package", "muster-tests", "--test", "layering"])
            .run()
            .context("a crate names one it must not: the table is in tests/tests/layering.rs")?;
        Ok(String::new())
    })?;
    context.step("licences, bans, sources", || deny(context, advisories))?;
    context.step("documentation", || {
        context
            .cargo()
            .args(["doc", "--quiet", "--workspace", "--no-deps", "--locked"])
            .env("RUSTDOCFLAGS", "-D warnings")
            .run()?;
        Ok(String::new())
    })
}

fn deny(context: &Context, advisories: bool) -> Result<String> {
    let (deny, _) = setup::deny(context)?;
    context
        .command(&deny)
        .args(["--locked", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"])
        .run()
        .context("deny.toml forbids something in the tree")?;
    // The advisory database is a repository on the network. It is asked for by name only, so that this works offline.
    if !advisories {
        return Ok("ok; advisories not checked (`cargo xtask check --advisories` fetches the database)".to_owned());
    }
    context
        .command(&deny)
        .args(["--locked", "check", "advisories"])
        .run()
        .context("check for known vulnerabilities")?;
    Ok("ok, advisories too".to_owned())
}
