//! As much unique data as asked for, many concurrent writers against an oracle, snapshots, clones, resets and deletes
//! going on, an exact audit every few seconds and at the end.
//!
//! `cargo run --release -p muster-store --example soak -- --gib 8 --writers 16`

use std::time::Duration;

use muster_common::ByteLen;

#[path = "../tests/soak/mod.rs"]
mod soak;

fn main() {
    let (mut gib, mut writers, mut churn) = (1, 16, 2000);
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().and_then(|text| text.parse().ok());
        match (flag.as_str(), value) {
            ("--gib", Some(value)) => gib = value,
            ("--writers", Some(value)) if value > 0 => writers = value,
            ("--churn", Some(value)) => churn = value,
            _ => {
                eprintln!("soak [--gib N] [--writers N] [--churn OPERATIONS-PER-WRITER]");
                std::process::exit(2);
            }
        }
    }
    let plan = soak::Plan { unique: ByteLen::gib(gib as u64), writers, churn, audit_every: Duration::from_secs(5) };
    let outcome = soak::run(&plan);
    let stats = &outcome.stats;
    let metadata = stats.metadata_bytes.bytes() as f64;
    println!("{} unique, {writers} writers, pages {}", plan.unique, stats.pages.as_str());
    println!("filled in {:.1?}, churned {churn} operations each in {:.1?}", outcome.filling, outcome.churning);
    println!("written {}, every block checked: {} in {:.1?}", outcome.written, outcome.checked, outcome.checking);
    println!("frames in use {}, independent recount {}", stats.unique_blocks, outcome.distinct);
    println!(
        "resident {} of {}, metadata {:.1} bytes a unique frame, logical {}, dedup ratio {:.2}",
        stats.resident_bytes,
        stats.budget,
        metadata / stats.unique_blocks as f64,
        stats.logical_bytes,
        stats.dedup_ratio
    );
    println!(
        "audits {} and one at the end: {} frames, {} references, {} nodes, {} faults",
        outcome.audits,
        outcome.audit.frames,
        outcome.audit.frame_references,
        outcome.audit.nodes,
        outcome.audit.faults.len()
    );
    if !outcome.audit.is_exact() || stats.unique_blocks != outcome.distinct {
        eprintln!("NOT EXACT: {:?}", outcome.audit.faults);
        std::process::exit(1);
    }
}
