//! A file system on a volume, whose serving process is killed (SIGKILL) while files are written: ext4 on a loop device on
//! `nbdfuse` on our export. The next process attaches to the store in surviving memory; after the journal's replay the file
//! system is clean, and every file whose fsync had returned is there with what was written. (nbdfuse fails an assertion of
//! its own when its server goes; all that matters here is that the kernel gets errors.)
//!
//! 4 kills; `MUSTER_EXT4_KILLS=100` for more. Needs root: a loop device.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;
mod private;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use common::{NAME, run, tool, wait_for};
use muster_block::conformance::Random;
use muster_common::{ByteLen, VolumeId};
use muster_export::{NbdConfig, NbdServer, Registry};
use muster_store::{Attached, Store, StoreConfig, VolumeSpec};
use private::{Nbdfuse, privately, skip};

const SIZE: ByteLen = ByteLen::mib(96);
/// Each with a directory of its own.
const WRITERS: u64 = 2;
const FILES: u64 = 24;
const LONGEST: u64 = 300_000;
/// A file that never changes.
const MARK: &str = "mark";
const PLACE: &str = "MUSTER_TEST_PLACE";

fn volume_id() -> VolumeId {
    VolumeId::from_bytes([5; 16])
}

/// The process that is killed.
#[test]
fn a_process_that_serves_until_it_is_killed() {
    let Some(place) = std::env::var_os(PLACE).map(PathBuf::from) else { return };
    let directory = Some(place.join("arena"));
    let config = StoreConfig { directory, ..StoreConfig::new(ByteLen(SIZE.bytes() * 2)) };
    let (store, attached) = Store::open_or_attach(config).unwrap();
    let volume = match attached {
        Attached::Fresh(None) => store.create_volume(VolumeSpec::blank(volume_id(), SIZE)).unwrap(),
        Attached::Fresh(Some(why)) => panic!("what the last process left is lost: {why}"),
        Attached::Warm(report) => {
            assert!(report.faults.is_empty(), "{:?}", report.faults);
            store.volume(volume_id()).unwrap()
        }
    };
    let audit = store.audit();
    assert!(audit.is_exact(), "{:?}", audit.faults);
    let registry = Arc::new(Registry::new());
    registry.add(NAME, volume).unwrap();
    let server = NbdServer::start(NbdConfig::unix(place.join("nbd.sock")), registry).unwrap();
    fs::write(place.join("ready"), b"").unwrap();
    // until the test lets go of the other end
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
    server.stop();
    assert!(store.audit().is_exact());
    store.discard();
}

fn serve(place: &Path) -> Child {
    let ready = place.join("ready");
    let _ = fs::remove_file(&ready);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_that_serves_until_it_is_killed", "--nocapture"])
        .env(PLACE, place)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the serving process", || {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        ready.exists()
    });
    child
}

/// A mounted file system, on a loop device that goes with it.
struct Ext4(PathBuf);

impl Ext4 {
    fn mount(file: &Path, place: &Path) -> Ext4 {
        fs::create_dir_all(place).unwrap();
        run(Command::new("mount").args(["-t", "ext4", "-o", "loop,discard"]).arg(file).arg(place));
        Ext4(place.to_owned())
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        // in namespaces of its own nothing is left of it even when this fails; then the next step says so
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// What a file holds, by its number.
fn contents(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut data = vec![seed as u8; random.below(LONGEST) as usize];
    if !seed.is_multiple_of(4) {
        random.fill(&mut data);
    }
    data
}

/// One writer's files as they are known to be, and what was under way at the end.
#[derive(Default)]
struct Known {
    files: BTreeMap<String, u64>,
    pending: Option<(String, Option<u64>)>,
}

/// Writes and deletes files until that fails.
fn write_until_it_fails(directory: &Path, known: &mut Known, seed: u64, done: &AtomicU64) -> io::Error {
    let mut random = Random(seed);
    loop {
        let name = format!("f{}", random.below(FILES));
        let new = (random.below(6) > 0).then(|| random.next_u64());
        known.pending = Some((name.clone(), new));
        if let Err(error) = put(directory, &name, new) {
            return error;
        }
        match new {
            Some(seed) => known.files.insert(name, seed),
            None => known.files.remove(&name),
        };
        known.pending = None;
        done.fetch_add(1, Relaxed);
    }
}

/// Puts a file in the place of another, as programs do that must not lose either; or removes it.
fn put(directory: &Path, name: &str, new: Option<u64>) -> io::Result<()> {
    let path = directory.join(name);
    match new {
        Some(seed) => {
            let beside = directory.join("new");
            let mut file = File::create(&beside)?;
            file.write_all(&contents(seed))?;
            file.sync_all()?;
            fs::rename(&beside, &path)?;
        }
        None => match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        },
    }
    File::open(directory)?.sync_all()?;
    // A directory's fsync returns without an error, too, when its changes were in a commit of somebody else's that has failed
    // (jbd2: "nothing to commit"). A file's asks the device, always: when that answers now, it did so then.
    File::open(directory.join(MARK))?.sync_all()
}

/// Every file is there as it is known to be. What was under way happened or not; after this it is known.
fn check(directory: &Path, known: &mut Known) {
    let (pending, maybe) = known.pending.take().unzip();
    for name in (0..FILES).map(|n| format!("f{n}")) {
        let found = match fs::read(directory.join(&name)) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => panic!("{}: {error}", directory.join(&name).display()),
        };
        let before = known.files.get(&name).copied();
        let mut may = vec![before];
        if pending.as_ref() == Some(&name) {
            may.extend(maybe);
        }
        let is = may.iter().find(|may| may.map(contents) == found);
        let Some(is) = is else {
            let path = directory.join(&name);
            panic!("{} is not as it was when its fsync returned: {}", path.display(), differs(&may, found.as_deref()));
        };
        match is {
            Some(seed) => known.files.insert(name, *seed),
            None => known.files.remove(&name),
        };
    }
}

