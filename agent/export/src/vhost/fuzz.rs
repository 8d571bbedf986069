//! One queue over memory that the caller chose: for fuzzing, and for tests that must not need a frontend.

use std::sync::Arc;

use muster_block::BlockDevice;
use muster_block::model::MemoryDevice;
use muster_common::ByteLen;

use super::memory::Memory;
use super::queue::{Armed, Context, Queue, Step};
use super::ring::Layout;
use crate::registry::Export;

const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const INDIRECT: u64 = 0x3000;
const DATA: u64 = 0x5000;
const DISK: u64 = 256 << 10;

/// Eight bytes become a descriptor that is mostly valid: an address that is mostly memory, a length that mostly fits.
fn descriptor(word: u64) -> [u8; 16] {
    let place = (word & 0xffff) * 4;
    let address = if word >> 16 & 0xf == 0xf { !place } else { place };
    let len = match word >> 20 & 0xfff {
        0 => 16,
        1 => 0,
        2 => u64::from(u32::MAX),
        3 => 1,
        4 => 512,
        len => len,
    };
    let flags = word >> 32 & 7;
    let next = word >> 40 & 0xffff;
    (u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112).to_le_bytes()
}

/// Serves a queue whose rings, descriptors and buffers are made of `data`, as a driver could have left them.
///
/// | byte | meaning |
/// |---|---|
/// | 0 | size of the queue, log2, modulo 8 |
/// | 1 | 1: event indices, 2: indirect, 4: read-only device, 8: no flush, 16: rings elsewhere, by bytes 4 to 6 |
/// | 2 | requests made available |
/// | 3 | index the rings start at is 65535 less this |
/// | 8 ... | eight bytes a descriptor, table first, then the indirect one; the rest are the buffers |
///
/// # Panics
/// When the queue broke one of its promises: that is what is looked for.
#[doc(hidden)]
pub fn fuzz_queue(data: &[u8]) {
    serve(data);
}

