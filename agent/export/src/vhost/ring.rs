//! A split virtqueue and what its descriptors say. Everything read here is the guest's word and is checked.
//!
//! | part | offset | size | field |
//! |---|---|---|---|
//! | descriptor table | 16 n | 16 | address u64, length u32, flags u16, next u16 |
//! | available ring | 0 | 4 | flags u16, index u16 |
//! | | 4 + 2 n | 2 | head |
//! | | 4 + 2 size | 2 | used event |
//! | used ring | 0 | 4 | flags u16, index u16 |
//! | | 4 + 8 n | 8 | head u32, length u32 |
//! | | 4 + 8 size | 2 | available event |

use std::sync::atomic::Ordering;

use vm_memory::Bytes;

use super::memory::{Memory, Slice};

/// Largest queue taken.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;
/// Longest chain of descriptors taken, indirect ones included. QEMU's own limit.
const MAX_CHAIN: usize = 1024;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Why a queue cannot go on: the driver broke the rules of the ring, or its memory is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("its rings are not in memory")]
    Ring,
    #[error("more requests are available than the queue has room for")]
    Available,
    #[error("a descriptor's number is beyond the table")]
    Index,
    #[error("a chain of descriptors has no end")]
    Endless,
    #[error("an indirect table inside another, together with a next one, or of an impossible length")]
    Indirect,
    #[error("a buffer is not in memory")]
    Buffer,
    #[error("a buffer of length 0")]
    Empty,
    #[error("a readable buffer behind a writable one")]
    Direction,
    #[error("no room for a request's header or its status")]
    Frame,
}

/// Where a queue's rings are, by guest address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// The rings, found in memory.
pub(crate) struct Ring<'m> {
    size: u16,
    descriptors: Slice<'m>,
    available: Slice<'m>,
    used: Slice<'m>,
}

/// What a chain of descriptors holds.
#[derive(Default)]
pub(crate) struct Chain<'m> {
    pub(crate) readable: Vec<Slice<'m>>,
    pub(crate) writable: Vec<Slice<'m>>,
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Read once: the guest may change it under us.
    #[inline]
    fn read(table: &Slice<'_>, index: usize) -> Result<Descriptor, Broken> {
        let mut bytes = [0; 16];
        table.read_slice(&mut bytes, index * 16).map_err(|_| Broken::Index)?;
        let word = u128::from_le_bytes(bytes);
        Ok(Descriptor {
            address: word as u64,
            len: (word >> 64) as u32,
            flags: (word >> 96) as u16,
            next: (word >> 112) as u16,
        })
    }
}

impl<'m> Ring<'m> {
    #[inline]
    pub(crate) fn find(memory: &'m Memory, layout: &Layout) -> Result<Ring<'m>, Broken> {
        let size = usize::from(layout.size);
        let find = |at, len| memory.slice(at, len).ok_or(Broken::Ring);
        Ok(Ring {
            size: layout.size,
            descriptors: find(layout.descriptors, size * 16)?,
            available: find(layout.available, 4 + size * 2 + 2)?,
            used: find(layout.used, 4 + size * 8 + 2)?,
        })
    }

    #[inline]
    fn load(slice: &Slice<'_>, at: usize, order: Ordering) -> Result<u16, Broken> {
        // The only way to fail is a ring that is not aligned.
        slice.load::<u16>(at, order).map(u16::from_le).map_err(|_| Broken::Ring)
    }

    #[inline]
    fn store(slice: &Slice<'_>, at: usize, value: u16, order: Ordering) -> Result<(), Broken> {
        slice.store(value.to_le(), at, order).map_err(|_| Broken::Ring)
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index % self.size)
    }

    /// How many requests wait behind `next`.
    #[inline]
    pub(crate) fn pending(&self, next: u16) -> Result<u16, Broken> {
        let pending = Self::load(&self.available, 2, Ordering::Acquire)?.wrapping_sub(next);
        if pending > self.size { Err(Broken::Available) } else { Ok(pending) }
    }

