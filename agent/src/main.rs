//! `muster-agent`: the program around the library.
#![forbid(unsafe_code)]

use std::{io::Write, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use muster_agent::{
    Agent, Config, Deps, Stop,
    control::{self, Request},
};
use muster_common::logging;
use tokio::signal::unix::{SignalKind, signal};

/// A second SIGINT within this time means it.
const INSIST: Duration = Duration::from_secs(5);

#[derive(Parser)]
#[command(name = "muster-agent", version, about = "The Muster agent of one host.")]
struct Command {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Args, Clone)]
struct Settings {
    /// Configuration file (TOML).
    #[arg(long, short, global = true, env = "MUSTER_AGENT_CONFIG_FILE", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides a key: --set store.budget=8GiB. May be repeated.
    #[arg(long = "set", global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Overrides state_dir.
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Overrides run_dir.
    #[arg(long, global = true, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Verb {
    /// Runs the agent (the default).
    Run,
    /// Stops the running agent of this run directory.
    Stop {
        /// Pauses VMs whose volumes are attached instead of refusing. Their volumes are lost.
        #[arg(long)]
        force: bool,
        /// Leaves VMs and volumes as they are: the next start goes on with them. For upgrades.
        #[arg(long, conflicts_with = "force")]
        keep: bool,
    },
    /// Says what the running agent of this run directory is doing, as JSON.
    Status,
    /// Prints the effective configuration.
    Config,
}

impl Settings {
    fn load(&self) -> anyhow::Result<Config> {
        let mut overrides = Vec::new();
        for pair in &self.set {
            let (key, value) = pair.split_once('=').with_context(|| format!("--set {pair}: expected KEY=VALUE"))?;
            overrides.push((key.to_string(), value.to_string()));
        }
        for (key, path) in [("state_dir", &self.state_dir), ("run_dir", &self.run_dir)] {
            if let Some(path) = path {
                overrides.push((key.to_string(), path.display().to_string()));
            }
        }
        // these name the file, not keys of it
        let environment = std::env::vars().filter(|(name, _)| name != "MUSTER_AGENT_CONFIG_FILE");
        Ok(Config::load(self.config.as_deref(), environment, &overrides)?)
    }
}

fn main() -> ExitCode {
    let command = Command::parse();
    match run(command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("muster-agent: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let config = command.settings.load()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("agent-async").build()?;
    match command.verb.unwrap_or(Verb::Run) {
        Verb::Run => {
            logging::init(config.log.format);
            runtime.block_on(serve(config)).map(|()| ExitCode::SUCCESS)
        }
        Verb::Stop { force, keep } => runtime.block_on(ask(&config, &Request::Stop { force, keep })),
        Verb::Status => runtime.block_on(ask(&config, &Request::Status {})),
        Verb::Config => {
            config.check()?;
            print(&format!("{}\n", toml_of(&config)?))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Writes to standard output. A reader that has gone away (`| head`) has all it wanted.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("write to standard output"),
    }
}

fn toml_of(config: &Config) -> anyhow::Result<String> {
    toml::to_string_pretty(config).context("print the configuration")
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut agent = Agent::start(config, Deps::default()).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut keep = signal(SignalKind::user_defined1())?;
    let mut last_interrupt: Option<tokio::time::Instant> = None;
    loop {
        let how = tokio::select! {
            // granted already
            how = agent.stop_requested() => how,
            _ = keep.recv() => Stop::Keep,
            _ = terminate.recv() => Stop::Orderly,
            _ = interrupt.recv() => {
                let now = tokio::time::Instant::now();
                let again = last_interrupt.replace(now).is_some_and(|last| now - last < INSIST);
                if again { Stop::Force } else { Stop::Orderly }
            }
        };
        match agent.stop(how).await {
            Ok(()) => return Ok(()),
            // it was logged; a second interrupt insists
            Err((running, _)) => agent = running,
        }
    }
}

async fn ask(config: &Config, request: &Request) -> anyhow::Result<ExitCode> {
    let socket = config.control_socket();
    let reply = control::request(&socket, request)
        .await
        .with_context(|| format!("ask the agent at {} (is it running?)", socket.display()))?;
    if !reply.ok {
        bail!("{} ({})", reply.message, reply.code.unwrap_or_default());
    }
    if let Some(status) = reply.status {
        print(&format!("{}\n", serde_json::to_string_pretty(&status)?))?;
    }
    if !reply.message.is_empty() {
        eprintln!("{}", reply.message);
    }
    Ok(ExitCode::SUCCESS)
}
