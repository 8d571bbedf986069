use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use muster_block::{BlockDevice, BlockError, WriteFlags, ZeroFlags};
use muster_common::{ByteLen, VolumeId};
use muster_repository::{ChunkRef, Manifest};
use parking_lot::Mutex;

use crate::{BackupError, BackupId, Backups, OnProgress, Progress};

/// What a restore did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    pub written: ByteLen,
    pub zeroed: ByteLen,
}

/// Zeroes are asked for in pieces, so that cancelling does not wait for a terabyte.
const ZERO_PIECE: u64 = 1 << 30;

impl Backups {
    /// Makes `target` equal to a volume of a backup. The target must be of the same size and must not be in use; its present
    /// content is overwritten, holes become zeroes, and it is flushed.
    pub fn restore(
        &self,
        id: BackupId,
        volume: VolumeId,
        target: &dyn BlockDevice,
        progress: OnProgress<'_>,
    ) -> Result<Restored, BackupError> {
        let _reading = self.reading(id);
        let record = self.get(id)?;
        let backed = record.volumes.iter().find(|v| v.id == volume).ok_or(BackupError::UnknownVolume { id, volume })?;
        let have = target.geometry().size.0;
        if have != backed.size.0 {
            return Err(BackupError::SizeDiffers { volume, have, need: backed.size.0 });
        }
        let manifest = self.repository.manifest(&backed.manifest)?;
        let chunks: Vec<ChunkRef> = manifest.chunks().collect();
        let missing = chunks.iter().filter(|c| !self.repository.contains_chunk(&c.digest)).count() as u64;
        if missing > 0 || manifest.size() != backed.size {
            return Err(BackupError::ChunksMissing { volume, missing });
        }
        let wrong = |source: BlockError| BackupError::Target { volume, source };

        let done = AtomicU64::new(0);
        let total = backed.size;
        let mut report = |n: u64| {
            let done = ByteLen(done.fetch_add(n, Ordering::Relaxed) + n);
            let now = Progress { volume, done, total, new_bytes: ByteLen::ZERO };
            if progress(now).is_break() { Err(BackupError::Cancelled) } else { Ok(()) }
        };
        // heard at least once, also when the other threads take all chunks of a small volume
        report(0)?;
        let mut zeroed = 0;
        for (start, end) in holes(&manifest) {
            let mut at = start;
            while at < end {
                let piece = ZERO_PIECE.min(end - at);
                target.write_zeroes(at, piece, ZeroFlags::default()).map_err(wrong)?;
                at += piece;
                zeroed += piece;
                report(piece)?;
            }
        }

        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let failure = Mutex::new(None);
        let fail = |e: BackupError| {
            stop.store(true, Ordering::Relaxed);
            failure.lock().get_or_insert(e);
        };
        let copy = |chunk: &ChunkRef| {
            let bytes =
                self.repository.read_chunk(&chunk.digest).map_err(|source| BackupError::Read { volume, source })?;
            if bytes.len() != chunk.len {
                return Err(BackupError::ChunksMissing { volume, missing: 1 });
            }
            target.write_at(chunk.offset, &bytes, WriteFlags::default()).map_err(wrong)
        };
        // other threads only count; this one also reports
        let work = |mut report: Option<&mut dyn FnMut(u64) -> Result<(), BackupError>>| {
            while !stop.load(Ordering::Relaxed)
                && let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let copied = copy(chunk).and_then(|()| match &mut report {
                    Some(report) => report(chunk.len as u64),
                    None => {
                        done.fetch_add(chunk.len as u64, Ordering::Relaxed);
                        Ok(())
                    }
                });
                if let Err(e) = copied {
                    fail(e);
                }
            }
        };
        std::thread::scope(|scope| {
            let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
            for _ in 1..threads {
                scope.spawn(|| work(None));
            }
            work(Some(&mut report));
        });
        if let Some(e) = failure.into_inner() {
            return Err(e);
        }
        report(0)?;
        target.flush().map_err(wrong)?;
        Ok(Restored { written: manifest.data_bytes(), zeroed: ByteLen(zeroed) })
    }
}

/// The ranges between the chunks.
fn holes(manifest: &Manifest) -> Vec<(u64, u64)> {
    let mut holes = Vec::new();
    let mut at = 0;
    for chunk in manifest.chunks() {
        if chunk.offset > at {
            holes.push((at, chunk.offset));
        }
        at = chunk.offset + chunk.len as u64;
    }
    if at < manifest.size().0 {
        holes.push((at, manifest.size().0));
    }
    holes
}
