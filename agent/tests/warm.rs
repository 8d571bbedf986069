//! The agent goes away under a real guest that writes, and comes back: the guest sees no error, and what it wrote is there.
//!
//! Needs QEMU, libvirt and the images of `cargo xtask guest`. Without them it fails and names what is missing, unless
//! `MUSTER_ALLOW_SKIP=1`. The store is the test's here, so that it outlives the agent's end as a store in shared memory does.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use muster_agent::{Agent, Config, Stop, config::TransportChoice};
use muster_block::{BlockDevice, WriteFlags};
use muster_common::{ByteLen, VolumeId};
use muster_idl::{
    arguments::ExecResult,
    v1::{Event, Outcome, Verb, VirtualSystem},
};
use muster_store::{Store, VolumeSpec};
use support::{
    Place,
    guest::{BOOT, Running, World, in_own_process, running, start},
    wait_for,
};

/// Says at its top what it does.
const WRITER: &str = include_str!("support/writer.sh");

struct Warm {
    world: World,
    network: muster_bus::twin::Network,
    config: Config,
    store: Store,
    _place: Place,
}

impl Warm {
    async fn begin(seed: u64, transport: TransportChoice, budget: ByteLen) -> Option<(Self, Agent)> {
        let Running { world, network, config, store, place, agent } =
            running(seed, transport, ByteLen::mib(64), &[], budget).await?;
        Some((Self { world, network, config, store, _place: place }, agent))
    }

    async fn start(&self) -> Agent {
        start(&self.network, &self.config, &self.store).await
    }

    async fn begin_writing(&mut self) {
        let script = base64(WRITER.as_bytes());
        self.world.done(Verb::FileWrite, &[("path", "/run/writer"), ("content", &script)]).await;
        self.shell("setsid sh /run/writer >/dev/null 2>&1 </dev/null &").await;
        self.wrote(3).await;
    }

    async fn shell(&mut self, script: &str) -> String {
        let (status, said) = self.world.exec(&["/bin/sh", "-c", script]).await;
        assert_eq!(status, 0, "{script}: {said}");
        said
    }

    /// How many blocks it wrote; a guest that is paused at the moment does not say.
    async fn count(&mut self) -> Option<u64> {
        let argv = serde_json::to_string(&["cat", "/run/count"]).unwrap();
        let verdict = self.world.verdict(Verb::Exec, &[("argv", &argv)]).await;
        if verdict.outcome != Outcome::Done {
            assert!(["invalid-state", "guest-agent"].contains(&verdict.code.as_str()), "{verdict:?}");
            return None;
        }
        let result: ExecResult = serde_json::from_str(&verdict.result).unwrap();
        Some(result.stdout.trim().parse().unwrap_or(0))
    }

