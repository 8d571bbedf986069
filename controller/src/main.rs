//! The controller's program.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::Context;
use clap::Parser;
use muster_common::{SystemClock, config, logging};
use muster_controller::{Config, Controller, config::PREFIX};
use tokio::signal::unix::{SignalKind, signal};

/// Knows the fleet, commands it, and answers to people.
#[derive(Parser)]
#[command(name = "muster-controller", version)]
struct Arguments {
    /// Configuration file; examples/config/controller.toml explains every key.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets one key, for example stream.listen=0.0.0.0:7701. May be given more than once.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = pair)]
    set: Vec<(String, String)>,
    /// Prints the effective configuration and ends.
    #[arg(long)]
    check: bool,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) => Ok((key.trim().to_string(), value.trim().to_string())),
        None => Err("write KEY=VALUE".to_string()),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muster-controller: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let config: Config = config::load(arguments.config.as_deref(), PREFIX, std::env::vars(), &arguments.set)?;
    if arguments.check {
        print!("{}", config.to_toml());
        return Ok(config.check()?);
    }
    logging::init(config.log.format);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listen to signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen to signals")?;
        let controller = Controller::start(config, Arc::new(SystemClock)).await?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        controller.shutdown().await;
        Ok(())
    })
}
