//! Real guests for benches: QEMU under TCG with the Debian of `cargo xtask guest`, on whatever disk the bench gives it.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use muster_common::{ByteLen, Digest};
use muster_store::Store;
use muster_tests::Process;

/// Fills the store with a raw image. Its digest is that of the file: enough to name it here.
pub fn load(store: &Store, image: &Path) -> Result<Digest> {
    let bytes = fs::read(image)?;
    let digest = Digest::from_bytes([7; 32]);
    let builder = store.image_builder(digest, "debian", ByteLen(bytes.len() as u64))?;
    for (i, chunk) in bytes.chunks(1 << 20).enumerate() {
        builder.write_chunk((i as u64) << 20, chunk)?;
    }
    builder.finish()?;
    Ok(digest)
}

/// Starts a guest of 256 MiB; `disk` is QEMU's words for its disk.
pub fn start(guest: &Path, agent: &Path, disk: &[String]) -> Result<Process> {
    let cmdline = fs::read_to_string(guest.join("cmdline"))?;
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-display", "none", "-nodefaults"])
        .args(["-no-user-config", "-serial", "null", "-monitor", "none"])
        .args(disk)
        .arg("-kernel")
        .arg(guest.join("vmlinuz"))
        .arg("-initrd")
        .arg(guest.join("initramfs"))
        .args(["-append", cmdline.trim(), "-device", "virtio-serial"])
        .arg("-chardev")
        .arg(format!("socket,id=agent,server=on,wait=off,path={}", agent.display()))
        .args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    Process::spawn(&mut command).context("start qemu-system-x86_64")
}

/// A virtio disk on a block device of QEMU's.
pub fn block_device(node: &str) -> Vec<String> {
    let node = format!("{node},node-name=disk,cache.direct=on");
    ["-blockdev", &node, "-device", "virtio-blk-pci,drive=disk"].map(String::from).into()
}

/// The same over NBD.
pub fn nbd_disk(socket: &Path, export: &str) -> Vec<String> {
    let server = format!("file.server.type=unix,file.server.path={},file.export={export}", socket.display());
    block_device(&format!("driver=raw,discard=unmap,file.driver=nbd,{server}"))
}

/// One `guest-ping`, answered within a quarter of a second.
pub fn agent_answers(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    let asked = stream
        .set_read_timeout(Some(Duration::from_millis(250)))
        .and_then(|()| stream.write_all(b"{\"execute\":\"guest-ping\"}\n"));
    let mut line = String::new();
    asked.is_ok() && BufReader::new(stream).read_line(&mut line).is_ok_and(|n| n > 0) && line.contains("return")
}

/// Bytes a process has caused to be read from block devices (proc(5), /proc/pid/io).
pub fn read_bytes(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("read_bytes: ")).context("read_bytes in /proc/pid/io")?;
    Ok(line.trim().parse()?)
}
