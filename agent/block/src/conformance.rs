//! The suite every [`BlockDevice`] passes, against [`MemoryDevice`] as the oracle. Repeatable: it draws from a fixed seed.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use muster_common::ByteLen;

use crate::{BlockDevice, BlockErrorKind, Extent, ExtentKind, WriteFlags, ZeroFlags, model::MemoryDevice};

/// Runs the suite. `make` returns a fresh, writable device of the given size that reads as zero.
///
/// # Panics
/// When the device does not conform; the message says where.
pub fn run(make: impl Fn(ByteLen) -> Arc<dyn BlockDevice>) {
    a_fresh_device_reads_as_zero(&*make(ByteLen::mib(1)));
    ranges_outside_are_refused_and_empty_ones_are_done(&*make(ByteLen::kib(64)));
    bytes_around_a_change_stay(&*make(ByteLen::kib(64)));
    a_size_that_is_no_multiple_of_the_block_works_to_its_end(&*make(ByteLen(4096 * 3 + 512)));
    for seed in 1..=4 {
        any_sequence_equals_the_model(&*make(ByteLen::mib(4)), seed);
    }
    writers_of_one_block_do_not_lose_each_others_sectors(&*make(ByteLen::kib(8)));
    readers_see_whole_blocks_while_a_writer_runs(&*make(ByteLen::mib(1)));
}

/// SplitMix64: small, known, good enough to draw test requests from.
pub struct Random(pub u64);

impl Random {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Reads the whole device and checks it against `expected`.
///
/// # Panics
/// When a byte differs.
pub fn assert_contents(device: &dyn BlockDevice, expected: &[u8], what: &str) {
    assert_eq!(device.geometry().size.bytes(), expected.len() as u64, "{what}: size");
    let mut buf = vec![0xee; (1 << 20).min(expected.len())];
    for (n, want) in expected.chunks(1 << 20).enumerate() {
        let at = (n as u64) << 20;
        let got = &mut buf[..want.len()];
        device.read_at(at, got).unwrap_or_else(|error| panic!("{what}: read at {at}: {error}"));
        if let Some(i) = got.iter().zip(want).position(|(a, b)| a != b) {
            panic!("{what}: byte {} is {:#x}, expected {:#x}", at + i as u64, got[i], want[i]);
        }
        assert_shown(device, at, want, what);
    }
}

/// Reads a range by [`BlockDevice::read_with`] and checks that all of it is shown as `expected`.
///
/// # Panics
/// When a byte differs or is not shown.
pub fn assert_shown(device: &dyn BlockDevice, offset: u64, expected: &[u8], what: &str) {
    let mut shown = vec![0xee; expected.len()];
    let mut seen = vec![false; expected.len()];
    let mut sink = |at: u64, piece: &[u8]| {
        let range = at as usize..at as usize + piece.len();
        shown[range.clone()].copy_from_slice(piece);
        seen[range].fill(true);
    };
    device.read_with(offset, expected.len() as u64, &mut sink).expect("show a range within the device");
    assert!(seen.iter().all(|&seen| seen), "{what}: {} bytes at {offset} are not all shown", expected.len());
    assert!(shown == expected, "{what}: {} bytes at {offset} are shown wrong", expected.len());
}

/// Checks invariant 6 of the trait, and that holes read as zero.
///
/// # Panics
/// When an extent is wrong.
pub fn assert_extents(device: &dyn BlockDevice, offset: u64, len: u64, expected: &[u8]) {
    let mut extents = vec![Extent { len: 1, kind: ExtentKind::Data }];
    device.block_status(offset, len, &mut extents).expect("block status of a range within the device");
    assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), len, "extents cover the range at {offset}");
    let mut at = offset as usize;
    for extent in extents {
        assert!(extent.len > 0, "an extent of length 0");
        let end = at + extent.len as usize;
        if extent.kind == ExtentKind::Hole {
            assert!(expected[at..end].iter().all(|&byte| byte == 0), "hole {at}..{end} holds data");
        }
        at = end;
    }
}

fn a_fresh_device_reads_as_zero(device: &dyn BlockDevice) {
    let size = device.geometry().size.bytes();
    assert!(device.geometry().block_size.is_power_of_two());
    assert!(!device.geometry().read_only);
    assert_contents(device, &vec![0; size as usize], "fresh device");
    assert_extents(device, 0, size, &vec![0; size as usize]);
    device.flush().expect("flush");
}

fn ranges_outside_are_refused_and_empty_ones_are_done(device: &dyn BlockDevice) {
    let size = device.geometry().size.bytes();
    let flags = WriteFlags::default();
    let mut one = [7];
    for offset in [size, size + 1, u64::MAX] {
        let results = [
            device.read_at(offset, &mut one),
            device.read_with(offset, 1, &mut |_, _| {}),
            device.write_at(offset, &one, flags),
            device.write_zeroes(offset, 1, ZeroFlags::default()),
            device.trim(offset, 1),
            device.block_status(offset, 1, &mut Vec::new()),
        ];
        for result in results {
            assert_eq!(result.expect_err("outside the device").kind(), BlockErrorKind::OutOfRange);
        }
    }
    let mut both = [9; 1024];
    assert!(device.write_at(size - 512, &both, flags).is_err(), "a write over the end");
    device.read_at(size - 1024, &mut both).expect("read the end");
    assert_eq!(both, [0; 1024], "a refused write changes nothing");
    for offset in [0, 100, size] {
        device.read_at(offset, &mut []).expect("empty read");
        device.write_at(offset, &[], flags).expect("empty write");
        device.write_zeroes(offset, 0, ZeroFlags::default()).expect("empty zeroes");
        device.trim(offset, 0).expect("empty trim");
        let mut extents = Vec::new();
        device.block_status(offset, 0, &mut extents).expect("empty status");
        assert!(extents.is_empty());
    }
}

