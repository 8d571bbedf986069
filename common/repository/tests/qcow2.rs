//! The qcow2 reader against `qemu-img convert`, and what it must refuse. Needs qemu-img and qemu-io (Debian: qemu-utils).
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic")]

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use muster_common::ErrorCode;
use muster_repository::source::{ImageFormat, ReadAt, SourceError, open_image};
use tempfile::TempDir;

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed for this test (Debian: apt install qemu-utils): {e}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn create(path: &Path, options: &str, size: &str) {
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(path), size]);
}

fn qemu_io(path: &Path, commands: &[String]) {
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(text(path));
    run("qemu-io", &arguments);
}

fn read_all(source: &dyn ReadAt) -> Vec<u8> {
    let mut bytes = vec![0xaa; source.size().0 as usize];
    // uneven pieces, so that reads begin and end inside of clusters
    for (i, piece) in bytes.chunks_mut(100_003).enumerate() {
        source.read_at(i as u64 * 100_003, piece).unwrap();
    }
    bytes
}

/// What the spans call zero is zero, and they cover everything.
fn check_spans(source: &dyn ReadAt, bytes: &[u8]) {
    let mut at = 0;
    while at < bytes.len() as u64 {
        let mut spans = Vec::new();
        source.spans(at, bytes.len() as u64 - at, &mut spans).unwrap();
        assert!(!spans.is_empty());
        for span in spans {
            let end = at + span.len;
            assert!(!span.zero || bytes[at as usize..end as usize].iter().all(|&b| b == 0), "{at}..{end} is not zero");
            at = end;
        }
    }
    assert_eq!(at, bytes.len() as u64);
}

fn equals_qemu(path: &Path) {
    let raw = path.with_extension("raw");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(path), text(&raw)]);
    let expected = std::fs::read(&raw).unwrap();
    let image = open_image(path, ImageFormat::Auto).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(image.size().0, expected.len() as u64);
    let got = read_all(&*image);
    if let Some(at) = got.iter().zip(&expected).position(|(a, b)| a != b) {
        panic!("{}: differs from qemu-img at {at:#x}", path.display());
    }
    check_spans(&*image, &expected);
    // the raw file read as raw is the same disk
    let raw = open_image(&raw, ImageFormat::Auto).unwrap();
    assert_eq!(read_all(&*raw), expected);
    check_spans(&*raw, &expected);
}

/// Deterministic, neither zero nor repeating.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

fn write_pattern(path: &Path) {
    let commands: Vec<String> = [
        "write -P 0x11 0 64k",
        "write -P 0x22 1000000 300000",
        "write -P 0x33 3145728 2097152",
        "write -z 3200000 500000",
        "write -P 0x44 5242368 512",
        "discard 1100000 100000",
        "write -P 0x55 8388096 512",
    ]
    .map(str::to_string)
    .into();
    qemu_io(path, &commands);
}

#[test]
fn images_of_every_cluster_size_and_both_versions_read_as_qemu_reads_them() {
    let dir = TempDir::new().unwrap();
    for version in ["0.10", "1.1"] {
        for bits in 9..=21 {
            let path = dir.path().join(format!("v{version}-{bits}.qcow2"));
            create(&path, &format!("compat={version},cluster_size={}", 1 << bits), "8M");
            equals_qemu(&path);
            write_pattern(&path);
            equals_qemu(&path);
        }
    }
}

#[test]
fn compressed_images_read_as_qemu_reads_them() {
    let dir = TempDir::new().unwrap();
    let raw = dir.path().join("plain.img");
    // half compressible, half noise, a hole, and an end inside of a cluster
    let file = File::create(&raw).unwrap();
    file.write_all_at(&vec![0x5a; 1 << 20], 0).unwrap();
    file.write_all_at(&noise(1 << 20, 7), 3 << 20).unwrap();
    file.write_all_at(&b"muster ".repeat(100_000), 5 << 20).unwrap();
    file.set_len((6 << 20) + 512 * 3).unwrap();
    for bits in 9..=21 {
        let path = dir.path().join(format!("packed-{bits}.qcow2"));
        let options = format!("cluster_size={}", 1 << bits);
        run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", &options, text(&raw), text(&path)]);
        equals_qemu(&path);
        // plain and compressed clusters mixed
        qemu_io(&path, &["write -P 0x77 100000 50000".to_string(), "write -z 4000000 300000".to_string()]);
        equals_qemu(&path);
    }
}

