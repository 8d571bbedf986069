//! The data of a disk without its zeros, as a stream: what an export in the form `extents` sends.
//!
//! A sequence of frames, ascending, integers little-endian; between them the disk is zero. The last frame has the size of the
//! disk for an offset and no bytes: a stream without it was cut.
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | offset | in the disk |
//! | 8 | 4 | length n | of the bytes that follow, 0 in the last frame; at most 16 MiB |
//! | 12 | n | bytes | |

use std::io;

const HEAD: usize = 12;
const MAX_FRAME: u32 = 16 << 20;

/// Why a stream of extents cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ExtentError {
    #[error("read extents: {reason}")]
    Malformed { reason: &'static str },
    #[error("write the image")]
    Write {
        #[source]
        source: io::Error,
    },
}

/// Reads extents, however the network cuts them.
#[derive(Debug, Default)]
pub struct Extents {
    head: Vec<u8>,
    /// Where the frame at hand goes on, and how much of it is to come.
    at: u64,
    left: u64,
    size: Option<u64>,
}

impl Extents {
    /// The frame of some bytes.
    ///
    /// # Panics
    /// When there are more than 16 MiB.
    pub fn head(offset: u64, len: usize) -> [u8; HEAD] {
        assert!(len as u64 <= u64::from(MAX_FRAME), "a frame holds 16 MiB");
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&offset.to_le_bytes());
        head[8..].copy_from_slice(&(len as u32).to_le_bytes());
        head
    }

    /// Takes bytes in, and calls `write` with what they hold of the disk.
    ///
    /// # Errors
    /// When the bytes are no extents, or `write` fails.
    pub fn feed(
        &mut self,
        mut bytes: &[u8],
        write: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), ExtentError> {
        let malformed = |reason| Err(ExtentError::Malformed { reason });
        while !bytes.is_empty() {
            if self.left > 0 {
                let (piece, rest) = bytes.split_at(bytes.len().min(self.left as usize));
                write(self.at, piece).map_err(|source| ExtentError::Write { source })?;
                self.at += piece.len() as u64;
                self.left -= piece.len() as u64;
                bytes = rest;
                continue;
            }
            if self.size.is_some() {
                return malformed("bytes behind the end");
            }
            let (piece, rest) = bytes.split_at(bytes.len().min(HEAD - self.head.len()));
            self.head.extend_from_slice(piece);
            bytes = rest;
            let Some((offset, len)) = self.head.split_first_chunk::<8>() else { continue };
            let Ok(len) = <[u8; 4]>::try_from(len) else { continue };
            let (offset, len) = (u64::from_le_bytes(*offset), u32::from_le_bytes(len));
            self.head.clear();
            if offset < self.at || offset.checked_add(len.into()).is_none() {
                return malformed("they are not ascending");
            }
            if len > MAX_FRAME {
                return malformed("a frame is too long");
            }
            (self.at, self.left) = (offset, len.into());
            if len == 0 {
                self.size = Some(offset);
            }
        }
        Ok(())
    }

    /// The disk's size, when all of it has come.
    ///
    /// # Errors
    /// When it was cut.
    pub fn finish(self) -> Result<u64, ExtentError> {
        self.size.ok_or(ExtentError::Malformed { reason: "the stream was cut" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(extents: &[(u64, &[u8])], size: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (offset, data) in extents {
            bytes.extend(Extents::head(*offset, data.len()));
            bytes.extend(*data);
        }
        bytes.extend(Extents::head(size, 0));
        bytes
    }

    fn read(pieces: &[&[u8]]) -> Result<(Vec<u8>, u64), ExtentError> {
        let mut disk = vec![0; 64];
        let mut extents = Extents::default();
        for piece in pieces {
            extents.feed(piece, &mut |at, bytes| {
                disk[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
                Ok(())
            })?;
        }
        Ok((disk, extents.finish()?))
    }

    #[test]
    fn extents_are_read_however_they_are_cut() {
        let bytes = stream(&[(3, b"abc"), (10, b"defgh")], 64);
        let mut expected = vec![0; 64];
        expected[3..6].copy_from_slice(b"abc");
        expected[10..15].copy_from_slice(b"defgh");
        for cut in 0..bytes.len() {
            assert_eq!(read(&[&bytes[..cut], &bytes[cut..]]).unwrap(), (expected.clone(), 64), "cut at {cut}");
            let error = read(&[&bytes[..cut]]).unwrap_err();
            assert_eq!(error.to_string(), "read extents: the stream was cut", "only {cut} bytes");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(read(&single).unwrap().0, expected);
    }

    #[test]
    fn what_is_no_stream_of_extents_is_refused() {
        let with = |bytes: &[u8]| read(&[bytes]).unwrap_err().to_string();
        assert!(with(&stream(&[(10, b"x"), (3, b"y")], 64)).contains("ascending"));
        assert!(with(&stream(&[(10, b"x")], 5)).contains("ascending"));
        assert!(with(&[stream(&[], 64), vec![1]].concat()).contains("behind the end"));
        let mut long = Extents::head(0, 1).to_vec();
        long[8..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(with(&long).contains("too long"));
        let mut far = Extents::head(u64::MAX, 1).to_vec();
        far.push(0);
        assert!(with(&far).contains("ascending"));
    }
}
