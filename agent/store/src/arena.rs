//! Memory straight from the kernel. The only module of this crate with `unsafe` in it.
//!
//! A [`Region`] is address space reserved at once and taken from the machine page by page as it is touched
//! (`MAP_NORESERVE`), so its size costs nothing. It is either private to the process, or a file in memory (tmpfs,
//! hugetlbfs) that outlives it. hugetlb pages are the exception: all are taken at once and stay, because the kernel has no
//! answer but SIGBUS to who touches one that is not to be had. [`Words`] shows one as atomics, which is safe for anybody at any time. [`Blocks`] shows
//! one as frames of [`BLOCK`] bytes, and relies on one rule that `frames.rs` keeps:
//!
//! **Frame rule.** A frame without a reference belongs to the one thread that took it from the pool, which alone may
//! fill it. From the moment it is published (entered in the index, or in a map) until its last reference is dropped
//! nobody writes it. Whoever reads or compares a frame holds a reference to it, or the lock of a map that does, or the
//! lock of the index shard that lists it, for as long as the call lasts. Spilling and repair are the two exceptions:
//! they change or withdraw a published frame's memory, and everybody who reads finds out by the frame's mark
//! (`marks.rs`) and reads again.
#![allow(unsafe_code)]

use std::{
    ffi::c_void,
    fs::File,
    io,
    ops::Range,
    ptr::NonNull,
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::PageKind;

/// Bytes of a frame, and of the block it holds.
pub(crate) const BLOCK: usize = 4096;

/// What huge pages come in on the machines we know (x86-64, AArch64 with 4 KiB pages).
pub(crate) const HUGE: usize = 2 << 20;

/// What the tables beside frames come in.
const SMALL: usize = 4096;

/// Asks the processor to bring the cache line at an address near. A hint: whatever the address, nothing else happens.
#[inline]
pub(crate) fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch of an address that is not mapped does nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Reserved address space.
struct Region {
    /// Aligned to [`HUGE`].
    base: NonNull<u8>,
    len: usize,
    /// The mapping as the kernel gave it.
    mapping: *mut c_void,
    mapped: usize,
    /// A file's, so that pages go back by punching holes into it.
    shared: bool,
    pages: PageKind,
    /// Which transparent huge pages were given back in part.
    cut: Vec<AtomicBool>,
}

// SAFETY: a Region is an address and a length that never change; what may be done with the memory behind it is ruled by
// the types built on it.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// `file`: where the memory lies; `None` is private memory, all zero. A file is made as long as it has to be and
    /// never shorter; one that cannot be had is as long as before.
    fn reserve(len: usize, pages: PageKind, file: Option<&File>) -> io::Result<Region> {
        let unit = if pages == PageKind::Small { SMALL } else { HUGE };
        let len = len.max(1).next_multiple_of(unit);
        // one huge page more than needed, so that the base can be aligned; where the kernel maps such pages it is
        let aligned = file.is_none() && pages == PageKind::Huge;
        let mapped = len.checked_add(if aligned { 0 } else { HUGE }).ok_or(io::ErrorKind::InvalidInput)?;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let (space, flags) = match (file, pages) {
            (Some(_), _) => (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE),
            (None, PageKind::Huge) => (rights, MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB),
            (None, _) => (rights, MapFlags::PRIVATE | MapFlags::NORESERVE),
        };
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches no existing memory.
        let mapping = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, space, flags) }?;
        let skip = mapping.cast::<u8>().align_offset(HUGE);
        // SAFETY: the mapping is HUGE bytes longer than `len`, so base and base + len lie within it; or it is aligned, and
        // `skip` is 0.
        let base = unsafe { NonNull::new_unchecked(mapping.cast::<u8>().add(skip)) };
        let cut = if pages == PageKind::Transparent { len / HUGE } else { 0 };
        let cut = std::iter::repeat_with(|| AtomicBool::new(false)).take(cut).collect();
        let region = Region { base, len, mapping, mapped, shared: file.is_some(), pages, cut };
        if let Some(file) = file {
            let before = file.metadata()?.len();
            if before < len as u64 {
                file.set_len(len as u64)?;
            }
            // hugetlbfs reserves the pages now or refuses; a tmpfs lends them as they are touched
            let reserve = if pages == PageKind::Huge { MapFlags::empty() } else { MapFlags::NORESERVE };
            let flags = MapFlags::SHARED | MapFlags::FIXED | reserve;
            // SAFETY: the range is ours, reserved above and without access; the file's mapping takes its place.
            let shown = unsafe { mmap(base.as_ptr().cast(), len, rights, flags, file, 0) };
            let there = shown.map_err(io::Error::from).and_then(|_| region.take_what_stays());
            if let Err(error) = there {
                // what was taken goes back, and only that; an error leaves it to whoever clears the directory
                let _ = file.set_len(before);
                return Err(error);
            }
        } else {
            region.take_what_stays()?;
        }
        match pages {
            // SAFETY: the range is ours; this advice does not change contents.
            PageKind::Transparent => unsafe { madvise(region.base.as_ptr().cast(), len, Advice::LinuxHugepage) }?,
            // Where huge pages are "always", one touched frame would take 512. A kernel without them refuses the advice.
            // SAFETY: as above.
            PageKind::Small => {
                let _ = unsafe { madvise(region.base.as_ptr().cast(), len, Advice::LinuxNoHugepage) };
            }
            PageKind::Huge => {}
        }
        // A core dump of the whole store would fill the disk, and hold every guest's data. Not vital, so not checked.
        // SAFETY: the range is ours; this advice does not change contents.
        let _ = unsafe { madvise(region.base.as_ptr().cast(), len, Advice::LinuxDontDump) };
        Ok(region)
    }

    /// Takes all of a region of hugetlb pages from the machine: a reservation alone does not hold against the limit of a
    /// control group, or where a cpuset leaves us fewer nodes than the pages lie on.
    fn take_what_stays(&self) -> io::Result<()> {
        if self.pages != PageKind::Huge {
            return Ok(());
        }
        // the kernel zeroes each page, so it is worth more than one thread
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(8);
        let each = self.len.div_ceil(threads).next_multiple_of(HUGE);
        std::thread::scope(|scope| {
            let parts: Vec<_> = (0..self.len)
                .step_by(each)
                .map(|start| scope.spawn(move || self.populate(start..(start + each).min(self.len))))
                .collect();
            parts.into_iter().try_for_each(|part| part.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
        })
    }

    /// Gives the pages of the range back to the machine, but for hugetlb pages. Nobody relies on what they hold afterwards.
    fn give_back(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.len);
        match self.pages {
            // The reservation of one that goes back is lost with it, and whoever takes the page meanwhile leaves us SIGBUS.
            PageKind::Huge => return,
            PageKind::Transparent => self.leave_alone(&range),
            PageKind::Small => {}
        }
        let advice = if self.shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        // SAFETY: the range lies within our mapping. The callers of `Words::give_back` and `Blocks::give_back` own all of
        // it: nobody reads or writes it during the call. An error leaves the pages as they are, which is harmless.
        let _ = unsafe { madvise(self.base.as_ptr().add(range.start).cast(), range.len(), advice) };
    }

    /// Tells the kernel which huge pages not to make whole again, with memory that nobody counts, because a part of them goes
    /// back; once all of one goes back it may. Each is told once: telling stops page faults.
    fn leave_alone(&self, range: &Range<usize>) {
        for page in range.start / HUGE..range.end.div_ceil(HUGE) {
            let whole = range.start <= page * HUGE && (page + 1) * HUGE <= range.end;
            if self.cut[page].swap(!whole, Relaxed) != whole {
                continue;
            }
            let advice = if whole { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
            // SAFETY: the huge page lies within our mapping, whose length is a multiple of HUGE; this advice does not change
            // contents. It fails where the process has too many mappings; then the kernel may do so.
            let _ = unsafe { madvise(self.base.as_ptr().add(page * HUGE).cast(), HUGE, advice) };
        }
    }

    /// Takes the pages of the range from the machine now, or says that there are none.
    fn populate(&self, range: Range<usize>) -> io::Result<()> {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range lies within our mapping; populating it changes no contents.
        unsafe { madvise(self.base.as_ptr().add(range.start).cast(), range.len(), Advice::LinuxPopulateWrite) }?;
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `reserve`, is unmapped once, and nothing borrowed from it outlives us.
        let _ = unsafe { munmap(self.mapping, self.mapped) };
    }
}

