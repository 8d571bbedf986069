//! Raw disk images: the file is the disk. Holes of sparse files are skipped.
//!
//! A file that is not in the page cache is read past it (`O_DIRECT`): the disk is then as fast as it can be, and an import
//! does not push out what others keep there. A file that is in the page cache, wholly or by half, is read from there: it is
//! faster, and what was just written need not reach the disk first. Where direct reads are refused (some file systems), all
//! reads go through the page cache.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSliceMut},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use muster_common::ByteLen;
use rustix::{
    fs::{Advice, OFlags, SeekFrom},
    io::{Errno, ReadWriteFlags},
};

use super::{ReadAt, SourceError, Span};
use crate::buffer::ALIGN;

/// Below it nothing is gained by going past the page cache.
const LEAST_DIRECT: u64 = 1 << 20;
/// Pages looked for in the page cache, to know whether a file is in it.
const PROBES: u64 = 32;

/// A raw image file.
pub struct RawImage {
    file: File,
    /// The same file, opened for direct reads; none when it is in the page cache, or direct reads are refused.
    direct: Option<File>,
    /// A direct read was refused after all.
    refused: AtomicBool,
    name: String,
    size: u64,
}

/// Opens a file, refusing devices, pipes and directories. Never blocks on a pipe.
pub(crate) fn open_regular(path: &Path) -> Result<File, SourceError> {
    let failed = |action, source| SourceError::Io { action, what: path.display().to_string(), source };
    OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
        .open(path)
        .map_err(|source| failed("open", source))
}

/// The file opened once more, for direct reads. `None`: not possible here.
fn reopen_direct(file: &File) -> Option<File> {
    let flags = OFlags::DIRECT | OFlags::NONBLOCK | OFlags::NOCTTY;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path).ok()
}

/// True when more than half of some pages, spread over the file's data, are in the page cache. A file system that does not
/// say is taken for one that is memory itself (tmpfs).
fn is_cached(file: &File, size: u64) -> bool {
    // each probe that misses may read its page, but no more than that
    let _ = rustix::fs::fadvise(file, 0, None, Advice::Random);
    let (mut hits, mut probes) = (0, 0);
    let mut at = 0;
    let mut page = [0; ALIGN];
    while at < size && probes < PROBES {
        let Ok(data) = rustix::fs::seek(file, SeekFrom::Data(at)) else { break };
        probes += 1;
        let mut slices = [IoSliceMut::new(&mut page)];
        hits += match rustix::io::preadv2(file, &mut slices, data, ReadWriteFlags::NOWAIT) {
            Ok(read) => u64::from(read > 0),
            Err(error) => u64::from(error == Errno::OPNOTSUPP),
        };
        at = data + (size / PROBES).max(ALIGN as u64);
    }
    let _ = rustix::fs::fadvise(file, 0, None, Advice::Normal);
    hits * 2 > probes
}

impl RawImage {
    /// Opens a raw image: not empty, a multiple of 512 bytes long.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        Self::unchecked(open_regular(path)?, &path.display().to_string())?.checked()
    }

    /// As a container of another format: any length but zero.
    pub(crate) fn unchecked(file: File, name: &str) -> Result<Self, SourceError> {
        let metadata =
            file.metadata().map_err(|source| SourceError::Io { action: "stat", what: name.to_string(), source })?;
        if !metadata.is_file() {
            return Err(SourceError::NotAFile);
        }
        let size = metadata.len();
        if size == 0 {
            return Err(SourceError::Empty);
        }
        let direct = (size >= LEAST_DIRECT && !is_cached(&file, size)).then(|| reopen_direct(&file)).flatten();
        Ok(Self { file, direct, refused: AtomicBool::new(false), name: name.to_string(), size })
    }

    /// Reads whole aligned blocks past the page cache, if that is possible; how many bytes.
    fn read_direct(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let Some(direct) = self.direct.as_ref().filter(|_| !self.refused.load(Ordering::Relaxed)) else { return Ok(0) };
        let whole = buf.len() / ALIGN * ALIGN;
        if whole == 0 || !offset.is_multiple_of(ALIGN as u64) || buf.as_ptr().align_offset(ALIGN) != 0 {
            return Ok(0);
        }
        match direct.read_exact_at(&mut buf[..whole], offset) {
            Ok(()) => Ok(whole),
            // a device with larger blocks, or a file system that says so only now
            Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                self.refused.store(true, Ordering::Relaxed);
                Ok(0)
            }
            Err(e) => Err(e),
        }
    }

    /// Refuses a length that no disk has.
    pub(crate) fn checked(self) -> Result<Self, SourceError> {
        if !self.size.is_multiple_of(512) {
            return Err(SourceError::OddSize { size: self.size });
        }
        Ok(self)
    }

    fn failed(&self, action: &'static str, source: io::Error) -> SourceError {
        SourceError::Io { action, what: self.name.clone(), source }
    }
}

