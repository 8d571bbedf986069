//! Prints what the hosts of a cell say of themselves and of their VMs.
//!
//! `cargo run -p muster-examples --bin subscribe -- --cell 7 --interface 10.0.0.1`; `examples/python/subscribe.py` does
//! the same with another vendor's DDS.
#![forbid(unsafe_code)]

use std::net::IpAddr;

use clap::Parser;
use muster_bus::{Bus, BusConfig, Payload};
use muster_common::ByteLen;
use muster_idl::v1::{Event, HostMetrics, PhysicalHost, StoreState, VirtualSystem, VmMetrics};

/// Prints what the hosts of a cell say of themselves and of their VMs.
#[derive(Parser)]
struct Arguments {
    /// The cell: the DDS domain id.
    #[arg(long, default_value_t = 0)]
    cell: u16,
    /// Address of the network interface to use (default: all).
    #[arg(long)]
    interface: Option<IpAddr>,
    /// Address of a host to look for without multicast; may be repeated.
    #[arg(long = "peer")]
    peers: Vec<IpAddr>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let Arguments { cell, interface, peers } = Arguments::parse();
    let multicast = peers.is_empty();
    let bus = Bus::dds(&BusConfig { cell, interface, peers, multicast })?;
    let mut hosts = bus.subscriber::<PhysicalHost>(64)?;
    let mut loads = bus.subscriber::<HostMetrics>(64)?;
    let mut stores = bus.subscriber::<StoreState>(64)?;
    let mut systems = bus.subscriber::<VirtualSystem>(256)?;
    let mut vm_loads = bus.subscriber::<VmMetrics>(256)?;
    let mut events = bus.subscriber::<Event>(256)?;
    println!("reading in {}", bus.diagnosis());
    loop {
        tokio::select! {
            Some(sample) = hosts.recv() => match sample.payload {
                Payload::Value(s) => println!(
                    "host     {} {}: {} processors, {}, {}, {}{}",
                    s.host, s.name, s.number_of_processors, ByteLen(s.total_memory_bytes), s.accelerator,
                    s.operating_system, if s.lab { " (lab mode)" } else { "" }
                ),
                Payload::Disposed(key) => println!("gone     host {}", key.host),
            },
            Some(sample) = systems.recv() => match sample.payload {
                Payload::Value(s) => println!(
                    "vm       {} {}: state {}{}", s.vm, s.name, s.enabled_state, if s.guest_up { ", guest up" } else { "" }
                ),
                Payload::Disposed(key) => println!("gone     vm {}", key.vm),
            },
            Some(sample) = loads.recv() => if let Some(s) = sample.value() {
                println!(
                    "load     {} cpu {:.0} %, memory {}, {} VMs running", s.host, s.processor_percent,
                    ByteLen(s.memory_total_bytes.saturating_sub(s.memory_available_bytes)), s.running_vms
                );
            },
            Some(sample) = stores.recv() => if let Some(s) = sample.value() {
                println!(
                    "store    {} {} of {} resident, ratio {:.2}, {} images, {} volumes, {} file reads", s.host,
                    ByteLen(s.resident_bytes), ByteLen(s.budget_bytes), s.dedup_ratio, s.images.len(), s.volumes,
                    s.guest_file_reads
                );
            },
            Some(sample) = vm_loads.recv() => if let Some(s) = sample.value() {
                println!(
                    "vm load  {} cpu {:.0} %, {} reads, {} writes", s.vm, s.processor_percent, s.disk_reads, s.disk_writes
                );
            },
            Some(sample) = events.recv() => if let Some(s) = sample.value() {
                println!("event    {} {}: {}", s.host, s.kind, s.message);
            },
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}
