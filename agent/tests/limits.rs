//! What disks may take of their host's memory, and what each does when there is none left: on the in-memory bus, with the
//! simulated hypervisor and the real store.

#![allow(clippy::unwrap_used)]

mod support;

use std::{sync::Arc, time::Duration};

use muster_agent::{Agent, Config, config::SpillSection};
use muster_block::{BlockDevice, BlockErrorKind, WriteFlags, conformance::Random};
use muster_bus::twin::Network;
use muster_common::{ByteLen, Digest, VmId};
use muster_idl::{
    arguments::{LimitSpec, TemplateSpec},
    v1::{Event, Member, Outcome, Verb, Verdict},
};
use muster_store::{Volume, WhenFull};
use muster_virt::{DomainState, Hypervisor};
use support::{Controller, Depot, Place, image_bytes, network, template, vm_on, wait_for};

const SOON: Duration = Duration::from_secs(20);

struct World {
    network: Network,
    place: Place,
    config: Config,
    agent: Agent,
    controller: Controller,
    image: Digest,
    _depot: Depot,
    /// The store's memory.
    _memory: tempfile::TempDir,
}

fn limits(quota_mib: u64, reservation_mib: u64, when_full: &str) -> Option<LimitSpec> {
    let bytes = |mib: u64| (mib > 0).then_some(mib << 20);
    Some(LimitSpec {
        quota_bytes: bytes(quota_mib),
        reservation_bytes: bytes(reservation_mib),
        when_full: Some(when_full.into()),
    })
}

impl World {
    /// An agent whose store outlives it, of 64 MiB and with so much to spill to.
    async fn begin(seed: u64, spill: Option<ByteLen>) -> Self {
        let (network, depot, place) = (network(seed), Depot::start().await, Place::new(seed));
        let memory = tempfile::Builder::new().prefix("ma").tempdir_in("/dev/shm").unwrap();
        let mut config = place.config();
        config.run_dir = memory.path().join("r");
        config.store.survive = true;
        config.store.budget = ByteLen::mib(64);
        config.store.spill = spill.map(|size| SpillSection { size, directory: None });
        let agent = place.start_with(&network, config.clone()).await;
        let controller = Controller::join(&network, &depot.url);
        controller.beat(vec![]);
        let image = depot.import(image_bytes(4, 2));
        Self { network, place, config, agent, controller, image, _depot: depot, _memory: memory }
    }

    fn spec(&self, data_mib: u64, limits: Option<LimitSpec>) -> TemplateSpec {
        let plain: TemplateSpec = serde_json::from_str(&template(&self.image, Some(data_mib))).unwrap();
        TemplateSpec { data_limits: limits, ..plain }
    }

    async fn create(&mut self, name: &str, spec: &TemplateSpec) -> (Member, Verdict) {
        let vm = vm_on(&self.agent, name);
        let text = serde_json::to_string(spec).unwrap();
        let verdict = self.controller.answer(Verb::Create, &vm, &[("template", &text)]).await;
        (vm, verdict)
    }

    /// A VM that runs, and its data disk.
    async fn running(&mut self, name: &str, spec: &TemplateSpec) -> (Member, Arc<Volume>) {
        let (vm, verdict) = self.create(name, spec).await;
        assert_eq!(verdict.outcome, Outcome::Done, "{}", verdict.message);
        self.done(&vm, Verb::PowerOn, &[]).await;
        let data = self.data(&vm).await;
        (vm, data)
    }

    async fn data(&mut self, vm: &Member) -> Arc<Volume> {
        let system = self.controller.system(vm, "its disks", |s| s.disks.len() == 2).await;
        let store = self.agent.store();
        store.volume(system.disks.iter().find(|d| d.role == "data").unwrap().volume.parse().unwrap()).unwrap()
    }

    async fn done(&mut self, vm: &Member, verb: Verb, arguments: &[(&str, &str)]) -> Verdict {
        self.controller.done(verb, std::slice::from_ref(vm), arguments).await.remove(0)
    }

    async fn event(&mut self, kind: &str, vm: &Member) -> Event {
        let controller = &mut self.controller;
        let mut said = || {
            let mut heard = std::iter::from_fn(|| controller.events.try_recv()).filter_map(|sample| sample.value());
            heard.find(|event| event.kind == kind && event.vm == vm.vm)
        };
        wait_for(kind, SOON, &mut said).await
    }

    fn state(&self, vm: &Member) -> DomainState {
        self.place.hypervisor.status(id(vm)).unwrap().state
    }