/// A region of atomic words, all zero at first.
pub(crate) struct Words(Region);

impl Words {
    pub(crate) fn reserve(count: usize, file: Option<&File>) -> io::Result<Words> {
        Ok(Words(Region::reserve(count * size_of::<AtomicU32>(), PageKind::Small, file)?))
    }

    #[inline]
    pub(crate) fn all(&self) -> &[AtomicU32] {
        // SAFETY: the region is mapped, readable, writable and aligned for all of our life, every bit pattern is an
        // AtomicU32, and the memory is only ever reached as atomics (`give_back` sets words to zero in the kernel, which
        // a concurrent atomic access may see before or after).
        unsafe { std::slice::from_raw_parts(self.0.base.as_ptr().cast(), self.0.len / size_of::<AtomicU32>()) }
    }

    /// Brings the pages of these words near before they are all wanted. Not vital, so not checked.
    pub(crate) fn populate(&self, words: Range<usize>) {
        let bytes = words.start * size_of::<AtomicU32>()..(words.end * size_of::<AtomicU32>()).min(self.0.len);
        let _ = self.0.populate(bytes.start / SMALL * SMALL..bytes.end);
    }

    /// Gives whole pages of words that nobody uses back to the machine.
    pub(crate) fn give_back(&self, words: Range<usize>) {
        self.0.give_back(words.start * size_of::<AtomicU32>()..words.end * size_of::<AtomicU32>());
    }

