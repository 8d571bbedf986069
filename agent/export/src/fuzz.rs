//! A whole NBD connection over bytes that somebody chose: for fuzzing, and for the replay of what fuzzing found.

use std::sync::Arc;

use muster_block::model::MemoryDevice;
use muster_common::ByteLen;

use crate::{connection::replay, registry::Registry};

const DISK: ByteLen = ByteLen::mib(1);

/// Serves a disk named `disk` to a client that sent `data`. The first two bytes are the longest run of bytes received at
/// once, little-endian.
///
/// # Panics
/// When the server broke one of its promises: that is what is looked for.
#[doc(hidden)]
pub fn fuzz_session(data: &[u8]) {
    let Some((piece, input)) = data.split_first_chunk::<2>() else { return };
    let registry = Registry::new();
    let Ok(export) = registry.add("disk", Arc::new(MemoryDevice::new(DISK))) else { return };
    replay(input, usize::from(u16::from_le_bytes(*piece)).max(1), &registry);
    assert!(!export.is_fenced(), "a client cannot make the device panic: {:?}", export.fence_reason());
    assert_eq!(export.statistics().in_flight, 0, "what began has ended");
    assert_eq!(registry.sessions("disk"), Some(0), "the session has left");
}
