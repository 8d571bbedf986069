//! A real guest writes, reads, discards and zeroes its data disk at random, past its caches and with several requests under
//! way, and compares; then the host compares what its store holds. Over both transports. And it does notice a bit that was
//! flipped under it.
//!
//! Needs QEMU, libvirt and the images of `cargo xtask guest`. Without them it fails and names what is missing, unless
//! `MUSTER_ALLOW_SKIP=1`. The guest has no fio (70 MB with what it needs): it runs `inside/verify.rs`, compiled here and
//! brought in as an application disk.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "inside/verify.rs"]
mod inside;
mod support;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use muster_agent::{Stop, config::TransportChoice};
use muster_block::{BlockDevice, WriteFlags, conformance::assert_contents};
use muster_common::ByteLen;
use muster_idl::v1::{Verb, VolumeMetrics};
use muster_store::Volume;
use support::{
    guest::{BOOT, Running, World, guest_images, in_own_process, running},
    wait_for,
};

const DISK: ByteLen = ByteLen::mib(48);
const THREADS: u64 = 4;
/// Of each thread.
const REQUESTS: u32 = 400;
/// A byte of the third thread's part.
const DAMAGED: u64 = (33 << 20) + 0x3205;

/// The session on the screen lives there: init is told to start no other, and its shell does not heed a mere TERM.
const FREE_THE_DISK: &str = "
    sed -i /^tty1/d /etc/inittab && kill -HUP 1
    n=0; until umount /home; do
        n=$((n + 1)); [ $n -lt 100 ] || exit 1
        pkill -KILL -u desktop; sleep 0.1
    done";

/// Statically linked: the guest's libraries may be older than this machine's.
fn program() -> Vec<u8> {
    let place = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/inside/verify.rs");
    // beside cargo where cargo is not in the PATH
    let beside =
        || Some(PathBuf::from(std::env::var_os("CARGO")?).with_file_name("rustc")).filter(|rustc| rustc.is_file());
    let rustc = std::env::var_os("RUSTC").map(PathBuf::from).or_else(beside).unwrap_or("rustc".into());
    let compiled = Command::new(rustc)
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"])
        .arg(place.path().join("verify"))
        .arg(source)
        .status()
        .unwrap();
    assert!(compiled.success(), "{compiled}. It needs a static C library: libc6-dev on Debian, glibc-static on Fedora");
    std::fs::read(place.path().join("verify")).unwrap()
}

async fn shell(w: &mut World, script: &str) -> String {
    let (status, said) = w.exec(&["/bin/sh", "-c", script]).await;
    assert_eq!(status, 0, "{script}: {said}");
    said
}

/// What the program answers; one call for all of its run: a guest agent starves beside it on a busy machine, and each order
/// begins with the question whether it is there.
async fn verify(w: &mut World, seed: u64, again: &[&str]) -> (i32, String) {
    let words = [REQUESTS.to_string(), THREADS.to_string(), seed.to_string()];
    let mut argv = vec!["/run/verify", "/dev/vdb"];
    argv.extend(words.iter().map(String::as_str).chain(again.iter().copied()));
    // 7 s on an idle machine, 97 and 115 at load 15
    w.exec_within(&argv, 2 * BOOT).await
}

/// Flips a bit of the disk under the guest.
fn damage(volume: &Volume, at: u64) {
    let block = at / 4096 * 4096;
    let mut bytes = [0; 4096];
    volume.read_at(block, &mut bytes).unwrap();
    bytes[(at - block) as usize] ^= 1;
    volume.write_at(block, &bytes, WriteFlags::default()).unwrap();
}

/// What the disk must hold then.
fn expected(seed: u64) -> Vec<u8> {
    let mut expected = vec![0; DISK.bytes() as usize];
    for thread in 0..THREADS {
        let mut part = inside::Part::new(DISK.bytes(), THREADS, thread, seed);
        for _ in 0..REQUESTS {
            part.draw();
        }
        let (at, bytes) = part.all();
        expected[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }
    expected
}

async fn verifies(transport: TransportChoice, named: &str, seed: u64) {
    if guest_images().is_none() {
        return;
    }
    let program = program();
    let mut application = program.clone();
    application.resize(program.len().next_multiple_of(4096), 0);
    let desk = running(seed, transport, DISK, &[application], ByteLen::gib(1)).await;
    let Running { world: mut w, store, agent, place: _place, .. } = desk.unwrap();
    shell(&mut w, FREE_THE_DISK).await;
    shell(&mut w, &format!("head -c {} /dev/vdc >/run/verify && chmod +x /run/verify", program.len())).await;

    let (status, said) = verify(&mut w, seed, &[]).await;
    assert_eq!(status, 0, "{said}");
    eprintln!("{named}: {said}");
    let errors = shell(&mut w, "dmesg | grep -iE 'i/o error|blk_update|buffer i/o' || true").await;
    assert_eq!(errors, "");
    let mut disks = w.controller.bus.subscriber::<VolumeMetrics>(256).unwrap();
    let end = w.since_us;
    let data = |m: &VolumeMetrics| m.target == "vdb" && m.sampled_at_us > end;
    let mut seen = || std::iter::from_fn(|| disks.try_recv()).filter_map(|s| s.value()).find(data);
    let figures = wait_for("figures of the data disk", BOOT, &mut seen).await;
    assert_eq!((figures.transport.as_str(), figures.errors), (named, 0), "{figures:?}");
    assert!(figures.reads > 0 && figures.writes > 0 && figures.discards > 0, "{figures:?}");
    let volume = store.volumes().into_iter().find(|volume| volume.size() == DISK).unwrap();
    let expected = expected(seed);
    assert_contents(&*volume, &expected, "the data disk");

    // it sees one wrong bit, and it was that bit
    let was = expected[DAMAGED as usize];
    damage(&volume, DAMAGED);
    let (status, said) = verify(&mut w, seed, &["again"]).await;
    let found = format!("byte {DAMAGED} of the disk is {:#x}, should be {was:#x}", was ^ 1);
    assert!(status == 1 && said.contains(&found), "{status} {said}");
    damage(&volume, DAMAGED);
    let (status, said) = verify(&mut w, seed, &["again"]).await;
    assert_eq!(status, 0, "{said}");

    drop(volume);
    w.done(Verb::PowerOff, &[]).await;
    w.done(Verb::Delete, &[]).await;
    assert!(store.audit().is_exact());
    agent.stop(Stop::Orderly).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_verifies_its_disk_over_vhost_user() {
    if in_own_process("a_guest_verifies_its_disk_over_vhost_user") {
        verifies(TransportChoice::VhostUser, "vhost-user", 81).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_verifies_its_disk_over_nbd() {
    if in_own_process("a_guest_verifies_its_disk_over_nbd") {
        verifies(TransportChoice::Nbd, "nbd", 82).await;
    }
}
