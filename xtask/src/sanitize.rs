//! The tests of the store and of the export with AddressSanitizer.
//!
//! These two crates hold the memory of every guest: the store in mappings it makes itself, the export in mappings of the
//! guests'. Miri knows no mappings of files, so the real program is watched. Found is an access to the heap or the stack that
//! is none of the program's (freed, or beyond an end), and one to a mapping that is gone. One block of a mapping taken for
//! another is not: that the store's tests find, by what they read back.
//!
//! As for the fuzzers the compiler is the project's own ([`crate::fuzz`]); `cargo +nightly xtask sanitize` takes nightly.

use anyhow::{Result, bail};

use crate::fuzz;
use crate::run::{Context, show_tail};

const PACKAGES: &[&str] = &["muster-store", "muster-export"];
/// Tests that say nothing under AddressSanitizer.
const LEFT_OUT: &[&str] = &[
    // compares the whole process's memory with the store's figures: the sanitizer keeps freed memory, and its own records
    "the_whole_process_grows_by_what_is_reported_within_five_percent",
];

/// Times a process of the store is killed and its memory found again, unless told otherwise. The plain tests do it 200 times;
/// here each takes several times as long.
const KILLS: &str = "20";
const KILLS_VARIABLE: &str = "MUSTER_STORE_KILLS";

pub fn run(context: &Context, filters: &[&str]) -> Result<()> {
    let Some(triple) = fuzz::sanitizer(context)? else {
        println!("  AddressSanitizer: skipped: {}", fuzz::NO_SANITIZER);
        return Ok(());
    };
    let kills = std::env::var_os(KILLS_VARIABLE).unwrap_or_else(|| KILLS.into());
    let cargo = || {
        let cargo = context.cargo().args(["test", "--locked", "--lib", "--tests"]);
        cargo
            .args(PACKAGES.iter().flat_map(|name| ["--package", name]))
            // named, so that build scripts and procedural macros are built without
            .args(["--target", &triple, "--target-dir"])
            .arg(context.target.join("sanitize"))
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", "-Zsanitizer=address")
            // Looking for leaks takes ptrace, which containers do not let it have.
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .env(KILLS_VARIABLE, &kills)
    };
    context.step("build the tests", || cargo().arg("--no-run").run().map(|()| String::new()))?;
    context.step("tests with AddressSanitizer", || {
        let outcome = cargo()
            .args(["--no-fail-fast", "--"])
            .args(LEFT_OUT.iter().flat_map(|name| ["--skip", name]))
            .args(filters)
            .outcome()?;
        let counts = count(&outcome.stdout);
        if !outcome.success {
            show_tail(&outcome.stdout);
            show_tail(&outcome.stderr);
            bail!(
                "{}: {} tests failed, or AddressSanitizer ended a program and says why in target/xtask/sanitize.log",
                outcome.code,
                counts.failed
            );
        }
        Ok(format!("{} passed, nothing found", counts.passed))
    })
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
}

/// What all test programs said at their ends, together.
fn count(output: &str) -> Counts {
    let mut counts = Counts::default();
    for line in output.lines().filter_map(|line| line.strip_prefix("test result: ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].parse::<u64>() else { continue };
            match pair[1] {
                "passed;" => counts.passed += number,
                "failed;" => counts.failed += number,
                _ => {}
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_all_test_programs_are_added_up() {
        let output = "running 3 tests\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; \
                      finished in 5.00s\n\ntest result: FAILED. 4 passed; 3 failed; 0 ignored; 0 measured; 0 filtered \
                      out; finished in 0.01s\n";
        assert_eq!(count(output), Counts { passed: 6, failed: 3 });
    }
}
