//! What the agent says of its disks while a stock NBD client uses them. Needs nbdcopy (package libnbd-bin).

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use muster_idl::v1::{Verb, VolumeMetrics};
use support::{Controller, Depot, Place, image_bytes, libnbd, network, template, vm_on, wait_for};

/// False: there is none, and that is allowed.
async fn nbdcopy(arguments: &[String]) -> bool {
    let Some(output) = libnbd("nbdcopy", arguments).await else { return false };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_disk_does_is_counted_and_said_also_when_no_hypervisor_counts_it() {
    let (network, depot, place) = (network(91), Depot::start().await, Place::new(91));
    let mut config = place.config();
    config.export.iops = 20;
    let agent = place.start_with(&network, config).await;
    let mut controller = Controller::join(&network, &depot.url);
    controller.beat(vec![]);
    let mut metrics = controller.bus.subscriber::<VolumeMetrics>(256).unwrap();
    let image = depot.import(image_bytes(4, 2));
    let vm = vm_on(&agent, "desk");
    let template = template(&image, Some(1));
    controller.done(Verb::Create, std::slice::from_ref(&vm), &[("template", &template)]).await;
    let system = controller.system(&vm, "two disks", |s| s.disks.len() == 2).await;
    let disk = &system.disks[0];
    let uri = format!("nbd+unix:///{}.{}?socket={}", disk.volume, disk.generation, agent.export_socket().display());

    controller.done(Verb::PowerOn, std::slice::from_ref(&vm), &[]).await;
    let idle = wait_for("a word of the idle disk", Duration::from_secs(15), || {
        let mut said = std::iter::from_fn(|| metrics.try_recv()).filter_map(|s| s.value());
        said.find(|m| m.volume == disk.volume)
    })
    .await;
    assert_eq!((idle.reads, idle.read_max_us, idle.throttled_requests), (0, 0.0, 0));
    let copy = place.path().join("copy").display().to_string();
    if !nbdcopy(&[uri, copy]).await {
        return;
    }
    let mut worst = 0.0_f64;
    let last = wait_for("all of it to be counted", Duration::from_secs(15), || {
        let said = std::iter::from_fn(|| metrics.try_recv()).filter_map(|s| s.value());
        let mut last = None;
        for m in said.filter(|m| m.volume == disk.volume) {
            assert!(m.read_p50_us <= m.read_p99_us && m.read_p99_us <= m.read_max_us, "{m:?}");
            worst = worst.max(m.read_max_us);
            last = Some(m);
        }
        // 4 MiB without its holes; nbdcopy does not read those
        last.filter(|m| m.sessions == 0 && m.read_bytes >= 2 << 20)
    })
    .await;
    assert_eq!((last.vm.as_str(), last.target.as_str(), last.transport.as_str()), (vm.vm.as_str(), "vda", "nbd"));
    assert_eq!((last.generation, last.writes, last.written_bytes, last.errors), (disk.generation, 0, 0, 0));
    assert!(last.reads > 10 && last.read_bytes <= 4 << 20, "{last:?}");
    assert!(last.latency_window_us > 0 && worst > 0.0, "{last:?}");
    // the limit holds over NBD, and is said
    assert_eq!((last.limit_requests, last.limit_bytes), (20, 0));
    assert!(last.throttled_requests > 0 && last.throttled_us > 100_000, "{last:?}");

    let image = vec![7; 1 << 20];
    std::fs::write(place.path().join("in"), &image).unwrap();
    let data = &system.disks[1];
    let uri = format!("nbd+unix:///{}.{}?socket={}", data.volume, data.generation, agent.export_socket().display());
    nbdcopy(&[place.path().join("in").display().to_string(), uri]).await;
    let written = wait_for("what was written", Duration::from_secs(15), || {
        let mut said = std::iter::from_fn(|| metrics.try_recv()).filter_map(|s| s.value());
        said.find(|m| m.volume == data.volume && m.writes > 0 && m.sessions == 0)
    })
    .await;
    assert!(written.written_bytes > 0 && written.target == "vdb" && written.errors == 0, "{written:?}");
}
