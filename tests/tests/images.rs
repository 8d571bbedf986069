//! Images on their whole way: what the estimate says is what the store takes; and with real processes, a desktop's disk
//! becomes an image, comes out as a file, goes under other desktops.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use muster_common::{ByteLen, Digest};
use muster_repository::{
    estimate::Estimator,
    source::{ImageFormat, ReadAt, open_image, read_data},
};
use muster_store::{Image, Store, StoreConfig};
use muster_tests::{Fleet, fleet::LIMIT, outcomes, tool, wait_for};
use serde_json::Value;

fn run(program: &Path, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{} {arguments:?}: {}{}",
        program.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A disk with a bit of everything: contents of their own, contents that repeat, zeros, holes; `salt` makes an eighth of it
/// another one's.
fn disk(path: &Path, mib: u64, salt: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(mib << 20).unwrap();
    let mut block = vec![0u8; 4096];
    for n in 0..mib * 256 {
        let content = match n % 16 {
            0..3 => continue,
            3 => 0,
            4 | 5 => 1 + n % 50,
            6 | 7 => (n + 1) << 20 | salt,
            _ => (n + 1) << 20,
        };
        let mut state = content;
        for word in block.chunks_exact_mut(8) {
            state =
                if content == 0 { 0 } else { state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(n % 50 + 1) };
            word.copy_from_slice(&if content <= 50 { content } else { state }.to_le_bytes());
        }
        file.write_all_at(&block, n * 4096).unwrap();
    }
}

fn load(store: &Store, source: &dyn ReadAt, n: u8) -> Arc<Image> {
    let builder = store.image_builder(Digest::from_bytes([n; 32]), "image", source.size()).unwrap();
    read_data(source, |offset, bytes| Ok::<_, anyhow::Error>(builder.write_chunk(offset, bytes)?)).unwrap();
    builder.finish().unwrap()
}

#[test]
fn the_estimate_is_what_the_store_takes() {
    let Some(qemu_img) = tool("qemu-img", "qemu-utils") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (first, second, packed) = (dir.path().join("a.raw"), dir.path().join("b.raw"), dir.path().join("b.qcow2"));
    disk(&first, 192, 1);
    disk(&second, 192, 2);
    let (from, to) = (second.to_str().unwrap(), packed.to_str().unwrap());
    run(&qemu_img, &["convert", "-c", "-O", "qcow2", from, to]);
    let go = &mut |_| ControlFlow::Continue(());
    let open = |path: &PathBuf| open_image(path, ImageFormat::Auto).unwrap();

    let mut estimator = Estimator::new();
    let store = Store::open(StoreConfig::new(ByteLen::gib(1))).unwrap();
    let empty = store.stats();
    for (n, path) in [&first, &packed].into_iter().enumerate() {
        let before = store.stats();
        let estimate = estimator.add(&*open(path), go).unwrap();
        let _image = load(&store, &*open(path), n as u8 + 1);
        let after = store.stats();
        let taken = after.used_bytes.0 - before.used_bytes.0;
        assert_eq!(estimate.added.0, taken, "{}", path.display());
        assert_eq!(estimate.resident, after.used_bytes);
        assert!(estimate.added.0 > 10 << 20);
        let off = (after.used_bytes.0 - empty.used_bytes.0).abs_diff(estimate.resident.0) as f64;
        assert!(off <= 0.02 * estimate.resident.0 as f64, "{off} bytes off");
    }
    assert!(estimator.resident().0 < 160 << 20, "most of the second is the first's: {}", estimator.resident());
}

fn system_disk(fleet: &Fleet, vm: &str) -> Value {
    let vm = fleet.json(&["vm", "show", vm]);
    vm["disks"].as_array().unwrap().iter().find(|d| d["role"] == "system").unwrap().clone()
}

fn nbd_uri(fleet: &Fleet, disk: &Value) -> String {
    let name = format!("{}.{}", disk["volume"].as_str().unwrap(), disk["generation"]);
    format!("nbd+unix:///{name}?socket={}", fleet.dir().join("h1/r/nbd.sock").display())
}

fn refused(fleet: &Fleet, arguments: &[&str]) -> String {
    let output = fleet.muster(arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?} was not refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_desktop_becomes_an_image_and_a_file_and_is_never_taken_for_something_else() {
    let Some(qemu_io) = tool("qemu-io", "qemu-utils") else { return };
    let Some(qemu_img) = tool("qemu-img", "qemu-utils") else { return };
    let Some(nbdcopy) = tool("nbdcopy", "libnbd-bin") else { return };
    let fleet = Fleet::start(1, "sim:///?seed=5");
    fleet.furnish(1);
    let vm = "host1-desk01";
    assert_eq!(outcomes(&fleet.json(&["vm", "power-on", vm])), [("done".to_string(), 1)]);
    let small = fleet.json(&["image", "show", "small"]);

    // the user changes his disk: data, and what would make it a qcow2 image with a backing file, were anybody to look
    let header = fleet.dir().join("header");
    let mut bytes = vec![0u8; 512];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    bytes[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 11]);
    bytes[256..267].copy_from_slice(b"/etc/shadow");
    std::fs::write(&header, bytes).unwrap();
    let uri = nbd_uri(&fleet, &system_disk(&fleet, vm));
    let put = format!("write -s {} 0 512", header.display());
    run(&qemu_io, &["-f", "raw", "-c", &put, "-c", "write -P 0x51 1M 100k", "-c", "write -z 2M 1M", &uri]);
    let expected = fleet.dir().join("expected.raw");
    run(&nbdcopy, &[&uri, expected.to_str().unwrap()]);

    let text = refused(&fleet, &["image", "commit", vm, "--as", "small"]);
    assert!(text.contains("--new-revision"), "{text}");
    let image = fleet.json(&["image", "commit", vm, "--as", "golden"]);
    assert_eq!((image["name"].as_str(), image["revision"].as_u64()), (Some("golden"), Some(1)));
    assert_eq!((&image["parent"], image["parent_name"].as_str()), (&small["digest"], Some("small@1")));
    assert_eq!(image["origin"], "VM host1-desk01 on host1");
    // of 64 chunks, the first and two that hold the 100 KiB are new; the zeros are none
    assert_eq!(image["new_bytes"].as_u64(), Some(3 * 65_536), "only what the controller lacked came: {image:#}");
    let text = refused(&fleet, &["image", "commit", vm, "--as", "twin"]);
    assert!(text.contains("the same content is there already, as image golden@1"), "{text}");
    assert!(fleet.json(&["image", "verify", "golden"])["chunks"].as_u64().unwrap() > 40);

    // out again, raw and qcow2
    let raw = fleet.dir().join("out.raw");
    let raw_text = raw.to_str().unwrap();
    let done = fleet.json(&["image", "export", "golden", raw_text]);
    assert_eq!(done["bytes"].as_u64(), Some(4 << 20));
    assert!(std::fs::read(&raw).unwrap() == std::fs::read(&expected).unwrap());
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&raw).unwrap());
    assert!(blocks * 512 < 4 << 20, "the zeros are a hole: {blocks} blocks");
    let text = refused(&fleet, &["image", "export", "golden", raw_text, "--format", "qcow2"]);
    assert!(text.contains("exists already (--force"), "{text}");
    let qcow2 = fleet.dir().join("out.qcow2");
    let qcow2_text = qcow2.to_str().unwrap();
    std::fs::write(&qcow2, "in the way").unwrap();
    fleet.json(&["image", "export", "golden@1", qcow2_text, "--format", "qcow2", "--force"]);
    run(&qemu_img, &["check", "-q", "-f", "qcow2", qcow2_text]);
    run(&qemu_img, &["compare", "-q", "-f", "qcow2", "-F", "raw", qcow2_text, raw_text]);
    // a disk that does not hold it: said as such, and nothing is left (the mount goes with its namespace)
    let Some(unshare) = tool("unshare", "util-linux") else { return };
    let tiny = fleet.dir().join("tiny");
    std::fs::create_dir(&tiny).unwrap();
    let script = "mount -t tmpfs -o size=1m tmpfs \"$1\" || exit 77; d=$1; shift; \"$@\"; s=$?; ls -A \"$d\"; exit $s";
    // a user namespace only where it is needed: there is none below a chroot
    let who: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user"] };
    let full = Command::new(unshare)
        .args(who)
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(&tiny)
        .arg(muster_tests::program("muster"))
        .arg("--connect")
        .arg(fleet.socket())
        .args(["image", "export", "golden"])
        .arg(tiny.join("disk.raw"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&full.stderr);
    assert_eq!(full.status.code(), Some(2), "{text}");
    assert!(text.contains("export golden@1") && text.contains("No space left on device"), "{text}");
    assert_eq!(String::from_utf8_lossy(&full.stdout), "", "a part of it was left");

    let left = std::fs::read_dir(fleet.dir())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".part"));
    assert_eq!(left.count(), 0);

    // the template moves to it, and brings the old one as an application
    let change = fleet.json(&["template", "change", "desk", "--image", "golden", "--application", "small"]);
    assert_eq!((&change["image"], &change["applications"][0]["image"]), (&image["digest"], &small["digest"]));
    let made = fleet.json(&["vm", "create", "--template", "desk", "--name", "next"]);
    assert_eq!(outcomes(&made), [("done".to_string(), 1)], "{made:#}");
    let next = wait_for("the new VM's disks", LIMIT, || {
        let next = fleet.json(&["vm", "show", "next"]);
        (next["disks"].as_array()?.len() == 3).then_some(next)
    });
    let copy = fleet.dir().join("copy.raw");
    run(&nbdcopy, &[&nbd_uri(&fleet, &next["disks"][0]), copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&expected).unwrap());
    let application = &next["disks"][2];
    assert_eq!(application["role"], "application");
    let uri = nbd_uri(&fleet, application);
    run(&nbdcopy, &[&uri, copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(fleet.dir().join("small.raw")).unwrap());
    let write = Command::new(&qemu_io).args(["-f", "raw", "-c", "write 0 4k", &uri]).output().unwrap();
    assert!(!write.status.success(), "an application cannot be written to");

    // who uses what
    let images = wait_for("the store to tell of its images", LIMIT, || {
        let images = fleet.json(&["image", "ls"]);
        let told = images.as_array()?.iter().all(|i| i["volumes"].as_u64().is_some_and(|v| v > 0));
        told.then_some(images)
    });
    let of = |name: &str| images.as_array().unwrap().iter().find(|i| i["name"] == name).unwrap().clone();
    assert_eq!((of("small")["volumes"].as_u64(), of("small")["vms"].as_u64()), (Some(2), Some(2)));
    assert_eq!(of("golden")["residency"][0]["volumes"].as_u64(), Some(1));
    let text = refused(&fleet, &["image", "rm", "small"]);
    assert!(text.contains("image small@1 is used by template desk"), "{text}");
    fleet.json(&["template", "change", "desk", "--no-applications"]);
    let text = refused(&fleet, &["image", "rm", "small"]);
    assert!(text.contains("is used by VM"), "{text}");
    for desktop in [vm, "next"] {
        fleet.json(&["vm", "power-off", desktop]);
        let gone = fleet.json(&["vm", "delete", desktop, "--yes"]);
        assert_eq!(outcomes(&gone), [("done".to_string(), 1)], "{gone:#}");
    }
    fleet.json(&["image", "rm", "small"]);
    let image = fleet.json(&["image", "show", "golden"]);
    assert_eq!((&image["parent"], image["parent_name"].as_str()), (&small["digest"], Some("")), "its parent is gone");
    fleet.json(&["image", "verify", "golden"]);
}

