//! Application images as read-only disks, and a volume's way into a repository: on the in-memory bus, with the simulated
//! hypervisor and the real store.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use muster_agent::Agent;
use muster_block::{BlockDevice, BlockErrorKind, WriteFlags};
use muster_common::{Digest, VolumeId};
use muster_idl::{
    arguments::{BackupResult, SnapshotResult},
    v1::{Member, Outcome, Verb, VirtualSystem},
};
use muster_repository::{Manifest, digest_of};
use muster_virt::Hypervisor;
use support::{Controller, Depot, Place, host_of, image_bytes, network, template_with, vm_on};

struct World {
    agent: Agent,
    controller: Controller,
    vm: Member,
    tools: [Digest; 2],
    place: Place,
    _depot: Depot,
}

/// A VM with a system disk of 4 MiB, a data disk of 1 MiB, and two applications of 2 and 3 MiB.
async fn world(seed: u64) -> World {
    let network = network(seed);
    let (depot, place) = (Depot::start().await, Place::new(seed));
    let agent = place.start(&network).await;
    let mut controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let image = depot.import(image_bytes(4, 2));
    let tools = [depot.import(image_bytes(2, 3)), depot.import(image_bytes(3, 4))];
    let vm = vm_on(&agent, "desk");
    let template = template_with(&image, Some(1), &tools);
    controller.done(Verb::Create, std::slice::from_ref(&vm), &[("template", &template)]).await;
    World { agent, controller, vm, tools, place, _depot: depot }
}