fn bytes_around_a_change_stay(device: &dyn BlockDevice) {
    let size = device.geometry().size.bytes() as usize;
    let mut expected = vec![0x5a; size];
    device.write_at(0, &expected, WriteFlags { fua: true }).expect("fill");
    for (offset, len) in [(1, 1), (4095, 2), (8192, 4096), (12_289, 8190), (30_000, 512), (size - 1, 1)] {
        device.trim(offset as u64, len as u64).expect("trim");
        expected[offset..offset + len].fill(0);
        assert_contents(device, &expected, "after trim");
        device.write_at(offset as u64, &vec![0xa5; len], WriteFlags::default()).expect("write");
        expected[offset..offset + len].fill(0xa5);
        assert_contents(device, &expected, "after write");
        let flags = ZeroFlags { no_hole: len % 2 == 0, fua: true, fast: false };
        device.write_zeroes(offset as u64, len as u64, flags).expect("zeroes");
        expected[offset..offset + len].fill(0);
        assert_contents(device, &expected, "after zeroes");
    }
}

fn a_size_that_is_no_multiple_of_the_block_works_to_its_end(device: &dyn BlockDevice) {
    let size = device.geometry().size.bytes();
    let mut expected = vec![0; size as usize];
    Random(11).fill(&mut expected);
    device.write_at(0, &expected, WriteFlags::default()).expect("write all");
    assert_contents(device, &expected, "odd size");
    assert_extents(device, 0, size, &expected);
    device.trim(size - 512, 512).expect("trim the tail");
    expected[size as usize - 512..].fill(0);
    assert_contents(device, &expected, "odd size, tail trimmed");
    assert_extents(device, size - 512, 512, &expected);
}

fn any_sequence_equals_the_model(device: &dyn BlockDevice, seed: u64) {
    let size = device.geometry().size.bytes();
    let model = MemoryDevice::new(device.geometry().size);
    let mut random = Random(seed);
    let mut buf = vec![0; 512 << 10];
    for step in 0..400 {
        let mut offset = random.below(size);
        let mut len = match random.below(4) {
            0 => random.below(4096),
            1 => random.below(64 << 10),
            2 => random.below(buf.len() as u64),
            _ => 4096 * (1 + random.below(32)),
        };
        match random.below(3) {
            0 => {}
            1 => (offset, len) = (offset / 512 * 512, len.next_multiple_of(512)),
            _ => (offset, len) = (offset / 4096 * 4096, len.next_multiple_of(4096)),
        }
        len = len.min(size - offset).min(buf.len() as u64);
        let data = &mut buf[..len as usize];
        match random.below(8) {
            0 | 1 => {
                random.fill(data);
                for device in [device, &model] {
                    device.write_at(offset, data, WriteFlags::default()).expect("write");
                }
            }
            2 => {
                // few distinct blocks, so that a device that shares equal blocks has something to share
                data.fill(random.below(3) as u8);
                for device in [device, &model] {
                    device.write_at(offset, data, WriteFlags { fua: true }).expect("write");
                }
            }
            3 => {
                for device in [device, &model] {
                    device.trim(offset, len).expect("trim");
                }
            }
            4 => {
                for device in [device, &model] {
                    device.write_zeroes(offset, len, ZeroFlags::default()).expect("zeroes");
                }
            }
            5 => assert_extents(device, offset, len, &model.contents()),
            6 => device.flush().expect("flush"),
            _ => {
                device.read_at(offset, data).expect("read");
                let contents = model.contents();
                let expected = &contents[offset as usize..(offset + len) as usize];
                assert!(data == expected, "seed {seed} step {step}: read of {len} at {offset} differs from the model");
                assert_shown(device, offset, expected, &format!("seed {seed} step {step}"));
            }
        }
    }
    assert_contents(device, &model.contents(), &format!("seed {seed}"));
    assert_extents(device, 0, size, &model.contents());
}

fn writers_of_one_block_do_not_lose_each_others_sectors(device: &dyn BlockDevice) {
    const ROUNDS: u8 = 200;
    std::thread::scope(|scope| {
        for sector in 0..8u64 {
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    let data = [round ^ sector as u8; 512];
                    device.write_at(sector * 512, &data, WriteFlags::default()).expect("write a sector");
                    let mut back = [0; 512];
                    device.read_at(sector * 512, &mut back).expect("read a sector");
                    assert_eq!(back, data, "sector {sector} lost round {round}");
                }
            });
        }
    });
}

fn readers_see_whole_blocks_while_a_writer_runs(device: &dyn BlockDevice) {
    const BLOCK: u64 = 4096;
    if u64::from(device.geometry().block_size) != BLOCK {
        return;
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let done = &done;
            scope.spawn(move || {
                let mut random = Random(reader);
                let mut buf = vec![0; BLOCK as usize];
                while !done.load(Ordering::Relaxed) {
                    let at = random.below(16) * BLOCK;
                    device.read_at(at, &mut buf).expect("read a block");
                    assert!(buf.iter().all(|&byte| byte == buf[0]), "block at {at} is torn");
                }
            });
        }
        let mut random = Random(99);
        for round in 0..4000u64 {
            let at = random.below(16) * BLOCK;
            match random.below(8) {
                0 => device.trim(at, BLOCK).expect("trim"),
                _ => device.write_at(at, &[round as u8; BLOCK as usize], WriteFlags::default()).expect("write"),
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}