#[test]
fn an_import_says_before_what_it_will_take() {
    let fleet = Fleet::start(1, "sim:///?seed=6");
    let (first, second) = (fleet.dir().join("a.raw"), fleet.dir().join("b.raw"));
    disk(&first, 16, 1);
    disk(&second, 16, 2);
    let (first, second) = (first.to_str().unwrap(), second.to_str().unwrap());
    let estimate = fleet.json(&["image", "import", first, "--estimate"]);
    assert!(fleet.json(&["image", "ls"]).as_array().unwrap().is_empty(), "nothing is imported");
    let image = fleet.json(&["image", "import", first, "--name", "a"]);
    assert_eq!(estimate["resident_bytes"], image["resident_estimate_bytes"]);
    assert_eq!(estimate["new_bytes"], image["new_bytes"]);
    let beside = fleet.json(&["image", "estimate", second, "--beside", "a"]);
    let pulled = fleet.json(&["image", "pull", "a", "host1"]);
    assert_eq!(outcomes(&pulled), [("done".to_string(), 1)], "{pulled:#}");
    let image = fleet.json(&["image", "import", second, "--name", "b"]);
    assert_eq!(beside["new_bytes"], image["new_bytes"]);
    let unique = || {
        wait_for("the store to tell of itself", LIMIT, || {
            let store = fleet.json(&["store", "show", "host1"]);
            store["unique_blocks"].as_u64().filter(|blocks| *blocks > 0)
        })
    };
    let alone = wait_for("the first image's blocks", LIMIT, || {
        (unique() * 4096 == estimate["resident_bytes"].as_u64()?).then(unique)
    });
    fleet.json(&["image", "pull", "b", "host1"]);
    wait_for("the second image's blocks, as many as were said", LIMIT, || {
        ((unique() - alone) * 4096 == beside["added_bytes"].as_u64()?).then_some(())
    });
    let text = refused(&fleet, &["image", "import", fleet.dir().to_str().unwrap()]);
    assert!(text.contains("is not a regular file"), "{text}");
    let cut = fleet.dir().join("cut.raw");
    std::fs::write(&cut, vec![1; 1000]).unwrap();
    let text = refused(&fleet, &["image", "estimate", cut.to_str().unwrap()]);
    assert!(text.contains("not a multiple of 512"), "{text}");
}
