//! The fuzzers of `tests/fuzz`: libFuzzer with coverage and AddressSanitizer.
//!
//! The folder is a crate of cargo-fuzz, and `cargo +nightly fuzz run TARGET` works in it. Here neither is needed: what
//! cargo-fuzz adds are compiler options, and `RUSTC_BOOTSTRAP=1` lets the compiler of the project take them. So the code
//! that is fuzzed comes from the compiler that it is shipped with, and a machine needs nothing but the C++ compiler.
//!
//! ```text
//! tests/fuzz/corpus/TARGET        committed: read, never written; a test replays it (tests/tests/corpus.rs)
//! target/fuzz/corpus/TARGET       what runs on this machine found interesting; the next run goes on from there
//! target/fuzz/artifacts/TARGET    inputs that failed
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::run::{Cmd, Context, show_tail};

const TARGETS: &[&str] = &["nbd_session", "virtqueue", "qcow2"];
/// Of one target, unless told otherwise.
const SECONDS: u32 = 60;
/// In the tests: long enough to find again what a change of these parsers breaks at once.
const SHORT_SECONDS: u32 = 10;

/// What `cargo fuzz` (0.13) gives to the compiler.
const FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "--cfg=fuzzing",
    "-Zsanitizer=address",
];

/// What the command line asks for.
struct Asked {
    seconds: u32,
    /// Any of [`TARGETS`].
    targets: Vec<&'static str>,
    /// Put what was found into the committed corpus, as few and as short inputs as cover all of it.
    keep: bool,
}

pub fn run(context: &Context, words: &[&str]) -> Result<()> {
    let asked = parse(words)?;
    match build(context)? {
        Build::Skipped(why) => println!("  fuzzers: skipped: {why}"),
        Build::Done(fuzzers) => {
            for target in asked.targets {
                if asked.keep {
                    context.step(&format!("corpus of {target}"), || fuzzers.keep(target))?;
                } else {
                    context.step(&format!("fuzz {target}"), || fuzzers.run(target, asked.seconds))?;
                }
            }
        }
    }
    Ok(())
}

/// The short run of the tests.
pub fn short(context: &Context) -> Result<()> {
    run(context, &["--seconds", &SHORT_SECONDS.to_string()])
}

fn parse(words: &[&str]) -> Result<Asked> {
    let mut asked = Asked { seconds: SECONDS, targets: Vec::new(), keep: false };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match *word {
            "--seconds" => {
                let value = words.next().context("--seconds: how many? A number follows it")?;
                asked.seconds = value.parse().with_context(|| format!("--seconds {value}: expected a number"))?;
                if asked.seconds == 0 {
                    bail!("--seconds 0: libFuzzer would never end; at least 1");
                }
            }
            "--keep" => asked.keep = true,
            name => match TARGETS.iter().find(|target| **target == name) {
                Some(target) => asked.targets.push(target),
                None => bail!("no fuzz target {name}: there are {}", TARGETS.join(", ")),
            },
        }
    }
    if asked.targets.is_empty() {
        asked.targets = TARGETS.to_vec();
    }
    Ok(asked)
}

enum Build<'a> {
    Done(Fuzzers<'a>),
    /// And why.
    Skipped(String),
}

/// Said when there is none.
pub const NO_SANITIZER: &str = "this compiler has no AddressSanitizer for this machine";

/// The name of this machine's target, when the compiler has AddressSanitizer for it.
pub fn sanitizer(context: &Context) -> Result<Option<String>> {
    let rustc = || context.command(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let version = rustc().arg("-vV").read()?;
    let triple = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not say its host")?;
    let libraries = rustc().args(["--print", "target-libdir"]).read()?;
    Ok(has_sanitizer(Path::new(libraries.trim())).then(|| triple.to_owned()))
}

fn build(context: &Context) -> Result<Build<'_>> {
    let Some(triple) = sanitizer(context)? else {
        return Ok(Build::Skipped(NO_SANITIZER.into()));
    };
    if !context.command("c++").arg("--version").succeeds() {
        return Ok(Build::Skipped("no C++ compiler, and libFuzzer is C++: install g++, or `cargo xtask setup`".into()));
    }
    let dir = context.target.join("fuzz");
    context.step("build the fuzzers", || {
        context
            .cargo()
            // not --locked: the lock file follows that of the project by itself
            .args(["build", "--release", "--bins", "--target", &triple, "--manifest-path"])
            .arg(context.root.join("tests/fuzz/Cargo.toml"))
            .arg("--target-dir")
            .arg(&dir)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", FLAGS.join(" "))
            .run()?;
        Ok(String::new())
    })?;
    let programs = dir.join(triple).join("release");
    Ok(Build::Done(Fuzzers { context, dir, programs }))
}