    /// The head of the chain at `next`.
    #[inline]
    pub(crate) fn head(&self, next: u16) -> Result<u16, Broken> {
        let head = Self::load(&self.available, 4 + 2 * self.slot(next), Ordering::Relaxed)?;
        if head < self.size { Ok(head) } else { Err(Broken::Index) }
    }

    /// Where the used ring stands, as the last one to serve it left it.
    pub(crate) fn used_index(&self) -> Result<u16, Broken> {
        Self::load(&self.used, 2, Ordering::Acquire)
    }

    /// Writes an entry of the used ring; the driver sees it after [`Ring::publish`].
    #[inline]
    pub(crate) fn put_used(&self, used: u16, head: u16, len: u32) -> Result<(), Broken> {
        let entry = u64::from(head) | u64::from(len) << 32;
        self.used.write_slice(&entry.to_le_bytes(), 4 + 8 * self.slot(used)).map_err(|_| Broken::Ring)
    }

    /// Shows the driver every entry before `used`.
    #[inline]
    pub(crate) fn publish(&self, used: u16) -> Result<(), Broken> {
        Self::store(&self.used, 2, used, Ordering::Release)
    }

    /// Whether the driver wants to be told that the used ring moved from `old` to `new`. The caller has a full fence
    /// between publishing and this.
    #[inline]
    pub(crate) fn wants_call(&self, event_index: bool, old: u16, new: u16) -> Result<bool, Broken> {
        if event_index {
            let event = Self::load(&self.available, 4 + 2 * usize::from(self.size), Ordering::Relaxed)?;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            Ok(Self::load(&self.available, 0, Ordering::Relaxed)? & AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver to kick for what it makes available from `next` on. The caller has a full fence between this and
    /// looking once more.
    pub(crate) fn want_kick(&self, event_index: bool, next: u16) -> Result<(), Broken> {
        if event_index {
            Self::store(&self.used, 4 + 8 * usize::from(self.size), next, Ordering::Relaxed)
        } else {
            Self::store(&self.used, 0, 0, Ordering::Relaxed)
        }
    }

    /// Asks the driver not to kick. With event indices there is nothing to do: the event stays behind.
    pub(crate) fn want_no_kick(&self, event_index: bool) -> Result<(), Broken> {
        if event_index { Ok(()) } else { Self::store(&self.used, 0, USED_F_NO_NOTIFY, Ordering::Relaxed) }
    }

    /// Collects the buffers of a chain into `chain`, which is emptied first.
    #[inline]
    pub(crate) fn walk(
        &self,
        memory: &'m Memory,
        head: u16,
        indirect_allowed: bool,
        chain: &mut Chain<'m>,
    ) -> Result<(), Broken> {
        chain.readable.clear();
        chain.writable.clear();
        let mut table = self.descriptors;
        let mut entries = usize::from(self.size);
        let mut inside = false;
        let mut index = usize::from(head);
        let mut steps = 0;
        loop {
            steps += 1;
            if steps > MAX_CHAIN {
                return Err(Broken::Endless);
            }
            if index >= entries {
                return Err(Broken::Index);
            }
            let descriptor = Descriptor::read(&table, index)?;
            if descriptor.len == 0 {
                return Err(Broken::Empty);
            }
            if descriptor.flags & DESC_F_INDIRECT != 0 {
                let len = descriptor.len as usize;
                let fits = len.is_multiple_of(16) && len / 16 <= MAX_CHAIN;
                if inside || !indirect_allowed || !fits || descriptor.flags & DESC_F_NEXT != 0 {
                    return Err(Broken::Indirect);
                }
                table = memory.slice(descriptor.address, len).ok_or(Broken::Buffer)?;
                (entries, inside, index) = (len / 16, true, 0);
                continue;
            }
            let out = if descriptor.flags & DESC_F_WRITE != 0 {
                &mut chain.writable
            } else if chain.writable.is_empty() {
                &mut chain.readable
            } else {
                return Err(Broken::Direction);
            };
            if !memory.slices(descriptor.address, u64::from(descriptor.len), out) {
                return Err(Broken::Buffer);
            }
            if descriptor.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = usize::from(descriptor.next);
        }
    }
}
