//! Real clients against the server. A missing client fails the test and names its package, unless MUSTER_ALLOW_SKIP=1.

mod common;

use std::sync::Arc;

use common::{NAME, Served, run, tool};
use muster_block::BlockDevice;
use muster_block::model::MemoryDevice;
use muster_common::ByteLen;
use muster_export::{Listen, Operation};

const SIZE: usize = 48 << 20;

/// Bytes that tell apart every place of the device, with a hole in the middle.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = vec![0; SIZE];
    for chunk in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    bytes[8 << 20..24 << 20].fill(0);
    bytes
}

fn memory(bytes: Vec<u8>) -> (Arc<MemoryDevice>, Served) {
    let device = Arc::new(MemoryDevice::from_bytes(bytes));
    let served = Served::new(device.clone());
    (device, served)
}

#[test]
fn nbdinfo_sees_every_capability() {
    let Some(mut nbdinfo) = tool("nbdinfo", "libnbd-bin") else { return };
    let (_, served) = memory(vec![0; SIZE]);
    let output = run(nbdinfo.args(["--no-content", "--json", &served.uri()]));
    let text = String::from_utf8(output.stdout).unwrap();
    for wanted in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"base:allocation\"",
        "\"is_read_only\": false",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        &format!("\"export-size\": {SIZE}"),
    ] {
        assert!(text.contains(wanted), "{wanted} is missing in {text}");
    }
}

#[test]
fn nbdinfo_lists_exports_and_a_read_only_one_says_so() {
    let Some(mut nbdinfo) = tool("nbdinfo", "libnbd-bin") else { return };
    let (_, served) = memory(vec![0; 1 << 20]);
    served.registry.add("other", Arc::new(MemoryDevice::new(ByteLen::mib(2)).read_only())).unwrap();
    let output = run(nbdinfo.args([
        "--list",
        "--no-content",
        "--json",
        &format!("nbd+unix://?socket={}", served.socket.display()),
    ]));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(NAME) && text.contains("\"other\""), "{text}");
    assert!(text.contains("\"is_read_only\": true"), "{text}");
    assert!(text.contains("\"can_trim\": false"), "{text}");
}

#[test]
fn nbdinfo_maps_data_and_holes() {
    let Some(mut nbdinfo) = tool("nbdinfo", "libnbd-bin") else { return };
    let (_, served) = memory(pattern());
    let output = run(nbdinfo.args(["--map", "--json", &served.uri()]));
    let text: String = String::from_utf8(output.stdout).unwrap().split_whitespace().collect();
    let entry =
        |offset: usize, length: usize, kind: u32| format!("\"offset\":{offset},\"length\":{length},\"type\":{kind}");
    for wanted in [entry(0, 8 << 20, 0), entry(8 << 20, 16 << 20, 3), entry(24 << 20, 24 << 20, 0)] {
        assert!(text.contains(&wanted), "{wanted} is missing in {text}");
    }
}

#[test]
fn nbdcopy_brings_a_whole_device_in_and_out() {
    let Some(mut nbdcopy) = tool("nbdcopy", "libnbd-bin") else { return };
    let (device, served) = memory(vec![0xaa; SIZE]);
    let source = pattern();
    std::fs::write(served.path("in"), &source).unwrap();
    run(nbdcopy.args([served.path("in").as_os_str(), served.uri().as_ref()]));
    assert!(device.contents() == source, "what nbdcopy wrote differs");
    run(tool("nbdcopy", "libnbd-bin").unwrap().args([served.uri().as_ref(), served.path("out").as_os_str()]));
    assert!(std::fs::read(served.path("out")).unwrap() == source, "what nbdcopy read differs");
    let statistics = served.registry.statistics(NAME).unwrap();
    // The hole of 16 MiB was not written as data.
    assert_eq!(statistics.of(Operation::Write).bytes, (SIZE - (16 << 20)) as u64);
    assert_eq!(statistics.of(Operation::Write).errors, 0);
}

#[test]
fn nbdcopy_works_over_tcp_too() {
    let Some(mut nbdcopy) = tool("nbdcopy", "libnbd-bin") else { return };
    let source = pattern();
    let device = Arc::new(MemoryDevice::from_bytes(source.clone()));
    let served =
        Served::with(device, |config| config.listen.push(Listen::Tcp("127.0.0.1:0".parse().expect("an address"))));
    let address = served.server.as_ref().unwrap().addresses()[0];
    run(nbdcopy.arg(format!("nbd://{address}/{NAME}")).arg(served.path("out")));
    assert!(std::fs::read(served.path("out")).unwrap() == source, "what nbdcopy read differs");
}

#[test]
fn qemu_io_patterns_hold() {
    let Some(mut qemu_io) = tool("qemu-io", "qemu-utils") else { return };
    let (device, served) = memory(vec![0; SIZE]);
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
        "read -P 0 0 513",
        "write -P 11 16M 32M",
        "read -P 11 16M 32M",
    ];
    qemu_io.args(["-f", "raw"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let output = run(qemu_io.arg(served.uri()));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("Pattern verification failed"), "{text}");
    let bytes = device.contents();
    assert!(bytes[513..1513].iter().all(|byte| *byte == 9));
    assert!(bytes[16 << 20..].iter().all(|byte| *byte == 11));
}

#[test]
fn qemu_img_converts_both_ways_and_compares_equal() {
    let Some(mut qemu_img) = tool("qemu-img", "qemu-utils") else { return };
    let source = pattern();
    let (device, served) = memory(vec![0x55; SIZE]);
    std::fs::write(served.path("in"), &source).unwrap();
    run(qemu_img.args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(served.path("in")).arg(served.uri()));
    assert!(device.contents() == source, "what qemu-img wrote differs");
    let qcow2 = served.path("out.qcow2");
    run(tool("qemu-img", "qemu-utils")
        .unwrap()
        .args(["convert", "-f", "raw", "-O", "qcow2", &served.uri()])
        .arg(&qcow2));
    run(tool("qemu-img", "qemu-utils")
        .unwrap()
        .args(["compare", "-f", "raw", "-F", "qcow2", &served.uri()])
        .arg(&qcow2));
}

/// Every block size has a run of its own: fio's `--bsrange` with a queue depth above 1 reports false verify errors.
#[test]
fn fio_verifies_what_it_wrote() {
    for (bs, depth) in [("4k", 32), ("64k", 8), ("300k", 4)] {
        let Some(mut fio) = tool("fio", "fio") else { return };
        let (_, served) = memory(vec![0; SIZE]);
        let output = run(fio.current_dir(served.directory.path()).args([
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={}", served.uri()),
            "--rw=randwrite",
            &format!("--bs={bs}"),
            &format!("--iodepth={depth}"),
            &format!("--size={SIZE}"),
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randrepeat=0",
        ]));
        let statistics = served.registry.statistics(NAME).unwrap();
        let reads = statistics.of(Operation::Read).requests;
        assert!(
            reads > 0 && statistics.of(Operation::Read).errors == 0,
            "{bs}: {}",
            String::from_utf8_lossy(&output.stdout)
        );
        assert!(
            served.registry.get(NAME).is_some_and(|export| export.device().geometry().size == ByteLen(SIZE as u64))
        );
    }
}
