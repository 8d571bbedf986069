//! A server with the agent embedded: it owns the process, brings its own configuration, runs the agent beside its own
//! work, and looks into the agent's memory store.
//!
//!     cargo run -p muster-examples --bin embedded_agent -- /tmp/embedded --uri simulator:
//!
//! What an embedding program has to know:
//! - it needs a multi-threaded tokio runtime; the agent brings its own named threads beside it;
//! - `Deps` lets it hand in its own bus, hypervisor and clock; the default takes all from the configuration;
//! - the process holds the disks of its VMs: it ends through `Agent::stop`, which refuses while volumes are attached;
//! - the program's tracing subscriber receives the agent's log.

use std::{path::PathBuf, time::Duration};

use clap::Parser;
use muster_agent::{Agent, Config, Deps, Stop};
use muster_common::{ByteLen, logging};

#[derive(Parser)]
#[command(about = "A small server with a Muster agent inside.")]
struct Arguments {
    /// Directory for state and sockets.
    directory: PathBuf,
    /// Hypervisor: simulator:, none, qemu:///system, or empty for the embedded QEMU driver.
    #[arg(long, default_value = "simulator:")]
    uri: String,
    /// Memory for images and volumes.
    #[arg(long, default_value = "512MiB")]
    budget: ByteLen,
    /// The cell (DDS domain id).
    #[arg(long, default_value_t = 0)]
    cell: u16,
    /// Ends by itself after this many seconds; 0: runs until Ctrl-C.
    #[arg(long, default_value_t = 0)]
    seconds: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    logging::init(logging::LogFormat::Text);

    let mut config =
        Config::minimal(arguments.directory.join("state"), arguments.directory.join("run"), arguments.budget);
    config.name = Some("embedded".into());
    config.cell = arguments.cell;
    config.hypervisor.uri = arguments.uri;
    let mut agent = Agent::start(config, Deps::default()).await?;
    println!("agent {} serves streams on {}", agent.host_id(), agent.stream_address());

    let mut own_work = tokio::time::interval(Duration::from_secs(5));
    let lifetime = Duration::from_secs(if arguments.seconds == 0 { u64::from(u32::MAX) } else { arguments.seconds });
    let end = tokio::time::sleep(lifetime);
    tokio::pin!(end);
    loop {
        tokio::select! {
            // what the server is really for
            _ = own_work.tick() => {
                let stats = agent.store().stats();
                println!(
                    "store: {} of {} resident, {} images, {} volumes, dedup {:.2}",
                    stats.resident_bytes, stats.budget, stats.images, stats.volumes, stats.dedup_ratio
                );
                continue;
            }
            _ = tokio::signal::ctrl_c() => {}
            _ = agent.stop_requested() => {}
            // refused, it is asked again in a while
            () = &mut end => end.as_mut().reset(tokio::time::Instant::now() + Duration::from_secs(5)),
        }
        match agent.stop(Stop::Orderly).await {
            Ok(()) => return Ok(()),
            Err((running, refused)) => {
                println!("still running: {refused}");
                agent = running;
            }
        }
    }
}
