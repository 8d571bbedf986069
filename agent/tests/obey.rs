//! Agents on the in-memory bus with the simulated hypervisor and the real store obey commands.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use muster_agent::{Agent, Config, Deps, Stop};
use muster_block::{BlockDevice, WriteFlags};
use muster_common::{ByteLen, VolumeId};
use muster_idl::{
    arguments::{BackupResult, ExecResult, PullResult},
    v1::{Heartbeat, Outcome, StoreState, Verb, VirtualSystem},
};
use muster_store::{Store, StoreConfig, VolumeSpec};
use muster_virt::{DomainState, Hypervisor, simulator::Fault};
use support::{Controller, Depot, Place, balky::Balky, host_of, image_bytes, network, template, vm_on, wait_for};

/// A fleet of one with a VM named `desk`, off.
struct One {
    network: muster_bus::twin::Network,
    depot: Depot,
    place: Place,
    agent: Agent,
    controller: Controller,
    vm: muster_idl::v1::Member,
    image: muster_common::Digest,
}

async fn one(seed: u64) -> One {
    let place = Place::new(seed);
    let (config, hypervisor) = (place.config(), place.hypervisor.clone());
    one_on(seed, place, config, hypervisor).await
}

async fn one_on(seed: u64, place: Place, config: Config, hypervisor: Arc<dyn Hypervisor>) -> One {
    let network = network(seed);
    let depot = Depot::start().await;
    let agent = place.start_on(&network, config, hypervisor).await;
    let mut controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let image = depot.import(image_bytes(4, 2));
    let vm = vm_on(&agent, "desk");
    controller.done(Verb::Create, std::slice::from_ref(&vm), &[("template", &template(&image, Some(1)))]).await;
    One { network, depot, place, agent, controller, vm, image }
}

