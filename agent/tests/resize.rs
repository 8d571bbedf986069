//! Disks become larger under a real guest that runs.
//!
//! Needs QEMU, libvirt and the images of `cargo xtask guest`. Without them it fails and names what is missing, unless
//! `MUSTER_ALLOW_SKIP=1`. The store is the test's here, so that it outlives the agent's end as a store in shared memory does.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use muster_agent::{Agent, Config, config::TransportChoice};
use muster_common::ByteLen;
use muster_idl::v1::{Outcome, Verb, VirtualSystem};
use muster_store::Store;
use support::{
    Place,
    guest::{Running, World, in_own_process, running, start},
};

/// The guest's data disk at first.
const BEGIN: u64 = 64;

struct Desk {
    world: World,
    network: muster_bus::twin::Network,
    config: Config,
    store: Store,
    _place: Place,
}

impl Desk {
    async fn begin(seed: u64, transport: TransportChoice) -> Option<(Self, Agent)> {
        let Running { world, network, config, store, place, agent } =
            running(seed, transport, ByteLen::mib(BEGIN), &[], ByteLen::gib(1)).await?;
        Some((Self { world, network, config, store, _place: place }, agent))
    }

    /// As its guest's kernel knows it.
    async fn size(&mut self, disk: &str) -> u64 {
        let (status, sectors) = self.world.read(&format!("/sys/block/{disk}/size")).await;
        assert_eq!(status, 0);
        sectors.trim().parse::<u64>().unwrap() * 512 / (1 << 20)
    }

    /// Orders it; what the verdict says.
    async fn resize(&mut self, disk: &str, mib: u64) -> String {
        self.world.done(Verb::Resize, &[("disk", disk), ("size_bytes", &(mib << 20).to_string())]).await.message
    }

    async fn sees(&mut self, disk: &str, mib: u64) {
        let started = Instant::now();
        loop {
            let size = self.size(disk).await;
            if size == mib {
                eprintln!("{disk} has {mib} MiB after {:?}", started.elapsed());
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(30), "{disk} has {size} MiB and not {mib}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Writes the last 64 KiB and reads them back, both past the guest's cache.
    async fn use_the_end(&mut self, disk: &str, mib: u64) {
        let script = format!(
            "head -c 65536 /dev/urandom >/run/end && dd if=/run/end of=/dev/{disk} bs=64k seek={at} oflag=direct conv=fsync \
             && dd if=/dev/{disk} bs=64k skip={at} iflag=direct | cmp - /run/end && ! dd if=/run/end of=/dev/{disk} bs=64k \
             seek={past} oflag=direct",
            at = mib * 16 - 1,
            past = mib * 16,
        );
        let (status, said) = self.world.exec(&["/bin/sh", "-c", &script]).await;
        assert_eq!(status, 0, "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_guest_on_vhost_user_disks_sees_its_disks_grow() {
    if !in_own_process("a_running_guest_on_vhost_user_disks_sees_its_disks_grow") {
        return;
    }
    let Some((mut d, agent)) = Desk::begin(71, TransportChoice::VhostUser).await else { return };
    assert_eq!(d.size("vdb").await, BEGIN);
    assert_eq!(d.resize("data", 96).await, "", "told, without a but");
    d.sees("vdb", 96).await;
    d.use_the_end("vdb", 96).await;
    let system = d.size("vda").await;
    assert_eq!(d.resize("system", system + 32).await, "");
    d.sees("vda", system + 32).await;
    d.use_the_end("vda", system + 32).await;

    let arguments = [("disk", "data"), ("size_bytes", &*(BEGIN << 20).to_string())];
    let refused = d.world.verdict(Verb::Resize, &arguments).await;
    assert_eq!((refused.outcome, refused.code.as_str()), (Outcome::Refused, "invalid-argument"));
    assert!(refused.message.contains("disks only grow"), "{}", refused.message);
    assert_eq!(d.size("vdb").await, 96);

    // a guest that stood still sees it when it goes on
    d.world.done(Verb::Pause, &[]).await;
    eprintln!("while paused: {:?}", d.resize("data", 128).await);
    d.world.done(Verb::Resume, &[]).await;
    d.sees("vdb", 128).await;

    // and one whose agent was gone meanwhile
    agent.kill().await;
    let agent = start(&d.network, &d.config, &d.store).await;
    d.world.controller.beat(vec![]);
    let (vm, run) = (d.world.vm.clone(), agent.incarnation().to_string());
    let there = |s: &VirtualSystem| s.incarnation == run && s.enabled_state == 2 && s.guest_up;
    let shown = d.world.controller.system(&vm, "it to run", there).await;
    assert!(shown.disks.iter().any(|disk| disk.size_bytes == 128 << 20), "{:?}", shown.disks);
    // at once or when QEMU comes back to the socket, within a second or two
    eprintln!("after the agent was away: {:?}", d.resize("data", 160).await);
    d.sees("vdb", 160).await;
    d.use_the_end("vdb", 160).await;
    let (_, errors) = d.world.exec(&["/bin/sh", "-c", "dmesg | grep -iE 'ext4-fs error|remount' || true"]).await;
    assert_eq!(errors, "");
    let (_, told) = d.world.exec(&["/bin/sh", "-c", "dmesg | grep -c 'new size' || true"]).await;
    assert_eq!(told.trim(), "4", "one for each");

    // a clean session starts on a disk of that size
    d.world.done(Verb::ResetSession, &[]).await;
    d.world.guest_up().await;
    assert_eq!((d.size("vda").await, d.size("vdb").await), (system + 32, 160));
    d.world.done(Verb::PowerOff, &[]).await;
    d.world.done(Verb::Delete, &[]).await;
    assert!(d.store.audit().is_exact());
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_on_nbd_disks_sees_its_disk_grow_when_it_is_started_next() {
    if !in_own_process("a_guest_on_nbd_disks_sees_its_disk_grow_when_it_is_started_next") {
        return;
    }
    let Some((mut d, agent)) = Desk::begin(72, TransportChoice::Nbd).await else { return };
    let said = d.resize("data", 96).await;
    assert!(said.contains("powered off and on"), "{said}");
    // neither now nor after a reboot: QEMU keeps its connection, and with it the size
    d.world.done(Verb::Reset, &[]).await;
    d.world.guest_up().await;
    assert_eq!(d.size("vdb").await, BEGIN);
    d.world.done(Verb::PowerOff, &[]).await;
    d.world.done(Verb::PowerOn, &[]).await;
    d.world.guest_up().await;
    assert_eq!(d.size("vdb").await, 96);
    d.use_the_end("vdb", 96).await;
    d.world.done(Verb::PowerOff, &[]).await;
    d.world.done(Verb::Delete, &[]).await;
    agent.kill().await;
}