/// See [`fuzz_queue`]; how many requests were answered.
fn serve(data: &[u8]) -> u16 {
    let Some((options, rest)) = data.split_at_checked(8) else { return 0 };
    // Two neighbours and one apart.
    let regions = [(0, 0x10000), (0x10000, 0x4000), (0x3_0000, 0x4000)];
    let regions: Result<Vec<_>, _> = regions.iter().map(|(at, size)| Memory::anonymous(*at, *size)).collect();
    let Ok(memory) = regions.and_then(Memory::new) else { return 0 };
    let put = |at: u64, bytes: &[u8]| {
        let mut slices = Vec::new();
        if !bytes.is_empty() && memory.slices(at, bytes.len() as u64, &mut slices) {
            super::memory::Cursor::new(&slices).write(0, bytes);
        }
    };

    let size = 1u16 << (options[0] % 8);
    let start = u16::MAX - u16::from(options[3]);
    let mut words = rest.chunks_exact(8);
    for (table, entries) in [(TABLE, u64::from(size)), (INDIRECT, 64)] {
        for (index, word) in (0..entries).zip(words.by_ref()) {
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            put(table + 16 * index, &descriptor(word));
        }
    }
    let buffers: Vec<u8> = words.flatten().copied().take(0xb000).collect();
    put(DATA, &buffers);
    put(AVAILABLE + 2, &start.wrapping_add(u16::from(options[2])).to_le_bytes());
    for index in 0..size {
        let slot = start.wrapping_add(index) % size;
        put(AVAILABLE + 4 + 2 * u64::from(slot), &index.to_le_bytes());
    }
    put(USED + 2, &start.to_le_bytes());

    let mut disk = MemoryDevice::new(ByteLen(DISK));
    if options[1] & 4 != 0 {
        disk = disk.read_only();
    }
    let disk = Arc::new(disk);
    let before = disk.contents();
    let export = Arc::new(Export::new("fuzz", Arc::clone(&disk) as Arc<dyn BlockDevice>));
    let context =
        Context { export: Arc::clone(&export), name: super::device_name("fuzz"), space_wait: None, observer: None };
    let mut queue = Queue::new(Arc::new(context), 0);
    queue.memory = memory.clone();
    queue.layout = Layout { size, descriptors: TABLE, available: AVAILABLE, used: USED };
    if options[1] & 16 != 0 {
        let place = |byte: u8| u64::from(byte) << 10 | u64::from(byte);
        queue.layout.descriptors = place(options[4]);
        queue.layout.available = place(options[5]);
        queue.layout.used = place(options[6]);
    }
    queue.event_index = options[1] & 1 != 0;
    queue.indirect = options[1] & 2 != 0;
    queue.flushes = options[1] & 8 == 0;
    queue.set_base(start);
    queue.enable(true);
    queue.start();
    // A driver cannot make more available while this runs, but its buffers may overlap the rings.
    for _ in 0..64 {
        if queue.run() == Step::Idle && queue.arm() != Armed::Pending {
            break;
        }
    }
    let answered = queue.answered().wrapping_sub(start);
    assert!(options[1] & 16 != 0 || answered <= u16::from(options[2]), "more answers than requests");
    queue.close();

    assert!(!export.is_fenced(), "a driver cannot make the device panic: {:?}", export.fence_reason());
    assert_eq!(export.statistics().in_flight, 0, "what began has ended");
    assert_eq!(disk.contents().len() as u64, DISK);
    assert!(options[1] & 4 == 0 || disk.contents() == before, "a read-only device was changed");
    answered
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A word that [`descriptor`] takes apart again.
    fn word(place: u64, len: u64, flags: u64, next: u64) -> u64 {
        place | len << 20 | flags << 32 | next << 40
    }

    fn words() -> impl Strategy<Value = u64> {
        let place = prop_oneof![6 => 0u64..0x4000, 2 => 0u64..0x10000, 2 => Just(DATA / 4), 1 => Just(INDIRECT / 4)];
        let len = prop_oneof![3 => Just(0u64), 3 => Just(4u64), 1 => Just(3u64), 1 => 1u64..0x1000];
        let flags = prop_oneof![4 => Just(1u64), 3 => Just(3), 3 => Just(2), 2 => Just(0), 1 => 0u64..8];
        let next = prop_oneof![9 => 0u64..16, 1 => 0u64..0x10000];
        (place, len, flags, next).prop_map(|(place, len, flags, next)| word(place, len, flags, next))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
        #[test]
        fn no_driver_breaks_the_queue(
            options in any::<[u8; 8]>(),
            words in proptest::collection::vec(words(), 0..200),
            kind in prop_oneof![Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()],
            sector in prop_oneof![4 => 0u64..512, 1 => any::<u64>()],
            tail in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut data = options.to_vec();
            let padded = usize::from(1u16 << (options[0] % 8)) + 64;
            data.extend(words.iter().chain(std::iter::repeat(&0)).take(padded).flat_map(|word| word.to_le_bytes()));
            data.extend(kind.to_le_bytes());
            data.extend([0; 4]);
            data.extend(sector.to_le_bytes());
            data.extend(tail);
            fuzz_queue(&data);
        }
    }

    /// One request, made of three descriptors, in a queue of four.
    fn one(kind: u32, sector: u64, data_flags: u64) -> Vec<u8> {
        let mut data = vec![2, 0, 1, 0, 0, 0, 0, 0];
        let table =
            [word(DATA / 4, 0, 1, 1), word(DATA / 4 + 0x100, 4, 1 | data_flags, 2), word(DATA / 4 + 0x800, 3, 2, 0), 0];
        data.extend(table.iter().chain([0; 64].iter()).flat_map(|word| word.to_le_bytes()));
        data.extend(kind.to_le_bytes());
        data.extend([0; 4]);
        data.extend(sector.to_le_bytes());
        data
    }

    #[test]
    fn the_generator_makes_requests_that_are_done() {
        // Else the property above would hold of nothing.
        for (kind, flags) in [(0, 2), (1, 0), (8, 2), (77, 0)] {
            assert_eq!(serve(&one(kind, 5, flags)), 1, "kind {kind}");
        }
    }
}
