//! A bit flips in the store's memory: the agent finds it, fetches the block again, and says so. The bit is flipped in the
//! file on a tmpfs that the store's memory is, behind the store's back. On the in-memory bus, with the simulated hypervisor.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use muster_agent::{Agent, Config};
use muster_block::{BlockDevice, BlockErrorKind, WriteFlags};
use muster_common::ByteLen;
use muster_idl::v1::{Event, Member, Severity, StoreHealth, Verb};
use muster_store::Volume;
use support::{Controller, Depot, Place, image_bytes, network, template, vm_on, wait_for};

const BLOCK: usize = 4096;
const MIB: u64 = 1 << 20;

struct World {
    network: muster_bus::twin::Network,
    depot: Depot,
    place: Place,
    config: Config,
    agent: Agent,
    controller: Controller,
    vm: Member,
    /// In memory; goes last.
    _memory: tempfile::TempDir,
}

/// A VM with a system disk of 4 MiB that is a clone of an image, and a data disk of 1 MiB.
async fn world(seed: u64) -> World {
    world_with(seed, 1).await
}

async fn world_with(seed: u64, data_mib: u64) -> World {
    let memory = tempfile::Builder::new().prefix("ma").tempdir_in("/dev/shm").unwrap();
    let (network, depot, place) = (network(seed), Depot::start().await, Place::new(seed));
    let mut config = place.config();
    config.run_dir = memory.path().join("r");
    config.store.survive = true;
    config.scrub.rate = Some(ByteLen::gib(1));
    let agent = place.start_with(&network, config.clone()).await;
    let mut controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let image = depot.import(image_bytes(4, 2));
    let vm = vm_on(&agent, "desk");
    let template = template(&image, Some(data_mib));
    controller.done(Verb::Create, std::slice::from_ref(&vm), &[("template", &template)]).await;
    World { network, depot, place, config, agent, controller, vm, _memory: memory }
}

impl World {
    fn frames(&self) -> PathBuf {
        self.config.run_dir.join("store/frames")
    }

    /// Flips a bit wherever this block lies in memory.
    fn damage(&self, block: &[u8; BLOCK]) {
        assert!(self.damage_each(|found| found == block) > 0, "the block is not in memory");
    }

    /// Flips a bit in each such block; how many there were.
    fn damage_each(&self, is_one: impl Fn(&[u8]) -> bool) -> usize {
        let file = std::fs::File::options().read(true).write(true).open(self.frames()).unwrap();
        let (mut piece, mut flipped) = (vec![0; MIB as usize], 0);
        for at in (0..file.metadata().unwrap().len()).step_by(MIB as usize) {
            let len = file.read_at(&mut piece, at).unwrap();
            for (n, block) in piece[..len].chunks_exact(BLOCK).enumerate().filter(|(_, found)| is_one(found)) {
                file.write_all_at(&[block[1234] ^ 4], at + (n * BLOCK) as u64 + 1234).unwrap();
                flipped += 1;
            }
        }
        flipped
    }

    fn volume(&self, size: u64) -> Arc<Volume> {
        self.agent.store().volumes().into_iter().find(|v| v.size().bytes() == size).unwrap()
    }

    /// The next event of this kind.
    async fn told(&mut self, kind: &str) -> Event {
        let events = &mut self.controller.events;
        let mut next = || std::iter::from_fn(|| events.try_recv()).filter_map(|s| s.value()).find(|e| e.kind == kind);
        wait_for(kind, Duration::from_secs(30), &mut next).await
    }

    /// Counters and the number of blocks that are damaged now, as `muster-agent status` has them.
    async fn status(&self) -> serde_json::Value {
        let socket = self.config.control_socket();
        let reply = muster_agent::control::request(&socket, &muster_agent::control::Request::Status {}).await;
        reply.unwrap().status.unwrap()
    }

    async fn restart(mut self) -> Self {
        self.agent.kill().await;
        self.agent = self.place.start_with(&self.network, self.config.clone()).await;
        self
    }
}

/// Block `n` of the image every VM here has.
fn of_image(n: usize) -> [u8; BLOCK] {
    image_bytes(4, 2)[n * BLOCK..][..BLOCK].try_into().unwrap()
}

