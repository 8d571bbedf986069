//! The same tools over every way a volume of the real store is exported: NBD on a unix socket, on TCP and under TLS, and
//! vhost-user-blk. After each the store's audit is exact and the volume holds what it should.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod certificates;
mod common;
mod exerciser;
mod frontend;
mod private;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use certificates::{authority, issue};
use common::{NAME, run, tool};
use exerciser::{DeviceTarget, Exerciser, FileTarget};
use frontend::{Client, Options, WireDevice};
use muster_block::BlockDevice;
use muster_block::conformance::{Random, assert_contents};
use muster_common::{ByteLen, VolumeId};
use muster_export::vhost::{VhostConfig, VhostServer};
use muster_export::{Listen, NbdConfig, NbdServer, Operation, Registry, Tls};
use muster_store::{Store, StoreConfig, Volume, VolumeSpec};
use private::{Nbdfuse, privately};
use rcgen::{ExtendedKeyUsagePurpose, SanType};

const SIZE: usize = 12 << 20;

/// Whoever is not root.
const NOBODY: u32 = 65_534;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Unix,
    Tcp,
    Tls,
}

/// A blank volume of a store, served one way.
struct Exported {
    directory: tempfile::TempDir,
    store: Store,
    volume: Arc<Volume>,
    registry: Arc<Registry>,
    server: Option<NbdServer>,
    way: Way,
}

impl Exported {
    fn new(way: Way) -> Exported {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(StoreConfig::new(ByteLen::mib(128))).unwrap();
        let volume = store.create_volume(VolumeSpec::blank(VolumeId::random(), ByteLen(SIZE as u64))).unwrap();
        let registry = Arc::new(Registry::new());
        registry.add(NAME, volume.clone()).unwrap();
        let mut config = NbdConfig::unix(directory.path().join("nbd.sock"));
        if way != Way::Unix {
            config.listen = vec![Listen::Tcp("127.0.0.1:0".parse().unwrap())];
        }
        if way == Way::Tls {
            config.tls = Some(certify(directory.path().join(CERTIFICATES)));
        }
        let server = Some(NbdServer::start(config, registry.clone()).unwrap());
        Exported { directory, store, volume, registry, server, way }
    }

    fn port(&self) -> u16 {
        self.server.as_ref().unwrap().addresses()[0].port()
    }

    fn certificates(&self) -> PathBuf {
        self.path(CERTIFICATES)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Without the certificates.
    fn plain_uri(&self) -> String {
        match self.way {
            Way::Unix => format!("nbd+unix:///{NAME}?socket={}", self.path("nbd.sock").display()),
            Way::Tcp => format!("nbd://127.0.0.1:{}/{NAME}", self.port()),
            Way::Tls => format!("nbds://127.0.0.1:{}/{NAME}", self.port()),
        }
    }

    fn uri(&self) -> String {
        match self.way {
            Way::Tls => format!("{}?tls-certificates={}", self.plain_uri(), self.certificates().display()),
            _ => self.plain_uri(),
        }
    }

    fn mount(&self) -> Nbdfuse {
        let place = self.path("mounted");
        if self.way != Way::Tls {
            return Nbdfuse::mount(&place, &self.uri());
        }
        // nbdfuse cannot be told where certificates are: nbdkit speaks TLS for it
        let port = format!("port={}", self.port());
        let export = format!("export={NAME}");
        let certificates = format!("tls-certificates={}", self.certificates().display());
        let nbdkit = ["[", "nbdkit", "--exit-with-parent", "nbd", "hostname=127.0.0.1", &port, &export, "tls=require"];
        Nbdfuse::mount_with(&place, &[&nbdkit[..], &[&certificates, "]"]].concat())
    }

    /// No request failed, every count is right, and the volume holds what it should.
    fn check(&self, expected: Option<&[u8]>) {
        let statistics = self.registry.statistics(NAME).unwrap();
        let errors: u64 = Operation::ALL.iter().map(|operation| statistics.of(*operation).errors).sum();
        assert_eq!(errors, 0, "{:?}", self.way);
        assert!(self.store.audit().is_exact(), "{:?}: {:?}", self.way, self.store.audit().faults);
        assert!(self.store.verify_volume(self.volume.id()).unwrap().is_clean());
        if let Some(expected) = expected {
            assert_contents(&*self.volume, expected, &format!("the volume over {:?}", self.way));
        }
    }
}

/// Where libnbd looks for certificates below a home, when it is not told.
const CERTIFICATES: &str = ".config/pki/libnbd";

/// Makes a client's certificates in a directory; a server's that go with them.
fn certify(place: PathBuf) -> Tls {
    let ours = authority("tests");
    std::fs::create_dir_all(&place).unwrap();
    let (certificate, key) = issue(&ours, "client", vec![], ExtendedKeyUsagePurpose::ClientAuth);
    std::fs::write(place.join("ca-cert.pem"), ours.pem()).unwrap();
    std::fs::write(place.join("client-cert.pem"), certificate).unwrap();
    std::fs::write(place.join("client-key.pem"), key).unwrap();
    let names =
        vec![SanType::DnsName("localhost".try_into().unwrap()), SanType::IpAddress("127.0.0.1".parse().unwrap())];
    let (certificate, key) = issue(&ours, "server", names, ExtendedKeyUsagePurpose::ServerAuth);
    Tls::from_pem(certificate.as_bytes(), key.as_bytes(), ours.pem().as_bytes()).unwrap()
}

/// Blocks of their own, blocks that are alike, and holes.
fn pattern() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for (n, block) in bytes.chunks_mut(4096).enumerate().filter(|(n, _)| n % 4 > 0) {
        Random(if n % 4 == 1 { 1 } else { n as u64 }).fill(block);
    }
    bytes
}

