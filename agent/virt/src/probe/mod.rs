//! Does KVM work here? Found out by running a guest, because `/dev/kvm` alone says little: nested and paravirtual
//! hosts offer one in which a 64-bit kernel starts, crawls and dies.
//!
//! The guest is our own ROM (`rom.S`, 166 bytes in a 64 KiB image) instead of firmware: reset vector, 64-bit mode with
//! paging, 200 million loop steps with a thousand address space switches, exit through QEMU's debug port. Nothing to
//! find or build, no disk, and it exercises what a kernel does in its first milliseconds.
//!
//! Measured (2 shared cores, QEMU 7.2): under TCG the ROM ends in 1.4 to 2.0 s. On a host whose KVM has page tables only
//! (module `kvm_pvm`), the processor model our domains use, `-cpu host`, is refused after 0.1 to 0.4 s (QEMU aborts on an
//! MSR); with any other model the ROM writes its first mark in real mode and has not reached 64-bit mode after 30 s.
//! With hardware assistance the loop takes about 0.1 s. So the limit may be short: [`LIMIT`].

mod rom;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::spec::Accel;

/// Enough for hardware on a host that is busy, too short for emulation.
pub const LIMIT: Duration = Duration::from_secs(3);

/// QEMU's exit status when the ROM wrote 0x21 to its debug port.
const EXPECTED_STATUS: i32 = 0x21 * 2 + 1;
const EMULATOR: &str = "qemu-system-x86_64";
const KVM_DEVICE: &str = "/dev/kvm";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmProbe {
    pub usable: bool,
    /// For logs and the host topic: why it is or is not.
    pub reason: String,
    pub took: Duration,
    /// Read from the cache of an earlier probe since this boot.
    pub cached: bool,
}

impl KvmProbe {
    /// What domains should use.
    pub fn accel(&self) -> Accel {
        if self.usable { Accel::Kvm } else { Accel::Tcg }
    }
}

/// What the cache file holds (JSON). Another boot or another QEMU makes it worthless.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Cached {
    boot_id: String,
    emulator_modified: u64,
    usable: bool,
    reason: String,
}

/// Runs the probe, or reads its result from `cache`. Never fails: whatever goes wrong means "not usable", with the
/// reason. Blocks for at most about `limit`.
pub fn probe_kvm(limit: Duration, cache: Option<&Path>) -> KvmProbe {
    let began = Instant::now();
    let boot_id = fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned();
    let emulator_modified = emulator_modified();
    if let Some(found) = cache.and_then(read_cache)
        && !boot_id.is_empty()
        && found.boot_id == boot_id
        && found.emulator_modified == emulator_modified
    {
        return KvmProbe { usable: found.usable, reason: found.reason, took: began.elapsed(), cached: true };
    }
    let (usable, reason) = match check_device().and_then(|()| run_rom("kvm", "host", limit)) {
        Ok(took) => (true, format!("a guest ran under KVM in {:.2} s", took.as_secs_f64())),
        Err(reason) => (false, reason),
    };
    let result = Cached { boot_id, emulator_modified, usable, reason };
    if let Some(path) = cache
        && let Err(e) = write_cache(path, &result)
    {
        tracing::warn!(path = %path.display(), err = %e, "cannot keep the result of the KVM probe");
    }
    KvmProbe { usable: result.usable, reason: result.reason, took: began.elapsed(), cached: false }
}

fn emulator_modified() -> u64 {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .find_map(|dir| fs::metadata(dir.join(EMULATOR)).ok())
        .and_then(|metadata| metadata.modified().ok())
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |since| since.as_secs())
}

fn read_cache(path: &Path) -> Option<Cached> {
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

fn write_cache(path: &Path, result: &Cached) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(serde_json::to_string(result)?.as_bytes())?;
    fs::rename(&temporary, path)
}

fn check_device() -> Result<(), String> {
    if !Path::new(KVM_DEVICE).exists() {
        return Err(format!("there is no {KVM_DEVICE}: no hardware assistance, or its module is not loaded"));
    }
    match OpenOptions::new().read(true).write(true).open(KVM_DEVICE) {
        Ok(_) => Ok(()),
        Err(e) => Err(format!("{KVM_DEVICE} cannot be opened: {e}")),
    }
}