fn read(volume: &Volume, n: usize) -> Result<[u8; BLOCK], BlockErrorKind> {
    let mut block = [0; BLOCK];
    volume.read_at((n * BLOCK) as u64, &mut block).map(|()| block).map_err(|e| e.kind())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_of_an_image_is_repaired_from_the_image_repository() {
    let mut w = world(81).await;
    let served = w.depot.chunks_served.load(Ordering::Relaxed);
    let mut healths = w.controller.bus.subscriber::<StoreHealth>(64).unwrap();
    w.damage(&of_image(100));
    let event = w.told("block-repaired").await;
    assert_eq!((event.severity, &event.vm), (Severity::Warning, &w.vm.vm));
    let at = 100 * BLOCK;
    for named in ["image \"debian\"", "disk vda of VM \"desk\"", &format!("at byte {at}"), "the image repository"] {
        assert!(event.message.contains(named), "{named}: {}", event.message);
    }
    assert_eq!(read(&w.volume(4 * MIB), 100), Ok(of_image(100)));
    assert_eq!(w.depot.chunks_served.load(Ordering::Relaxed), served + 1, "one chunk, no more");
    let status = w.status().await;
    assert_eq!((&status["scrub"]["damaged"], &status["scrub"]["repaired"]), (&1.into(), &1.into()), "{status:#}");
    assert_eq!(status["damaged_blocks"], 0);
    // everybody hears it
    let mut next =
        || std::iter::from_fn(|| healths.try_recv()).filter_map(|s| s.value()).find(|h| h.blocks_repaired > 0);
    let health = wait_for("the store's health", Duration::from_secs(30), &mut next).await;
    assert_eq!((health.blocks_damaged, health.blocks_repaired, health.blocks_unreadable), (1, 1, 0));
    assert!(health.scrubbing && health.blocks_checked > 0 && !health.nodes.is_empty(), "{health:?}");
    // and where all that lies
    let nodes = status["numa_nodes"].as_array().unwrap();
    let bytes = |what: &str| nodes.iter().filter_map(|node| node[what].as_u64()).sum::<u64>();
    assert!(bytes("store_bytes") >= MIB && bytes("memory_bytes") > bytes("store_bytes"), "{status:#}");

    // after a restart the agent has no manifests; and nobody to ask until the controller's stream endpoint is there
    let depot = std::mem::replace(&mut w.controller.depot, "http://127.0.0.1:1".into());
    w.controller.beat(vec![]);
    w = w.restart().await;
    w.damage(&of_image(200));
    let event = w.told("block-damaged").await;
    assert_eq!(event.severity, Severity::Error);
    assert_eq!(read(&w.volume(4 * MIB), 200), Err(BlockErrorKind::Io));
    assert_eq!(read(&w.volume(4 * MIB), 202), Ok(of_image(202)), "only that block");
    w.controller.depot = depot;
    w.controller.beat(vec![]);
    w.told("block-repaired").await;
    assert_eq!(read(&w.volume(4 * MIB), 200), Ok(of_image(200)));
    assert!(w.agent.store().audit().is_exact());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_of_a_block_of_ones_own_is_repaired_from_a_backup_or_told() {
    let mut w = world(82).await;
    let data = w.volume(MIB);
    let (old, new) = ([7; BLOCK], [9; BLOCK]);
    data.write_at(3 * BLOCK as u64, &old, WriteFlags::default()).unwrap();
    w.controller.done(Verb::Backup, std::slice::from_ref(&w.vm), &[]).await;
    data.write_at(4 * BLOCK as u64, &new, WriteFlags::default()).unwrap();

    w.damage(&old);
    let event = w.told("block-repaired").await;
    assert!(event.message.contains("from a backup") && event.message.contains("vdb"), "{}", event.message);
    assert_eq!(read(&data, 3), Ok(old));

    w.damage(&new);
    let event = w.told("block-damaged").await;
    assert_eq!((event.severity, &event.vm), (Severity::Error, &w.vm.vm));
    assert!(event.message.contains("disk vdb of VM \"desk\" at byte 16384"), "{}", event.message);
    assert_eq!(read(&data, 4), Err(BlockErrorKind::Io));
    assert_eq!(read(&data, 3), Ok(old), "only that block");
    assert_eq!(w.status().await["damaged_blocks"], 1);
    data.write_at(4 * BLOCK as u64, &new, WriteFlags::default()).unwrap();
    assert_eq!(read(&data, 4), Ok(new), "it is whole again when it is written anew");
    assert_eq!(w.status().await["damaged_blocks"], 0);
    assert!(w.agent.store().audit().is_exact());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_beyond_what_is_known_one_by_one_is_told_as_a_number_and_once() {
    const BLOCKS: usize = 1280;
    let mut w = world_with(84, 5).await;
    let data = w.volume(5 * MIB);
    let of_disk = |n: usize| {
        let mut block = [7; BLOCK];
        block[..8].copy_from_slice(&n.to_le_bytes());
        block
    };
    for n in 0..BLOCKS {
        data.write_at((n * BLOCK) as u64, &of_disk(n), WriteFlags::default()).unwrap();
    }
    assert_eq!(w.damage_each(|block| block[8..] == [7; BLOCK - 8]), BLOCKS);
    while !w.told("block-damaged").await.message.contains(" 280 more of 4 KiB") {}
    let passes = |status: &serde_json::Value| status["scrub"]["passes"].as_u64().unwrap();
    let told_at = passes(&w.status().await);
    // each of which finds all of them
    let until = tokio::time::Instant::now() + Duration::from_secs(60);
    while passes(&w.status().await) < told_at + 2 {
        assert!(tokio::time::Instant::now() < until, "no two passes in a minute");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let status = w.status().await;
    assert_eq!(
        (&status["damaged_blocks"], &status["scrub"]["damaged"]),
        (&BLOCKS.into(), &BLOCKS.into()),
        "{status:#}"
    );
    let more: Vec<String> = std::iter::from_fn(|| w.controller.events.try_recv())
        .filter_map(|sample| sample.value())
        .filter(|event| event.kind == "block-damaged")
        .map(|event| event.message)
        .collect();
    assert_eq!(more, [""; 0]);
    for n in 0..BLOCKS {
        data.write_at((n * BLOCK) as u64, &of_disk(n), WriteFlags::default()).unwrap();
    }
    assert_eq!(w.status().await["damaged_blocks"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scrub_ends_with_the_agent_at_once_and_a_rate_of_zero_is_none() {
    let mut w = world(83).await;
    while w.status().await["scrub"]["passes"] == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let began = Instant::now();
    w.agent.stop(muster_agent::Stop::Force).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    w.config.scrub.rate = Some(ByteLen::ZERO);
    assert!(!w.config.scrub.is_on());
    w.agent = w.place.start_with(&w.network, w.config.clone()).await;
    assert_eq!(w.status().await["scrub"]["blocks"], 0);
}
