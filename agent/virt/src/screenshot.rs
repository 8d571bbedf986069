//! A picture of a guest's screen.

use crate::error::{HypervisorError, HypervisorErrorKind, Result};

/// A screen as the hypervisor gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Screenshot {
    /// `image/x-portable-pixmap` (QEMU before 7.1 or as libvirt 9 asks for) or `image/png`.
    pub mime: String,
    pub bytes: Vec<u8>,
}

impl Screenshot {
    /// The same picture as PNG.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        if self.bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
            return Ok(self.bytes.clone());
        }
        let invalid = |what: &str| {
            HypervisorError::new(
                HypervisorErrorKind::Other,
                format!("convert screenshot of type {}: {what}", self.mime),
            )
        };
        let (width, height, pixels) = parse_ppm(&self.bytes).ok_or_else(|| invalid("not a binary pixmap"))?;
        let mut out = Vec::with_capacity(pixels.len() / 8);
        let mut encoder = png::Encoder::new(&mut out, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let encode = |e: png::EncodingError| {
            HypervisorError::with_source(HypervisorErrorKind::Other, "encode screenshot as PNG", e)
        };
        let mut writer = encoder.write_header().map_err(encode)?;
        writer.write_image_data(pixels).map_err(encode)?;
        writer.finish().map_err(encode)?;
        Ok(out)
    }
}

/// Width, height and RGB bytes of a `P6` pixmap with 8 bits a channel.
fn parse_ppm(bytes: &[u8]) -> Option<(u32, u32, &[u8])> {
    let mut rest = bytes.strip_prefix(b"P6")?;
    let mut fields = [0u32; 3];
    for field in &mut fields {
        loop {
            let (first, tail) = rest.split_first()?;
            if first.is_ascii_whitespace() {
                rest = tail;
            } else if *first == b'#' {
                let end = rest.iter().position(|b| *b == b'\n')?;
                rest = &rest[end..];
            } else {
                break;
            }
        }
        let digits = rest.iter().position(|b| !b.is_ascii_digit())?;
        *field = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        rest = &rest[digits..];
    }
    let (separator, pixels) = rest.split_first()?;
    let [width, height, maximum] = fields;
    let length = usize::try_from(u64::from(width).checked_mul(u64::from(height))?.checked_mul(3)?).ok()?;
    if !separator.is_ascii_whitespace() || maximum != 255 || length == 0 {
        return None;
    }
    Some((width, height, pixels.get(..length)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ppm(bytes: &[u8]) -> Screenshot {
        Screenshot { mime: "image/x-portable-pixmap".into(), bytes: bytes.to_vec() }
    }

    #[test]
    fn a_pixmap_becomes_a_png_with_the_same_pixels() {
        let shot = ppm(b"P6\n# by hand\n2 1\n255\n\x01\x02\x03\xff\xfe\xfd");
        let png_bytes = shot.to_png().unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(png_bytes)).read_info().unwrap();
        let mut pixels = vec![0; 6];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels, [1, 2, 3, 0xff, 0xfe, 0xfd]);
    }

    #[test]
    fn broken_pixmaps_are_refused() {
        for bad in [
            &b""[..],
            b"P6",
            b"P6 2 1 255",
            b"P6 2 1 255 abc",
            b"P6 0 1 255 ",
            b"P5 1 1 255 a",
            b"P6 1 1 65535 abcdef",
            b"P6 4294967295 4294967295 255 ",
        ] {
            assert!(ppm(bad).to_png().is_err(), "{bad:?}");
        }
    }
}
