//! The record of requests in flight, in memory that outlives this process: the frontend keeps it and gives it to
//! whoever serves the queue next. The layout of the vhost-user specification for split queues, version 1. Each queue has
//! its own stretch, aligned to 64 bytes.
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | features | 0 |
//! | 8 | 2 | version | 1; 0 in fresh memory |
//! | 10 | 2 | desc_num | size of the queue |
//! | 12 | 2 | last_batch_head | head published last |
//! | 14 | 2 | used_idx | index of the used ring when that was recorded |
//! | 16 + 16 n | 1 | inflight | 1: taken and not answered |
//! | 18 + 16 n | 6 | padding, next | `next` (u16 at 22) links the heads of a batch |
//! | 24 + 16 n | 8 | counter | order of taking |

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::memory::cannot_shrink;

const ALIGNMENT: u64 = 64;
const HEADER: u64 = 16;
const ENTRY: u64 = 16;
const VERSION: u16 = 1;

/// Bytes a queue of that size takes.
fn stride(queue_size: u16) -> u64 {
    (HEADER + ENTRY * u64::from(queue_size)).next_multiple_of(ALIGNMENT)
}

/// Bytes that many queues take.
pub(crate) fn area(queues: u16, queue_size: u16) -> u64 {
    stride(queue_size) * u64::from(queues)
}

/// A fresh record: a file in memory, of a fixed size.
pub(crate) fn create(queues: u16, queue_size: u16) -> io::Result<File> {
    let fd = memfd_create("muster-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, area(queues, queue_size))?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(fd))
}

/// A mapped record.
#[derive(Clone)]
pub(crate) struct Inflight {
    map: Arc<MmapRegion<()>>,
    queues: u16,
    queue_size: u16,
}

/// The record of one queue.
pub(crate) struct QueueRecord {
    map: Arc<MmapRegion<()>>,
    base: usize,
    queue_size: u16,
    counter: u64,
}

impl Inflight {
    /// Maps a record of that shape. As for memory, `sealed` demands a file that cannot shrink.
    pub(crate) fn map(
        file: File,
        (offset, size): (u64, u64),
        (queues, queue_size): (u16, u16),
        sealed: bool,
    ) -> io::Result<Inflight> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let needed = area(queues, queue_size);
        let end = offset.checked_add(needed).ok_or_else(|| invalid("record wraps around"))?;
        if needed == 0 || size < needed || file.metadata()?.len() < end {
            return Err(invalid("record smaller than its queues"));
        }
        if sealed && !cannot_shrink(&file) {
            return Err(invalid("record in a file that can shrink"));
        }
        let map = MmapRegion::from_file(FileOffset::new(file, offset), needed as usize).map_err(io::Error::other)?;
        Ok(Inflight { map: Arc::new(map), queues, queue_size })
    }

    /// The part of a queue, if it is within the record.
    pub(crate) fn queue(&self, index: u16, size: u16) -> Option<QueueRecord> {
        (index < self.queues && size <= self.queue_size).then(|| QueueRecord {
            map: Arc::clone(&self.map),
            base: (stride(self.queue_size) * u64::from(index)) as usize,
            queue_size: size,
            counter: 0,
        })
    }
}

impl QueueRecord {
    // Within the mapping by construction and aligned: these do not fail.
    fn load<T: vm_memory::AtomicAccess + Default>(&self, at: usize) -> T {
        self.map.as_volatile_slice().load(self.base + at, Ordering::Acquire).unwrap_or_default()
    }