impl ReadAt for RawImage {
    fn size(&self) -> ByteLen {
        ByteLen(self.size)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(SourceError::OutOfRange { offset, len, size: self.size });
        }
        let done = self.read_direct(offset, buf).map_err(|source| self.failed("read", source))?;
        self.file.read_exact_at(&mut buf[done..], offset + done as u64).map_err(|source| self.failed("read", source))
    }

    fn is_cold(&self) -> bool {
        self.direct.is_some() && !self.refused.load(Ordering::Relaxed)
    }

    fn spans(&self, offset: u64, len: u64, out: &mut Vec<Span>) -> Result<(), SourceError> {
        let stop = offset.saturating_add(len).min(self.size);
        let mut at = offset;
        // reads go by position, so moving the file's own position here disturbs nobody
        while at < stop {
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data.min(stop),
                Err(rustix::io::Errno::NXIO) => stop,
                // a file system without holes
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => at,
                Err(e) => return Err(self.failed("find data in", e.into())),
            };
            if data > at {
                out.push(Span { len: data - at, zero: true });
                at = data;
            }
            if at < stop {
                let hole = match rustix::fs::seek(&self.file, SeekFrom::Hole(at)) {
                    Ok(hole) if hole > at => hole.min(stop),
                    _ => stop,
                };
                out.push(Span { len: hole - at, zero: false });
                at = hole;
            }
        }
        Ok(())
    }
}

/// True for qcow2, false for what may be raw; formats of other programs, and packed files, are refused by name.
pub(crate) fn sniff(image: &RawImage) -> Result<bool, SourceError> {
    let mut head = [0; 512];
    let have = image.size.min(512) as usize;
    image.read_at(0, &mut head[..have])?;
    if head.starts_with(b"QFI\xfb") {
        return Ok(true);
    }
    let foreign: [(&[u8], &'static str); 8] = [
        (b"KDMV", "VMDK (VMware)"),
        (b"COWD", "VMDK (VMware ESX)"),
        (b"# Disk DescriptorFile", "VMDK descriptor (VMware)"),
        (b"vhdxfile", "VHDX (Hyper-V)"),
        (b"conectix", "VHD (Hyper-V, Xen)"),
        (b"QED\0", "QED"),
        (b"WithoutFreeSpace", "Parallels"),
        (b"WithouFreSpacExt", "Parallels"),
    ];
    if let Some((_, format)) = foreign.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(SourceError::Foreign { format });
    }
    if head[0x40..0x44] == 0xbeda_107f_u32.to_le_bytes() {
        return Err(SourceError::Foreign { format: "VDI (VirtualBox)" });
    }
    let mut tail = [0; 8];
    if image.size >= 512 {
        image.read_at(image.size - 512, &mut tail)?;
        if tail == *b"conectix" {
            return Err(SourceError::Foreign { format: "VHD (Hyper-V, Xen)" });
        }
    }
    let packed: [(&[u8], &'static str); 8] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"PK\x03\x04", "zip"),
        (b"7z\xbc\xaf\x27\x1c", "7-zip"),
        (b"Rar!", "rar"),
        (b"LZIP", "lzip"),
    ];
    if let Some((_, format)) = packed.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(SourceError::Packed { format });
    }
    Ok(false)
}