/// The image QEMU takes for a BIOS, removed with this value.
struct RomFile(PathBuf);

impl RomFile {
    fn create() -> std::io::Result<Self> {
        let name = format!("muster-probe-{}.rom", muster_common::id::VmId::random());
        let path = std::env::temp_dir().join(name);
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        let rom = Self(path);
        file.write_all(&rom::image())?;
        Ok(rom)
    }
}

impl Drop for RomFile {
    fn drop(&mut self) {
        // a left-over in the temporary directory harms nobody
        let _ = fs::remove_file(&self.0);
    }
}

/// How long the ROM took, or why it did not end as it should.
fn run_rom(accel: &str, cpu: &str, limit: Duration) -> Result<Duration, String> {
    let rom = RomFile::create().map_err(|e| format!("cannot write the probe's ROM: {e}"))?;
    let began = Instant::now();
    let mut child = Command::new(EMULATOR)
        .args(["-accel", accel, "-cpu", cpu, "-machine", "q35", "-m", "16", "-bios"])
        .arg(&rom.0)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-monitor", "none"])
        .args(["-chardev", "stdio,id=mark", "-device", "isa-debugcon,chardev=mark,iobase=0xe9"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot start {EMULATOR} (package qemu-system-x86): {e}"))?;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if began.elapsed() >= limit => break None,
            Ok(None) => {}
            Err(e) => {
                tracing::warn!(err = %e, "cannot wait for the KVM probe");
                break None;
            }
        }
        // only the timer can end this
        let _ = crossbeam_channel::after(Duration::from_millis(10)).recv();
    };
    let took = began.elapsed();
    if status.is_none() {
        // both fail only for a child that is gone already
        let _ = child.kill();
        let _ = child.wait();
    }
    // two marks and a few lines of complaint: far less than a pipe holds, and the writer is gone
    let mut marks = String::new();
    let mut complaint = Vec::new();
    let _ = child.stdout.take().map(|mut out| out.read_to_string(&mut marks));
    let _ = child.stderr.take().map(|mut err| err.read_to_end(&mut complaint));
    let reached = match marks.as_str() {
        "" => "not its first instruction",
        "R" => "16-bit code only",
        _ => "64-bit code",
    };
    match status {
        Some(status) if status.code() == Some(EXPECTED_STATUS) => Ok(took),
        Some(status) => {
            let complaint = String::from_utf8_lossy(&complaint);
            let first = complaint.lines().next().unwrap_or_default();
            Err(format!("the probe guest ended with {status} and reached {reached}: {first}"))
        }
        None => Err(format!("the probe guest did not end within {limit:?} and reached {reached}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rom_runs_to_its_end_where_guests_work() {
        // translation works everywhere, so the ROM itself is right; the limit only bounds a hang
        run_rom("tcg", "max", Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn a_guest_that_does_not_end_is_stopped_at_the_limit() {
        let reason = run_rom("tcg", "max", Duration::ZERO).unwrap_err();
        assert!(reason.contains("did not end within"), "{reason}");
    }

    #[test]
    fn a_guest_that_qemu_refuses_is_told() {
        let reason = run_rom("tcg", "no-such-processor", Duration::from_secs(60)).unwrap_err();
        assert!(reason.contains("no-such-processor"), "{reason}");
    }

    #[test]
    fn the_result_is_kept_for_this_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("kvm.json");
        let first = probe_kvm(LIMIT, Some(&cache));
        println!("{first:?}");
        assert!(!first.cached);
        assert!(first.took < LIMIT + Duration::from_secs(10), "{first:?}");
        let second = probe_kvm(LIMIT, Some(&cache));
        assert!(second.cached);
        assert_eq!((second.usable, &second.reason), (first.usable, &first.reason));

        let mut kept = read_cache(&cache).unwrap();
        kept.boot_id = "another boot".into();
        kept.reason = "stale".into();
        write_cache(&cache, &kept).unwrap();
        assert!(!probe_kvm(Duration::ZERO, Some(&cache)).cached);
        fs::write(&cache, "not json").unwrap();
        assert!(!probe_kvm(Duration::ZERO, Some(&cache)).cached);
    }
}