    #[cfg(test)]
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.0.base.as_ptr().addr()..self.0.base.as_ptr().addr() + self.0.len
    }
}

/// Copies a block to memory that is not near and will not be wanted soon: without reading it first, as an ordinary copy
/// has the processor do, and without driving out what is near.
///
/// # Safety
/// `to` is valid for writes of [`BLOCK`] bytes, aligned to 64, and does not overlap `block`.
#[inline]
unsafe fn copy_past_caches(block: &[u8; BLOCK], to: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
        let (from, to) = (block.as_ptr().cast::<__m128i>(), to.cast::<__m128i>());
        for line in (0..BLOCK / 16).step_by(4) {
            // SAFETY: SSE2 is part of x86-64; the caller vouches for `to`, and `block` has as many bytes.
            unsafe {
                let words = [0, 1, 2, 3].map(|n| _mm_loadu_si128(from.add(line + n)));
                for (n, word) in words.into_iter().enumerate() {
                    _mm_stream_si128(to.add(line + n), word);
                }
            }
        }
        // SAFETY: as above. Such stores are not ordered with what publishes the frame, but for this.
        unsafe { _mm_sfence() };
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller vouches for it.
    unsafe {
        std::ptr::copy_nonoverlapping(block.as_ptr(), to, BLOCK);
    }
}

/// A region of frames. See the frame rule above.
pub(crate) struct Blocks(Region);

impl Blocks {
    pub(crate) fn reserve(frames: usize, pages: PageKind, file: Option<&File>) -> io::Result<Blocks> {
        Ok(Blocks(Region::reserve(frames * BLOCK, pages, file)?))
    }

    #[inline]
    fn frame(&self, frame: u32) -> *mut u8 {
        let at = frame as usize * BLOCK;
        assert!(at < self.0.len, "frame {frame} is outside of the arena");
        // SAFETY: the region's length is a multiple of BLOCK, so the whole frame lies within it.
        unsafe { self.0.base.as_ptr().add(at) }
    }

    /// Fills a frame the caller took from the pool and has not published yet.
    #[inline]
    pub(crate) fn fill(&self, frame: u32, block: &[u8; BLOCK]) {
        // SAFETY: by the frame rule no other thread reads or writes this frame now; source and destination are BLOCK
        // bytes long, and no `&[u8]` ever refers to arena memory, so they do not overlap. A frame is aligned to BLOCK.
        unsafe { copy_past_caches(block, self.frame(frame)) }
    }

    /// Copies bytes `from..from + buf.len()` of a frame the caller keeps alive.
    #[inline]
    pub(crate) fn read(&self, frame: u32, from: usize, buf: &mut [u8]) {
        assert!(from <= BLOCK && buf.len() <= BLOCK - from);
        // SAFETY: by the frame rule nobody writes this frame during the call; the range lies within the frame; `buf` is
        // exclusive and outside of the arena.
        unsafe { std::ptr::copy_nonoverlapping(self.frame(frame).add(from), buf.as_mut_ptr(), buf.len()) }
    }

    /// Shows a frame the caller keeps alive.
    #[inline]
    pub(crate) fn with<R>(&self, frame: u32, look: impl FnOnce(&[u8; BLOCK]) -> R) -> R {
        // SAFETY: by the frame rule nobody writes this frame during the call; the reference cannot leave it.
        look(unsafe { &*self.frame(frame).cast::<[u8; BLOCK]>() })
    }

    /// Asks for the first bytes of a frame and the translation of its address, which the processor does not see coming
    /// behind the frame before. More than the first cache line is in the way of the copy.
    #[inline]
    pub(crate) fn prefetch(&self, frame: u32) {
        prefetch(self.0.base.as_ptr().addr().wrapping_add(frame as usize * BLOCK));
    }

