//! fio writes and verifies a store volume over NBD until the time is over:
//!
//! ```text
//! cargo run --release -p muster-export --example verify_volume -- --minutes 10 [--size 512MiB]
//! ```
//!
//! Two fio jobs on halves of the volume, so two connections; every pass has another block size, depth and seed
//! (`--bsrange` with a queue depth above 1 reports false verify errors in fio, so one size a pass). After each pass the
//! store must audit exact and the whole device read through the socket must equal the device read directly.

use std::error::Error;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_block::BlockDevice;
use muster_common::{ByteLen, VolumeId};
use muster_export::{NbdConfig, NbdServer, Operation, Registry};
use muster_store::{Store, StoreConfig, VolumeSpec};

fn main() -> Result<(), Box<dyn Error>> {
    let mut minutes = 10.0f64;
    let mut size = ByteLen::mib(512);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--minutes" => minutes = value.parse()?,
            "--size" => size = value.parse()?,
            _ => return Err(format!("unknown argument {argument}").into()),
        }
    }
    let store = Store::open(StoreConfig::new(ByteLen(size.bytes() * 2 + (64 << 20))))?;
    let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), size))?;
    let registry = Arc::new(Registry::new());
    let export = registry.add("volume", volume.clone())?;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("nbd.sock");
    let server = NbdServer::start(NbdConfig::unix(&socket), registry)?;
    let uri = format!("nbd+unix:///volume?socket={}", socket.display());

    let start = Instant::now();
    let until = start + Duration::from_secs_f64(minutes * 60.0);
    let passes = [("4k", 32), ("64k", 8), ("16k", 16), ("512", 32), ("128k", 4), ("300k", 4), ("1m", 4), ("12k", 8)];
    let half = size.bytes() / 2 / (1 << 20) * (1 << 20);
    let mut pass = 0usize;
    while Instant::now() < until {
        let (block, depth) = passes[pass % passes.len()];
        // 512-byte requests over everything would take all the time there is.
        let reach = if block == "512" { half / 16 } else { half };
        let mut fio = Command::new("fio");
        fio.current_dir(directory.path()).args([
            "--ioengine=nbd",
            "--rw=randwrite",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--group_reporting",
            &format!("--uri={uri}"),
            &format!("--bs={block}"),
            &format!("--iodepth={depth}"),
            &format!("--randseed={}", pass + 1),
            &format!("--size={reach}"),
            "--name=low",
            "--offset=0",
            "--name=high",
            &format!("--offset={half}"),
        ]);
        let output = fio.output()?;
        if !output.status.success() {
            return Err(format!(
                "pass {pass} ({block}, depth {depth}): {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )
            .into());
        }
        let copy = directory.path().join("copy");
        if !Command::new("nbdcopy").arg(&uri).arg(&copy).status()?.success() {
            return Err("nbdcopy failed".into());
        }
        compare(&copy, &*volume)?;
        std::fs::remove_file(&copy)?;
        let audit = store.audit();
        if !audit.is_exact() {
            return Err(format!("pass {pass}: the store's audit is not exact: {audit:?}").into());
        }
        pass += 1;
        eprintln!("{:>5.0} s: pass {pass} ({block}, depth {depth}) verified", start.elapsed().as_secs_f64());
    }
    server.stop();
    let statistics = export.statistics();
    let errors: u64 = Operation::ALL.iter().map(|operation| statistics.of(*operation).errors).sum();
    let (reads, writes) = (statistics.of(Operation::Read), statistics.of(Operation::Write));
    println!(
        "{:.1} minutes, {pass} passes, 0 verify errors; {} writes ({}), {} reads ({}), {errors} errors",
        start.elapsed().as_secs_f64() / 60.0,
        writes.requests,
        ByteLen(writes.bytes),
        reads.requests,
        ByteLen(reads.bytes),
    );
    if errors > 0 { Err("requests failed".into()) } else { Ok(()) }
}

fn compare(copy: &std::path::Path, device: &dyn BlockDevice) -> Result<(), Box<dyn Error>> {
    use std::io::Read;
    let mut file = std::fs::File::open(copy)?;
    let size = device.geometry().size.bytes();
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size {
        let len = (size - at).min(1 << 20) as usize;
        device.read_at(at, &mut ours[..len])?;
        file.read_exact(&mut theirs[..len])?;
        if ours[..len] != theirs[..len] {
            return Err(format!("the copy differs in the MiB at {at}").into());
        }
        at += len as u64;
    }
    Ok(())
}
