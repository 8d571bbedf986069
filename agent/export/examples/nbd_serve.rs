//! Serves one device for benches and tries by hand:
//!
//! ```text
//! cargo run --release -p muster-export --example nbd_serve -- --socket /tmp/x.sock [--tcp 127.0.0.1:0] \
//!     [--device memory|store] [--size 1GiB] [--name disk] [--spin-us 50]
//! ```
//!
//! Prints the URI and serves until its standard input ends (^D).

use std::error::Error;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use muster_block::BlockDevice;
use muster_block::model::MemoryDevice;
use muster_common::{ByteLen, VolumeId};
use muster_export::{Listen, NbdConfig, NbdServer, Operation, Registry};
use muster_store::{Store, StoreConfig, VolumeSpec};

fn main() -> Result<(), Box<dyn Error>> {
    let mut socket = None;
    let mut tcp = None;
    let mut size = ByteLen::gib(1);
    let mut device = "memory".to_owned();
    let mut name = String::new();
    let mut spin = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--socket" => socket = Some(value),
            "--tcp" => tcp = Some(value.parse()?),
            "--size" => size = value.parse()?,
            "--device" => device = value,
            "--name" => name = value,
            "--spin-us" => spin = Some(Duration::from_micros(value.parse()?)),
            _ => return Err(format!("unknown argument {argument}").into()),
        }
    }
    let store;
    let device: Arc<dyn BlockDevice> = match device.as_str() {
        "memory" => Arc::new(MemoryDevice::new(size)),
        "store" => {
            store = Store::open(StoreConfig::new(ByteLen(size.bytes() * 2)))?;
            store.create_volume(VolumeSpec::blank(VolumeId::random(), size))?
        }
        other => return Err(format!("no device {other}: memory or store").into()),
    };
    let registry = Arc::new(Registry::new());
    let export = registry.add(name.clone(), device)?;
    let mut config = NbdConfig::unix(socket.clone().unwrap_or_default());
    config.spin = spin.unwrap_or(config.spin);
    config.listen.clear();
    if let Some(path) = &socket {
        config.listen.push(Listen::Unix { path: path.into(), mode: 0o600 });
    }
    if let Some(address) = tcp {
        config.listen.push(Listen::Tcp(address));
    }
    let server = NbdServer::start(config, registry)?;
    if let Some(path) = socket {
        println!("nbd+unix:///{name}?socket={path}");
    }
    for address in server.addresses() {
        println!("nbd://{address}/{name}");
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    for operation in Operation::ALL {
        let statistics = export.statistics();
        let counted = statistics.of(operation);
        if let Some(p99) = counted.quantile(0.99) {
            eprintln!(
                "{operation:?}: {} requests, {} bytes, {} errors, p99 <= {p99:?}",
                counted.requests, counted.bytes, counted.errors
            );
        }
    }
    Ok(())
}
