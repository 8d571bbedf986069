//! One agent, the embedded QEMU driver, a real Debian guest that boots from a disk in the agent's memory.
//!
//! Needs QEMU, libvirt and the images of `cargo xtask guest`. Without them it fails and names what is missing, unless
//! `MUSTER_ALLOW_SKIP=1`.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use muster_agent::{Agent, Deps, Stop};
use muster_common::ByteLen;
use muster_idl::{
    arguments::BackupResult,
    v1::{Verb, VolumeMetrics},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use support::{
    Controller, Depot, Place,
    guest::{BOOT, World, desk_template, guest_images},
    network, vm_on, wait_for,
};

/// Asks for a raw stream and takes the answer's head off.
async fn upgraded(address: std::net::SocketAddr, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: muster-stream\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        seen.push(stream.read_u8().await.unwrap());
    }
    assert!(seen.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&seen));
    stream
}

async fn say_and_hear(mut stream: TcpStream, say: &[u8], hear: &str) {
    stream.write_all(say).await.unwrap();
    let mut heard = Vec::new();
    let hearing = async {
        let mut piece = [0; 1024];
        while !String::from_utf8_lossy(&heard).contains(hear) {
            let len = stream.read(&mut piece).await.unwrap();
            assert!(len > 0, "the stream ended: {}", String::from_utf8_lossy(&heard));
            heard.extend_from_slice(&piece[..len]);
        }
    };
    tokio::time::timeout(BOOT, hearing).await.expect("the guest says it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_debian_guest_boots_from_memory_and_survives_reset_backup_and_a_kill() {
    let Some(images) = guest_images() else { return };
    muster_common::logging::init(muster_common::logging::LogFormat::Text);
    let network = network(1);
    let depot = Depot::start().await;
    let mut application = b"muster application\n".to_vec();
    application.resize(1 << 20, b'.');
    let application = depot.import(application);
    let template = desk_template(&depot, &images, Some(ByteLen::mib(64)), &[application]);

    let place = Place::new(1);
    let mut config = place.config();
    config.hypervisor.uri = String::new();
    config.store.budget = ByteLen::gib(1);
    config.timeouts = Default::default();
    let start = || async {
        let deps = Deps { bus: Some(network.join("host1")), ..Deps::default() };
        Agent::start(config.clone(), deps).await.unwrap()
    };
    let agent = start().await;
    let controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let vm = vm_on(&agent, "desk 1");
    let mut w = World { controller, vm, since_us: 0 };

    w.done(Verb::Create, &[("template", &template)]).await;
    w.done(Verb::PowerOn, &[]).await;
    w.guest_up().await;
    assert_eq!(w.read("/etc/hostname").await.0, 0);
    let (_, name) = w.read("/proc/sys/kernel/hostname").await;
    assert_eq!(name.trim(), "desk-1");

    // its balloon driver reports free pages (feature 5)
    let features = "cut -c6 /sys/bus/virtio/drivers/virtio_balloon/virtio*/features";
    assert_eq!(w.exec(&["/bin/sh", "-c", features]).await, (0, "1\n".into()));

    // what the disks do is said each second
    let mut disks = w.controller.bus.subscriber::<VolumeMetrics>(256).unwrap();
    let mut seen = || std::iter::from_fn(|| disks.try_recv()).filter_map(|s| s.value()).find(|m| m.target == "vda");
    let system = wait_for("figures of the system disk", Duration::from_secs(30), &mut seen).await;
    assert_eq!((system.vm.as_str(), system.transport.as_str()), (w.vm.vm.as_str(), "vhost-user"));
    assert!(system.sessions > 0 && system.reads > 0 && system.read_bytes >= 512 * system.reads, "{system:?}");
    assert_eq!((system.errors, system.waiting_for_space, system.limit_requests), (0, 0, 0));

    // an application is a disk of its own, which nobody can write to
    assert_eq!(w.read("/sys/block/vdc/ro").await, (0, "1\n".into()));
    assert_eq!(w.exec(&["head", "-n1", "/dev/vdc"]).await, (0, "muster application\n".into()));
    assert_ne!(w.exec(&["dd", "if=/dev/zero", "of=/dev/vdc", "bs=4096", "count=1", "conv=fsync"]).await.0, 0);

    // step 6 of the demonstration
    w.done(Verb::FileWrite, &[("path", "/etc/muster-note"), ("content", "c3lzdGVt")]).await;
    w.done(Verb::FileWrite, &[("path", "/home/muster-note"), ("content", "ZGF0YQ==")]).await;
    let verdict = w.done(Verb::Backup, &[]).await;
    assert_eq!(verdict.message, "", "frozen, not crash-consistent");
    let backup: BackupResult = serde_json::from_str(&verdict.result).unwrap();
    assert_eq!(backup.volumes.len(), 2);
    w.done(Verb::PowerOff, &[]).await;
    w.done(Verb::DestroyVolumes, &[]).await;
    assert_eq!(w.verdict(Verb::PowerOn, &[]).await.code, "volume-lost");
    w.done(Verb::Restore, &[]).await;
    w.done(Verb::PowerOn, &[]).await;
    w.guest_up().await;
    assert_eq!(w.read("/etc/muster-note").await, (0, "system".into()));
    assert_eq!(w.read("/home/muster-note").await, (0, "data".into()));
    w.done(Verb::ResetSession, &[]).await;
    w.guest_up().await;
    assert_ne!(w.read("/etc/muster-note").await.0, 0, "the system disk is the template's again");
    assert_eq!(w.read("/home/muster-note").await, (0, "data".into()));

    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{}/bulk/v1/vms/{}/screenshot", agent.stream_address(), w.vm.vm);
    let png = client.get(url).send().await.unwrap().bytes().await.unwrap();
    assert!(png.starts_with(b"\x89PNG") && png.len() > 500, "{} bytes", png.len());
    let ping = format!("http://{}/bulk/v1/ping", agent.stream_address());
    let ping: serde_json::Value =
        serde_json::from_slice(&client.get(ping).send().await.unwrap().bytes().await.unwrap()).unwrap();
    eprintln!("evidence: {}", ping["evidence"]);
    assert_eq!(ping["evidence"]["guest_file_reads"], 0);
    assert!(!ping["evidence"]["hypervisor"].as_object().unwrap().is_empty());

    // the serial port and the screen, as raw bytes
    let console = upgraded(agent.stream_address(), &format!("/bulk/v1/vms/{}/console", w.vm.vm)).await;
    say_and_hear(console, b"\necho con''sole-$((6*7))\n", "console-42").await;
    let vnc = upgraded(agent.stream_address(), &format!("/bulk/v1/vms/{}/vnc", w.vm.vm)).await;
    say_and_hear(vnc, b"", "RFB 003").await;

    for verb in [Verb::Pause, Verb::Resume, Verb::Suspend, Verb::PowerOn, Verb::Reset] {
        w.done(verb, &[]).await;
    }
    w.guest_up().await;
    w.done(Verb::Reboot, &[]).await;
    w.guest_up().await;

    // the agent dies, the guest does not, its disks do
    let (host, old) = (agent.host_id(), agent.incarnation());
    agent.kill().await;
    let agent = start().await;
    assert_eq!(agent.host_id(), host);
    assert_ne!(agent.incarnation(), old);
    w.controller.beat(vec![]);
    let vm = w.vm.clone();
    let lost = w.controller.system(&vm, "adopted", |s| s.incarnation == agent.incarnation().to_string()).await;
    assert_eq!(lost.enabled_state, 9, "paused");
    assert!(lost.disks.iter().all(|d| d.condition == "lost"));
    assert_eq!(w.verdict(Verb::Resume, &[]).await.code, "volume-lost");
    w.done(Verb::ResetSession, &[]).await;
    w.guest_up().await;
    assert_eq!(w.read("/home/muster-note").await, (0, "data".into()), "from the backup");
    assert_eq!(w.exec(&["head", "-n1", "/dev/vdc"]).await, (0, "muster application\n".into()));

    let (agent, refused) = agent.stop(Stop::Orderly).await.unwrap_err();
    assert_eq!(refused.vms, ["desk 1"]);
    w.done(Verb::Shutdown, &[]).await;
    w.done(Verb::Delete, &[]).await;
    assert!(agent.store().audit().is_exact());
    agent.stop(Stop::Orderly).await.unwrap();
}