/// Whether the compiler came with the sanitizer's library, whose name holds that of the toolchain.
fn has_sanitizer(libraries: &Path) -> bool {
    let names = std::fs::read_dir(libraries).into_iter().flatten().flatten();
    names.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with("_rt.asan.a"))
}

struct Fuzzers<'a> {
    context: &'a Context,
    dir: PathBuf,
    programs: PathBuf,
}

impl Fuzzers<'_> {
    fn committed(&self, target: &str) -> PathBuf {
        self.context.root.join("tests/fuzz/corpus").join(target)
    }

    fn found(&self, target: &str) -> Result<PathBuf> {
        let dir = self.dir.join("corpus").join(target);
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(dir)
    }

    fn command(&self, target: &str) -> Cmd<'_> {
        // On a machine with other work an input of 2 ms has taken 12 s: a minute hangs. What takes 2 GiB takes memory out
        // of proportion.
        self.context.command(self.programs.join(target)).args(["-timeout=60", "-rss_limit_mb=2048"])
    }

    fn run(&self, target: &str, seconds: u32) -> Result<String> {
        let artifacts = self.dir.join("artifacts").join(target);
        std::fs::create_dir_all(&artifacts).with_context(|| format!("create {}", artifacts.display()))?;
        let outcome = self
            .command(target)
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg("-print_final_stats=1")
            .arg(self.found(target)?)
            .arg(self.committed(target))
            .outcome()?;
        if !outcome.success {
            show_tail(&outcome.stderr);
            bail!(
                "{target} found an input that fails ({}), it lies in {}. Mend it, and put the input into {}: a test \
                 replays it from then on",
                outcome.code,
                artifacts.display(),
                self.committed(target).display()
            );
        }
        Ok(summary(&outcome.stderr))
    }

    fn keep(&self, target: &str) -> Result<String> {
        let fresh = self.dir.join("merged").join(target);
        if fresh.exists() {
            std::fs::remove_dir_all(&fresh).with_context(|| format!("remove {}", fresh.display()))?;
        }
        std::fs::create_dir_all(&fresh).with_context(|| format!("create {}", fresh.display()))?;
        // what is committed stays: some of it is there because it failed once
        let committed = self.committed(target);
        let before = copy_all(&committed, &fresh)?;
        let found = self.found(target)?;
        self.command(target).arg("-set_cover_merge=1").arg(&fresh).arg(found).run()?;
        let after = copy_all(&fresh, &committed)?;
        Ok(format!("{} of {after} inputs are new", after - before))
    }
}

/// How many files there were.
fn copy_all(from: &Path, to: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))
            .with_context(|| format!("copy {}", entry.path().display()))?;
        count += 1;
    }
    Ok(count)
}

/// What libFuzzer said at its end, in a few words.
fn summary(output: &str) -> String {
    let statistic = |name: &str| {
        let line = output.lines().rev().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
        line.and_then(|rest| rest.strip_prefix(':')).map_or("?", str::trim)
    };
    let done = output.lines().rev().find(|line| line.contains("\tDONE ")).unwrap_or_default();
    let field = |name: &str| {
        let mut words = done.split_whitespace().skip_while(|word| *word != name);
        words.nth(1).unwrap_or("?")
    };
    format!(
        "nothing found in {} inputs, {} a second; {} edges covered, {} kept",
        statistic("number_of_executed_units"),
        statistic("average_exec_per_sec"),
        field("cov:"),
        field("corp:"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_run_is_told_in_a_line() {
        let output = "#12\tNEW    cov: 10 ft: 11 corp: 2/9b lim: 4 exec/s: 0 rss: 40Mb\n\
                      #5000\tDONE   cov: 123 ft: 456 corp: 78/9Kb lim: 40 exec/s: 2500 rss: 50Mb\n\
                      Done 5000 runs in 2 second(s)\n\
                      stat::number_of_executed_units: 5000\nstat::average_exec_per_sec:     2500\n";
        let told = summary(output);
        assert_eq!(told, "nothing found in 5000 inputs, 2500 a second; 123 edges covered, 78/9Kb kept");
    }

    #[test]
    fn a_target_that_is_not_there_and_a_time_that_is_none_are_refused() {
        assert_eq!(parse(&[]).unwrap().targets, TARGETS);
        let asked = parse(&["--seconds", "5", "qcow2"]).unwrap();
        assert_eq!((asked.seconds, asked.targets), (5, vec!["qcow2"]));
        for words in [&["qcow3"][..], &["--seconds"], &["--seconds", "soon"], &["--seconds", "0"]] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn every_target_of_the_crate_is_known() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/fuzz_targets");
        let mut files: Vec<String> = std::fs::read_dir(root)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        files.sort();
        let mut known = TARGETS.to_vec();
        known.sort_unstable();
        assert_eq!(files, known);
    }
}
