//! A qcow2 image as somebody else made it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| muster_repository::fuzz::qcow2(data));
