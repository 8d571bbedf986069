//! The agent of one host: keeps disk images in memory and serves them to its VMs, drives the hypervisor, says what host and
//! VMs are doing, and obeys commands that name them.
//!
//! Main types: [`Agent`] ([`Agent::start`], [`Agent::stop`]), [`Config`], [`Deps`] (what an embedding program or a test
//! brings along). Below, in the order data flows: [`dispatcher`] decides (pure), `driver` carries out, `executor` acts
//! through `muster-virt`, `muster-store` and `muster-backup`, `voice` and `telemetry` publish. [`ledger`] is what makes a
//! command happen at most once; [`records`] what a VM is made of.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use muster_agent::{Agent, Config, Deps, Stop};
//! let config = Config::load(Some("agent.toml".as_ref()), std::env::vars(), &[])?;
//! let agent = Agent::start(config, Deps::default()).await?;
//! agent.stop_requested().await;
//! agent.stop(Stop::Orderly).await.map_err(|(_, refused)| refused)?;
//! # Ok(())
//! # }
//! ```
//!
//! Invariants:
//! 1. A command is recorded durably before anything is done about it, and is carried out at most once.
//! 2. Every member of this host in a command gets exactly one verdict; `done` is said when the state read back says so.
//! 3. An export is named by volume and generation. A generation is recorded durably before it is used, and is never used
//!    for two contents; what was lost is never served again under its name.
//! 4. A domain of ours has a record, whenever the agent dies. Machines without our mark are never touched.
//! 5. Telemetry holds no lock that control needs; a heartbeat waits for nothing.
//! 6. A panic in an order is a verdict; a panic in an export session fences that export. Neither ends the agent.
//! 7. It does not start unless `lab = true`: there is no authentication yet.
//!
//! Threads: tokio's for control; `agent-voice`, `agent-telemetry`, `agent-events`, `agent-scrub`; those of bus, pool and exports. All are
//! joined in the order written in [`supervise`]. Locks: inventory, presence, manifests: each a leaf, none held while
//! anything is called or awaited.
//!
//! Deliberately not here: placement, groups, who may command (controller), schedules, live migration, durable volumes.
#![forbid(unsafe_code)]

pub mod accounting;
mod aftercare;
pub mod arguments;
mod boot;
mod chunks;
pub mod config;
pub mod control;
mod disk_metrics;
pub mod dispatcher;
mod driver;
mod executor;
mod host;
pub mod identity;
mod images;
mod inventory;
pub mod ledger;
mod machines;
mod memory;
mod mend;
mod numa;
mod observer;
pub mod presence;
pub mod records;
mod repair;
mod sampling;
mod scrub;
pub mod stop;
mod stream;
pub mod supervise;
mod tcp;
mod telemetry;
mod voice;
mod volumes;
mod watermark;

pub use config::Config;
pub use stop::{Stop, StopRefused};
pub use supervise::{Agent, Deps, StartError};
