//! What ten desktops of one image take in memory, and what they would take elsewhere.
//!
//!     cargo bench -p muster-tests --bench desktops
//!
//! Ten copies of the Debian of `cargo xtask guest` are changed in their file systems with `debugfs -w`, each as its user
//! might: files of his own, one of them saved twice, files that everybody got, an application that every second one has,
//! files removed, a host name. `e2fsck -fn` finds each file system clean. What differs from the image, 4 KiB by 4 KiB, is
//! then written over NBD into a clone in the store and, with the same requests, into a qcow2 overlay. Everything is read
//! back and compared.
//!
//! The blocks are counted from the ten files, with BLAKE3 and without the store: what is asked is what the store takes
//! over the least there can be. ZFS-style is the same count with chunks of 64 and 128 KiB at fixed places (of a chunk
//! that is not all zero, all bytes).

use std::{
    collections::HashSet,
    fs::{self, File},
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use muster_common::{ByteLen, Digest, VolumeId};
use muster_export::{NbdConfig, NbdServer, Registry, trace::Kind};
use muster_repository::digest_of;
use muster_store::{Store, StoreConfig, VolumeSpec};
use muster_tests::{Process, source_root};

mod nbd;

const DESKTOPS: usize = 10;
const BLOCK: usize = 4096;
const START_LIMIT: Duration = Duration::from_secs(20);

fn main() -> Result<()> {
    let image = source_root().join("target/guest/debian.raw");
    ensure!(image.exists(), "{} is missing: run cargo xtask guest", image.display());
    let dir = tempfile::Builder::new().prefix("desktops").tempdir()?;
    let base = fs::read(&image)?;

    let store = Store::open(StoreConfig::new(ByteLen::gib(2)))?;
    let digest = Digest::from_bytes([7; 32]);
    let builder = store.image_builder(digest, "debian", ByteLen(base.len() as u64))?;
    for (i, chunk) in base.chunks(1 << 20).enumerate() {
        builder.write_chunk((i as u64) << 20, chunk)?;
    }
    builder.finish()?;
    let registry = Arc::new(Registry::new());
    let socket = dir.path().join("nbd.sock");
    let server = NbdServer::start(NbdConfig::unix(&socket), registry.clone())?;

    // each set has what the image has, too: it is kept beside its desktops everywhere
    let mut with_image = [BLOCK, 64 << 10, 128 << 10].map(|size| (size, Unique::of(&base, size)));
    let mut unique = Unique::default();
    let (mut changed, mut logical, mut overlays) = (0u64, 0u64, 0u64);
    for n in 0..DESKTOPS {
        let disk = make(dir.path(), &image, n)?;
        let bytes = fs::read(&disk)?;
        fs::remove_file(&disk)?;
        ensure!(bytes.len() == base.len(), "a desktop is as large as its image");
        unique.add(&bytes, BLOCK);
        with_image.iter_mut().for_each(|(size, unique)| unique.add(&bytes, *size));
        logical += bytes.chunks(BLOCK).filter(|block| !is_zero(block)).count() as u64 * BLOCK as u64;

        let id = VolumeId::random();
        registry.add(id.to_string(), store.create_volume(VolumeSpec::clone_of(id, digest))?)?;
        changed += write(&socket, &id.to_string(), &base, &bytes)?;
        let (overlay, place) = (dir.path().join(format!("{n}.qcow2")), dir.path().join(format!("{n}.sock")));
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&image, &overlay])
            .status()?;
        ensure!(made.success(), "qemu-img create failed");
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--discard=unmap", "-f", "qcow2", "-x", "disk", "-k"]).args([&place, &overlay]);
        let process = Process::spawn(command.stdin(Stdio::null())).context("start qemu-nbd")?;
        write(&place, "disk", &base, &bytes)?;
        drop(process);
        File::open(&overlay)?.sync_all()?;
        overlays += fs::metadata(&overlay)?.blocks() * 512;
    }

    let audit = store.audit();
    ensure!(audit.is_exact(), "the store's books are wrong: {:?}", audit.faults);
    let stats = store.stats();
    let least = unique.bytes;
    let row = |what: &str, bytes: u64| {
        println!("| {what} | {:.1} | {:.3} |", bytes as f64 / 1_048_576.0, bytes as f64 / least as f64);
    };
    println!("{DESKTOPS} desktops of {}, {} changed in place", ByteLen(base.len() as u64), ByteLen(changed));
    println!("| | MiB | of the desktops' unique 4 KiB blocks |");
    println!("|---|---|---|");
    row("unique non-zero 4 KiB blocks of the ten desktops, counted apart", least);
    row("the same with the image's", with_image[0].1.bytes);
    row("muster: blocks in use (the image's, too)", stats.used_bytes.bytes());
    row("muster: frames taken from the machine", stats.frame_bytes.bytes());
    row("muster: metadata", stats.metadata_bytes.bytes());
    row("muster: resident, all together", stats.resident_bytes.bytes());
    row("fixed 64 KiB chunks (ZFS-style), image and desktops", with_image[1].1.bytes);
    row("fixed 128 KiB chunks (ZFS-style), image and desktops", with_image[2].1.bytes);
    let backing = fs::metadata(&image)?.blocks() * 512;
    row("qcow2: backing file and ten overlays, allocated", backing + overlays);
    row("qcow2: the overlays of it", overlays);
    row("ten raw copies, non-zero blocks", logical);
    server.stop();
    Ok(())
}