    #[inline]
    fn store<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        let stored = self.map.as_volatile_slice().store(value, self.base + at, Ordering::Release);
        debug_assert!(stored.is_ok(), "within the record");
    }

    fn entry(head: u16) -> usize {
        16 + 16 * usize::from(head)
    }

    /// Reads what the last one to serve the queue left, whose used ring stands at `used`: the heads that were taken and
    /// not answered, in the order they were taken. A batch whose answers were published but not recorded is recorded now.
    pub(crate) fn recover(&mut self, used: u16) -> Vec<u16> {
        if self.load::<u16>(8) != VERSION || self.load::<u16>(10) != self.queue_size {
            // Fresh, or of another shape: nothing in it is ours.
            for head in 0..self.queue_size {
                self.store(Self::entry(head), 0u8);
            }
            self.store(0, 0u64);
            self.store(10, self.queue_size);
            self.store(14, used);
            self.store(8, VERSION);
            return Vec::new();
        }
        let published = used.wrapping_sub(self.load::<u16>(14));
        if published > 0 {
            let mut head = self.load::<u16>(12);
            for _ in 0..published.min(self.queue_size) {
                if head >= self.queue_size {
                    break;
                }
                self.store(Self::entry(head), 0u8);
                head = self.load::<u16>(Self::entry(head) + 6);
            }
            self.store(14, used);
        }
        let mut heads: Vec<(u64, u16)> = (0..self.queue_size)
            .filter(|head| self.load::<u8>(Self::entry(*head)) == 1)
            .map(|head| (self.load::<u64>(Self::entry(head) + 8), head))
            .collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        heads.into_iter().map(|(_, head)| head).collect()
    }

    /// The request at `head` is being worked on.
    #[inline]
    pub(crate) fn take(&mut self, head: u16) {
        self.store(Self::entry(head) + 8, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.store(Self::entry(head), 1u8);
    }

    /// The answer of `head` is about to be published.
    #[inline]
    pub(crate) fn answering(&mut self, head: u16) {
        self.store(12, head);
    }

    /// The answer of `head` is published, the used ring stands at `used`.
    #[inline]
    pub(crate) fn answered(&mut self, head: u16, used: u16) {
        self.store(Self::entry(head), 0u8);
        self.store(14, used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(file: &File) -> QueueRecord {
        let inflight = Inflight::map(file.try_clone().expect("clone"), (0, area(2, 8)), (2, 8), true).expect("map");
        inflight.queue(1, 8).expect("the second queue")
    }

    #[test]
    fn what_was_taken_and_not_answered_comes_back_in_order() {
        let file = create(2, 8).expect("memfd");
        let mut first = record(&file);
        assert!(first.recover(0).is_empty());
        for head in [5, 2, 7] {
            first.take(head);
        }
        first.answering(2);
        first.answered(2, 1);
        assert_eq!(record(&file).recover(1), [5, 7]);
        // and again: it is only the answer that ends it
        assert_eq!(record(&file).recover(1), [5, 7]);
        let mut second = record(&file);
        second.recover(1);
        second.take(1);
        assert_eq!(record(&file).recover(1), [5, 7, 1]);
    }

    #[test]
    fn an_answer_that_was_published_but_not_recorded_is_not_done_again() {
        let file = create(2, 8).expect("memfd");
        let mut first = record(&file);
        first.recover(10);
        first.take(3);
        first.take(4);
        first.answering(3);
        // killed here, after the used ring moved to 11
        assert_eq!(record(&file).recover(11), [4]);
        // killed before it moved: both again
        let file = create(2, 8).expect("memfd");
        let mut first = record(&file);
        first.recover(10);
        first.take(3);
        first.take(4);
        first.answering(3);
        assert_eq!(record(&file).recover(10), [3, 4]);
    }

    #[test]
    fn nonsense_in_the_record_is_survived() {
        let file = create(1, 8).expect("memfd");
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 144], 0).expect("write");
        let inflight = Inflight::map(file.try_clone().expect("clone"), (0, area(1, 8)), (1, 8), true).expect("map");
        assert!(inflight.queue(0, 8).expect("queue").recover(3).is_empty());
        std::os::unix::fs::FileExt::write_all_at(&file, &[1, 0, 8, 0, 0xff, 0xff, 9, 9], 8).expect("write");
        let heads = inflight.queue(0, 8).expect("queue").recover(3);
        assert!(heads.len() <= 8);
        assert!(inflight.queue(1, 8).is_none());
        assert!(inflight.queue(0, 16).is_none());
        assert!(Inflight::map(file, (0, 10), (1, 8), true).is_err());
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(area(1, 8)).expect("set length");
        assert!(Inflight::map(file, (0, area(1, 8)), (1, 8), true).is_err(), "it could shrink");
    }
}