fn nbdcopy(way: Way) {
    let Some(mut write) = tool("nbdcopy", "libnbd-bin") else { return };
    let exported = Exported::new(way);
    let source = pattern();
    std::fs::write(exported.path("in"), &source).unwrap();
    run(write.arg(exported.path("in")).arg(exported.uri()));
    exported.check(Some(&source));
    run(Command::new("nbdcopy").arg(exported.uri()).arg(exported.path("out")));
    assert!(std::fs::read(exported.path("out")).unwrap() == source, "what nbdcopy read over {way:?} differs");
}

#[test]
fn nbdcopy_over_every_nbd_export() {
    [Way::Unix, Way::Tcp, Way::Tls].into_iter().for_each(nbdcopy);
}

fn qemu_io(way: Way) {
    let Some(mut qemu_io) = tool("qemu-io", "qemu-utils") else { return };
    let exported = Exported::new(way);
    let commands = [
        "write -P 7 4k 5M",
        "read -P 7 4k 5M",
        "discard 8k 1M",
        "read -P 0 8k 1M",
        "read -P 7 1032k 8k",
        "write -z 2M 1M",
        "read -P 0 2M 1M",
        "write -z -u 4M 64k",
        "read -P 0 4M 64k",
        "write -P 3 -f 6M 64k",
        "flush",
        "write -P 9 513 1000",
        "read -P 9 513 1000",
        "aio_write -P 11 8M 1M",
        "aio_write -P 12 9M 1M",
        "aio_write -P 13 10M 1M",
        "aio_flush",
        "read -P 11 8M 1M",
        "read -P 12 9M 1M",
        "read -P 13 10M 1M",
    ];
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    match way {
        Way::Tls => {
            let certificates = exported.certificates();
            let credentials =
                format!("tls-creds-x509,id=tls0,endpoint=client,verify-peer=on,dir={}", certificates.display());
            let image = format!(
                "driver=nbd,host=127.0.0.1,port={},export={NAME},tls-creds=tls0,tls-hostname=localhost",
                exported.port()
            );
            qemu_io.args(["--object", &credentials, "--image-opts", &image]);
        }
        _ => {
            qemu_io.args(["-f", "raw", &exported.uri()]);
        }
    }
    let output = run(&mut qemu_io);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("failed"), "{way:?}: {text}");
    let mut expected = vec![0; SIZE];
    expected[4 << 10..(5 << 20) + (4 << 10)].fill(7);
    expected[8 << 10..(1 << 20) + (8 << 10)].fill(0);
    expected[2 << 20..3 << 20].fill(0);
    expected[4 << 20..(4 << 20) + (64 << 10)].fill(0);
    expected[6 << 20..(6 << 20) + (64 << 10)].fill(3);
    expected[513..1513].fill(9);
    for (mib, byte) in [(8, 11), (9, 12), (10, 13)] {
        expected[mib << 20..(mib + 1) << 20].fill(byte);
    }
    exported.check(Some(&expected));
}