#[test]
fn preallocated_images_and_sizes_that_end_inside_of_a_cluster_read_as_qemu_reads_them() {
    let dir = TempDir::new().unwrap();
    for preallocation in ["off", "metadata", "falloc", "full"] {
        let path = dir.path().join(format!("{preallocation}.qcow2"));
        create(&path, &format!("preallocation={preallocation}"), "5243392");
        equals_qemu(&path);
        qemu_io(&path, &["write -P 0x99 5242880 512".to_string()]);
        equals_qemu(&path);
    }
    let path = dir.path().join("sparse.qcow2");
    create(&path, "cluster_size=65536", "3T");
    qemu_io(&path, &["write -P 9 2T 64k".to_string()]);
    let image = open_image(&path, ImageFormat::Qcow2).unwrap();
    let mut buf = vec![0; 65536];
    image.read_at(2 << 40, &mut buf).unwrap();
    assert_eq!(buf, vec![9; 65536]);
}

#[test]
fn internal_snapshots_are_ignored_and_the_active_state_is_read() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("snapshot.qcow2");
    create(&path, "cluster_size=65536", "4M");
    qemu_io(&path, &["write -P 1 0 1M".to_string()]);
    run("qemu-img", &["snapshot", "-c", "before", text(&path)]);
    qemu_io(&path, &["write -P 2 512k 1M".to_string()]);
    equals_qemu(&path);
}

fn refused(path: &Path) -> SourceError {
    match open_image(path, ImageFormat::Auto) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(e) => e,
    }
}

fn patched(dir: &TempDir, name: &str, base: &Path, changes: &[(u64, &[u8])]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::copy(base, &path).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    for (at, bytes) in changes {
        file.write_all_at(bytes, *at).unwrap();
    }
    path
}

#[test]
fn images_that_name_other_files_are_refused() {
    let dir = TempDir::new().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![1; 1 << 20]).unwrap();
    let path = dir.path().join("overlay.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&path)]);
    let error = refused(&path);
    assert_eq!(error.code(), ErrorCode::ExternalReference);
    assert!(error.to_string().contains("a backing file"), "{error}");

    let path = dir.path().join("external.qcow2");
    let data = dir.path().join("data.raw");
    create(&path, &format!("data_file={}", text(&data)), "1M");
    let error = refused(&path);
    assert_eq!(error.code(), ErrorCode::ExternalReference);
    assert!(error.to_string().contains("an external data file"), "{error}");
}

#[test]
fn features_that_are_not_supported_are_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("extended.qcow2");
    create(&path, "extended_l2=on,cluster_size=128k", "1M");
    assert!(refused(&path).to_string().contains("extended L2"));

    // Not LUKS here: qemu-img times its key derivation, and fails where the processor clock of a thread is coarse.
    let path = dir.path().join("aes.qcow2");
    let secret = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s"];
    run("qemu-img", &[&["create", "-q", "-f", "qcow2"], &secret[..], &[text(&path), "1M"]].concat());
    assert!(refused(&path).to_string().contains("encryption"));

    let good = dir.path().join("good.qcow2");
    create(&good, "cluster_size=65536", "1M");
    for (bits, expected, code) in [
        (1u64, "dirty", ErrorCode::Corrupt),
        (2, "corrupt", ErrorCode::Corrupt),
        (1 << 5, "incompatible feature bit 5", ErrorCode::UnsupportedFormat),
        (1 << 63, "incompatible feature bit 63", ErrorCode::UnsupportedFormat),
        (8, "compression type 0", ErrorCode::UnsupportedFormat),
    ] {
        let path = patched(&dir, "bits.qcow2", &good, &[(72, &bits.to_be_bytes())]);
        let error = refused(&path);
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.code(), code);
    }
    let zstd = patched(&dir, "zstd.qcow2", &good, &[(72, &8u64.to_be_bytes()), (104, &[1])]);
    assert!(refused(&zstd).to_string().contains("zstd"));
    let version = patched(&dir, "version.qcow2", &good, &[(4, &4u32.to_be_bytes())]);
    assert!(refused(&version).to_string().contains("version 4"));
    let luks = patched(&dir, "luks.qcow2", &good, &[(32, &2u32.to_be_bytes())]);
    assert!(refused(&luks).to_string().contains("encryption"));
}

