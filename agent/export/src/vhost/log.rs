//! The log of guest memory that we wrote, for a frontend that saves or moves the guest meanwhile (`VHOST_F_LOG_ALL`, the
//! log in shared memory; vhost-user specification, *Migration*). A bit a page of 4 KiB, set after the page was written.
//!
//! A frontend takes the log only while it saves or moves, and stops the rings before the last look at it. So nothing is
//! spent on it otherwise, and no account is kept of pages: while there is a log, each answer marks all of it. A guest that
//! is saved stands still and answers come to an end; moving one that reads much would have to send more than it must, and
//! is not offered yet.

use std::fs::File;
use std::io;

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::memory::cannot_shrink;

/// A mapped log.
pub(crate) struct Log(MmapRegion<()>);

impl Log {
    /// `sealed` demands a file that nobody can shrink under the mapping.
    pub(crate) fn map(file: File, offset: u64, size: u64, sealed: bool) -> io::Result<Log> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let len = usize::try_from(size).ok().filter(|&len| len > 0).ok_or_else(|| invalid("size of the log"))?;
        if sealed && !cannot_shrink(&file) {
            return Err(invalid("log in a file that can shrink, not a sealed memfd"));
        }
        if offset.checked_add(size).is_none_or(|end| file.metadata().map_or(true, |metadata| metadata.len() < end)) {
            return Err(invalid("log beyond the end of its file"));
        }
        Ok(Log(MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(io::Error::other)?))
    }

    pub(crate) fn mark_all(&self) {
        const ONES: [u8; 4096] = [0xff; 4096];
        for at in (0..self.0.size()).step_by(ONES.len()) {
            let len = ONES.len().min(self.0.size() - at);
            if let Ok(slice) = self.0.get_slice(at, len) {
                slice.copy_from(&ONES[..len]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn all_of_a_log_is_marked_and_one_beyond_its_file_is_refused() {
        let mut file = tempfile::tempfile().expect("temporary file");
        file.set_len(8192).expect("set length");
        let copy = || file.try_clone().expect("clone");
        for (offset, size) in [(4096, 4097), (0, 0), (u64::MAX, 2)] {
            assert!(Log::map(copy(), offset, size, false).is_err(), "{size} at {offset}");
        }
        assert!(Log::map(copy(), 0, 4096, true).is_err(), "a file that can shrink");
        Log::map(copy(), 4096, 1000, false).expect("map").mark_all();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).expect("read");
        assert!(bytes[..4096].iter().all(|&byte| byte == 0));
        assert!(bytes[4096..5096].iter().all(|&byte| byte == 0xff));
        assert!(bytes[5096..].iter().all(|&byte| byte == 0));
    }
}