impl One {
    async fn done(&mut self, verb: Verb, arguments: &[(&str, &str)]) -> muster_idl::v1::Verdict {
        let vm = [self.vm.clone()];
        self.controller.done(verb, &vm, arguments).await.remove(0)
    }
    async fn answer(&mut self, verb: Verb, arguments: &[(&str, &str)]) -> muster_idl::v1::Verdict {
        let vm = self.vm.clone();
        self.controller.answer(verb, &vm, arguments).await
    }
    fn vm_id(&self) -> muster_common::VmId {
        self.vm.vm.parse().unwrap()
    }
    /// Volumes with a role's size: 4 MiB is the system disk, 1 MiB the data disk.
    fn volume(&self, mib: u64) -> std::sync::Arc<muster_store::Volume> {
        let volumes = self.agent.store().volumes();
        volumes.into_iter().find(|v| v.geometry().size == ByteLen::mib(mib)).unwrap()
    }
    fn byte(&self, mib: u64) -> u8 {
        let mut byte = [0];
        self.volume(mib).read_at(8192, &mut byte).unwrap();
        byte[0]
    }
    fn scribble(&self, mib: u64, value: u8) {
        self.volume(mib).write_at(8192, &[value; 4096], WriteFlags::default()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_of_three_obeys_one_sample() {
    let network = network(1);
    let depot = Depot::start().await;
    let places: Vec<Place> = (1..=3).map(Place::new).collect();
    let mut agents = Vec::new();
    for place in &places {
        agents.push(place.start(&network).await);
    }
    let mut controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let image = depot.import(image_bytes(4, 2));
    let members: Vec<_> = agents.iter().flat_map(|a| [vm_on(a, "desk1"), vm_on(a, "desk2")]).collect();
    let before = network.published("muster_v1_group_command");
    controller.done(Verb::Create, &members, &[("template", &template(&image, Some(1)))]).await;
    controller.done(Verb::PowerOn, &members, &[]).await;
    assert_eq!(network.published("muster_v1_group_command") - before, 2, "one sample a command");
    for member in &members {
        controller.system(member, "guest up", |s| s.enabled_state == 2 && s.guest_up).await;
    }
    controller.done(Verb::Shutdown, &members, &[]).await;
    controller.done(Verb::Delete, &members, &[]).await;
    for agent in agents {
        assert!(agent.store().volumes().is_empty());
        assert!(agent.store().audit().is_exact());
        agent.stop(Stop::Orderly).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_power_verb_is_done_when_the_state_read_back_says_so() {
    let mut o = one(2).await;
    for (verb, state) in [
        (Verb::PowerOn, DomainState::Running),
        (Verb::Pause, DomainState::Paused),
        (Verb::Resume, DomainState::Running),
        (Verb::Suspend, DomainState::Saved),
        (Verb::PowerOn, DomainState::Running),
        (Verb::Reset, DomainState::Running),
        (Verb::Reboot, DomainState::Running),
        (Verb::Shutdown, DomainState::Off),
        (Verb::PowerOn, DomainState::Running),
        (Verb::PowerOff, DomainState::Off),
    ] {
        let verdict = o.done(verb, &[]).await;
        assert_eq!(o.place.hypervisor.status(o.vm_id()).unwrap().state, state, "{verb}: {verdict:?}");
    }
    assert_eq!(o.answer(Verb::PowerOff, &[]).await.outcome, Outcome::Already);
    let refused = o.answer(Verb::Pause, &[]).await;
    assert_eq!((refused.outcome, refused.code.as_str()), (Outcome::Refused, "invalid-state"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_seen_again_and_an_expired_one_begin_nothing() {
    let mut o = one(3).await;
    let command = o.controller.command(Verb::PowerOn, vec![o.vm.clone()], &[], Duration::from_secs(20));
    let first = o.controller.obeyed(&command).await;
    o.done(Verb::PowerOff, &[]).await;
    o.controller.seen.clear();
    let again = o.controller.obeyed(&command).await;
    assert_eq!(first, again, "answered from the ledger, word by word");
    assert_eq!(o.place.hypervisor.status(o.vm_id()).unwrap().state, DomainState::Off);

    let mut late = o.controller.command(Verb::PowerOn, vec![o.vm.clone()], &[], Duration::ZERO);
    late.not_after_us -= 1;
    assert_eq!(o.controller.obeyed(&late).await[0].outcome, Outcome::Expired);

    o.controller.seen.clear();
    o.controller.beat(vec![command.id.clone()]);
    assert_eq!(o.controller.answers(&command).await, first, "said again when awaited");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_listen_is_powered_off_only_when_the_policy_says_so() {
    let mut o = one(4).await;
    o.done(Verb::PowerOn, &[]).await;
    o.place.hypervisor.inject(o.vm_id(), Fault::StuckShutdown).unwrap();
    let short = Duration::from_millis(1500);
    let command = o.controller.command(Verb::Shutdown, vec![o.vm.clone()], &[], short);
    let verdict = o.controller.obeyed(&command).await.remove(0);
    assert_eq!((verdict.outcome, verdict.code.as_str(), verdict.enabled_state), (Outcome::Failed, "timeout", 2));
    let command = o.controller.command(Verb::Shutdown, vec![o.vm.clone()], &[("policy", "power-off")], short);
    let verdict = o.controller.obeyed(&command).await.remove(0);
    assert_eq!((verdict.outcome, verdict.enabled_state), (Outcome::Done, 3), "{}", verdict.message);
    assert!(verdict.message.contains("powered off"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reset_session_renews_the_system_disk_and_keeps_the_data_disk() {
    let mut o = one(5).await;
    let clean = o.byte(4);
    o.done(Verb::PowerOn, &[]).await;
    o.scribble(4, 77);
    o.scribble(1, 88);
    let vm = o.vm.clone();
    let before = o.controller.system(&vm, "disks", |s| s.disks.len() == 2).await;
    o.done(Verb::ResetSession, &[]).await;
    assert_eq!((o.byte(4), o.byte(1)), (clean, 88));
    assert_eq!(o.place.hypervisor.status(o.vm_id()).unwrap().state, DomainState::Running, "it was up and is up");
    let generation = before.disks[0].generation;
    let after = o.controller.system(&vm, "a new generation", |s| s.disks[0].generation == generation + 1).await;
    assert_eq!(after.disks[0].volume, before.disks[0].volume);
    assert_eq!(after.disks[1], before.disks[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destroyed_volumes_come_back_from_a_backup() {
    let mut o = one(6).await;
    o.done(Verb::PowerOn, &[]).await;
    o.controller.system(&o.vm.clone(), "guest up", |s| s.guest_up).await;
    o.scribble(4, 77);
    o.scribble(1, 88);
    let verdict = o.done(Verb::Backup, &[]).await;
    let backup: BackupResult = serde_json::from_str(&verdict.result).unwrap();
    assert_eq!((backup.volumes.len(), verdict.message.as_str()), (2, ""));
    let running = o.answer(Verb::DestroyVolumes, &[]).await;
    assert_eq!(running.code, "invalid-state");
    o.done(Verb::PowerOff, &[]).await;
    o.done(Verb::DestroyVolumes, &[]).await;
    assert!(o.agent.store().volumes().is_empty());
    let refused = o.answer(Verb::PowerOn, &[]).await;
    assert_eq!((refused.outcome, refused.code.as_str()), (Outcome::Refused, "volume-lost"));
    o.done(Verb::Restore, &[("backup", &backup.id)]).await;
    assert_eq!((o.byte(4), o.byte(1)), (77, 88));
    o.done(Verb::PowerOn, &[]).await;
    // host backup does them all
    let host = host_of(&o.agent);
    let all = o.controller.answer(Verb::Backup, &host, &[]).await;
    let all: Vec<BackupResult> = serde_json::from_str(&all.result).unwrap();
    assert_eq!((all.len(), all[0].new_bytes), (1, 0), "nothing changed since");
    o.done(Verb::PowerOff, &[]).await;
    o.scribble(1, 99);
    o.done(Verb::Restore, &[]).await;
    assert_eq!(o.byte(1), 88);
    assert!(o.agent.store().audit().is_exact());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_from_a_damaged_backup_leaves_the_vm_as_it_was() {
    let mut o = one(17).await;
    o.scribble(1, 88);
    o.done(Verb::Backup, &[]).await;
    o.scribble(1, 99);
    let mut damaged = 0;
    for pack in std::fs::read_dir(o.place.config().backup_directory().join("packs")).unwrap().flatten() {
        let mut bytes = std::fs::read(pack.path()).unwrap();
        // head and index stay: the chunks between them do not
        let (from, to) = (bytes.len() / 4, bytes.len() / 2);
        bytes[from..to].iter_mut().for_each(|b| *b ^= 0xff);
        std::fs::write(pack.path(), bytes).unwrap();
        damaged += 1;
    }
    assert!(damaged > 0);
    let failed = o.answer(Verb::Restore, &[]).await;
    assert_eq!(failed.outcome, Outcome::Failed, "{failed:?}");
    assert_eq!(o.byte(1), 99, "what was there is there");
    o.done(Verb::PowerOn, &[]).await;
    assert!(o.agent.store().audit().is_exact());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_can_be_gone_back_to() {
    let mut o = one(7).await;
    o.scribble(1, 1);
    o.done(Verb::Snapshot, &[("name", "before")]).await;
    assert_eq!(o.answer(Verb::Snapshot, &[("name", "before")]).await.code, "already-exists");
    o.scribble(1, 2);
    o.done(Verb::Restore, &[("name", "before")]).await;
    assert_eq!(o.byte(1), 1);
    assert_eq!(o.answer(Verb::Restore, &[("name", "never")]).await.code, "not-found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_volumes_are_lost_and_nothing_else_is_served_for_them() {
    let mut o = one(8).await;
    o.done(Verb::PowerOn, &[]).await;
    o.scribble(1, 88);
    o.done(Verb::Backup, &[]).await;
    let old = o.agent.incarnation().to_string();
    let (host, id) = (o.agent.host_id(), o.vm_id());
    o.agent.kill().await;
    assert_eq!(o.place.hypervisor.status(id).unwrap().state, DomainState::Running, "the VM runs on");
    o.agent = o.place.start(&o.network).await;
    o.controller.beat(vec![]);
    assert_eq!(o.agent.host_id(), host);
    let vm = o.vm.clone();
    let lost = o.controller.system(&vm, "lost", |s| s.incarnation != old).await;
    assert!(lost.disks.iter().all(|d| d.condition == "lost"), "{lost:?}");
    assert_eq!((lost.enabled_state, lost.health_state), (9, 20), "adopted, paused");
    for verb in [Verb::PowerOn, Verb::Resume, Verb::Backup, Verb::Snapshot] {
        let refused = o.answer(verb, &[("name", "x")]).await;
        assert_eq!((refused.outcome, refused.code.as_str()), (Outcome::Refused, "volume-lost"), "{verb}");
    }
    let mut stale = o.controller.command(Verb::PowerOff, vec![vm.clone()], &[], Duration::from_secs(5));
    stale.members[0].incarnation = old;
    assert_eq!(o.controller.obeyed(&stale).await[0].code, "stale-incarnation");
    // the system disk from the image, the data disk from the newest backup
    let verdict = o.done(Verb::ResetSession, &[]).await;
    assert!(verdict.message.contains("restored from backup"), "{}", verdict.message);
    assert_eq!(o.byte(1), 88);
    assert_eq!(o.place.hypervisor.status(o.vm_id()).unwrap().state, DomainState::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_data_disk_without_backup_is_made_blank_only_when_told() {
    let mut o = one(9).await;
    o.agent.kill().await;
    o.agent = o.place.start(&o.network).await;
    o.controller.beat(vec![]);
    assert_eq!(o.answer(Verb::ResetSession, &[]).await.code, "volume-lost");
    assert!(o.agent.store().volumes().is_empty(), "a refusal touches nothing");
    o.done(Verb::ResetSession, &[("data", "blank")]).await;
    o.done(Verb::PowerOn, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_cut_off_by_a_kill_is_answered_by_the_next_run() {
    let mut o = one(10).await;
    o.place.hypervisor.inject(o.vm_id(), Fault::StuckShutdown).unwrap();
    o.done(Verb::PowerOn, &[]).await;
    let command = o.controller.command(Verb::Shutdown, vec![o.vm.clone()], &[], Duration::from_secs(20));
    o.controller.publish(&command);
    // begun: shown as shutting down
    o.controller.system(&o.vm.clone(), "shutting down", |s| s.enabled_state == 4).await;
    o.agent.kill().await;
    o.controller.take();
    assert!(!o.controller.seen.keys().any(|(id, ..)| *id == command.id), "no word from the dead");
    o.agent = o.place.start(&o.network).await;
    let verdict = o.controller.answers(&command).await.remove(0);
    assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Failed, "volume-lost"), "{}", verdict.message);
    assert_eq!(verdict.incarnation, o.agent.incarnation().to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_stop_is_refused_while_volumes_are_attached_and_force_pauses_first() {
    let mut o = one(11).await;
    o.done(Verb::PowerOn, &[]).await;
    let (agent, refused) = o.agent.stop(Stop::Orderly).await.unwrap_err();
    assert_eq!(refused.vms, ["desk"]);
    // it runs on and obeys
    o.agent = agent;
    let vm = o.vm.clone();
    assert_eq!(o.controller.answer(Verb::Ping, &vm, &[]).await.enabled_state, 2);
    let id = o.vm_id();
    let socket = o.place.config().control_socket();
    let ask = |force| muster_agent::control::Request::Stop { force, keep: false };
    let reply = muster_agent::control::request(&socket, &ask(false)).await.unwrap();
    assert_eq!((reply.ok, reply.code.as_deref()), (false, Some("in-use")));
    let reply = muster_agent::control::request(&socket, &ask(true)).await.unwrap();
    assert!(reply.ok, "{reply:?}");
    assert_eq!(o.agent.stop_requested().await, Stop::Force);
    o.agent.stop(Stop::Force).await.unwrap();
    assert_eq!(o.place.hypervisor.status(id).unwrap().state, DomainState::Paused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_are_pulled_once_verified_and_by_missing_chunks_only() {
    let mut o = one(12).await;
    let served = || o.depot.chunks_served.load(Ordering::Relaxed);
    let host = host_of(&o.agent);
    let first = served();
    let image = o.image.to_string();
    let again = o.controller.answer(Verb::ImagePull, &host, &[("digest", &image), ("image_name", "x")]).await;
    assert_eq!((again.outcome, served()), (Outcome::Already, first));
    // half of it stands in the other image
    let half = o.depot.import(image_bytes(4, 3));
    let verdict =
        o.controller.answer(Verb::ImagePull, &host, &[("digest", &half.to_string()), ("image_name", "y")]).await;
    assert_eq!(verdict.outcome, Outcome::Done, "{}", verdict.message);
    let pulled: PullResult = serde_json::from_str(&verdict.result).unwrap();
    assert_eq!((pulled.logical_bytes, served() - first), (4 << 20, 32));
    let mut bytes = vec![0; 4 << 20];
    o.agent.store().image(&half).unwrap().read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, image_bytes(4, 3));
    let unknown = "ab".repeat(32);
    let missing = o.controller.answer(Verb::ImagePull, &host, &[("digest", &unknown)]).await;
    assert_eq!((missing.outcome, missing.code.as_str()), (Outcome::Failed, "not-found"));
    let used = o.controller.answer(Verb::ImageDrop, &host, &[("digest", &image)]).await;
    assert_eq!((used.outcome, used.code.as_str()), (Outcome::Refused, "in-use"));
    let dropped = o.controller.answer(Verb::ImageDrop, &host, &[("digest", &half.to_string())]).await;
    assert_eq!(dropped.outcome, Outcome::Done, "{}", dropped.message);
    assert!(o.agent.store().image(&half).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_does_not_fit_is_refused_before_a_byte_is_pulled() {
    let network = network(13);
    let depot = Depot::start().await;
    let place = Place::new(13);
    let mut config = place.config();
    config.store.budget = ByteLen::mib(64);
    let agent = place.start_with(&network, config).await;
    let mut controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let image = depot.import(image_bytes(128, 2));
    let host = host_of(&agent);
    let resident = agent.store().stats().resident_bytes;
    let verdict = controller.answer(Verb::ImagePull, &host, &[("digest", &image.to_string())]).await;
    assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Refused, "no-space"), "{}", verdict.message);
    assert_eq!(depot.chunks_served.load(Ordering::Relaxed), 0);
    assert_eq!(agent.store().stats().resident_bytes, resident);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_host_takes_no_new_work_and_remembers_it() {
    let mut o = one(14).await;
    let host = host_of(&o.agent);
    o.controller.done(Verb::Drain, std::slice::from_ref(&host), &[]).await;
    assert_eq!(o.controller.answer(Verb::Drain, &host, &[]).await.outcome, Outcome::Already);
    assert_eq!(o.answer(Verb::PowerOn, &[]).await.code, "host-draining");
    o.agent.kill().await;
    o.agent = o.place.start(&o.network).await;
    let host = host_of(&o.agent);
    assert_eq!(o.controller.answer(Verb::Drain, &host, &[]).await.outcome, Outcome::Already);
    o.controller.done(Verb::Undrain, &[host], &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guest_is_reached_through_its_agent_or_it_is_said_that_there_is_none() {
    let mut o = one(15).await;
    o.done(Verb::PowerOn, &[]).await;
    o.controller.system(&o.vm.clone(), "guest up", |s| s.guest_up).await;
    o.done(Verb::FileWrite, &[("path", "/etc/motd"), ("content", "aGVsbG8=")]).await;
    let verdict = o.done(Verb::Exec, &[("argv", "[\"cat\", \"/etc/motd\"]")]).await;
    let result: ExecResult = serde_json::from_str(&verdict.result).unwrap();
    assert_eq!((result.exit_status, result.stdout.as_str()), (0, "hello"));
    o.place.hypervisor.inject(o.vm_id(), Fault::AgentMissing).unwrap();
    let refused = o.answer(Verb::Exec, &[("argv", "[\"true\"]")]).await;
    assert_eq!((refused.outcome, refused.code.as_str()), (Outcome::Refused, "guest-agent"));
    let wrong = o.answer(Verb::Exec, &[("argv", "true")]).await;
    assert_eq!((wrong.outcome, wrong.code.as_str()), (Outcome::Refused, "invalid-argument"));
    // without it a backup is crash-consistent and says so
    assert!(o.done(Verb::Backup, &[]).await.message.contains("crash-consistent"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_waits_for_a_guest_agent_that_is_there_and_slow() {
    let place = Place::new(34);
    let (config, hypervisor) = (place.config(), Balky::new(&place.hypervisor));
    let mut o = one_on(34, place, config, hypervisor.clone()).await;
    o.done(Verb::PowerOn, &[]).await;
    o.controller.system(&o.vm.clone(), "guest up", |s| s.guest_up).await;
    hypervisor.silent_ms.store(5_000, Ordering::Relaxed);
    o.done(Verb::FileWrite, &[("path", "/etc/motd"), ("content", "aGVsbG8=")]).await;
    hypervisor.pings_to_fail.store(2, Ordering::Relaxed);
    o.done(Verb::Exec, &[("argv", "[\"cat\", \"/etc/motd\"]")]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn duplicates_and_unknown_things_are_refused_by_name() {
    let mut o = one(16).await;
    let template = template(&o.image, Some(1));
    assert_eq!(o.answer(Verb::Create, &[("template", &template)]).await.outcome, Outcome::Already);
    let other = vm_on(&o.agent, "desk");
    let taken = o.controller.answer(Verb::Create, &other, &[("template", &template)]).await;
    assert_eq!((taken.outcome, taken.code.as_str()), (Outcome::Refused, "already-exists"));
    let nobody = vm_on(&o.agent, "nobody");
    assert_eq!(o.controller.answer(Verb::PowerOn, &nobody, &[]).await.code, "not-found");
    assert_eq!(o.controller.answer(Verb::Delete, &nobody, &[]).await.outcome, Outcome::Already);
    let wrong = o.answer(Verb::Drain, &[]).await;
    assert_eq!((wrong.outcome, wrong.code.as_str()), (Outcome::Refused, "invalid-argument"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_that_fails_leaves_nothing_behind() {
    let mut o = one(17).await;
    let volumes = o.agent.store().volumes().len();
    let other = vm_on(&o.agent, "other");
    let missing = template(&muster_common::Digest::from_bytes([1; 32]), None);
    let failed = o.controller.answer(Verb::Create, &other, &[("template", &missing)]).await;
    assert_eq!((failed.outcome, failed.code.as_str()), (Outcome::Failed, "not-found"), "{}", failed.message);
    assert_eq!(o.agent.store().volumes().len(), volumes);
    assert_eq!(o.controller.answer(Verb::PowerOn, &other, &[]).await.code, "not-found");
    assert_eq!(std::fs::read_dir(o.place.path().join("s/vms")).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_hypervisor_the_agent_runs_says_so_and_refuses_vms() {
    let network = network(18);
    let depot = Depot::start().await;
    let place = Place::new(18);
    let deps = Deps { bus: Some(network.join("h")), ..Deps::default() };
    let mut controller = Controller::join(&network, &depot.url);
    let mut hosts = controller.bus.subscriber::<muster_idl::v1::PhysicalHost>(16).unwrap();
    let agent = Agent::start(place.config(), deps).await.unwrap();
    controller.beat(vec![]);
    let host = hosts.recv().await.unwrap().value().unwrap();
    assert_eq!((host.accelerator.as_str(), host.health_state, host.lab), ("none", 20, true));
    assert!(!host.hypervisor_remark.is_empty());
    let vm = vm_on(&agent, "desk");
    assert_eq!(controller.answer(Verb::PowerOn, &vm, &[]).await.code, "hypervisor");
    let host = host_of(&agent);
    assert_eq!(controller.answer(Verb::Ping, &host, &[]).await.outcome, Outcome::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_agent_on_the_same_directory_or_port_is_refused() {
    let network = network(19);
    let place = Place::new(19);
    let agent = place.start(&network).await;
    let deps = || Deps { bus: Some(network.join("x")), ..Deps::default() };
    let error = Agent::start(place.config(), deps()).await.unwrap_err();
    assert_eq!(error.code(), muster_common::ErrorCode::AddressInUse);
    let other = Place::new(20);
    let mut config = other.config();
    config.stream.listen = agent.stream_address();
    let error = Agent::start(config, deps()).await.unwrap_err();
    assert_eq!(error.code(), muster_common::ErrorCode::AddressInUse);
    let config = Config { lab: false, ..other.config() };
    assert!(Agent::start(config, deps()).await.unwrap_err().to_string().contains("lab = true"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_serve_bulk_bytes_and_no_commands() {
    let mut o = one(21).await;
    o.done(Verb::PowerOn, &[]).await;
    o.scribble(1, 5);
    let base = format!("http://{}/bulk/v1", o.agent.stream_address());
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let get = |path: String| client.get(format!("{base}{path}")).send();
    let ping: serde_json::Value =
        serde_json::from_slice(&get("/ping".into()).await.unwrap().bytes().await.unwrap()).unwrap();
    assert_eq!((ping["lab"].as_bool(), ping["evidence"]["guest_file_reads"].as_u64()), (Some(true), Some(0)));
    let shot = get(format!("/vms/{}/screenshot", o.vm.vm)).await.unwrap();
    assert_eq!(shot.headers()["content-type"], "image/png");
    assert!(shot.bytes().await.unwrap().starts_with(b"\x89PNG"));
    let volume: VolumeId = o.volume(1).id();
    let raw = get(format!("/volumes/{volume}/export")).await.unwrap().bytes().await.unwrap();
    assert_eq!((raw.len(), raw[8192]), (1 << 20, 5));
    assert_eq!(get(format!("/volumes/{}/export", VolumeId::random())).await.unwrap().status(), 404);
    assert_eq!(get("/vms/nonsense/screenshot".into()).await.unwrap().status(), 400);
    let post = client.post(format!("{base}/commands")).send().await.unwrap();
    assert_eq!(post.status(), 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_live_agents_with_one_host_id_are_an_alarm() {
    let network = network(22);
    let (place, twin) = (Place::new(22), Place::new(23));
    let agent = place.start(&network).await;
    // a copied state directory
    std::fs::create_dir_all(twin.path().join("s")).unwrap();
    std::fs::copy(place.path().join("s/host-id"), twin.path().join("s/host-id")).unwrap();
    let mut controller = Controller::join(&network, "");
    controller.beat(vec![]);
    let other = twin.start(&network).await;
    assert_eq!(agent.host_id(), other.host_id());
    wait_for("the alarm", Duration::from_secs(15), || {
        while let Some(sample) = controller.events.try_recv() {
            if sample.value().is_some_and(|e| e.kind == "duplicate-host") {
                return Some(());
            }
        }
        None
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_says_what_it_holds_and_that_no_file_was_read() {
    let mut o = one(24).await;
    let mut stores = o.controller.bus.subscriber::<StoreState>(16).unwrap();
    o.done(Verb::PowerOn, &[]).await;
    let mut state = stores.recv().await.unwrap().value().unwrap();
    while state.images.is_empty() {
        state = stores.recv().await.unwrap().value().unwrap();
    }
    assert_eq!((state.guest_file_reads, state.volumes, state.images.len()), (0, 2, 1));
    assert_eq!((state.images[0].name.as_str(), state.images[0].volumes), ("debian", 1));
    assert!(state.dedup_ratio > 1.9, "image and clone share: {}", state.dedup_ratio);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_stop_is_answered_however_long_pausing_takes() {
    let mut o = one(18).await;
    o.done(Verb::PowerOn, &[]).await;
    let (id, socket) = (o.vm_id(), o.place.config().control_socket());
    o.place.hypervisor.inject(id, Fault::CallsHang).unwrap();
    let ask = tokio::spawn(async move {
        let stop = muster_agent::control::Request::Stop { force: true, keep: false };
        muster_agent::control::request(&socket, &stop).await
    });
    // longer than the patience with a client that does not send
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(!ask.is_finished(), "cut off half-way: {:?}", ask.await);
    o.place.hypervisor.clear(id, Fault::CallsHang).unwrap();
    assert!(ask.await.unwrap().unwrap().ok);
    assert_eq!(o.agent.stop_requested().await, Stop::Force);
    o.agent.stop(Stop::Force).await.unwrap();
    assert_eq!(o.place.hypervisor.status(id).unwrap().state, DomainState::Paused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_given_up_half_way_is_undone_when_the_hypervisor_lets_it() {
    let network = network(25);
    let depot = Depot::start().await;
    let place = Place::new(25);
    let hypervisor = Balky::new(&place.hypervisor);
    let agent = place.start_on(&network, place.config(), hypervisor.clone()).await;
    let mut controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let template = template(&depot.import(image_bytes(4, 2)), Some(1));
    let vm = vm_on(&agent, "desk");
    hypervisor.define_hangs.store(true, Ordering::Relaxed);
    let arguments = [("template", template.as_str())];
    let command = controller.command(Verb::Create, vec![vm.clone()], &arguments, Duration::from_secs(2));
    let verdict = controller.obeyed(&command).await.remove(0);
    assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Indeterminate, "timeout"), "{}", verdict.message);
    assert_eq!(hypervisor.defines.load(Ordering::Relaxed), 1);
    assert_eq!((place.records(), agent.store().volumes().len()), (1, 2), "a domain that may come has a record");
    let again = controller.answer(Verb::Create, &vm, &arguments).await;
    assert_eq!((again.outcome, again.code.as_str()), (Outcome::Refused, "in-use"), "{}", again.message);

    hypervisor.define_hangs.store(false, Ordering::Relaxed);
    let limit = Duration::from_secs(10);
    wait_for("the undo", limit, || (place.records() == 0 && agent.store().volumes().is_empty()).then_some(())).await;
    assert!(place.hypervisor.status(vm.vm.parse().unwrap()).is_err());
    controller.done(Verb::Create, &[vm], &arguments).await;
    agent.stop(Stop::Orderly).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_cannot_write_its_ledger_says_so_once_and_at_once() {
    use std::os::fd::AsRawFd;
    let network = network(26);
    let place = Place::new(26);
    // a ledger that can be read and opened, and takes not one byte more
    let ledger = rustix::fs::memfd_create("ledger", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    let header = [b"MSTRLEDG".as_slice(), &[1, 0, 0, 0, 0, 0, 0, 0]].concat();
    rustix::io::write(&ledger, &header).unwrap();
    rustix::fs::fcntl_add_seals(&ledger, rustix::fs::SealFlags::GROW).unwrap();
    std::fs::create_dir_all(place.path().join("s")).unwrap();
    let path = format!("/proc/self/fd/{}", ledger.as_raw_fd());
    std::os::unix::fs::symlink(path, place.path().join("s/ledger")).unwrap();
    let agent = place.start(&network).await;
    let mut controller = Controller::join(&network, "");
    controller.beat(vec![]);
    let mut hearts = controller.bus.subscriber::<Heartbeat>(64).unwrap();
    let host = host_of(&agent);
    let short = Duration::from_secs(2);
    // of one lane: each frees it for the next
    let commands =
        [Verb::Drain, Verb::Undrain, Verb::Ping].map(|v| controller.command(v, vec![host.clone()], &[], short));
    for command in &commands {
        let verdict = controller.obeyed(command).await.remove(0);
        assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Failed, "io"), "{}", verdict.message);
        assert!(verdict.ended_at_us < command.not_after_us, "not at its deadline");
    }
    // past deadline and grace nothing else is said of them: a heartbeat of that time tells that the agent lived to say it
    let quiet_us = commands.iter().map(|c| c.not_after_us).max().unwrap() + 3_000_000;
    while hearts.recv().await.unwrap().value().unwrap().sent_at_us < quiet_us {}
    controller.take();
    assert!(controller.seen.values().all(|said| said.len() == 1), "{:?}", controller.seen);
    agent.stop(Stop::Orderly).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_is_done_when_the_heartbeat_says_so() {
    let network = network(27);
    let place = Place::new(27);
    let agent = place.start(&network).await;
    let mut controller = Controller::join(&network, "");
    let mut hearts = controller.bus.subscriber::<Heartbeat>(64).unwrap();
    let host = host_of(&agent);
    for (verb, draining) in [(Verb::Drain, true), (Verb::Undrain, false), (Verb::Drain, true)] {
        controller.done(verb, std::slice::from_ref(&host), &[]).await;
        let heard = std::iter::from_fn(|| hearts.try_recv()).filter_map(|sample| sample.value()).last();
        assert_eq!(heard.map(|beat| beat.draining), Some(draining), "{verb}");
    }
    agent.stop(Stop::Orderly).await.unwrap();
}

async fn event(controller: &mut Controller, kind: &str) {
    let mut said = || {
        let heard = std::iter::from_fn(|| controller.events.try_recv());
        heard.filter_map(|sample| sample.value()).any(|event| event.kind == kind)
    };
    wait_for(kind, Duration::from_secs(15), || said().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_thawed_even_when_the_order_that_froze_it_was_given_up() {
    let place = Place::new(28);
    let (config, hypervisor) = (place.config(), Balky::new(&place.hypervisor));
    let mut o = one_on(28, place, config, hypervisor.clone()).await;
    o.done(Verb::PowerOn, &[]).await;
    o.controller.system(&o.vm.clone(), "guest up", |s| s.guest_up).await;
    hypervisor.thaw_hangs.store(true, Ordering::Relaxed);
    hypervisor.thaws_to_fail.store(3, Ordering::Relaxed);
    let time = Duration::from_secs(1);
    let command = o.controller.command(Verb::Snapshot, vec![o.vm.clone()], &[("name", "a")], time);
    let verdict = o.controller.obeyed(&command).await.remove(0);
    assert_eq!((verdict.outcome, verdict.code.as_str()), (Outcome::Indeterminate, "timeout"), "{}", verdict.message);
    // meanwhile nothing is called consistent: the late thaw would end its freeze
    assert!(o.done(Verb::Snapshot, &[("name", "b")]).await.message.contains("crash-consistent"));
    hypervisor.thaw_hangs.store(false, Ordering::Relaxed);
    event(&mut o.controller, "guest-frozen").await;
    event(&mut o.controller, "guest-thawed").await;
    assert_eq!(hypervisor.thawed.load(Ordering::Relaxed), 1);
    assert_eq!(o.done(Verb::Snapshot, &[("name", "c")]).await.message, "");
    assert_eq!(hypervisor.thawed.load(Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_cannot_be_thawed_holds_nobody_up_and_is_let_go_when_it_is_off() {
    let place = Place::new(29);
    let (mut config, hypervisor) = (place.config(), Balky::new(&place.hypervisor));
    // longer than the test takes: it ends in time only when nothing is at work any more
    config.timeouts.stop_ms = 60_000;
    let mut o = one_on(29, place, config, hypervisor.clone()).await;
    o.done(Verb::PowerOn, &[]).await;
    o.controller.system(&o.vm.clone(), "guest up", |s| s.guest_up).await;
    hypervisor.thaws_to_fail.store(u32::MAX, Ordering::Relaxed);
    o.done(Verb::Snapshot, &[("name", "a")]).await;
    event(&mut o.controller, "guest-frozen").await;
    o.done(Verb::PowerOff, &[]).await;
    let stop = o.agent.stop(Stop::Orderly);
    tokio::time::timeout(Duration::from_secs(20), stop).await.unwrap().unwrap();
    assert_eq!(hypervisor.thawed.load(Ordering::Relaxed), 0);
}

/// What outlives a killed agent, in the hands of the test: its store.
struct Afterlife {
    o: One,
    store: Store,
}

impl Afterlife {
    /// A VM `desk`, up, and a second one, `other`, up.
    async fn begin(seed: u64) -> (Self, muster_idl::v1::Member) {
        let place = Place::new(seed);
        let store = Store::open(StoreConfig::new(ByteLen::mib(96))).unwrap();
        let network = network(seed);
        let depot = Depot::start().await;
        let agent = place.start_on_store(&network, place.config(), &store).await;
        let mut controller = Controller::join(&network, &depot.url);
        controller.beat(vec![]);
        let image = depot.import(image_bytes(4, 2));
        let (vm, other) = (vm_on(&agent, "desk"), vm_on(&agent, "other"));
        let both = [vm.clone(), other.clone()];
        controller.done(Verb::Create, &both, &[("template", &template(&image, Some(1)))]).await;
        controller.done(Verb::PowerOn, &both, &[]).await;
        (Self { o: One { network, depot, place, agent, controller, vm, image }, store }, other)
    }
}

async fn again(place: &Place, network: &muster_bus::twin::Network, store: &Store) -> Agent {
    place.start_on_store(network, place.config(), store).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_run_finds_vms_and_volumes_as_the_killed_one_left_them() {
    let (mut a, _) = Afterlife::begin(40).await;
    a.o.scribble(4, 77);
    // what a restore had read aside
    a.store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(1))).unwrap();
    let (id, old) = (a.o.vm_id(), a.o.agent.incarnation().to_string());
    let before: Vec<_> = a.o.agent.exports();
    assert_eq!(before.len(), 4);
    a.o.agent.kill().await;
    a.o.agent = again(&a.o.place, &a.o.network, &a.store).await;
    a.o.controller.beat(vec![]);
    event(&mut a.o.controller, "store-attached").await;
    assert_eq!(a.o.agent.exports(), before, "under the same names");
    let vm = a.o.vm.clone();
    let found = a.o.controller.system(&vm, "found", |s| s.incarnation != old).await;
    assert!(found.disks.iter().all(|d| d.condition == "volatile"), "{found:?}");
    assert_eq!((found.enabled_state, found.health_state), (2, 5), "it runs, and nothing is wrong");
    assert_eq!(a.o.byte(4), 77);
    assert_eq!(a.store.volumes().len(), 4, "the volume that no VM has is gone");
    a.o.done(Verb::Pause, &[]).await;
    a.o.done(Verb::Resume, &[]).await;
    a.o.done(Verb::ResetSession, &[]).await;
    assert_eq!(a.o.place.hypervisor.status(id).unwrap().state, DomainState::Running);
    assert!(a.store.audit().is_exact());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_of_a_record_that_cannot_be_read_are_not_swept() {
    let (mut a, other) = Afterlife::begin(41).await;
    a.o.agent.kill().await;
    let record = a.o.place.path().join(format!("s/vms/{}.json", other.vm));
    let text = std::fs::read(&record).unwrap();
    std::fs::write(&record, "{").unwrap();
    a.o.agent = again(&a.o.place, &a.o.network, &a.store).await;
    assert_eq!(a.store.volumes().len(), 4);
    a.o.agent.kill().await;
    std::fs::write(&record, text).unwrap();
    a.o.agent = again(&a.o.place, &a.o.network, &a.store).await;
    a.o.controller.beat(vec![]);
    let whole = |s: &VirtualSystem| s.disks.iter().all(|d| d.condition == "volatile");
    a.o.controller.system(&other, "there again", whole).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_disk_paused_meanwhile_goes_on_and_what_a_command_paused_does_not() {
    let (mut a, other) = Afterlife::begin(42).await;
    a.o.controller.done(Verb::Pause, std::slice::from_ref(&other), &[]).await;
    let (id, other_id) = (a.o.vm_id(), other.vm.parse().unwrap());
    a.o.agent.kill().await;
    // as QEMU does when the server of an NBD disk is away
    a.o.place.hypervisor.fail_disk(id, false).unwrap();
    a.o.agent = again(&a.o.place, &a.o.network, &a.store).await;
    let hypervisor = a.o.place.hypervisor.clone();
    let state = |vm| hypervisor.status(vm).unwrap().state;
    let runs = || (state(id) == DomainState::Running).then_some(());
    wait_for("the first to run", Duration::from_secs(10), runs).await;
    // again, and the other one is looked at in each round
    for _ in 0..3 {
        hypervisor.fail_disk(id, false).unwrap();
        wait_for("it to run again", Duration::from_secs(10), runs).await;
    }
    assert_eq!(state(other_id), DomainState::Paused);
    // a command pauses what a disk has paused: from then on only a command resumes it
    a.o.controller.beat(vec![]);
    a.o.place.hypervisor.pause(id).unwrap();
    assert_eq!(a.o.answer(Verb::Pause, &[]).await.outcome, Outcome::Already);
    a.o.agent.kill().await;
    a.o.agent = again(&a.o.place, &a.o.network, &a.store).await;
    a.o.controller.beat(vec![]);
    a.o.controller.done(Verb::Resume, std::slice::from_ref(&other), &[]).await;
    assert_eq!((state(id), state(other_id)), (DomainState::Paused, DomainState::Running));
    a.o.done(Verb::Resume, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_finds_no_memory_stands_still_until_there_is_some() {
    let (mut a, _) = Afterlife::begin(43).await;
    let id = a.o.vm_id();
    let hog = a.store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(96))).unwrap();
    let mut block = [0; 4096];
    for n in 0u64.. {
        if !a.store.would_fit(ByteLen::mib(1)) {
            break;
        }
        block[..8].copy_from_slice(&(n + 1).to_le_bytes());
        hog.write_at(n * 4096, &block, WriteFlags::default()).unwrap();
    }
    event(&mut a.o.controller, "store-filling").await;
    // as QEMU does when an NBD server says that there is no space
    a.o.place.hypervisor.fail_disk(id, true).unwrap();
    event(&mut a.o.controller, "volume-full").await;
    let vm = a.o.vm.clone();
    let full = a.o.controller.system(&vm, "it to say why", |s| s.remark.contains("store is full")).await;
    assert_eq!((full.enabled_state, full.health_state), (9, 20));
    // a restart does not forget why it stands still, and sweeps what no VM has: then there is memory
    a.o.agent.kill().await;
    a.o.agent = again(&a.o.place, &a.o.network, &a.store).await;
    a.o.controller.beat(vec![]);
    event(&mut a.o.controller, "volume-space-back").await;
    assert_eq!(a.o.place.hypervisor.status(id).unwrap().state, DomainState::Running);
    let well = a.o.controller.system(&vm, "it to be well", |s| s.enabled_state == 2 && s.remark.is_empty()).await;
    assert_eq!(well.health_state, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_keeps_leaves_everything_and_is_refused_where_nothing_would_be_left() {
    let (mut a, _) = Afterlife::begin(44).await;
    let id = a.o.vm_id();
    let socket = a.o.place.config().control_socket();
    let keep = muster_agent::control::Request::Stop { force: false, keep: true };
    let reply = muster_agent::control::request(&socket, &keep).await.unwrap();
    assert!(reply.ok, "{reply:?}");
    assert_eq!(a.o.agent.stop_requested().await, Stop::Keep);
    a.o.agent.stop(Stop::Keep).await.unwrap();
    assert_eq!(a.o.place.hypervisor.status(id).unwrap().state, DomainState::Running);
    assert_eq!(a.store.volumes().len(), 4);
    a.o.agent = again(&a.o.place, &a.o.network, &a.store).await;
    a.o.controller.beat(vec![]);
    a.o.done(Verb::Snapshot, &[("name", "x")]).await;
    a.o.agent.kill().await;

    let mut o = one(45).await;
    o.done(Verb::PowerOn, &[]).await;
    let (_, refused) = o.agent.stop(Stop::Keep).await.unwrap_err();
    assert!(refused.to_string().contains("cannot be kept"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_survives_is_attached_by_the_next_run_and_given_back_by_an_orderly_stop() {
    let place = Place::new(46);
    let (mut config, hypervisor) = (place.config(), place.hypervisor.clone());
    // in memory, so that nothing has to be mounted
    let memory = tempfile::Builder::new().prefix("ma").tempdir_in("/dev/shm").unwrap();
    config.run_dir = memory.path().join("r");
    config.store.survive = true;
    let mut o = one_on(46, place, config.clone(), hypervisor.clone()).await;
    o.scribble(4, 99);
    o.done(Verb::Snapshot, &[("name", "noon")]).await;
    o.scribble(4, 100);
    o.done(Verb::PowerOn, &[]).await;
    o.agent.kill().await;
    o.agent = o.place.start_on(&o.network, config.clone(), hypervisor.clone()).await;
    o.controller.beat(vec![]);
    event(&mut o.controller, "store-attached").await;
    assert_eq!(o.byte(4), 100);
    o.agent.stop(Stop::Keep).await.unwrap();
    o.agent = o.place.start_on(&o.network, config.clone(), hypervisor).await;
    o.controller.beat(vec![]);
    assert_eq!(o.byte(4), 100);
    assert!(o.agent.store().audit().is_exact());
    o.done(Verb::PowerOff, &[]).await;
    // the named snapshot came over, too
    o.done(Verb::Restore, &[("name", "noon")]).await;
    assert_eq!(o.byte(4), 99);
    o.done(Verb::DestroyVolumes, &[]).await;
    assert!(o.agent.store().snapshots().is_empty());
    o.agent.stop(Stop::Orderly).await.unwrap();
    let left = std::fs::read_dir(config.run_dir.join("store")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "the machine has its memory back");
}
