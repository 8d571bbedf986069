//! Objects as files. A put writes `tmp/<n>`, fsyncs it, renames it to its place and fsyncs that directory; so after a crash
//! an object is whole or absent, and what lies in `tmp/` is removed at the next open.
//!
//! The steps go through [`Files`], so that tests run the same code over a simulated disk that forgets what was not synced.

use std::{
    collections::HashSet,
    fs::{File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::{Storage, StorageError, check_key};

/// The file system calls a directory storage is made of. Each is one step of a crash test.
pub(crate) trait Files: Send + Sync {
    type File: Send + Sync;
    fn create(&self, path: &Path) -> io::Result<Self::File>;
    fn write(&self, file: &Self::File, bytes: &[u8]) -> io::Result<()>;
    fn sync(&self, file: &Self::File) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn sync_directory(&self, path: &Path) -> io::Result<()>;
    fn make_directory(&self, path: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    fn open(&self, path: &Path) -> io::Result<Self::File>;
    fn length(&self, file: &Self::File) -> io::Result<u64>;
    fn read_at(&self, file: &Self::File, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Names in a directory: (name, is a directory).
    fn names(&self, path: &Path) -> io::Result<Vec<(String, bool)>>;
}

/// The host's file system.
pub(crate) struct HostFiles;

impl Files for HostFiles {
    type File = File;
    fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).open(path)
    }
    fn write(&self, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }
    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }
    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
    fn make_directory(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
    fn open(&self, path: &Path) -> io::Result<File> {
        File::open(path)
    }
    fn length(&self, file: &File) -> io::Result<u64> {
        Ok(file.metadata()?.len())
    }
    fn read_at(&self, file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        file.read_exact_at(buf, offset)
    }
    fn names(&self, path: &Path) -> io::Result<Vec<(String, bool)>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            if let Ok(name) = entry.file_name().into_string() {
                names.push((name, entry.file_type()?.is_dir()));
            }
        }
        Ok(names)
    }
}

/// Open files kept for ranged reads: a pull reads a pack's 500 chunks one after another.
const KEPT_OPEN: usize = 16;

/// Objects as files below one directory of this host, locked against other processes.
pub struct DirectoryStorage {
    objects: Objects<HostFiles>,
    /// Holds the lock as long as the storage lives.
    _lock: File,
}

impl DirectoryStorage {
    /// Opens the directory, making it when it is absent (its parent must be there).
    pub fn open(root: &Path) -> Result<Self, StorageError> {
        let lock_path = root.join(".lock");
        if !root.is_dir() {
            let made = HostFiles.make_directory(root).and_then(|()| match root.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => HostFiles.sync_directory(parent),
                _ => HostFiles.sync_directory(Path::new(".")),
            });
            made.map_err(|source| failed("create directory", root, source))?;
        }
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(|source| failed("create", &lock_path, source))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StorageError::InUse { path: root.to_path_buf() }),
            Err(TryLockError::Error(source)) => return Err(failed("lock", &lock_path, source)),
        }
        Ok(Self { objects: Objects::open(HostFiles, root)?, _lock: lock })
    }
}

