//! Sixteen writers at once against the oracle. `MUSTER_SOAK_MIB` scales it (default 128).
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use muster_common::ByteLen;

mod soak;

#[test]
fn sixteen_concurrent_writers_equal_the_oracle() {
    let mib = std::env::var("MUSTER_SOAK_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(128);
    let plan =
        soak::Plan { unique: ByteLen::mib(mib), writers: 16, churn: 300, audit_every: Duration::from_millis(200) };
    let outcome = soak::run(&plan);
    assert!(outcome.audit.is_exact(), "{:?}", outcome.audit.faults);
    assert_eq!(outcome.stats.unique_blocks, outcome.distinct, "frames in use equal an independent recount");
    assert!(outcome.audits > 0);
    println!(
        "{} written ({:.1?} filling, {:.1?} churning), {} checked in {:.1?}",
        outcome.written, outcome.filling, outcome.churning, outcome.checked, outcome.checking
    );
}