    /// Waits until it wrote so many more blocks.
    async fn wrote(&mut self, more: u64) {
        let started = Instant::now();
        let mut before = None;
        loop {
            let now = self.count().await;
            before = before.or(now);
            if let (Some(before), Some(now)) = (before, now)
                && now >= before + more
            {
                return;
            }
            assert!(started.elapsed() < BOOT, "it wrote {now:?} blocks, {before:?} before");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ends the writer; no write was lost and the kernel saw no error.
    async fn end_writing(&mut self) {
        self.shell(": >/run/enough").await;
        let started = Instant::now();
        while self.world.read("/run/ended").await.0 != 0 {
            assert!(started.elapsed() < BOOT, "the writer does not end");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(self.shell("cat /run/bad 2>/dev/null; true").await, "");
        let errors =
            self.shell("dmesg | grep -iE 'i/o error|blk_update|buffer i/o|ext4-fs error|remount' || true").await;
        assert_eq!(errors, "");
    }

    /// Events of these kinds that were told.
    fn told(&mut self, kinds: &[&str]) -> Vec<Event> {
        let heard = std::iter::from_fn(|| self.world.controller.events.try_recv());
        heard.filter_map(|sample| sample.value()).filter(|event| kinds.contains(&event.kind.as_str())).collect()
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let encode = |piece: &[u8]| {
        let word = (0..3).fold(0u32, |word, at| word << 8 | u32::from(piece.get(at).copied().unwrap_or(0)));
        let digit = |at: usize| match at <= piece.len() {
            true => char::from(DIGITS[(word >> (18 - 6 * at) & 63) as usize]),
            false => '=',
        };
        [digit(0), digit(1), digit(2), digit(3)]
    };
    bytes.chunks(3).flat_map(encode).collect()
}

async fn goes_away_three_times(transport: TransportChoice, seed: u64) {
    let Some((mut w, mut agent)) = Warm::begin(seed, transport, ByteLen::gib(1)).await else { return };
    w.begin_writing().await;
    for round in 1..=3 {
        w.told(&[]);
        let incarnation = agent.incarnation();
        let began = Instant::now();
        match round {
            // as an upgrade does
            3 => agent.stop(Stop::Keep).await.unwrap(),
            _ => agent.kill().await,
        }
        let gone = began.elapsed();
        agent = w.start().await;
        let back = began.elapsed();
        w.world.controller.beat(vec![]);
        w.wrote(3).await;
        eprintln!(
            "{transport:?} {round}: ended in {gone:?}, up {back:?}, wrote on {:?} after the end",
            began.elapsed()
        );
        let vm = w.world.vm.clone();
        let there = |s: &VirtualSystem| s.incarnation != incarnation.to_string() && s.enabled_state == 2;
        let system = w.world.controller.system(&vm, "it to run", there).await;
        assert!(system.disks.iter().all(|d| d.condition == "volatile"), "{system:?}");
    }
    w.end_writing().await;
    // a named snapshot works on volumes that came over, and a reset too
    w.world.done(Verb::Snapshot, &[("name", "after")]).await;
    w.world.done(Verb::Suspend, &[]).await;
    w.world.done(Verb::PowerOn, &[]).await;
    w.world.done(Verb::ResetSession, &[]).await;
    w.world.guest_up().await;
    assert_eq!(w.shell("ls /home | grep -c ^f").await.trim().parse::<u32>().unwrap().min(5), 5);
    w.world.done(Verb::PowerOff, &[]).await;
    w.world.done(Verb::Delete, &[]).await;
    assert!(w.store.audit().is_exact());
    agent.stop(Stop::Orderly).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writing_guest_on_vhost_user_disks_does_not_notice_that_its_agent_goes_and_comes() {
    if !in_own_process("a_writing_guest_on_vhost_user_disks_does_not_notice_that_its_agent_goes_and_comes") {
        return;
    }
    goes_away_three_times(TransportChoice::VhostUser, 51).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writing_guest_on_nbd_disks_is_paused_while_its_agent_is_away_and_goes_on() {
    if !in_own_process("a_writing_guest_on_nbd_disks_is_paused_while_its_agent_is_away_and_goes_on") {
        return;
    }
    goes_away_three_times(TransportChoice::Nbd, 52).await;
}

/// The store fills up under a guest that writes, and empties again.
async fn stands_still_while_the_store_is_full(transport: TransportChoice, seed: u64) {
    let Some((mut w, agent)) = Warm::begin(seed, transport, ByteLen::mib(512)).await else { return };
    w.begin_writing().await;
    w.told(&[]);
    let hog = w.store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen::mib(512))).unwrap();
    let mut block = [0; 4096];
    let mut n = 0u64;
    let mut fill = || {
        // the last blocks too: the guest's next write is to find nothing
        for _ in 0..256 << 10 {
            n += 1;
            block[..8].copy_from_slice(&n.to_le_bytes());
            if hog.write_at(n * 4096 % (512 << 20), &block, WriteFlags::default()).is_err() {
                break;
            }
        }
    };
    let paused = wait_for("the VM to stand still", BOOT, || {
        fill();
        w.told(&["volume-full"]).pop()
    })
    .await;
    eprintln!("{}: {}", paused.kind, paused.message);
    let stopped = |s: &VirtualSystem| s.enabled_state == 9 && s.remark.contains("store is full");
    let system = w.world.controller.system(&w.world.vm.clone(), "it to say so", stopped).await;
    assert_eq!(system.health_state, 20);
    w.store.delete_volume(hog.id()).unwrap();
    wait_for("it to go on", BOOT, || w.told(&["volume-space-back"]).pop()).await;
    w.wrote(3).await;
    w.end_writing().await;
    w.world.done(Verb::PowerOff, &[]).await;
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_on_vhost_user_disks_stands_still_while_the_store_is_full() {
    if !in_own_process("a_guest_on_vhost_user_disks_stands_still_while_the_store_is_full") {
        return;
    }
    stands_still_while_the_store_is_full(TransportChoice::VhostUser, 53).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_on_nbd_disks_stands_still_while_the_store_is_full() {
    if !in_own_process("a_guest_on_nbd_disks_stands_still_while_the_store_is_full") {
        return;
    }
    stands_still_while_the_store_is_full(TransportChoice::Nbd, 54).await;
}
