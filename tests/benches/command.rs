//! From the publication of a group command to its last verdict: 3 and 30 agents as processes (simulated hypervisor),
//! real RTPS by multicast in one network namespace. Needs root for the namespace.
//!
//!     cargo build --release --workspace --bins && cargo bench -p muster-tests --bench command [-- ROUNDS]
//!
//! `ping` is the way there and back alone (the agent writes the command to its ledger, durably, before it answers);
//! `pause` and `resume` change two simulated VMs a host. Times are the controller's: from the durable row to the arrival
//! of the verdict.

use anyhow::{Context, Result, ensure};
use muster_bus::testing::Namespaces;
use muster_tests::{Fleet, Network, outcomes};

fn main() -> Result<()> {
    let rounds: usize = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(15);
    println!("| agents | command | members | first verdict p50, ms | last verdict p50, ms | last verdict max, ms |");
    println!("|---|---|---|---|---|---|");
    for hosts in [3, 30] {
        let namespaces = Namespaces::make().context("make a network namespace (run as root)")?;
        let network =
            Network::Namespace { name: namespaces.name(0).to_string(), address: Namespaces::ADDRESSES[0].into() };
        let fleet = Fleet::start_on(network, hosts, "sim:///?seed=1");
        fleet.furnish(2);
        let on = fleet.json(&["vm", "power-on", "school"]);
        ensure!(outcomes(&on) == [("done".to_string(), 2 * hosts as u64)], "power-on failed: {on:#}");
        let names: Vec<String> = fleet.hosts.iter().map(|h| h.name.clone()).collect();
        let ping: Vec<&str> = ["host", "ping"].into_iter().chain(names.iter().map(String::as_str)).collect();
        for (what, members, commands) in [
            ("ping", hosts, vec![ping.as_slice()]),
            ("pause, resume", 2 * hosts, vec![&["vm", "pause", "school"][..], &["vm", "resume", "school"][..]]),
        ] {
            let (mut first, mut last) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                for command in &commands {
                    let done = fleet.json(command);
                    ensure!(outcomes(&done) == [("done".to_string(), members as u64)], "{what}: {done:#}");
                    first.push(done["first_verdict_after_us"].as_u64().unwrap_or(0));
                    last.push(done["last_verdict_after_us"].as_u64().unwrap_or(0));
                }
            }
            first.sort_unstable();
            last.sort_unstable();
            let ms = |us: u64| us as f64 / 1000.0;
            println!(
                "| {hosts} | {what} | {members} | {:.1} | {:.1} | {:.1} |",
                ms(first[first.len() / 2]),
                ms(last[last.len() / 2]),
                ms(last[last.len() - 1])
            );
        }
    }
    Ok(())
}