    /// As `kill -9` and a start.
    async fn again(mut self) -> Self {
        self.agent.kill().await;
        self.agent = self.place.start_with(&self.network, self.config.clone()).await;
        self.controller.beat(vec![]);
        self
    }
}

fn id(vm: &Member) -> VmId {
    vm.vm.parse().unwrap()
}

fn write(volume: &Volume, n: u64, seed: u64) -> Result<(), BlockErrorKind> {
    let mut block = [0; 4096];
    Random(seed).fill(&mut block);
    volume.write_at(n * 4096, &block, WriteFlags::default()).map_err(|e| e.kind())
}

fn assert_block(volume: &Volume, n: u64, seed: u64) {
    let (mut expected, mut found) = ([0; 4096], [0; 4096]);
    Random(seed).fill(&mut expected);
    volume.read_at(n * 4096, &mut found).unwrap();
    assert!(found == expected, "block {n} is not that of seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_full_store_the_reserved_disk_never_fails_the_spilling_goes_on_and_the_third_waits_for_room() {
    let mut w = World::begin(61, Some(ByteLen::mib(256))).await;
    let (_, reserved) = w.running("reserved", &w.spec(16, limits(0, 16, "pause"))).await;
    let (spiller, spilling) = w.running("spilling", &w.spec(96, limits(0, 0, "spill"))).await;
    let (third, waiting) = w.running("waiting", &w.spec(96, limits(0, 0, "pause"))).await;
    assert_eq!((reserved.reservation(), spilling.when_full()), (Some(ByteLen::mib(16)), WhenFull::Spill));

    // all three at once, each more than there is; who waits stops where it is refused
    let (reserved_blocks, spilled_blocks) = (16 << 8, 80 << 8);
    let stopped_at = std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=4 {
                (0..reserved_blocks).for_each(|n| write(&reserved, n, round << 40 | n).unwrap());
            }
        });
        scope.spawn(|| (0..spilled_blocks).for_each(|n| write(&spilling, n, 5 << 40 | n).unwrap()));
        let third = scope.spawn(|| (0..96 << 8).find_map(|n| write(&waiting, n, 6 << 40 | n).err().map(|e| (n, e))));
        third.join().unwrap()
    });
    let (stopped_at, why) = stopped_at.expect("there is not room for all");
    assert_eq!(why, BlockErrorKind::NoSpace);
    let stats = w.agent.store().stats();
    assert!(stats.resident_bytes <= stats.budget && stats.spilled_bytes > ByteLen::mib(16), "{stats:?}");

    // as QEMU does when an NBD server says that there is no space
    w.place.hypervisor.fail_disk(id(&third), true).unwrap();
    let full = w.event("volume-full", &third).await;
    assert!(full.message.contains("store's budget"), "{}", full.message);
    assert_eq!(w.state(&third), DomainState::Paused);
    // the others do not notice
    (0..reserved_blocks).for_each(|n| write(&reserved, n, 7 << 40 | n).unwrap());
    (0..1000).for_each(|n| write(&spilling, n, 8 << 40 | n).unwrap());
    assert_eq!(w.state(&spiller), DomainState::Running);
    assert_block(&spilling, 999, 8 << 40 | 999);
    assert_block(&spilling, spilled_blocks - 1, 5 << 40 | (spilled_blocks - 1));

    drop(spilling);
    w.done(&spiller, Verb::PowerOff, &[]).await;
    w.done(&spiller, Verb::Delete, &[]).await;
    w.event("volume-space-back", &third).await;
    assert_eq!(w.state(&third), DomainState::Running);
    write(&waiting, stopped_at, 6 << 40 | stopped_at).unwrap();
    (0..=stopped_at).step_by(97).for_each(|n| assert_block(&waiting, n, 6 << 40 | n));
    (0..reserved_blocks).for_each(|n| assert_block(&reserved, n, 7 << 40 | n));
    assert!(w.agent.store().audit().is_exact());
    assert_eq!(w.agent.store().stats().spilled_bytes, ByteLen::ZERO);
    w.agent.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_outlive_the_agent_and_the_volume_and_spilled_blocks_outlive_the_agent() {
    let mut w = World::begin(62, Some(ByteLen::mib(256))).await;
    let of_tenant = |spec: TemplateSpec, tenant: &str| TemplateSpec { tenant: Some(tenant.into()), ..spec };
    let spec = of_tenant(w.spec(96, limits(90, 8, "spill")), "school-a");
    let (vm, data) = w.running("desk", &spec).await;
    let (_, other) = w.running("other", &of_tenant(w.spec(16, None), "school-b")).await;
    let (_, friend) = w.running("friend", &of_tenant(w.spec(16, None), "school-a")).await;
    (0..80 << 8).for_each(|n| write(&data, n, n + 1).unwrap());
    assert!(w.agent.store().stats().spilled_bytes > ByteLen::ZERO);
    let before = data.stats();
    assert_eq!((before.quota, before.reservation), (Some(ByteLen::mib(90)), Some(ByteLen::mib(8))));
    assert!(before.tenant.is_some() && before.tenant == friend.stats().tenant && before.tenant != other.stats().tenant);
    drop((data, other, friend));

    let mut w = w.again().await;
    w.event("store-attached", &Member { vm: String::new(), ..vm.clone() }).await;
    let data = w.data(&vm).await;
    assert_eq!(data.stats(), before);
    (0..80 << 8).step_by(61).for_each(|n| assert_block(&data, n, n + 1));

    // a volume that is made anew is made with what was ordered, not with nothing
    w.done(&vm, Verb::PowerOff, &[]).await;
    w.done(&vm, Verb::DestroyVolumes, &[]).await;
    drop(data);
    assert_eq!(w.agent.store().stats().spilled_bytes, ByteLen::ZERO);
    w.done(&vm, Verb::ResetSession, &[("data", "blank")]).await;
    let data = w.data(&vm).await;
    let after = data.stats();
    assert_eq!((after.quota, after.reservation, after.when_full), (before.quota, before.reservation, before.when_full));
    assert_eq!(after.tenant, before.tenant);
    assert!(w.agent.store().audit().is_exact());
    w.agent.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_that_a_host_cannot_keep_are_refused_before_anything_is_made() {
    let mut w = World::begin(63, None).await;
    let cases = [
        (limits(0, 0, "spill"), "unsupported", "set store.spill"),
        (limits(0, 64, "pause"), "no-space", "budget is 64 MiB"),
        (limits(4, 8, "pause"), "invalid-argument", "below the reservation"),
        (limits(0, 97, "pause"), "invalid-argument", "more than the disk"),
        (limits(0, 0, "hope"), "invalid-argument", "\"spill\" are possible"),
    ];
    for (limits, code, text) in cases {
        let spec = w.spec(96, limits);
        let (_, verdict) = w.create("desk", &spec).await;
        assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Refused, code), "{}", verdict.message);
        assert!(verdict.message.contains(text), "{}", verdict.message);
    }
    let spec = TemplateSpec { system_limits: limits(0, 5, "pause"), ..w.spec(1, None) };
    let (_, verdict) = w.create("desk", &spec).await;
    assert!(verdict.message.contains("the system disk: a reservation of 5 MiB"), "{}", verdict.message);
    assert_eq!((w.place.records(), w.agent.store().volumes().len()), (0, 0));
    // what fits the budget and not what is left of it: nothing stays behind either
    let spec = w.spec(96, limits(0, 40, "pause"));
    assert_eq!(w.create("first", &spec).await.1.outcome, Outcome::Done);
    let (_, verdict) = w.create("second", &spec).await;
    assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Failed, "no-space"), "{}", verdict.message);
    assert_eq!((w.place.records(), w.agent.store().volumes().len()), (1, 2));
    w.agent.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_met_a_quota_stands_still_until_it_is_raised() {
    let mut w = World::begin(64, None).await;
    let (vm, data) = w.running("desk", &w.spec(32, limits(4, 0, "pause"))).await;
    let (other, _) = w.running("other", &w.spec(32, None)).await;
    assert_eq!((0..).find_map(|n| write(&data, n, n + 1).err()), Some(BlockErrorKind::NoSpace));
    w.place.hypervisor.fail_disk(id(&vm), true).unwrap();
    let full = w.event("volume-full", &vm).await;
    assert!(full.message.contains("the quota of its data disk is used up"), "{}", full.message);
    let shown = w.controller.system(&vm, "it to say why", |s| s.remark.contains("quota of its data disk")).await;
    assert_eq!((shown.enabled_state, shown.health_state), (9, 20));
    let refused = w.controller.answer(Verb::Resize, &vm, &[("disk", "data"), ("quota_bytes", "4096")]).await;
    assert_eq!((refused.outcome, refused.code.as_str()), (Outcome::Refused, "invalid-argument"));
    w.done(&vm, Verb::Resize, &[("disk", "data"), ("quota_bytes", &(8 << 20).to_string())]).await;
    w.event("volume-space-back", &vm).await;
    assert_eq!(w.state(&vm), DomainState::Running);
    write(&data, 1024, 1).unwrap();
    // no quota any more, and one again
    w.done(&vm, Verb::Resize, &[("disk", "data"), ("quota_bytes", "0")]).await;
    assert_eq!(data.quota(), None);
    w.done(&vm, Verb::Resize, &[("disk", "data"), ("quota_bytes", &(16 << 20).to_string())]).await;
    assert_eq!(data.quota(), Some(ByteLen::mib(16)));
    drop(data);
    let refused = w.controller.answer(Verb::Resize, &other, &[("disk", "data"), ("quota_bytes", "4194304")]).await;
    assert!(refused.message.contains("made without a quota"), "{}", refused.message);
    let mut w = w.again().await;
    assert_eq!(w.data(&vm).await.quota(), Some(ByteLen::mib(16)));
    w.agent.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_grows_and_never_shrinks_and_stays_as_large_as_it_is() {
    let mut w = World::begin(65, None).await;
    let (vm, data) = w.running("desk", &w.spec(8, None)).await;
    let to = |mib: u64| (mib << 20).to_string();
    let verdict = w.done(&vm, Verb::Resize, &[("disk", "data"), ("size_bytes", &to(16))]).await;
    assert!(verdict.message.contains("powered off and on"), "{}", verdict.message);
    assert_eq!(data.size(), ByteLen::mib(16));
    let grown = |s: &muster_idl::v1::VirtualSystem| s.disks.iter().any(|d| d.size_bytes == 16 << 20);
    w.controller.system(&vm, "its size", grown).await;
    let verdict = w.controller.answer(Verb::Resize, &vm, &[("disk", "data"), ("size_bytes", &to(8))]).await;
    assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Refused, "invalid-argument"));
    assert!(verdict.message.contains("disks only grow"), "{}", verdict.message);
    write(&data, 4095, 9).unwrap();
    // what is so is done again
    w.done(&vm, Verb::Resize, &[("disk", "data"), ("size_bytes", &to(16))]).await;
    w.done(&vm, Verb::Snapshot, &[("name", "large")]).await;
    w.done(&vm, Verb::Backup, &[]).await;
    w.done(&vm, Verb::Resize, &[("disk", "data"), ("size_bytes", &to(24))]).await;
    w.done(&vm, Verb::Resize, &[("disk", "system"), ("size_bytes", &to(6))]).await;
    let huge = (1u64 << 51).to_string();
    let verdict = w.controller.answer(Verb::Resize, &vm, &[("disk", "data"), ("size_bytes", &huge)]).await;
    assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Failed, "invalid-argument"), "{}", verdict.message);
    w.controller.system(&vm, "what it was", |s| s.disks.iter().any(|d| d.size_bytes == 24 << 20)).await;
    drop(data);
    let mut w = w.again().await;
    w.done(&vm, Verb::PowerOff, &[]).await;
    let verdict = w.done(&vm, Verb::Resize, &[("disk", "system"), ("size_bytes", &to(8))]).await;
    assert_eq!(verdict.message, "", "nobody has to be told");
    // as it was when it was smaller: from the snapshot, from the backup; and from the image
    for arguments in [&[("name", "large")][..], &[]] {
        let data = w.data(&vm).await;
        write(&data, 4095, 10).unwrap();
        write(&data, 5000, 11).unwrap();
        drop(data);
        w.done(&vm, Verb::Restore, arguments).await;
        let data = w.data(&vm).await;
        assert_block(&data, 4095, 9);
        let mut added = [1; 4096];
        data.read_at(5000 * 4096, &mut added).unwrap();
        assert_eq!(added, [0; 4096]);
    }
    w.done(&vm, Verb::ResetSession, &[]).await;
    let system = w.controller.system(&vm, "the reset", |s| s.disks[0].generation == 4).await;
    assert_eq!((system.disks[0].size_bytes, system.disks[1].size_bytes), (8 << 20, 24 << 20));
    w.done(&vm, Verb::Backup, &[]).await;
    for disk in &system.disks {
        let volume = w.agent.store().volume(disk.volume.parse().unwrap()).unwrap();
        assert_eq!(volume.size().bytes(), disk.size_bytes, "{}", disk.role);
    }
    assert!(w.agent.store().audit().is_exact());
    w.agent.kill().await;
}