#[test]
fn qemu_io_over_every_nbd_export() {
    [Way::Unix, Way::Tcp, Way::Tls].into_iter().for_each(qemu_io);
}

/// Every block size has a run of its own: fio's `--bsrange` with a queue depth above 1 reports false verify errors.
fn fio(way: Way) {
    for (bs, depth) in [("4k", 32), ("44k", 8), ("512", 16), ("1m", 3)] {
        let Some(mut fio) = tool("fio", "fio") else { return };
        let exported = Exported::new(way);
        if way == Way::Tls {
            // fio does not let libnbd be told where certificates are, and libnbd looks below the home of who is not root
            if rustix::process::geteuid().is_root() {
                let Some(setpriv) = tool("setpriv", "util-linux") else { return };
                std::os::unix::fs::chown(exported.directory.path(), Some(NOBODY), None).unwrap();
                fio = setpriv;
                fio.args([&format!("--reuid={NOBODY}"), "--clear-groups", "fio"]);
            }
            fio.env("HOME", exported.directory.path());
        }
        // a part is enough of small ones
        let size = if bs == "512" { SIZE / 16 } else { SIZE };
        let output = run(fio.current_dir(exported.directory.path()).args([
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={}", exported.plain_uri()),
            "--rw=randwrite",
            &format!("--bs={bs}"),
            &format!("--iodepth={depth}"),
            &format!("--size={size}"),
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randrepeat=0",
        ]));
        let reads = exported.registry.statistics(NAME).unwrap().of(Operation::Read).bytes;
        assert!(reads > size as u64 / 2, "{way:?} {bs}: {}", String::from_utf8_lossy(&output.stdout));
        exported.check(None);
    }
}

#[test]
fn fio_verifies_over_every_nbd_export() {
    [Way::Unix, Way::Tcp, Way::Tls].into_iter().for_each(fio);
}

#[test]
fn random_requests_over_tcp_and_tls_equal_the_model() {
    privately("random_requests_over_tcp_and_tls_equal_the_model", || {
        if !Nbdfuse::is_here() {
            return;
        }
        let ways = [Way::Tcp, Way::Tls];
        for way in ways.into_iter().filter(|way| *way == Way::Tcp || tool("nbdkit", "nbdkit").is_some()) {
            let exported = Exported::new(way);
            exported.volume.write_at(0, &pattern(), Default::default()).unwrap();
            let mounted = exported.mount();
            let sectors = FileTarget::open(&mounted.file());
            let (expected, _) = Exerciser::new(sectors, pattern(), 3).in_units_of(512).run(3_000);
            drop(mounted);
            exported.check(Some(&expected));
        }
    });
}

#[test]
fn random_requests_over_vhost_user_equal_the_model() {
    for (queues, seed) in [(1, 1), (4, 2)] {
        let exported = Exported::new(Way::Unix);
        let vhost = VhostServer::start(VhostConfig::new(exported.path("vu")), exported.registry.clone()).unwrap();
        let socket = vhost.serve(NAME).unwrap();
        let connect = || -> Arc<dyn BlockDevice> {
            Arc::new(WireDevice::new(Client::connect(&socket, Options { queues, ..Options::default() })))
        };
        let (expected, counts) = Exerciser::new(DeviceTarget::new(connect), vec![0; SIZE], seed).run(10_000);
        assert!(counts[&exerciser::Kind::Reopen] > 100);
        vhost.stop();
        exported.check(Some(&expected));
    }
}
