//! A whole connection of NBD: everything the client sent, received in pieces of a length the first two bytes choose.
#![no_main]

use std::sync::Arc;

use muster_block::model::MemoryDevice;
use muster_common::ByteLen;
use muster_export::{Registry, replay};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((piece, input)) = data.split_first_chunk::<2>() else { return };
    let registry = Registry::new();
    let disk = Arc::new(MemoryDevice::new(ByteLen::mib(1)));
    registry.add("disk", disk).expect("the registry is empty");
    replay(input, usize::from(u16::from_le_bytes(*piece)).max(1), &registry);
    let export = registry.get("disk").expect("it was added");
    assert!(!export.is_fenced(), "a client cannot make the device panic: {:?}", export.fence_reason());
    assert_eq!(export.statistics().in_flight, 0, "what began has ended");
    assert_eq!(registry.sessions("disk"), Some(0), "the session has left");
});
