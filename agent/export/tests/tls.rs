//! TLS with real clients: libnbd (GnuTLS) and QEMU, with certificates made here. Who has no certificate, one of another
//! authority, or one for another export gets nothing, not even a name.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod certificates;
mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use certificates::{Authority, authority, issue};
use common::{handshake_bytes, option_bytes, read_option_reply, run, tool, wait_for};
use muster_block::BlockDevice;
use muster_block::model::MemoryDevice;
use muster_common::ByteLen;
use muster_export::protocol::{option, option_reply};
use muster_export::{Listen, NbdConfig, NbdServer, Operation, Peer, Registry, Restricted, Tls};
use rcgen::{ExtendedKeyUsagePurpose, SanType};

const SIZE: usize = 6 << 20;
const ALICE: &str = "spiffe://muster/host/alice";
const BOB: &str = "bob";

struct Fixture {
    directory: tempfile::TempDir,
    registry: Arc<Registry>,
    devices: [Arc<MemoryDevice>; 2],
    server: Option<NbdServer>,
    address: SocketAddr,
}

impl Fixture {
    /// Alice (by the URI in her certificate) may have the export of her name, Bob (by his common name) that of his.
    fn new() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let ours = authority("tests");
        let others = authority("somebody else");
        let client = |by: &Authority, who: &str, name: &str, names: Vec<SanType>| {
            let path = directory.path().join(who);
            std::fs::create_dir(&path).unwrap();
            let (certificate, key) = issue(by, name, names, ExtendedKeyUsagePurpose::ClientAuth);
            std::fs::write(path.join("ca-cert.pem"), ours.pem()).unwrap();
            std::fs::write(path.join("client-cert.pem"), certificate).unwrap();
            std::fs::write(path.join("client-key.pem"), key).unwrap();
        };
        client(&ours, "alice", BOB, vec![SanType::URI(ALICE.try_into().unwrap())]);
        client(&ours, "bob", BOB, vec![]);
        client(&others, "stranger", BOB, vec![]);
        std::fs::create_dir(directory.path().join("nobody")).unwrap();
        std::fs::write(directory.path().join("nobody/ca-cert.pem"), ours.pem()).unwrap();

