//! What the store says it takes against what the machine says it took, for the whole process. One test, so that nothing
//! else runs in this process.
#![allow(clippy::unwrap_used)]

use muster_block::{BlockDevice, WriteFlags, conformance::Random};
use muster_common::{ByteLen, VolumeId};
use muster_store::{Pages, Store, StoreConfig, VolumeSpec};

/// Private memory of this process that is not shared with a file: heap, stacks, regions.
fn anonymous() -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Anonymous:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn the_whole_process_grows_by_what_is_reported_within_five_percent() {
    for pages in [Pages::Small, Pages::Transparent] {
        let before = anonymous();
        let store = Store::open(StoreConfig { pages, ..StoreConfig::new(ByteLen::gib(1)) }).unwrap();
        let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::gib(4))).unwrap();
        let mut random = Random(3);
        let mut data = vec![0; 256 << 10];
        // scattered, so that maps cost what they may
        for n in 0..1024u64 {
            random.fill(&mut data);
            volume.write_at(n * 7 % 1024 * (4 << 20) + (n % 16) * 4096, &data, WriteFlags::default()).unwrap();
        }
        let check = |what: &str| {
            let (taken, stats) = (anonymous() - before, store.stats());
            let reported = stats.resident_bytes.bytes();
            let off = taken as f64 / reported as f64 - 1.0;
            println!("{what}, {:?} pages: {taken} taken, {reported} reported: {:+.2} %", stats.pages, off * 100.0);
            assert!(off.abs() < 0.05, "{what}: {taken} taken, {reported} reported");
        };
        check("256 MiB unique");
        let stats = store.stats();
        assert_eq!(stats.unique_blocks, 65_536);
        let metadata = stats.metadata_bytes.bytes() as f64;
        let most = 24.0 * stats.unique_blocks as f64 + 4.2 * stats.unique_blocks as f64 + 200_000.0;
        println!("{:.1} bytes of metadata a unique block, scattered over a disk", metadata / 65_536.0);
        assert!(metadata < most * 1.3, "{metadata} bytes of metadata");
        let clones: Vec<_> = (0..100).map(|_| volume.snapshot().unwrap()).collect();
        check("and 100 snapshots");
        drop(clones);
        volume.trim(0, 2 << 30).unwrap();
        check("half trimmed");
    }
}