impl World {
    async fn done(&mut self, verb: Verb, arguments: &[(&str, &str)]) -> muster_idl::v1::Verdict {
        let vm = [self.vm.clone()];
        self.controller.done(verb, &vm, arguments).await.remove(0)
    }
    async fn shown(&mut self, what: &str, condition: impl Fn(&VirtualSystem) -> bool) -> VirtualSystem {
        let vm = self.vm.clone();
        self.controller.system(&vm, what, condition).await
    }
    fn first_bytes(&self, volume: &str) -> Vec<u8> {
        let volume = self.agent.store().volume(volume.parse::<VolumeId>().unwrap()).unwrap();
        let mut bytes = vec![0; 64 << 10];
        volume.read_at(1 << 20, &mut bytes).unwrap();
        bytes
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applications_are_read_only_disks_that_come_back_with_their_images() {
    let mut w = world(71).await;
    let shown = w.shown("four disks", |s| s.disks.len() == 4).await;
    let roles: Vec<&str> = shown.disks.iter().map(|d| d.role.as_str()).collect();
    assert_eq!(roles, ["system", "data", "application", "application"]);
    for (disk, (digest, (mib, salt))) in shown.disks[2..].iter().zip(w.tools.iter().zip([(2, 3), (3, 4)])) {
        assert_eq!((disk.image.as_str(), disk.size_bytes), (digest.to_string().as_str(), (mib as u64) << 20));
        assert!(w.first_bytes(&disk.volume) == image_bytes(mib, salt)[1 << 20..][..64 << 10]);
        let volume = w.agent.store().volume(disk.volume.parse().unwrap()).unwrap();
        assert!(volume.geometry().read_only);
        let refused = volume.write_at(0, &[1; 4096], WriteFlags::default()).unwrap_err();
        assert_eq!(refused.kind(), BlockErrorKind::ReadOnly);
    }
    let id = w.vm.vm.parse().unwrap();
    assert!(w.place.hypervisor.status(id).is_ok(), "the domain stands");

    // one image is held by whom it is attached to
    let host = host_of(&w.agent);
    let digest = w.tools[0].to_string();
    let held = w.controller.answer(Verb::ImageDrop, &host, &[("digest", &digest)]).await;
    assert_eq!((held.outcome, held.code.as_str()), (Outcome::Refused, "in-use"));

    // what is the image's is not backed up, and stands again after a restore
    let backup = w.done(Verb::Backup, &[]).await;
    let backup: BackupResult = serde_json::from_str(&backup.result).unwrap();
    let roles: Vec<&str> = backup.volumes.iter().map(|v| v.role.as_str()).collect();
    assert_eq!(roles, ["system", "data"]);
    w.done(Verb::DestroyVolumes, &[]).await;
    assert!(w.agent.store().volumes().is_empty());
    w.done(Verb::Restore, &[]).await;
    let again = w.shown("disks again", |s| s.disks.iter().all(|d| d.condition != "lost" && d.generation > 1)).await;
    assert!(w.first_bytes(&again.disks[2].volume) == image_bytes(2, 3)[1 << 20..][..64 << 10]);
    w.done(Verb::PowerOn, &[]).await;

    // a new session leaves the applications as they are
    w.done(Verb::ResetSession, &[]).await;
    let reset = w.shown("the next session", |s| s.disks[0].generation > again.disks[0].generation).await;
    assert_eq!(reset.disks[2..], again.disks[2..]);
    w.done(Verb::PowerOff, &[]).await;
    w.done(Verb::Delete, &[]).await;
    assert!(w.agent.store().volumes().is_empty());
    w.controller.done(Verb::ImageDrop, &[host], &[("digest", &digest)]).await;
    assert!(w.agent.store().audit().is_exact());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_applications_are_made_anew_with_the_session() {
    let mut w = world(72).await;
    w.done(Verb::DestroyVolumes, &[]).await;
    w.done(Verb::ResetSession, &[("data", "blank")]).await;
    let shown = w.shown("all disks", |s| s.disks.iter().all(|d| d.condition != "lost" && d.generation == 2)).await;
    assert!(w.first_bytes(&shown.disks[3].volume) == image_bytes(3, 4)[1 << 20..][..64 << 10]);
    w.done(Verb::PowerOn, &[]).await;
}

/// What a stream endpoint answers a request for chunks with.
fn frames(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_first_chunk::<4>().unwrap();
        let (frame, rest) = rest.split_at(u32::from_le_bytes(*head) as usize);
        frames.push(frame.to_vec());
        bytes = rest;
    }
    frames
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_gives_its_chunks_by_name_and_goes_when_nobody_reads_any_more() {
    let mut w = world(73).await;
    let before = w.shown("the disks", |s| s.disks.len() == 4).await;
    let system = w.agent.store().volume(before.disks[0].volume.parse().unwrap()).unwrap();
    // what would be a qcow2 image with a backing file, were anybody to look
    let mut header = vec![0; 4096];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 11]);
    system.write_at(0, &header, WriteFlags::default()).unwrap();
    let said = w.done(Verb::Snapshot, &[("name", "commit-1"), ("keep_seconds", "2")]).await;
    let said: SnapshotResult = serde_json::from_str(&said.result).unwrap();
    assert!(said.consistent, "it is off");
    let roles: Vec<&str> = said.volumes.iter().map(|v| v.role.as_str()).collect();
    assert_eq!(roles, ["system", "data"]);
    assert_eq!(said.volumes[0].image, before.disks[0].image);
    system.write_at(0, &[9; 4096], WriteFlags::default()).unwrap();

    let http = reqwest::Client::new();
    let base = format!("http://{}/bulk/v1/vms/{}/snapshots/commit-1", w.agent.stream_address(), w.vm.vm);
    let system_base = format!("{base}/{}", said.volumes[0].volume);
    let bytes = http.get(format!("{system_base}/manifest")).send().await.unwrap().bytes().await.unwrap();
    let manifest = Manifest::parse(&bytes).unwrap();
    let mut expected = image_bytes(4, 2);
    expected[..4096].copy_from_slice(&header);
    let go = &mut |_| std::ops::ControlFlow::Continue(());
    assert_eq!(manifest, muster_repository::manifest_of(&expected, go).unwrap());
    let wanted: Vec<_> = manifest.chunks().collect();
    let body: Vec<u8> = wanted.iter().flat_map(|c| *c.digest.as_bytes()).collect();
    let answer = http.post(format!("{system_base}/chunks")).body(body).send().await.unwrap().bytes().await.unwrap();
    let chunks = frames(&answer);
    assert_eq!(chunks.len(), wanted.len());
    for (chunk, bytes) in wanted.iter().zip(chunks) {
        assert_eq!(digest_of(&bytes), chunk.digest);
    }

    for (path, body, status) in [
        (format!("{system_base}/chunks"), vec![7; 32], 404),
        (format!("{system_base}/chunks"), vec![7; 33], 400),
        (format!("{system_base}/chunks"), vec![], 400),
        (format!("{system_base}/chunks"), vec![7; 257 * 32], 413),
        (format!("{base}/{}/chunks", VolumeId::random()), vec![7; 32], 404),
        (format!("{base}/x/chunks"), vec![7; 32], 400),
        (format!("{base}-2/{}/chunks", said.volumes[0].volume), vec![7; 32], 404),
    ] {
        assert_eq!(http.post(&path).body(body).send().await.unwrap().status(), status, "{path}");
    }
    // looking for it would keep it: the store says when it is gone
    let started = Instant::now();
    while w.agent.store().stats().snapshots > 0 {
        assert!(started.elapsed() < Duration::from_secs(30), "the snapshot stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(http.get(format!("{system_base}/manifest")).send().await.unwrap().status(), 404);
    let wrong = w.controller.answer(Verb::Snapshot, &w.vm, &[("name", "x"), ("keep_seconds", "never")]).await;
    assert_eq!((wrong.outcome, wrong.code.as_str()), (Outcome::Refused, "invalid-argument"));
    w.done(Verb::Snapshot, &[("name", "stays")]).await;
}