        let names =
            vec![SanType::DnsName("localhost".try_into().unwrap()), SanType::IpAddress("127.0.0.1".parse().unwrap())];
        let (certificate, key) = issue(&ours, "server", names, ExtendedKeyUsagePurpose::ServerAuth);
        let registry = Arc::new(Registry::new());
        let devices =
            [Arc::new(MemoryDevice::from_bytes(pattern())), Arc::new(MemoryDevice::new(ByteLen(SIZE as u64)))];
        registry.add("for-alice", devices[0].clone()).unwrap();
        registry.add("for-bob", devices[1].clone()).unwrap();
        let catalog = Restricted::new(registry.clone(), |peer: &Peer, name: &str| match peer {
            Peer::Certified { identity, .. } => {
                (identity.is(ALICE) && name == "for-alice") || (identity.is(BOB) && name == "for-bob")
            }
            Peer::Local { .. } => true,
            _ => false,
        });
        let mut config = NbdConfig::tcp("127.0.0.1:0".parse().unwrap());
        config.listen.push(Listen::Unix { path: directory.path().join("nbd.sock"), mode: 0o600 });
        config.tls = Some(Tls::from_pem(certificate.as_bytes(), key.as_bytes(), ours.pem().as_bytes()).unwrap());
        config.handshake_time = Duration::from_secs(20);
        let server = NbdServer::start(config, Arc::new(catalog)).unwrap();
        let address = server.addresses()[0];
        Fixture { directory, registry, devices, server: Some(server), address }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn uri(&self, who: &str, export: &str) -> String {
        format!("nbds://{}/{export}?tls-certificates={}", self.address, self.path(who).display())
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

fn pattern() -> Vec<u8> {
    (0..SIZE as u32 / 4).flat_map(|word| (word.wrapping_mul(0x9e37_79b9) | 1).to_le_bytes()).collect()
}

fn nbdinfo(arguments: &[&str]) -> Option<Output> {
    Some(tool("nbdinfo", "libnbd-bin")?.args(arguments).output().unwrap())
}

#[test]
fn libnbd_copies_over_tls_both_ways() {
    let Some(mut nbdcopy) = tool("nbdcopy", "libnbd-bin") else { return };
    let fixture = Fixture::new();
    run(nbdcopy.arg(fixture.uri("alice", "for-alice")).arg(fixture.path("out")));
    assert!(std::fs::read(fixture.path("out")).unwrap() == pattern(), "what nbdcopy read differs");
    run(tool("nbdcopy", "libnbd-bin").unwrap().arg(fixture.path("out")).arg(fixture.uri("bob", "for-bob")));
    assert!(fixture.devices[1].contents() == pattern(), "what nbdcopy wrote differs");
    let statistics = fixture.registry.statistics("for-bob").unwrap();
    assert_eq!(statistics.of(Operation::Write).bytes, SIZE as u64);
}

#[test]
fn a_certificate_opens_and_sees_only_what_it_may() {
    let fixture = Fixture::new();
    let Some(own) = nbdinfo(&["--size", &fixture.uri("alice", "for-alice")]) else { return };
    assert_eq!(String::from_utf8_lossy(&own.stdout).trim(), SIZE.to_string(), "{own:?}");
    // Alice's common name is Bob's: it does not count where there are alternative names.
    for (who, export) in [("alice", "for-bob"), ("bob", "for-alice"), ("bob", "absent")] {
        let refused = nbdinfo(&["--size", &fixture.uri(who, export)]).unwrap();
        assert!(!refused.status.success(), "{who} opened {export}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("has no export named"), "{refused:?}");
    }
    for (who, sees, not) in [("alice", "for-alice", "for-bob"), ("bob", "for-bob", "for-alice")] {
        let listed = nbdinfo(&["--list", "--json", &fixture.uri(who, "")]).unwrap();
        let text = String::from_utf8_lossy(&listed.stdout);
        assert!(listed.status.success() && text.contains(sees) && !text.contains(not), "{who}: {listed:?}");
        assert!(text.contains("\"TLS\": true"), "{text}");
    }
}

#[test]
fn without_a_certificate_of_our_authority_there_is_nothing() {
    let fixture = Fixture::new();
    for who in ["stranger", "nobody"] {
        let Some(refused) = nbdinfo(&["--size", &fixture.uri(who, "for-bob")]) else { return };
        assert!(!refused.status.success(), "{who}: {refused:?}");
    }
    let plain = nbdinfo(&["--size", &format!("nbd://{}/for-bob", fixture.address)]).unwrap();
    assert!(!plain.status.success(), "{plain:?}");
    assert_eq!(fixture.registry.sessions("for-bob"), Some(0));
    // The unix socket of the same server stays as it was.
    let local = nbdinfo(&["--size", &format!("nbd+unix:///for-bob?socket={}", fixture.path("nbd.sock").display())]);
    assert!(local.unwrap().status.success());
}

/// The argument that tells QEMU where the certificates are.
fn credentials(directory: &Path) -> String {
    format!("tls-creds-x509,id=tls0,endpoint=client,verify-peer=on,dir={}", directory.display())
}

#[test]
fn qemu_reads_writes_and_converts_over_tls() {
    let Some(mut qemu_io) = tool("qemu-io", "qemu-utils") else { return };
    let fixture = Fixture::new();
    let image = |export: &str| {
        format!(
            "driver=nbd,host=127.0.0.1,port={},export={export},tls-creds=tls0,tls-hostname=localhost",
            fixture.address.port()
        )
    };
    let alice = credentials(&fixture.path("alice"));
    let output = run(qemu_io.args(["--object", &alice, "--image-opts"]).args([
        "-c",
        "write -P 7 4k 5M",
        "-c",
        "read -P 7 4k 5M",
        "-c",
        "discard 8k 1M",
        "-c",
        "read -P 0 8k 1M",
        "-c",
        "flush",
        &image("for-alice"),
    ]));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("failed"), "{text}");
    let bytes = fixture.devices[0].contents();
    assert!(bytes[4096..8192].iter().all(|byte| *byte == 7) && bytes[8192..16384].iter().all(|byte| *byte == 0));
    let out = fixture.path("out.raw");
    run(tool("qemu-img", "qemu-utils")
        .unwrap()
        .args(["convert", "--object", &alice, "--image-opts", "-O", "raw", &image("for-alice")])
        .arg(&out));
    assert!(std::fs::read(&out).unwrap() == fixture.devices[0].contents(), "what qemu-img read differs");
    let refused = tool("qemu-img", "qemu-utils")
        .unwrap()
        .args(["info", "--object", &alice, "--image-opts", &image("for-bob")])
        .output()
        .unwrap();
    assert!(!refused.status.success(), "{refused:?}");
}

#[test]
fn before_tls_every_option_is_refused_and_bytes_behind_starttls_end_the_connection() {
    let fixture = Fixture::new();
    let mut stream = fixture.connect();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    for number in [option::LIST, option::STRUCTURED_REPLY, option::INFO, option::GO, 77] {
        stream.write_all(&option_bytes(number, &[])).unwrap();
        assert_eq!(read_option_reply(&mut stream).1, option_reply::ERR_TLS_REQD);
    }
    // Options smuggled in behind STARTTLS, which a careless server would carry out as if they had come under TLS.
    let smuggled = handshake_bytes("for-bob", false).split_off(4);
    stream.write_all(&[option_bytes(option::STARTTLS, &[]), smuggled].concat()).unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() <= 20, "only the acknowledgement may follow: {rest:?}");

    let mut stream = fixture.connect();
    stream.write_all(&[&3u32.to_be_bytes()[..], &option_bytes(option::ABORT, &[])].concat()).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    assert_eq!(read_option_reply(&mut stream).1, option_reply::ACK);

    let mut stream = fixture.connect();
    stream.write_all(&[&3u32.to_be_bytes()[..], &option_bytes(option::EXPORT_NAME, b"for-bob")].concat()).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    rest.clear();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.is_empty());
}

