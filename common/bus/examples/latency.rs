//! Round trip and fan-out of the bus over DDS on loopback:
//! `cargo run --release -p muster-bus --example latency --features testing -- [AGENTS] [ROUNDS]`.
//!
//! Each agent is a bus of its own (in this process) that answers a command with a verdict. One command a round; the
//! times are from publish to the first and to the last verdict. RustDDS looks for twelve participants of its own
//! machine, so eleven agents at most.
#![allow(clippy::print_stdout)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use muster_bus::testing::{free_domain, wait_until};
use muster_idl::{
    samples,
    v1::{GroupCommand, Verdict},
};

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<usize>());
    let agents = arguments.next().transpose()?.unwrap_or(3).clamp(1, 11);
    let rounds = arguments.next().transpose()?.unwrap_or(1000).max(1);
    let domain = free_domain();
    let stop = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let mut threads = Vec::new();
    for agent in 0..agents {
        let (bus, stop) = (domain.bus()?, stop.clone());
        let verdicts = bus.publisher::<Verdict>()?;
        let mut commands = bus.subscriber::<GroupCommand>(1024)?;
        threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                let Some(command) = commands.recv_timeout(Duration::from_millis(100)).and_then(|s| s.value()) else {
                    continue;
                };
                let verdict = Verdict { command: command.id, host: agent.to_string(), ..samples::verdict() };
                if let Err(error) = verdicts.publish(&verdict) {
                    eprintln!("{error}");
                }
            }
        }));
    }
    let controller = domain.bus()?;
    let commands = controller.publisher::<GroupCommand>()?;
    let mut verdicts = controller.subscriber::<Verdict>(4096)?;
    wait_until("all agents match", Duration::from_secs(60), || {
        commands.matched() == agents && verdicts.matched() == agents
    });
    println!("{agents} agents matched after {:.0} ms", started.elapsed().as_secs_f64() * 1e3);
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let at = Instant::now();
        commands.publish(&GroupCommand { id: round.to_string(), ..samples::group_command() })?;
        for n in 0..agents {
            verdicts.recv_timeout(Duration::from_secs(10)).ok_or("a verdict is missing")?;
            if n == 0 {
                first.push(at.elapsed());
            }
        }
        last.push(at.elapsed());
    }
    stop.store(true, Ordering::Release);
    for thread in threads {
        thread.join().map_err(|_| "an agent panicked")?;
    }
    for (name, times) in [("first verdict", &mut first), ("last verdict", &mut last)] {
        times.sort();
        println!(
            "{name}: p50 {:?}, p99 {:?}, max {:?} ({rounds} rounds)",
            percentile(times, 50),
            percentile(times, 99),
            percentile(times, 100)
        );
    }
    Ok(())
}
