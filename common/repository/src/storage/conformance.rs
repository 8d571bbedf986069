//! What every [`Storage`] must do. Panics on the first difference: call it from a test.

use std::sync::Arc;

use super::{Storage, StorageError};

/// Runs the suite; `make` gives a fresh empty storage each time.
///
/// # Panics
/// When the storage does not conform.
pub fn run(make: impl Fn() -> Arc<dyn Storage>) {
    objects_are_what_was_put(&*make());
    absent_objects_are_said_to_be_absent(&*make());
    keys_that_could_escape_are_refused(&*make());
    listing_is_sorted_and_by_prefix(&*make());
    concurrent_puts_of_one_key_leave_one_whole_object(make());
}

fn objects_are_what_was_put(storage: &dyn Storage) {
    let big: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    for bytes in [&[][..], b"x", &big] {
        storage.put("packs/one", bytes).expect("put");
        assert_eq!(storage.get("packs/one").expect("get"), bytes, "a second put replaces the first");
        assert_eq!(storage.len("packs/one").expect("len"), bytes.len() as u64);
    }
    assert_eq!(storage.get_range("packs/one", 4, 8).expect("range"), big[4..12]);
    assert_eq!(storage.get_range("packs/one", big.len() as u64, 0).expect("empty range at the end"), b"");
    for (offset, len) in [(big.len() as u64, 1), (0, big.len() + 1), (u64::MAX, 2)] {
        let got = storage.get_range("packs/one", offset, len);
        assert!(matches!(got, Err(StorageError::OutOfRange { .. })), "{offset}+{len}: {got:?}");
    }
    storage.put("packs/one", b"short").expect("put");
    assert!(storage.get_range("packs/one", 4, 8).is_err(), "ranges come from the new object");
}

fn absent_objects_are_said_to_be_absent(storage: &dyn Storage) {
    assert!(storage.get("packs/none").is_err_and(|e| e.is_not_found()));
    assert!(storage.get_range("packs/none", 0, 1).is_err_and(|e| e.is_not_found()));
    assert!(storage.len("packs/none").is_err_and(|e| e.is_not_found()));
    storage.delete("packs/none").expect("deleting nothing is fine");
    storage.put("packs/some", b"1").expect("put");
    storage.get_range("packs/some", 0, 1).expect("range");
    storage.delete("packs/some").expect("delete");
    assert!(storage.get("packs/some").is_err_and(|e| e.is_not_found()));
    assert!(storage.get_range("packs/some", 0, 1).is_err_and(|e| e.is_not_found()));
    assert_eq!(storage.list("").expect("list"), Vec::<String>::new());
}

fn keys_that_could_escape_are_refused(storage: &dyn Storage) {
    for key in ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".hidden", "a/.b", "A", "a b", "a\0", "a/b/c/d/e", "ä"] {
        assert!(matches!(storage.put(key, b""), Err(StorageError::InvalidKey { .. })), "{key:?}");
        assert!(matches!(storage.get(key), Err(StorageError::InvalidKey { .. })), "{key:?}");
        assert!(matches!(storage.delete(key), Err(StorageError::InvalidKey { .. })), "{key:?}");
    }
}

fn listing_is_sorted_and_by_prefix(storage: &dyn Storage) {
    for key in ["refs/b", "packs/2", "refs/a", "format", "packs/10", "refs-not/x"] {
        storage.put(key, key.as_bytes()).expect("put");
    }
    assert_eq!(storage.list("refs/").expect("list"), ["refs/a", "refs/b"]);
    assert_eq!(storage.list("packs/1").expect("list"), ["packs/10"]);
    let all = storage.list("").expect("list");
    assert_eq!(all, ["format", "packs/10", "packs/2", "refs-not/x", "refs/a", "refs/b"]);
    assert_eq!(storage.list("nothing/").expect("list"), Vec::<String>::new());
}

fn concurrent_puts_of_one_key_leave_one_whole_object(storage: Arc<dyn Storage>) {
    std::thread::scope(|scope| {
        for writer in 0..4u8 {
            let storage = &storage;
            scope.spawn(move || {
                for _ in 0..8 {
                    storage.put("packs/shared", &vec![writer; 50_000 + writer as usize]).expect("put");
                    let got = storage.get("packs/shared").expect("get");
                    assert!(got.iter().all(|&b| b == got[0]), "an object is never mixed");
                    assert_eq!(got.len(), 50_000 + got[0] as usize);
                }
            });
        }
    });
}