/// What a file is and what it might have been, for who has to find out why.
fn differs(may: &[Option<u64>], found: Option<&[u8]>) -> String {
    let Some(found) = found else { return format!("it is absent, and might be {may:?}") };
    let of_one = |seed: &Option<u64>| {
        let Some(wanted) = seed.map(contents) else { return "absent".to_owned() };
        let blocks = found.chunks(4096).zip(wanted.chunks(4096)).enumerate().filter(|(_, (a, b))| a != b);
        let blocks: Vec<_> = blocks.map(|(n, (a, _))| (n, a.iter().all(|byte| *byte == 0), a[0])).collect();
        format!("{} bytes, differing in blocks (number, zero, first byte) {blocks:?}", wanted.len())
    };
    format!("it has {} bytes; might be {:?}", found.len(), may.iter().map(of_one).collect::<Vec<_>>())
}

struct Tools {
    place: tempfile::TempDir,
    uri: String,
}

impl Tools {
    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }
    fn nbdfuse(&self) -> Nbdfuse {
        Nbdfuse::mount(&self.path("device"), &self.uri)
    }
}

/// Changes nothing, and is content.
fn fsck(file: &Path) {
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(file));
}

fn rounds(kills: u64) {
    let place = tempfile::Builder::new().prefix("muster-ext4-").tempdir_in("/dev/shm").unwrap();
    let uri = format!("nbd+unix:///{NAME}?socket={}", place.path().join("nbd.sock").display());
    let tools = Tools { place, uri };
    let mut known: Vec<Known> = (0..WRITERS).map(|_| Known::default()).collect();
    let directory = |writer: usize| tools.path("files").join(format!("writer{writer}"));
    let mut child = serve(tools.place.path());
    {
        let mounted = tools.nbdfuse();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(mounted.file()));
        let _files = Ext4::mount(&mounted.file(), &tools.path("files"));
        for writer in 0..WRITERS as usize {
            fs::create_dir(directory(writer)).unwrap();
            fs::write(directory(writer).join(MARK), b"").unwrap();
        }
    }
    let mut total = 0;
    for round in 1..=kills {
        {
            let mounted = tools.nbdfuse();
            let _files = Ext4::mount(&mounted.file(), &tools.path("files"));
            let done = AtomicU64::new(0);
            let wanted = 2 + Random(round).below(40);
            std::thread::scope(|scope| {
                for (writer, known) in known.iter_mut().enumerate() {
                    let (done, directory) = (&done, directory(writer));
                    let seed = round << 8 | writer as u64;
                    scope.spawn(move || write_until_it_fails(&directory, known, seed, done));
                }
                wait_for("the writers", || done.load(Relaxed) >= wanted);
                child.kill().unwrap();
                child.wait().unwrap();
            });
            total += done.load(Relaxed);
        }
        child = serve(tools.place.path());
        let mounted = tools.nbdfuse();
        {
            // replays the journal
            let _files = Ext4::mount(&mounted.file(), &tools.path("files"));
            (0..).zip(&mut known).for_each(|(writer, known)| check(&directory(writer), known));
        }
        fsck(&mounted.file());
    }
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success(), "the last process does not end in order");
    eprintln!("{kills} kills, {total} files written or deleted with fsync");
}

#[test]
fn files_that_were_synced_survive_a_kill_of_the_process_that_serves_them() {
    privately("files_that_were_synced_survive_a_kill_of_the_process_that_serves_them", || {
        let missing = ["mkfs.ext4", "e2fsck"].iter().any(|program| tool(program, "e2fsprogs").is_none());
        if missing || !Nbdfuse::is_here() {
            return;
        }
        if !Path::new("/dev/loop-control").exists() || !is_root() {
            return skip("loop devices need root, and a kernel that has them");
        }
        rounds(std::env::var("MUSTER_EXT4_KILLS").map_or(4, |kills| kills.parse().unwrap()));
    });
}

/// Root of the machine, not of a namespace.
fn is_root() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}