    /// Shows the bytes of a frame and of those behind it, `frames` in all, which the caller keeps alive.
    #[inline]
    pub(crate) fn with_run<R>(&self, frame: u32, frames: usize, look: impl FnOnce(&[u8]) -> R) -> R {
        assert!(frames <= self.0.len / BLOCK - frame as usize);
        // SAFETY: the frames lie within the arena; by the frame rule nobody writes them during the call; the reference
        // cannot leave it.
        look(unsafe { std::slice::from_raw_parts(self.frame(frame), frames * BLOCK) })
    }

    /// Takes the memory of these frames, which are in nobody's hands, from the machine now.
    pub(crate) fn populate(&self, frames: Range<u32>) -> io::Result<()> {
        self.0.populate(frames.start as usize * BLOCK..frames.end as usize * BLOCK)
    }

    /// Has the kernel give these frames, of which none has memory, small pages from now on: they are used one by one.
    pub(crate) fn use_small(&self, frames: Range<u32>) {
        if self.0.pages == PageKind::Transparent {
            let bytes = frames.start as usize * BLOCK..frames.end as usize * BLOCK;
            for page in bytes.start / HUGE..bytes.end.div_ceil(HUGE) {
                // as if a part of each had gone back
                self.0.leave_alone(&(page * HUGE..page * HUGE + 1));
            }
        }
    }

    /// Gives frames back to the machine that are free and that the caller keeps out of the pool meanwhile.
    pub(crate) fn give_back(&self, frames: Range<u32>) {
        self.0.give_back(frames.start as usize * BLOCK..frames.end as usize * BLOCK);
    }

    #[cfg(test)]
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.0.base.as_ptr().addr()..self.0.base.as_ptr().addr() + self.0.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_keep_what_they_were_filled_with_until_given_back() {
        let blocks = Blocks::reserve(1 << 20, PageKind::Small, None).unwrap();
        blocks.fill(0, &[1; BLOCK]);
        blocks.fill((1 << 20) - 1, &[2; BLOCK]);
        let mut buf = [0; 10];
        blocks.read((1 << 20) - 1, BLOCK - 10, &mut buf);
        assert_eq!(buf, [2; 10]);
        assert!(blocks.with(0, |frame| frame == &[1; BLOCK]));
        blocks.give_back(0..1);
        assert!(blocks.with(0, |frame| frame == &[0; BLOCK]));
    }

    /// The flags the kernel has for the mapping at an address (`VmFlags` of /proc/PID/smaps).
    fn flags_at(address: usize) -> Vec<String> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut here = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            if let Some((Ok(start), Ok(end))) =
                range.map(|(a, b)| (usize::from_str_radix(a, 16), usize::from_str_radix(b, 16)))
            {
                here = (start..end).contains(&address);
            } else if let (true, Some(flags)) = (here, line.strip_prefix("VmFlags:")) {
                return flags.split_whitespace().map(str::to_owned).collect();
            }
        }
        panic!("nothing is mapped at {address:#x}");
    }

    #[test]
    fn the_kernel_does_not_fill_what_was_given_back_of_a_huge_page() {
        let Ok(blocks) = Blocks::reserve(2048, PageKind::Transparent, None) else {
            eprintln!("skipped: this kernel has no transparent huge pages");
            return;
        };
        blocks.fill(1, &[1; BLOCK]);
        blocks.fill(3, &[3; BLOCK]);
        let at = |frame: usize| flags_at(blocks.addresses().start + frame * BLOCK);
        let has = |frame, flag: &str| at(frame).iter().any(|one| one == flag);
        assert!(has(0, "hg") && has(600, "hg"));
        blocks.give_back(2..4);
        assert!(has(0, "nh") && has(511, "nh") && has(512, "hg"));
        assert!(blocks.with(1, |frame| frame == &[1; BLOCK]) && blocks.with(3, |frame| frame == &[0; BLOCK]));
        // across two
        blocks.give_back(1535..1537);
        assert!(has(512, "hg") && has(1024, "nh") && has(2047, "nh"));
        // a whole one
        blocks.give_back(0..512);
        assert!(has(0, "hg") && has(511, "hg") && has(1024, "nh"));
    }

    #[test]
    fn words_start_as_zero() {
        let words = Words::reserve(10_000, None).unwrap();
        assert!(words.all().len() >= 10_000);
        assert!(words.all().iter().all(|word| word.load(Relaxed) == 0));
        words.all()[1024].store(7, Relaxed);
        words.give_back(1024..2048);
        assert_eq!(words.all()[1024].load(Relaxed), 0);
    }

    #[test]
    #[should_panic(expected = "outside of the arena")]
    fn a_frame_outside_of_the_arena_is_never_reached() {
        Blocks::reserve(1, PageKind::Small, None).unwrap().fill(u32::MAX, &[0; BLOCK]);
    }
}
