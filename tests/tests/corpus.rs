//! Every input of `tests/fuzz/corpus` once, without a fuzzer: what was found and mended stays mended, on any machine.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Runs all inputs of a target and names those that fail.
fn replay(target: &str, entry: fn(&[u8])) {
    let dir = muster_tests::source_root().join("tests/fuzz/corpus").join(target);
    let mut inputs: Vec<_> = fs::read_dir(&dir).unwrap().map(|file| file.unwrap().path()).collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", dir.display());
    let failed = inputs.iter().filter(|path| {
        let bytes = fs::read(path).unwrap();
        catch_unwind(AssertUnwindSafe(|| entry(&bytes))).is_err()
    });
    let failed: Vec<_> = failed.collect();
    assert!(failed.is_empty(), "{target} fails over {failed:?}");
}

#[test]
fn no_recorded_client_breaks_an_nbd_session() {
    replay("nbd_session", muster_export::fuzz_session);
}

#[test]
fn no_recorded_driver_breaks_a_queue() {
    replay("virtqueue", muster_export::vhost::fuzz_queue);
}

#[test]
fn no_recorded_image_breaks_the_qcow2_reader() {
    replay("qcow2", muster_repository::fuzz::qcow2);
}