#[test]
fn an_image_cut_anywhere_is_refused_and_never_panics() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("whole.qcow2");
    create(&path, "cluster_size=4096", "1M");
    qemu_io(&path, &["write -P 3 0 1M".to_string()]);
    let whole = std::fs::read(&path).unwrap();
    let cut = dir.path().join("cut.qcow2");
    for len in (1..whole.len()).step_by(1021).chain([71, 72, 103, 104, 111, 112, whole.len() - 1]) {
        std::fs::write(&cut, &whole[..len]).unwrap();
        let code = refused_or_qemu_agrees(&cut, len);
        assert_eq!(code, ErrorCode::Corrupt, "cut to {len}");
    }
}

fn refused_or_qemu_agrees(path: &Path, len: usize) -> ErrorCode {
    match open_image(path, ImageFormat::Qcow2) {
        Ok(_) => panic!("cut to {len} bytes, it was opened"),
        Err(SourceError::NotQcow2) if len < 4 => ErrorCode::Corrupt,
        Err(e) => e.code(),
    }
}

#[test]
fn tables_that_overlap_or_leave_the_file_or_have_reserved_bits_are_refused() {
    let dir = TempDir::new().unwrap();
    let good = dir.path().join("good.qcow2");
    create(&good, "cluster_size=4096", "8M");
    qemu_io(&good, &["write -P 3 0 8M".to_string()]);
    let head = std::fs::read(&good).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
    let l1 = be64(40);
    let l1_first = be64(l1 as usize);
    let l2 = l1_first & 0x00ff_ffff_ffff_fe00;
    let far = (1u64 << 40).to_be_bytes();
    let cases: [(&str, u64, Vec<u8>, &str); 14] = [
        ("l1 reserved", l1, (l1_first | 1).to_be_bytes().to_vec(), "reserved bits"),
        ("l1 reserved high", l1, (l1_first | 1 << 60).to_be_bytes().to_vec(), "reserved bits"),
        ("l1 into file end", l1, (1u64 << 63 | 1 << 40).to_be_bytes().to_vec(), "outside of the file"),
        ("l1 unaligned", l1, (l2 + 512).to_be_bytes().to_vec(), "not aligned"),
        ("l1 twice", l1 + 8, l1_first.to_be_bytes().to_vec(), "overlaps"),
        ("l2 on the header", l1, 4096u64.to_be_bytes().to_vec(), "overlaps"),
        ("l1 offset", 40, far.to_vec(), "outside of the file"),
        ("l1 on the refcounts", 40, be64(48).to_be_bytes().to_vec(), "overlaps"),
        ("l1 short", 36, 1u32.to_be_bytes().to_vec(), "its size needs"),
        ("refcounts", 48, far.to_vec(), "outside of the file"),
        ("no refcounts", 56, 0u32.to_be_bytes().to_vec(), "refcount table"),
        ("data reserved", l2, (be64(l2 as usize) | 2).to_be_bytes().to_vec(), "reserved bits"),
        ("data outside", l2, (1u64 << 40).to_be_bytes().to_vec(), "outside of the file"),
        ("data in a table", l2, l2.to_be_bytes().to_vec(), "into a table"),
    ];
    for (name, at, bytes, expected) in cases {
        let path = patched(&dir, "bad.qcow2", &good, &[(at, &bytes)]);
        let error = refused(&path);
        assert!(error.to_string().contains(expected), "{name}: {error}");
        assert_eq!(error.code(), ErrorCode::Corrupt, "{name}");
    }
}

/// Writes a source as qcow2, and has qemu-img check it and compare it with a raw file.
fn exported(dir: &TempDir, name: &str, source: std::sync::Arc<dyn ReadAt>, raw: &Path) -> PathBuf {
    use std::io::Write;
    let path = dir.path().join(name);
    let mut file = File::create(&path).unwrap();
    let writer = muster_repository::export::Qcow2Writer::new(source).unwrap();
    writer
        .write(&mut |piece: &[u8]| {
            file.write_all(piece).unwrap();
            Ok::<_, SourceError>(())
        })
        .unwrap();
    assert_eq!(file.metadata().unwrap().len(), writer.file_len());
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
    run("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", text(&path), text(raw)]);
    path
}

