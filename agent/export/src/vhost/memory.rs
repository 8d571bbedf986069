//! The guest's memory as the frontend gave it: mapped files, and the two address spaces that name places in them.
//!
//! Every access goes through [`VolatileSlice`], which checks its bounds: the guest may change these bytes at any time, so
//! nothing here is ever a `&[u8]`, and what is decided on is copied out first, once.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// A stretch of guest memory.
pub(crate) type Slice<'m> = VolatileSlice<'m, ()>;

/// A mapped region.
#[derive(Clone)]
pub(crate) struct Region {
    guest: u64,
    user: u64,
    map: Arc<MmapRegion<()>>,
}

/// Where a region is, in the frontend's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Guest physical address.
    pub(crate) guest: u64,
    /// Address in the frontend's process: rings are named by these.
    pub(crate) user: u64,
    pub(crate) size: u64,
    /// Where in the file.
    pub(crate) offset: u64,
}

/// All regions, by guest address. Replaced whole when the frontend changes it.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    regions: Vec<Region>,
}

/// Whether nobody can make the file shorter.
pub(crate) fn cannot_shrink(file: &File) -> bool {
    fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

impl Memory {
    /// Maps a region. `sealed` demands a file that nobody can shrink under the mapping: touching pages that are gone
    /// would be a fatal signal for the whole process.
    pub(crate) fn map(place: Place, file: File, sealed: bool) -> io::Result<Region> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let fits = [place.guest, place.user, place.offset].iter().all(|at| at.checked_add(place.size).is_some());
        let size = usize::try_from(place.size).map_err(|_| invalid("region too large"))?;
        if !fits || size == 0 {
            return Err(invalid("region wraps around or is empty"));
        }
        if sealed && !cannot_shrink(&file) {
            return Err(invalid("region in a file that can shrink, not a sealed memfd"));
        }
        // The mapping itself would succeed over the end of the file.
        if file.metadata()?.len() < place.offset + place.size {
            return Err(invalid("region beyond the end of its file"));
        }
        let map = MmapRegion::from_file(FileOffset::new(file, place.offset), size).map_err(io::Error::other)?;
        Ok(Region { guest: place.guest, user: place.user, map: Arc::new(map) })
    }

    /// Private memory of our own at guest address `guest`; for tests and fuzzing.
    pub(crate) fn anonymous(guest: u64, size: usize) -> io::Result<Region> {
        Ok(Region { guest, user: guest, map: Arc::new(MmapRegion::new(size).map_err(io::Error::other)?) })
    }

    /// These regions and no others. Overlapping ones are refused.
    pub(crate) fn new(mut regions: Vec<Region>) -> io::Result<Memory> {
        regions.sort_by_key(|region| region.guest);
        let overlap = regions.windows(2).any(|two| two[0].guest + two[0].map.size() as u64 > two[1].guest);
        if overlap {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "regions overlap"));
        }
        Ok(Memory { regions })
    }

    /// With one more region.
    pub(crate) fn with(&self, region: Region) -> io::Result<Memory> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Memory::new(regions)
    }

    /// Without the region that is exactly there.
    pub(crate) fn without(&self, place: Place) -> Option<Memory> {
        let at = self.regions.iter().position(|region| {
            (region.guest, region.user, region.map.size() as u64) == (place.guest, place.user, place.size)
        })?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Some(Memory { regions })
    }

    pub(crate) fn regions(&self) -> usize {
        self.regions.len()
    }

    /// The guest address of an address of the frontend's process.
    pub(crate) fn guest_of_user(&self, user: u64) -> Option<u64> {
        self.regions
            .iter()
            .find(|region| user.checked_sub(region.user).is_some_and(|offset| offset < region.map.size() as u64))
            .map(|region| user - region.user + region.guest)
    }

    #[inline]
    fn region(&self, guest: u64) -> Option<(&Region, usize)> {
        // A guest has a handful of regions, and the last one (above 4 GiB) has most of its memory.
        let region = self.regions.iter().rev().find(|region| region.guest <= guest)?;
        let offset = (guest - region.guest) as usize;
        (offset < region.map.size()).then_some((region, offset))
    }

    /// `len` bytes at a guest address, all within one region. `len` is not 0.
    #[inline]
    pub(crate) fn slice(&self, guest: u64, len: usize) -> Option<Slice<'_>> {
        let (region, offset) = self.region(guest)?;
        region.map.get_slice(offset, len).ok()
    }

    /// Appends `len` bytes at a guest address, which may lie in neighbouring regions. `false` when not all of it is
    /// memory; what was appended by then is memory all the same.
    #[inline]
    pub(crate) fn slices<'m>(&'m self, mut guest: u64, mut len: u64, out: &mut Vec<Slice<'m>>) -> bool {
        loop {
            let Some((region, offset)) = self.region(guest) else { return false };
            let here = ((region.map.size() - offset) as u64).min(len);
            let Ok(slice) = region.map.get_slice(offset, here as usize) else { return false };
            out.push(slice);
            len -= here;
            if len == 0 {
                return true;
            }
            let Some(next) = guest.checked_add(here) else { return false };
            guest = next;
        }
    }
}

