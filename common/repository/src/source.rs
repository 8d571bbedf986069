//! What is read into the repository: anything that is [`ReadAt`]. Image files are opened by [`open_image`].

pub mod qcow2;
pub mod raw;

use std::{error::Error, fs::File, path::Path, sync::Arc};

use muster_common::{ByteLen, ErrorCode};

use crate::RepositoryError;

pub use qcow2::Qcow2Image;
pub use raw::RawImage;

/// Why a source could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{action} {what}")]
    Io {
        action: &'static str,
        what: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the image is empty")]
    Empty,
    #[error("not a regular file")]
    NotAFile,
    #[error("the image's size of {size} bytes is not a multiple of 512: it is truncated, or not a disk image")]
    OddSize { size: u64 },
    #[error("the image's size of {size} bytes is above the limit of {limit} bytes")]
    TooLarge { size: u64, limit: u64 },
    /// Another program's format.
    #[error("{format} images are not read; convert it first: qemu-img convert -O raw FILE FILE.raw")]
    Foreign { format: &'static str },
    /// A compressed file or archive around the image.
    #[error("this is a {format} file; unpack it first")]
    Packed { format: &'static str },
    #[error("not a qcow2 image (wrong magic)")]
    NotQcow2,
    /// The image names other files of the host: reading them would disclose them.
    #[error(
        "qcow2: the image has {what}; refused, because it names another file of this host (flatten it first: qemu-img convert)"
    )]
    ExternalReference { what: &'static str },
    #[error("qcow2: {what} is not supported")]
    Unsupported { what: String },
    #[error("qcow2: {what}: the image is truncated or corrupt")]
    Corrupt { what: String },
    #[error("read of {len} bytes at {offset} is outside of the image of {size} bytes")]
    OutOfRange { offset: u64, len: u64, size: u64 },
    #[error("read a source at {offset}")]
    Read {
        offset: u64,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

impl SourceError {
    /// The code that travels.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => ErrorCode::NotFound,
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                ErrorCode::PermissionDenied
            }
            Self::Read { source, .. } => match source.downcast_ref().map(RepositoryError::code) {
                Some(ErrorCode::Corrupt) => ErrorCode::Corrupt,
                _ => ErrorCode::Io,
            },
            Self::Io { .. } => ErrorCode::Io,
            Self::NotAFile | Self::OutOfRange { .. } => ErrorCode::InvalidArgument,
            Self::Foreign { .. } | Self::Packed { .. } | Self::NotQcow2 => ErrorCode::UnsupportedFormat,
            Self::Unsupported { .. } | Self::TooLarge { .. } => ErrorCode::UnsupportedFormat,
            Self::ExternalReference { .. } => ErrorCode::ExternalReference,
            Self::Empty | Self::OddSize { .. } | Self::Corrupt { .. } => ErrorCode::Corrupt,
        }
    }
}

/// A stretch of a source: bytes that may be anything, or bytes that are surely zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub len: u64,
    pub zero: bool,
}

/// A fixed-size thing that can be read anywhere, from many threads at once.
pub trait ReadAt: Send + Sync {
    fn size(&self) -> ByteLen;
    /// Fills `buf` from `offset`; the whole range lies inside of the size.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError>;
    /// Appends spans that cover at least one byte from `offset` and at most `len`. Claiming data for zeros costs time only;
    /// the default claims data for everything.
    fn spans(&self, offset: u64, len: u64, out: &mut Vec<Span>) -> Result<(), SourceError> {
        let _ = offset;
        out.push(Span { len, zero: false });
        Ok(())
    }
    /// True when reads wait for a disk: then more of them are made at once than there are cores.
    fn is_cold(&self) -> bool {
        false
    }
}

/// Bytes in memory are a source: for tests and small things.
impl ReadAt for Vec<u8> {
    fn size(&self) -> ByteLen {
        ByteLen(self.len() as u64)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let range = usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(buf.len())?));
        match range.and_then(|r| self.get(r)) {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => {
                return Err(SourceError::OutOfRange { offset, len: buf.len() as u64, size: self.len() as u64 });
            }
        }
        Ok(())
    }
}

/// Reads all of a source that is not known to be zero, on several threads at once: calls `each` with an offset and the bytes
/// there, at most 1 MiB, in no order, from those threads. The first error stops all of them and is returned.
///
/// # Errors
/// That of the source, or of `each`.
pub fn read_data<E, F>(source: &dyn ReadAt, each: F) -> Result<(), E>
where
    E: From<SourceError> + Send,
    F: Fn(u64, &[u8]) -> Result<(), E> + Sync,
{
    crate::scan::read_data(source, each)
}

/// How an image file is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ImageFormat {
    /// qcow2 by its magic, else raw; known foreign formats are refused by name. For import only: bytes that a guest could
    /// have written must never be sniffed.
    #[default]
    Auto,
    Raw,
    Qcow2,
}

/// Opens an image file for reading. Refuses what is not a regular file, is empty or truncated, or names other files.
pub fn open_image(path: &Path, format: ImageFormat) -> Result<Arc<dyn ReadAt>, SourceError> {
    let file = raw::open_regular(path)?;
    open_image_file(file, &path.display().to_string(), format)
}

/// As [`open_image`], over a file that is open already (one that an unprivileged caller passed in).
pub fn open_image_file(file: File, name: &str, format: ImageFormat) -> Result<Arc<dyn ReadAt>, SourceError> {
    let raw = RawImage::unchecked(file, name)?;
    let qcow2 = match format {
        ImageFormat::Raw => false,
        ImageFormat::Qcow2 => true,
        ImageFormat::Auto => raw::sniff(&raw)?,
    };
    if qcow2 { Ok(Arc::new(Qcow2Image::open(Box::new(raw))?)) } else { Ok(Arc::new(raw.checked()?)) }
}