#[test]
fn what_the_writer_writes_is_sound_to_qemu_and_reads_back() {
    let dir = TempDir::new().unwrap();
    let raw = dir.path().join("plain.raw");
    let file = File::create(&raw).unwrap();
    file.write_all_at(&noise(3 << 20, 5), 1 << 20).unwrap();
    file.write_all_at(&noise(70_000, 6), 700 << 20).unwrap();
    file.write_all_at(b"the end", (1600 << 20) - 512).unwrap();
    file.set_len((1600 << 20) + 512).unwrap();
    let path = exported(&dir, "plain.qcow2", open_image(&raw, ImageFormat::Raw).unwrap(), &raw);
    assert!(std::fs::metadata(&path).unwrap().len() < 5 << 20, "holes are not written");
    // out of our own reader again, and out of a repository
    let again = exported(&dir, "again.qcow2", open_image(&path, ImageFormat::Qcow2).unwrap(), &raw);
    assert!(std::fs::read(&path).unwrap() == std::fs::read(again).unwrap());
    let storage = std::sync::Arc::new(muster_repository::storage::MemoryStorage::new());
    let repository = muster_repository::Repository::open(storage).unwrap();
    let source = open_image(&path, ImageFormat::Auto).unwrap();
    let go = &mut |_| std::ops::ControlFlow::Continue(());
    let ingested = repository.ingest(&*source, &Default::default(), go).unwrap();
    let manifest = std::sync::Arc::new(repository.manifest(&ingested.digest).unwrap());
    exported(&dir, "repository.qcow2", std::sync::Arc::new(repository.reader(manifest)), &raw);
    let empty = dir.path().join("empty.raw");
    File::create(&empty).unwrap().set_len(1 << 30).unwrap();
    exported(&dir, "empty.qcow2", open_image(&empty, ImageFormat::Raw).unwrap(), &empty);
}

#[test]
fn a_raw_image_that_begins_like_qcow2_is_raw_when_it_is_said_to_be() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("guest.raw");
    let header = dir.path().join("header.qcow2");
    create(&header, "cluster_size=65536", "1M");
    let mut bytes = std::fs::read(&header).unwrap();
    // what a guest would write to have a file of the host read: a backing file
    bytes[8..16].copy_from_slice(&4096u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&11u32.to_be_bytes());
    bytes[4096..4107].copy_from_slice(b"/etc/shadow");
    bytes.resize(2 << 20, 7);
    std::fs::write(&path, &bytes).unwrap();
    assert!(read_all(&*open_image(&path, ImageFormat::Raw).unwrap()) == bytes);
    assert_eq!(refused(&path).code(), ErrorCode::ExternalReference, "sniffed, it is refused and nothing is opened");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
    #[test]
    fn any_sequence_of_writes_reads_as_qemu_reads_it(
        bits in 9u32..22,
        version in proptest::sample::select(vec!["0.10", "1.1"]),
        steps in proptest::collection::vec((0u8..4, 0u64..(6 << 20) / 512, 1u64..600, 1u8..255), 1..12),
    ) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("any.qcow2");
        create(&path, &format!("compat={version},cluster_size={}", 1 << bits), "6M");
        let commands: Vec<String> = steps
            .iter()
            .map(|(kind, at, len, byte)| {
                let (at, len) = (at * 512, (len * 512).min((6 << 20) - at * 512));
                match kind {
                    0 => format!("write -z {at} {len}"),
                    1 => format!("discard {at} {len}"),
                    _ => format!("write -P {byte} {at} {len}"),
                }
            })
            .collect();
        qemu_io(&path, &commands);
        equals_qemu(&path);
        let raw = path.with_extension("raw");
        exported(&dir, "exported.qcow2", open_image(&path, ImageFormat::Auto).unwrap(), &raw);
    }
}

