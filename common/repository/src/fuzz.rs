//! Entries for a fuzzer: each takes any bytes, must return, and must never panic or take memory out of proportion.

use crate::{manifest::Manifest, pack, reference::Reference};

/// A manifest that is accepted encodes to the same bytes again.
///
/// # Panics
/// When it does not: that is the finding.
pub fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        // compatible feature bits may be set by a newer writer and are dropped here
        if bytes[24..32] == [0; 8] {
            assert_eq!(manifest.encode(), bytes);
        }
        for chunk in manifest.chunks().take(1000) {
            assert_eq!(manifest.chunk_at(chunk.offset), Some(chunk));
        }
    }
}

pub fn pack(bytes: &[u8]) {
    let _ = pack::parse(bytes);
}

pub fn reference(bytes: &[u8]) {
    let _ = Reference::parse(bytes);
}
