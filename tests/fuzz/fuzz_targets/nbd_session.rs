//! A whole connection of NBD: everything the client sent, received in pieces of a length the first two bytes choose.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| muster_export::fuzz_session(data));