#[test]
fn claims_out_of_proportion_take_no_memory() {
    let dir = TempDir::new().unwrap();
    let good = dir.path().join("good.qcow2");
    create(&good, "cluster_size=65536", "1M");
    let cases: [(&str, u64, &[u8]); 6] = [
        ("an L1 table of 32 GiB", 36, &u32::MAX.to_be_bytes()),
        ("a refcount table of 256 TiB", 56, &u32::MAX.to_be_bytes()),
        ("a disk of 2^64 bytes", 24, &(u64::MAX - 511).to_be_bytes()),
        ("a disk of 64 TiB behind an L1 of one entry", 24, &(64u64 << 40).to_be_bytes()),
        ("a header of 4 GiB", 100, &u32::MAX.to_be_bytes()[..]),
        ("snapshots without end", 60, &u32::MAX.to_be_bytes()),
    ];
    for (what, at, bytes) in cases {
        let path = patched(&dir, "claim.qcow2", &good, &[(at, bytes)]);
        let error = refused(&path);
        assert!(matches!(error.code(), ErrorCode::Corrupt | ErrorCode::UnsupportedFormat), "{what}: {error}");
    }
    // a file with a hole of 8 TiB: no table may lie on another, so what is read stays in proportion to the tables
    let path = patched(&dir, "hole.qcow2", &good, &[(8 << 40, b"end")]);
    assert!(open_image(&path, ImageFormat::Auto).is_ok());
}

#[test]
fn other_formats_are_refused_with_the_way_to_convert_them() {
    let dir = TempDir::new().unwrap();
    for format in ["vmdk", "vdi", "vhdx", "vpc", "qed"] {
        let path = dir.path().join(format);
        run("qemu-img", &["create", "-q", "-f", format, text(&path), "4M"]);
        let error = refused(&path);
        assert_eq!(error.code(), ErrorCode::UnsupportedFormat);
        assert!(error.to_string().contains("qemu-img convert -O raw"), "{error}");
    }
    let path = dir.path().join("image.gz");
    std::fs::write(&path, [&b"\x1f\x8b"[..], &[0; 1022]].concat()).unwrap();
    assert!(refused(&path).to_string().contains("unpack it first"));
}

#[test]
fn raw_files_that_are_no_disks_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("raw");
    std::fs::write(&path, b"").unwrap();
    assert!(matches!(refused(&path), SourceError::Empty));
    std::fs::write(&path, vec![1; 1000]).unwrap();
    assert!(matches!(refused(&path), SourceError::OddSize { size: 1000 }));
    assert!(matches!(refused(dir.path()), SourceError::NotAFile | SourceError::Io { .. }));
    assert_eq!(refused(Path::new("/dev/zero")).code(), ErrorCode::InvalidArgument);
    assert_eq!(refused(&dir.path().join("absent")).code(), ErrorCode::NotFound);
    std::fs::write(&path, vec![1; 1024]).unwrap();
    assert!(matches!(open_image(&path, ImageFormat::Qcow2), Err(SourceError::NotQcow2)));
}

#[test]
fn damaged_images_never_panic_and_valid_ones_still_read() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("seed.qcow2");
    let raw = dir.path().join("seed.raw");
    std::fs::write(&raw, [vec![7; 1 << 18], noise(1 << 18, 3)].concat()).unwrap();
    run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", "cluster_size=4096", text(&raw), text(&path)]);
    qemu_io(&path, &["write -P 1 0 20000".to_string(), "write -z 40000 20000".to_string()]);
    let seed = std::fs::read(&path).unwrap();
    muster_repository::fuzz::qcow2(&seed);
    // mostly valid, rarely broken: one to three changed bytes, half of them in the tables
    let mut random = noise(400_000, 11).into_iter().cycle();
    let mut next = || u64::from_le_bytes(std::array::from_fn(|_| random.next().unwrap()));
    for _ in 0..20_000 {
        let mut bytes = seed.clone();
        for _ in 0..1 + next() % 3 {
            let within = if next() % 2 == 0 { 128 } else { bytes.len() as u64 };
            let at = (next() % within) as usize;
            bytes[at] = next() as u8;
        }
        if next() % 8 == 0 {
            bytes.truncate((next() % bytes.len() as u64) as usize);
        }
        muster_repository::fuzz::qcow2(&bytes);
    }
}
