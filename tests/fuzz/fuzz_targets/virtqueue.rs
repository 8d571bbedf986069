//! A queue of the disk server, as a driver could have left it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| muster_export::vhost::fuzz_queue(data));