impl Storage for DirectoryStorage {
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), StorageError> {
        self.objects.put(key, bytes)
    }
    fn get(&self, key: &str) -> Result<Vec<u8>, StorageError> {
        self.objects.get(key)
    }
    fn get_range(&self, key: &str, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        self.objects.get_range(key, offset, len)
    }
    fn len(&self, key: &str) -> Result<u64, StorageError> {
        self.objects.len(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        self.objects.list(prefix)
    }
    fn delete(&self, key: &str) -> Result<(), StorageError> {
        self.objects.delete(key)
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> StorageError {
    StorageError::Io { action, path: path.to_path_buf(), source }
}

/// The storage over any [`Files`].
pub(crate) struct Objects<F: Files> {
    files: F,
    root: PathBuf,
    next_temporary: AtomicU64,
    /// Directories known to be there, durably.
    directories: Mutex<HashSet<PathBuf>>,
    open: Mutex<Vec<(String, Arc<F::File>)>>,
}

impl<F: Files> Objects<F> {
    pub fn open(files: F, root: &Path) -> Result<Self, StorageError> {
        let objects = Self {
            files,
            root: root.to_path_buf(),
            next_temporary: AtomicU64::new(0),
            directories: Mutex::default(),
            open: Mutex::default(),
        };
        let temporary = root.join("tmp");
        match objects.files.names(&temporary) {
            Ok(names) => {
                for (name, _) in names {
                    let path = temporary.join(name);
                    objects.files.remove(&path).map_err(|source| failed("remove", &path, source))?;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => objects.directory(&temporary)?,
            Err(source) => return Err(failed("list", &temporary, source)),
        }
        Ok(objects)
    }

    /// Makes a directory below the root, and makes that durable.
    fn directory(&self, path: &Path) -> Result<(), StorageError> {
        let mut known = self.directories.lock();
        if path == self.root || known.contains(path) {
            return Ok(());
        }
        let below = path.strip_prefix(&self.root).unwrap_or(path);
        let mut at = self.root.clone();
        for part in below.components() {
            let parent = at.clone();
            at.push(part);
            if known.contains(&at) {
                continue;
            }
            match self.files.make_directory(&at) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(failed("create directory", &at, source)),
            }
            // also when it was there: whoever made it may have crashed before this
            self.files.sync_directory(&parent).map_err(|source| failed("sync directory", &parent, source))?;
            known.insert(at.clone());
        }
        Ok(())
    }

    fn path(&self, key: &str) -> Result<PathBuf, StorageError> {
        check_key(key)?;
        // `tmp` is ours
        if key == "tmp" || key.starts_with("tmp/") {
            return Err(StorageError::InvalidKey { key: key.to_string() });
        }
        Ok(self.root.join(key))
    }

    fn file(&self, key: &str) -> Result<Arc<F::File>, StorageError> {
        let path = self.path(key)?;
        let mut open = self.open.lock();
        if let Some(at) = open.iter().position(|(k, _)| k == key) {
            let found = open.remove(at);
            let file = found.1.clone();
            open.push(found);
            return Ok(file);
        }
        // opened under the lock, so that a put or delete of this key cannot leave its old file in the list
        let file = Arc::new(self.files.open(&path).map_err(|source| self.missing(key, "open", &path, source))?);
        if open.len() >= KEPT_OPEN {
            open.remove(0);
        }
        open.push((key.to_string(), file.clone()));
        Ok(file)
    }

    fn close(&self, key: &str) {
        self.open.lock().retain(|(k, _)| k != key);
    }

    fn missing(&self, key: &str, action: &'static str, path: &Path, source: io::Error) -> StorageError {
        match source.kind() {
            // a component of the key is an object itself: then there is no object of this key
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => StorageError::NotFound { key: key.to_string() },
            _ => failed(action, path, source),
        }
    }

    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), StorageError> {
        let path = self.path(key)?;
        let parent = path.parent().unwrap_or(&self.root);
        self.directory(parent)?;
        let name = self.next_temporary.fetch_add(1, Ordering::Relaxed).to_string();
        let temporary = self.root.join("tmp").join(name);
        let written = (|| {
            let file = self.files.create(&temporary).map_err(|source| failed("create", &temporary, source))?;
            self.files.write(&file, bytes).map_err(|source| failed("write", &temporary, source))?;
            // a failed fsync is final: the kernel may have dropped the pages, a second one would lie
            self.files.sync(&file).map_err(|source| failed("sync", &temporary, source))?;
            self.files.rename(&temporary, &path).map_err(|source| failed("rename to", &path, source))
        })();
        self.close(key);
        if written.is_err() {
            let _ = self.files.remove(&temporary); // best effort; the next open removes it too
            return written;
        }
        self.files.sync_directory(parent).map_err(|source| failed("sync directory", parent, source))
    }

    fn get(&self, key: &str) -> Result<Vec<u8>, StorageError> {
        let path = self.path(key)?;
        let file = self.files.open(&path).map_err(|source| self.missing(key, "open", &path, source))?;
        let length = self.files.length(&file).map_err(|source| failed("stat", &path, source))?;
        let mut bytes = vec![0; length as usize];
        self.files.read_at(&file, 0, &mut bytes).map_err(|source| failed("read", &path, source))?;
        Ok(bytes)
    }

    fn get_range(&self, key: &str, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        let file = self.file(key)?;
        let path = || self.root.join(key);
        let have = self.files.length(&file).map_err(|source| failed("stat", &path(), source))?;
        let need = offset.saturating_add(len as u64);
        if need > have {
            return Err(StorageError::OutOfRange { key: key.to_string(), need, have });
        }
        let mut bytes = vec![0; len];
        self.files.read_at(&file, offset, &mut bytes).map_err(|source| failed("read", &path(), source))?;
        Ok(bytes)
    }

    fn len(&self, key: &str) -> Result<u64, StorageError> {
        let path = self.path(key)?;
        let file = self.files.open(&path).map_err(|source| self.missing(key, "open", &path, source))?;
        self.files.length(&file).map_err(|source| failed("stat", &path, source))
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        let mut keys = Vec::new();
        // only directories that can hold such keys are read
        let start = prefix.rfind('/').map_or("", |at| &prefix[..at]);
        let mut todo = vec![start.to_string()];
        while let Some(directory) = todo.pop() {
            let path = self.root.join(&directory);
            let names = match self.files.names(&path) {
                Ok(names) => names,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(failed("list", &path, source)),
            };
            for (name, is_directory) in names {
                let key = if directory.is_empty() { name } else { format!("{directory}/{name}") };
                if self.path(&key).is_err() {
                    continue; // ours (`tmp`, `.lock`) or not an object
                }
                if is_directory {
                    todo.push(key);
                } else if key.starts_with(prefix) {
                    keys.push(key);
                }
            }
        }
        keys.sort();
        Ok(keys)
    }

    fn delete(&self, key: &str) -> Result<(), StorageError> {
        let path = self.path(key)?;
        let removed = self.files.remove(&path);
        self.close(key);
        match removed {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(failed("remove", &path, source)),
        }
        let parent = path.parent().unwrap_or(&self.root);
        self.files.sync_directory(parent).map_err(|source| failed("sync directory", parent, source))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn directory_storage_conforms() {
        let dir = tempfile::TempDir::new().unwrap();
        let count = AtomicU64::new(0);
        crate::storage::conformance::run(|| {
            let root = dir.path().join(count.fetch_add(1, Ordering::Relaxed).to_string());
            Arc::new(DirectoryStorage::open(&root).unwrap())
        });
    }

    #[test]
    fn a_second_storage_on_one_directory_is_refused_until_the_first_is_closed() {
        let dir = tempfile::TempDir::new().unwrap();
        let first = DirectoryStorage::open(dir.path()).unwrap();
        assert!(matches!(DirectoryStorage::open(dir.path()), Err(StorageError::InUse { .. })));
        first.put("a", b"1").unwrap();
        drop(first);
        assert_eq!(DirectoryStorage::open(dir.path()).unwrap().get("a").unwrap(), b"1");
    }

    #[test]
    fn what_a_crash_left_in_tmp_is_removed_at_open() {
        let dir = tempfile::TempDir::new().unwrap();
        drop(DirectoryStorage::open(dir.path()).unwrap());
        std::fs::write(dir.path().join("tmp/17"), b"half a pack").unwrap();
        let storage = DirectoryStorage::open(dir.path()).unwrap();
        assert!(!dir.path().join("tmp/17").exists());
        assert_eq!(storage.list("").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn more_objects_than_are_kept_open_can_be_read() {
        let dir = tempfile::TempDir::new().unwrap();
        let storage = DirectoryStorage::open(dir.path()).unwrap();
        for i in 0..3 * KEPT_OPEN {
            storage.put(&format!("packs/{i}"), &[i as u8; 100]).unwrap();
        }
        for i in (0..3 * KEPT_OPEN).chain(0..3 * KEPT_OPEN) {
            assert_eq!(storage.get_range(&format!("packs/{i}"), 99, 1).unwrap(), [i as u8]);
        }
        assert!(storage.objects.open.lock().len() <= KEPT_OPEN);
    }

    /// A disk that forgets: file contents live until the crash unless synced, names unless their directory was synced.
    #[derive(Default, Clone)]
    struct Node {
        now: Vec<u8>,
        synced: Option<Vec<u8>>,
    }

    #[derive(Default, Clone)]
    struct Disk {
        nodes: Vec<Node>,
        /// Path to node; directories have none.
        names: BTreeMap<PathBuf, Option<usize>>,
        durable_names: BTreeMap<PathBuf, Option<usize>>,
        steps: u64,
        crash_at: u64,
    }

    #[derive(Clone, Default)]
    struct SimFiles(Arc<Mutex<Disk>>);

    impl SimFiles {
        fn step(&self) -> io::Result<parking_lot::MutexGuard<'_, Disk>> {
            let mut disk = self.0.lock();
            disk.steps += 1;
            if disk.steps > disk.crash_at {
                return Err(io::Error::other("power lost"));
            }
            Ok(disk)
        }

        /// What is there after power comes back. A name that was not synced may or may not have reached the disk (`luck`
        /// decides for each); bytes that were not synced are lost or garbage.
        fn after_crash(&self, luck: u64) -> SimFiles {
            let mut disk = self.0.lock().clone();
            let mut names = disk.durable_names.clone();
            let changed: std::collections::BTreeSet<PathBuf> =
                disk.names.keys().chain(disk.durable_names.keys()).cloned().collect();
            for (i, path) in changed.iter().enumerate() {
                if luck >> (i % 64) & 1 == 1 {
                    match disk.names.get(path) {
                        Some(node) => names.insert(path.clone(), *node),
                        None => names.remove(path),
                    };
                }
            }
            // a name whose directory did not reach the disk is not there
            let all = names.clone();
            names.retain(|path, _| {
                path.ancestors().skip(1).all(|up| up == Path::new("/r") || up == Path::new("/") || all.contains_key(up))
            });
            for (i, node) in disk.nodes.iter_mut().enumerate() {
                let lost = match luck >> (i % 63) & 3 {
                    0 => Vec::new(),
                    1 => vec![0xee; node.now.len()],
                    _ => node.now[..node.now.len() / 2].to_vec(),
                };
                node.now = node.synced.clone().unwrap_or(lost);
                node.synced = Some(node.now.clone());
            }
            disk.durable_names = names.clone();
            disk.names = names;
            disk.steps = 0;
            disk.crash_at = u64::MAX;
            SimFiles(Arc::new(Mutex::new(disk)))
        }
    }

    fn absent() -> io::Error {
        io::ErrorKind::NotFound.into()
    }

    impl Files for SimFiles {
        type File = usize;
        fn create(&self, path: &Path) -> io::Result<usize> {
            let mut disk = self.step()?;
            if disk.names.contains_key(path) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            disk.nodes.push(Node::default());
            let node = disk.nodes.len() - 1;
            disk.names.insert(path.to_path_buf(), Some(node));
            Ok(node)
        }
        fn write(&self, file: &usize, bytes: &[u8]) -> io::Result<()> {
            self.step()?.nodes[*file].now.extend_from_slice(bytes);
            Ok(())
        }
        fn sync(&self, file: &usize) -> io::Result<()> {
            let mut disk = self.step()?;
            let node = &mut disk.nodes[*file];
            node.synced = Some(node.now.clone());
            Ok(())
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            let mut disk = self.step()?;
            let node = disk.names.remove(from).ok_or_else(absent)?;
            disk.names.insert(to.to_path_buf(), node);
            Ok(())
        }
        fn sync_directory(&self, path: &Path) -> io::Result<()> {
            let mut disk = self.step()?;
            let inside = |p: &Path| p.parent() == Some(path);
            disk.durable_names.retain(|p, _| !inside(p));
            let now: Vec<_> = disk.names.iter().filter(|(p, _)| inside(p)).map(|(p, n)| (p.clone(), *n)).collect();
            disk.durable_names.extend(now);
            Ok(())
        }
        fn make_directory(&self, path: &Path) -> io::Result<()> {
            let mut disk = self.step()?;
            match disk.names.entry(path.to_path_buf()) {
                std::collections::btree_map::Entry::Occupied(_) => Err(io::ErrorKind::AlreadyExists.into()),
                std::collections::btree_map::Entry::Vacant(v) => {
                    v.insert(None);
                    Ok(())
                }
            }
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            self.step()?.names.remove(path).map(|_| ()).ok_or_else(absent)
        }
        fn open(&self, path: &Path) -> io::Result<usize> {
            self.0.lock().names.get(path).copied().flatten().ok_or_else(absent)
        }
        fn length(&self, file: &usize) -> io::Result<u64> {
            Ok(self.0.lock().nodes[*file].now.len() as u64)
        }
        fn read_at(&self, file: &usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            let disk = self.0.lock();
            let from = &disk.nodes[*file].now[offset as usize..];
            buf.copy_from_slice(&from[..buf.len()]);
            Ok(())
        }
        fn names(&self, path: &Path) -> io::Result<Vec<(String, bool)>> {
            let disk = self.0.lock();
            if path != Path::new("/r") && !disk.names.contains_key(path) {
                return Err(absent());
            }
            let inside = disk.names.iter().filter(|(p, _)| p.parent() == Some(path));
            Ok(inside.map(|(p, n)| (p.file_name().unwrap().to_string_lossy().into_owned(), n.is_none())).collect())
        }
    }

    #[derive(Debug, Clone)]
    enum Act {
        Put(usize, u8, usize),
        Delete(usize),
    }

    const KEYS: [&str; 4] = ["format", "packs/a", "packs/b", "refs/x"];

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let act = prop_oneof![
            3 => (0..KEYS.len(), any::<u8>(), 0..5000usize).prop_map(|(k, b, n)| Act::Put(k, b, n)),
            1 => (0..KEYS.len()).prop_map(Act::Delete),
        ];
        proptest::collection::vec(act, 1..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn after_power_loss_at_any_step_each_object_is_whole_and_acknowledged_changes_are_there(
            acts in acts(), crash_at in 0..60u64, luck in any::<u64>(),
        ) {
            let files = SimFiles::default();
            files.0.lock().crash_at = crash_at;
            let root = Path::new("/r");
            // for each key, what a reader may find: the acknowledged state, and the one in flight at the crash
            let mut allowed: Vec<Vec<Option<Vec<u8>>>> = vec![vec![None]; KEYS.len()];
            if let Ok(storage) = Objects::open(files.clone(), root) {
                for act in &acts {
                    let (key, after, done) = match act {
                        Act::Put(k, b, n) => {
                            let bytes = vec![*b; *n];
                            let done = storage.put(KEYS[*k], &bytes);
                            (*k, Some(bytes), done)
                        }
                        Act::Delete(k) => (*k, None, storage.delete(KEYS[*k])),
                    };
                    if done.is_ok() {
                        allowed[key] = vec![after];
                    } else {
                        allowed[key].push(after);
                        break;
                    }
                }
            }
            let storage = Objects::open(files.after_crash(luck), root).unwrap();
            for (key, allowed) in KEYS.iter().zip(&allowed) {
                let found = match storage.get(key) {
                    Ok(bytes) => Some(bytes),
                    Err(e) if e.is_not_found() => None,
                    Err(e) => panic!("{e}"),
                };
                prop_assert!(
                    allowed.contains(&found),
                    "{key}: {:?} not among {:?}",
                    found.map(|f| f.len()),
                    allowed.iter().map(|a| a.as_ref().map(Vec::len)).collect::<Vec<_>>()
                );
                prop_assert_eq!(storage.list(key).unwrap().len(), usize::from(storage.get(key).is_ok()));
            }
        }
    }
}