/// A place in a list of slices, moving forwards: where a copy goes on. Going back starts over.
pub(crate) struct Cursor<'s, 'm> {
    slices: &'s [Slice<'m>],
    index: usize,
    /// Bytes in the slices before `index`.
    before: u64,
}

impl<'s, 'm> Cursor<'s, 'm> {
    pub(crate) fn new(slices: &'s [Slice<'m>]) -> Cursor<'s, 'm> {
        Cursor { slices, index: 0, before: 0 }
    }

    /// Calls `copy` with each stretch of the slices that `at..at + len` lies in, and with its place in the range.
    #[inline]
    fn each(&mut self, at: u64, len: usize, mut copy: impl FnMut(Slice<'m>, usize)) -> usize {
        if at < self.before {
            (self.index, self.before) = (0, 0);
        }
        let mut done = 0;
        while let Some(slice) = self.slices.get(self.index) {
            let within = (at + done as u64 - self.before) as usize;
            if within < slice.len() {
                let here = (slice.len() - within).min(len - done);
                if here == 0 {
                    break;
                }
                let Ok(piece) = slice.subslice(within, here) else { break };
                copy(piece, done);
                done += here;
                if done == len {
                    break;
                }
            }
            self.before += slice.len() as u64;
            self.index += 1;
        }
        done
    }

    /// Writes `bytes` into the guest at `at` of the list. Bytes beyond its end are dropped.
    #[inline]
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> usize {
        self.each(at, bytes.len(), |slice, from| slice.copy_from(&bytes[from..from + slice.len()]))
    }

    /// Copies from the guest at `at` of the list; returns how many bytes there were.
    #[inline]
    pub(crate) fn read(&mut self, at: u64, bytes: &mut [u8]) -> usize {
        let len = bytes.len();
        self.each(at, len, |slice, from| {
            let to = from + slice.len();
            slice.copy_to(&mut bytes[from..to]);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_neighbours_and_one_apart() -> Memory {
        let regions = [(0x10000, 0x2000), (0x12000, 0x1000), (0x20000, 0x1000)];
        Memory::new(regions.map(|(at, size)| Memory::anonymous(at, size).expect("map")).into()).expect("no overlap")
    }

    #[test]
    fn only_what_is_memory_is_found() {
        let memory = two_neighbours_and_one_apart();
        for (at, len, found) in [
            (0x10000, 0x2000, true),
            (0x11fff, 1, true),
            (0x11fff, 2, false),
            (0x0ffff, 1, false),
            (0x13000, 1, false),
            (0x20000, 0x1000, true),
            (0x20fff, 2, false),
            (u64::MAX, 1, false),
        ] {
            assert_eq!(memory.slice(at, len).is_some(), found, "{len} at {at:#x}");
        }
        for (at, len, pieces) in [
            (0x11000, 0x2000, Some(2)),
            (0x11000, 0x2001, None),
            (0x10000, u64::MAX, None),
            (0x20fff, 1, Some(1)),
            (u64::MAX, 2, None),
        ] {
            let mut out = Vec::new();
            let all = memory.slices(at, len, &mut out);
            assert_eq!(all.then_some(out.len()), pieces, "{len} at {at:#x}");
        }
    }

    #[test]
    fn overlapping_regions_are_refused() {
        let regions =
            [(0x10000, 0x2000), (0x11000, 0x1000)].map(|(at, size)| Memory::anonymous(at, size).expect("map"));
        assert!(Memory::new(regions.into()).is_err());
    }

    #[test]
    fn a_cursor_reads_back_what_it_wrote_across_slices_and_backwards() {
        let memory = two_neighbours_and_one_apart();
        let mut slices = Vec::new();
        for (at, len) in [(0x20000, 5), (0x11ff0, 0x20), (0x10000, 7)] {
            assert!(memory.slices(at, len, &mut slices));
        }
        let bytes: Vec<u8> = (0..44).collect();
        let mut cursor = Cursor::new(&slices);
        assert_eq!(cursor.write(20, &bytes[20..]), 24);
        assert_eq!(cursor.write(0, &bytes[..20]), 20);
        for (at, len) in [(0, 44), (3, 30), (21, 1), (4, 2), (43, 1)] {
            let mut back = vec![0; len];
            assert_eq!(cursor.read(at as u64, &mut back), len);
            assert_eq!(back, bytes[at..at + len]);
        }
        assert_eq!(cursor.read(40, &mut [0; 10]), 4);
        assert_eq!(cursor.read(44, &mut [0; 1]), 0);
        assert_eq!(cursor.write(1000, &[1]), 0);
    }

    #[test]
    fn a_region_beyond_its_file_or_in_a_file_that_can_shrink_is_refused() {
        let place = Place { guest: 0, user: 0, size: 0x2000, offset: 0x1000 };
        let file = |len| {
            let file = tempfile::tempfile().expect("temporary file");
            file.set_len(len).expect("set length");
            file
        };
        assert!(Memory::map(place, file(0x2fff), false).is_err());
        assert!(Memory::map(place, file(0x3000), false).is_ok());
        assert!(Memory::map(place, file(0x3000), true).is_err());
        assert!(Memory::map(Place { size: 0, ..place }, file(0x3000), false).is_err());
        assert!(Memory::map(Place { guest: u64::MAX - 5, ..place }, file(0x3000), false).is_err());
    }
}
