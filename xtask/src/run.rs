//! Child processes: each is logged with its output; the screen gets one line a step, and the output of a failure.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// How many lines of a failed command are shown; the whole output is in the log.
const SHOWN_LINES: usize = 60;

/// Where this run works and writes its log.
pub struct Context {
    /// The top of the checkout.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    /// Show the output of every command.
    pub verbose: bool,
    log: PathBuf,
}

impl Context {
    pub fn open(name: &str, verbose: bool) -> Result<Context> {
        let root =
            Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the xtask folder has no parent")?.to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        let logs = target.join("xtask");
        std::fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
        let log = logs.join(format!("{name}.log"));
        File::create(&log).with_context(|| format!("create {}", log.display()))?;
        Ok(Context { root, target, verbose, log })
    }

    /// A command that runs at the top of the checkout.
    pub fn command<S: AsRef<OsStr>>(&self, program: S) -> Cmd<'_> {
        let mut command = Command::new(program);
        command.current_dir(&self.root).stdin(Stdio::null());
        Cmd { context: self, command }
    }

    /// Cargo, as it called us.
    pub fn cargo(&self) -> Cmd<'_> {
        let mut command = self.command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // what cargo set for us must not leak into the cargo we call
        for name in ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "CARGO_PKG_VERSION"] {
            command.command.env_remove(name);
        }
        command
    }

    /// Runs one step and prints its name, how long it took and what it says of itself.
    pub fn step(&self, name: &str, work: impl FnOnce() -> Result<String>) -> Result<()> {
        let live = std::io::stdout().is_terminal() && !self.verbose;
        if live {
            print!("  {name} …");
            std::io::stdout().flush().ok();
        }
        self.note(&format!("== {name}"))?;
        let start = Instant::now();
        let result = work();
        let seconds = start.elapsed().as_secs_f64();
        if live {
            print!("\r\x1b[K");
        }
        match result {
            Ok(said) => {
                let said = if said.is_empty() { "ok".to_owned() } else { said };
                println!("  {name}: {said} ({seconds:.1} s)");
                Ok(())
            }
            Err(error) => {
                println!("  {name}: FAILED ({seconds:.1} s)");
                Err(error)
            }
        }
    }

    /// A line in the log only.
    pub fn note(&self, line: &str) -> Result<()> {
        writeln!(self.log_file()?, "{line}").with_context(|| format!("write {}", self.log.display()))
    }

    fn log_file(&self) -> Result<File> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&self.log)
            .with_context(|| format!("open {}", self.log.display()))
    }
}

/// A child process to be run in one of four ways.
pub struct Cmd<'a> {
    context: &'a Context,
    command: Command,
}

impl Cmd<'_> {
    pub fn arg<S: AsRef<OsStr>>(mut self, arg: S) -> Self {
        self.command.arg(arg);
        self
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub fn env<K: AsRef<OsStr>, V: AsRef<OsStr>>(mut self, name: K, value: V) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// The command as a person would type it.
    pub fn text(&self) -> String {
        let mut words = vec![quote(self.command.get_program())];
        words.extend(self.command.get_args().map(quote));
        words.join(" ")
    }

    /// Runs it; output goes to the log, and to the screen when it fails.
    pub fn run(mut self) -> Result<()> {
        let text = self.text();
        self.context.note(&format!("$ {text}"))?;
        if self.context.verbose {
            println!("$ {text}");
            let status = self.command.status().with_context(|| format!("start {text}"))?;
            if !status.success() {
                bail!("`{text}` ended with {status}");
            }
            return Ok(());
        }
        let log = self.context.log_file()?;
        let before = log.metadata()?.len();
        self.command.stdout(log.try_clone()?).stderr(log);
        let status = self.command.status().with_context(|| format!("start {text}"))?;
        if !status.success() {
            let bytes = std::fs::read(&self.context.log)?;
            let output = String::from_utf8_lossy(bytes.get(before as usize..).unwrap_or_default()).into_owned();
            show_tail(&output);
            bail!("`{text}` ended with {status}; whole output: {}", self.context.log.display());
        }
        Ok(())
    }

    /// Runs it with its output on the screen: for what a person or CI wants to read as it comes.
    pub fn stream(mut self) -> Result<()> {
        let text = self.text();
        self.context.note(&format!("$ {text}   (output on the screen)"))?;
        let status = self.command.status().with_context(|| format!("start {text}"))?;
        if !status.success() {
            bail!("`{text}` ended with {status}");
        }
        Ok(())
    }

    /// Runs it and returns its standard output; an error holds its standard error.
    pub fn read(self) -> Result<String> {
        let text = self.text();
        let done = self.outcome()?;
        if !done.success {
            bail!("`{text}` ended with {}: {}", done.code, done.stderr.trim());
        }
        Ok(done.stdout)
    }

    /// Runs it and returns whatever came of it, a non-zero exit included.
    pub fn outcome(mut self) -> Result<Outcome> {
        let text = self.text();
        self.context.note(&format!("$ {text}"))?;
        let output = self
            .command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
            .with_context(|| format!("start {text}"))?;
        let outcome = Outcome {
            success: output.status.success(),
            code: output.status.to_string(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        };
        self.context.note(&format!("{}{}", outcome.stdout, outcome.stderr))?;
        Ok(outcome)
    }

    /// True when it can be started and exits with 0; output is dropped.
    pub fn succeeds(mut self) -> bool {
        let status = self.command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        matches!(status, Ok(status) if status.success())
    }

    /// Starts it in the background with its output appended to a file; the caller keeps the process.
    pub fn start(mut self, output: &Path) -> Result<std::process::Child> {
        let text = self.text();
        self.context.note(&format!("$ {text} >>{} &", output.display()))?;
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(output)
            .with_context(|| format!("open {}", output.display()))?;
        self.command.stdout(file.try_clone()?).stderr(file);
        self.command.spawn().with_context(|| format!("start {text}"))
    }
}

/// What came of a child process.
pub struct Outcome {
    pub success: bool,
    pub code: String,
    pub stdout: String,
    pub stderr: String,
}

/// The last lines of what a command said.
pub fn show_tail(output: &str) {
    let lines: Vec<&str> = output.lines().collect();
    let skipped = lines.len().saturating_sub(SHOWN_LINES);
    if skipped > 0 {
        eprintln!("    … {skipped} lines before");
    }
    for line in &lines[skipped..] {
        eprintln!("    {line}");
    }
}

fn quote(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%^".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// True when this process may do what root may.
pub fn is_root() -> bool {
    // the effective user is the second number of the line
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find(|line| line.starts_with("Uid:"))?;
            line.split_whitespace().nth(2).map(|uid| uid == "0")
        })
        .unwrap_or(false)
}

/// The folder for what outlives `target/`: compiled cargo tools.
pub fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/tmp".into())).join(".cache");
    base.unwrap_or_else(home).join("muster")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_word_survives_a_shell() {
        assert_eq!(quote(OsStr::new("plain-1.2")), "plain-1.2");
        assert_eq!(quote(OsStr::new("")), "''");
        assert_eq!(quote(OsStr::new("a b")), "'a b'");
        assert_eq!(quote(OsStr::new("it's")), r"'it'\''s'");
    }
}