#[test]
fn garbage_instead_of_tls_ends_one_connection_and_a_removed_export_a_session_under_tls() {
    let Some(mut nbdcopy) = tool("nbdcopy", "libnbd-bin") else { return };
    let mut fixture = Fixture::new();
    let mut stream = fixture.connect();
    stream.write_all(&[&3u32.to_be_bytes()[..], &option_bytes(option::STARTTLS, &[])].concat()).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    assert_eq!(read_option_reply(&mut stream).1, option_reply::ACK);
    stream.write_all(&[0x55; 4096]).unwrap();
    let _ = stream.read_to_end(&mut Vec::new());

    // Copies into a pipe that nobody empties, so that the session is there until it is ended.
    let mut child = nbdcopy
        .arg(fixture.uri("alice", "for-alice"))
        .arg("-")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for("a session under TLS", || fixture.registry.sessions("for-alice") == Some(1));
    let peers = fixture.registry.get("for-alice").unwrap().peers();
    assert!(matches!(&peers[0], Peer::Certified { identity, .. } if identity.names() == [ALICE]), "{peers:?}");
    fixture.registry.remove("for-alice", Duration::from_secs(5)).unwrap();
    fixture.server.take().unwrap().stop();
    drop(child.stdout.take());
    child.wait().unwrap();
}

#[test]
fn certificates_that_do_not_fit_are_refused_at_the_start() {
    let ours = authority("tests");
    let (certificate, _) = issue(&ours, "server", vec![], ExtendedKeyUsagePurpose::ServerAuth);
    let (_, other_key) = issue(&ours, "server", vec![], ExtendedKeyUsagePurpose::ServerAuth);
    let authority = ours.pem();
    for (certificate, key, authority) in [
        (certificate.as_str(), other_key.as_str(), authority.as_str()),
        ("", &other_key, &authority),
        (&certificate, "no key", &authority),
        (&certificate, &other_key, ""),
    ] {
        assert!(Tls::from_pem(certificate.as_bytes(), key.as_bytes(), authority.as_bytes()).is_err());
    }
}

/// Requests of every size, many at once: what is sent and received crosses record and buffer boundaries everywhere.
#[test]
fn any_size_of_request_arrives_whole_under_tls() {
    let fixture = Fixture::new();
    let source = fixture.path("in");
    std::fs::write(&source, pattern()).unwrap();
    for (size, requests) in [(4096, 64), (65_536, 16), (2 << 20, 4)] {
        let nbdcopy = || {
            let mut nbdcopy = tool("nbdcopy", "libnbd-bin")?;
            nbdcopy.args([
                format!("--request-size={size}"),
                format!("--requests={requests}"),
                "--connections=1".into(),
            ]);
            Some(nbdcopy)
        };
        let Some(mut write) = nbdcopy() else { return };
        fixture.devices[1].trim(0, SIZE as u64).unwrap();
        run(write.arg(&source).arg(fixture.uri("bob", "for-bob")));
        assert!(fixture.devices[1].contents() == pattern(), "what was written by {size} differs");
        let out = fixture.path(&format!("out-{size}"));
        run(nbdcopy().unwrap().arg(fixture.uri("bob", "for-bob")).arg(&out));
        assert!(std::fs::read(&out).unwrap() == pattern(), "what was read by {size} differs");
    }
}
