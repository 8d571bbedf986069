//! Raw disk images: the file is the disk. Holes of sparse files are skipped.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use muster_common::ByteLen;
use rustix::fs::{OFlags, SeekFrom};

use super::{ReadAt, SourceError, Span};

/// A raw image file.
pub struct RawImage {
    file: File,
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
        if metadata.len() == 0 {
            return Err(SourceError::Empty);
        }
        Ok(Self { file, name: name.to_string(), size: metadata.len() })
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
        self.file.read_exact_at(buf, offset).map_err(|source| self.failed("read", source))
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
