//! Serves one device over vhost-user-blk, for tries by hand with a real VM:
//!
//! ```text
//! cargo run --release -p muster-export --example vhost_serve -- --directory /run/x [--name disk.1] \
//!     [--file disk.raw | --size 1GiB [--image disk.raw]] [--spin-us 50] [--queues 64] [--threads 2]
//!
//! qemu-system-x86_64 -machine q35,memory-backend=ram -object memory-backend-memfd,id=ram,size=512M,share=on \
//!     -chardev socket,id=disk,path=/run/x/disk.1,reconnect=1 -device vhost-user-blk-pci,chardev=disk ...
//! ```
//!
//! `--file` serves the file itself (it can be served again after a kill -9); `--size` a volume of a store in memory, with
//! the image's bytes in it. Prints the socket and serves until its standard input ends (^D), then prints what was done.

use std::error::Error;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use muster_block::{BlockDevice, BlockError, BlockErrorKind, Extent, ExtentKind, Geometry, WriteFlags, ZeroFlags};
use muster_common::{ByteLen, VolumeId};
use muster_export::vhost::{VhostConfig, VhostServer};
use muster_export::{Operation, Registry};
use muster_store::{Store, StoreConfig, VolumeSpec};

/// A file as a disk.
struct FileDevice {
    file: std::fs::File,
    size: ByteLen,
}

fn failed(error: std::io::Error) -> BlockError {
    BlockError::with_source(BlockErrorKind::Io, "use the file", error)
}

impl BlockDevice for FileDevice {
    fn geometry(&self) -> Geometry {
        Geometry::memory(self.size, false)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.geometry().check(offset, buf.len() as u64)?;
        self.file.read_exact_at(buf, offset).map_err(failed)
    }
    fn write_at(&self, offset: u64, data: &[u8], _flags: WriteFlags) -> Result<(), BlockError> {
        self.geometry().check(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset).map_err(failed)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> Result<(), BlockError> {
        self.geometry().check(offset, len)?;
        let zeroes = vec![0; 1 << 20];
        for at in (0..len).step_by(1 << 20) {
            self.file.write_all_at(&zeroes[..(len - at).min(1 << 20) as usize], offset + at).map_err(failed)?;
        }
        Ok(())
    }
    fn trim(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.write_zeroes(offset, len, ZeroFlags::default())
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.file.sync_data().map_err(failed)
    }
    fn block_status(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<(), BlockError> {
        self.geometry().check(offset, len)?;
        out.clear();
        Extent::push(out, len, ExtentKind::Data);
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut config = VhostConfig::new("");
    let mut name = "disk.1".to_owned();
    let (mut file, mut image) = (None, None);
    let mut size = ByteLen::gib(1);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--directory" => config.directory = value.into(),
            "--name" => name = value,
            "--file" => file = Some(value),
            "--image" => image = Some(value),
            "--size" => size = value.parse()?,
            "--spin-us" => config.spin = Duration::from_micros(value.parse()?),
            "--queues" => config.queues = value.parse()?,
            "--threads" => config.threads = value.parse()?,
            _ => return Err(format!("unknown argument {argument}").into()),
        }
    }
    let store;
    let device: Arc<dyn BlockDevice> = match file {
        Some(path) => {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
            let size = ByteLen(file.metadata()?.len());
            Arc::new(FileDevice { file, size })
        }
        None => {
            store = Store::open(StoreConfig::new(ByteLen(size.bytes() * 2 + ByteLen::mib(64).bytes())))?;
            let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), size))?;
            if let Some(path) = image {
                let mut file = std::fs::File::open(path)?;
                let mut piece = vec![0; 1 << 20];
                let mut at = 0;
                while let read @ 1.. = file.read(&mut piece)? {
                    volume.write_at(at, &piece[..read], WriteFlags::default())?;
                    at += read as u64;
                }
            }
            volume
        }
    };
    config.observer = Some(Arc::new(|name, event| eprintln!("{name}: {event:?}")));
    let registry = Arc::new(Registry::new());
    let export = registry.add(name.clone(), device)?;
    let server = VhostServer::start(config, registry)?;
    println!("{}", server.serve(&name)?.display());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    let statistics = export.statistics();
    for operation in Operation::ALL {
        let counted = statistics.of(operation);
        if let (Some(p50), Some(p99)) = (counted.quantile(0.5), counted.quantile(0.99)) {
            println!(
                "{operation:?}: {} requests, {} errors, {} bytes, p50 <= {p50:?}, p99 <= {p99:?}",
                counted.requests, counted.errors, counted.bytes
            );
        }
    }
    Ok(())
}
