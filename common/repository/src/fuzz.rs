//! Entries for a fuzzer: each takes any bytes, must return, and must never panic or take memory out of proportion.

use crate::{
    manifest::Manifest,
    pack,
    reference::Reference,
    source::{Qcow2Image, ReadAt},
};

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

/// Opens the bytes as a qcow2 image and reads its first data, at most a few MiB.
pub fn qcow2(bytes: &[u8]) {
    let Ok(image) = Qcow2Image::open(Box::new(bytes.to_vec())) else { return };
    let (mut at, mut left) = (0, 4 << 20);
    let mut buf = vec![0; 64 << 10];
    for _ in 0..64 {
        let mut spans = Vec::new();
        if at >= image.size().0 || image.spans(at, 1 << 30, &mut spans).is_err() {
            return;
        }
        for span in spans {
            let len = span.len.min(buf.len() as u64).min(left);
            if !span.zero && len > 0 {
                let _ = image.read_at(at, &mut buf[..len as usize]);
                left -= len;
            }
            at += span.len;
        }
    }
}