#[derive(Default)]
struct Unique {
    seen: HashSet<Digest>,
    bytes: u64,
}

impl Unique {
    fn of(bytes: &[u8], size: usize) -> Unique {
        let mut unique = Unique::default();
        unique.add(bytes, size);
        unique
    }

    fn add(&mut self, bytes: &[u8], size: usize) {
        for chunk in bytes.chunks(size).filter(|chunk| !is_zero(chunk)) {
            if self.seen.insert(digest_of(chunk)) {
                self.bytes += chunk.len() as u64;
            }
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Writes what differs, in runs of up to 1 MiB, and reads all of the disk back. Returns the bytes written.
fn write(socket: &Path, export: &str, base: &[u8], bytes: &[u8]) -> Result<u64> {
    let mut client = nbd::Client::connect(socket, export, 1 << 20, START_LIMIT)?;
    ensure!(client.size == bytes.len() as u64, "the disk has another size");
    let (mut at, mut written) = (0, 0);
    let differs = |at: usize| base.get(at..at + BLOCK) != bytes.get(at..at + BLOCK);
    while at < bytes.len() {
        let mut end = at;
        while end < bytes.len() && end - at < 1 << 20 && differs(end) {
            end += BLOCK;
        }
        if end > at {
            client.ask(Kind::Write, at as u64, end - at, &bytes[at..end])?;
            written += (end - at) as u64;
            at = end;
        } else {
            at += BLOCK;
        }
    }
    client.ask(Kind::Flush, 0, 0, &[])?;
    for (i, expected) in bytes.chunks(1 << 20).enumerate() {
        let come = client.ask(Kind::Read, (i as u64) << 20, expected.len(), &[])?;
        ensure!(come == expected, "{export} differs within MiB {i}");
    }
    Ok(written)
}

/// A copy of the image with the changes of user `n`.
fn make(dir: &Path, image: &Path, n: usize) -> Result<PathBuf> {
    let (disk, files) = (dir.join(format!("{n}.raw")), dir.join(format!("files{n}")));
    fs::copy(image, &disk)?;
    fs::create_dir(&files)?;
    let mut script = String::new();
    let mut add = |path: String, bytes: Vec<u8>| -> Result<()> {
        let source = files.join(path.replace('/', "_"));
        fs::write(&source, bytes)?;
        script.push_str(&format!("write {} {path}\n", source.display()));
        Ok(())
    };
    let user = format!("home/user{n}");
    // documents and a profile: nobody else's
    for file in 0..24u64 {
        let len = [700, 9_000, 48_000, 130_001, 400_000, 1_500_000][file as usize % 6];
        add(format!("{user}/document{file}"), text(1000 * (n as u64 + 1) + file, len))?;
    }
    add(format!("{user}/document5.copy"), text(1000 * (n as u64 + 1) + 5, 1_500_000))?;
    // what everybody was sent
    for file in 0..10 {
        add(format!("{user}/shared{file}"), text(file, 300_000))?;
    }
    // an application: many small files and a few large ones
    if n.is_multiple_of(2) {
        for file in 0..200 {
            add(format!("opt/application/{file}"), text(100 + file, if file < 8 { 2_000_000 } else { 11_000 }))?;
        }
    }
    add("etc/desktop-name".into(), format!("desktop{n}\n").into_bytes())?;
    let mut commands = format!("mkdir /home\nmkdir /{user}\nmkdir /opt\nmkdir /opt/application\n{script}");
    // debugfs writes into its current directory: the names are paths from the root
    commands.insert_str(0, "cd /\n");
    commands.push_str("rm /etc/issue\nrm /etc/issue.net\n");
    let mut child = Command::new("debugfs")
        .args(["-w", "-f", "-"])
        .arg(&disk)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start debugfs")?;
    child.stdin.take().context("debugfs's input")?.write_all(commands.as_bytes())?;
    ensure!(child.wait()?.success(), "debugfs failed");
    let checked = Command::new("e2fsck").arg("-fn").arg(&disk).output().context("start e2fsck")?;
    ensure!(checked.status.success(), "the file system is damaged: {}", String::from_utf8_lossy(&checked.stdout));
    let last = Command::new("debugfs").args(["-R", &format!("cat {user}/shared9")]).arg(&disk).output()?;
    ensure!(last.stdout == text(9, 300_000), "debugfs has not written all files");
    fs::remove_dir_all(&files)?;
    Ok(disk)
}

/// Bytes that nothing else has (xorshift), the same for the same seed.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; len];
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    bytes
}
