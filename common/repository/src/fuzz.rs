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
///
/// # Panics
/// When the spans are not what [`ReadAt::spans`] promises, or zeros are read as something else: that is the finding.
pub fn qcow2(bytes: &[u8]) {
    let Ok(image) = Qcow2Image::open(Box::new(bytes.to_vec())) else { return };
    let (mut at, mut left, mut zeros_left) = (0, 4 << 20, 16);
    let mut buf = vec![0; 64 << 10];
    for _ in 0..64 {
        let asked = (image.size().0 - at).min(1 << 30);
        let mut spans = Vec::new();
        if asked == 0 || image.spans(at, asked, &mut spans).is_err() {
            return;
        }
        let covered: u64 = spans.iter().map(|span| span.len).sum();
        assert!((1..=asked).contains(&covered), "{covered} of {asked} bytes at {at} are told");
        for span in spans {
            let len = span.len.min(buf.len() as u64).min(left);
            if span.zero && zeros_left > 0 {
                let zeros = &mut buf[..span.len.min(512) as usize];
                zeros.fill(1);
                assert!(image.read_at(at, zeros).is_err() || zeros.iter().all(|b| *b == 0), "a hole at {at} has data");
                zeros_left -= 1;
            } else if !span.zero && len > 0 {
                let _ = image.read_at(at, &mut buf[..len as usize]);
                left -= len;
            }
            at += span.len;
        }
    }
}
