//! What must be known of each image, volume and kept snapshot to find it again: one record of 512 bytes each, behind a
//! header of two pages.
//!
//! ```text
//! header, in words of 32 bits, little-endian as the machine is (the memory never leaves it)
//!   0   2  magic "MUSTERST"
//!   2   1  version                          1
//!   3   1  pages of the frames              0 small, 1 transparent, 2 hugetlb
//!   4   1  frames the files have room for
//!   5   1  nodes
//!   6   1  records
//!   8   8  master key: tags and tenants' keys come from it
//!  18   1  1 when all of the above is written
//!  20   1  checksum of words 0..7 and 8..16
//!  32  1020  tenants: 255 x 16 bytes, 0 where there is none
//! record, from word 2048 on, 128 words each; number 0 stands for none and is not used
//!   0   1  state: 0 free, 1 in use          written last; everything else is written before
//!   1   1  kind: 1 image, 2 volume, 3 snapshot
//!   2   1  which of the two variants holds  one store switches size, contents, generation and policy at once
//!   3   1  checksum of the fixed part
//!   4   4  id (volume or snapshot)          fixed
//!   8   8  digest: an image's own, a volume's base
//!  16   1  flags: 1 has a digest, 2 read-only
//!  17   1  origin: record of the snapshot that a reset goes back to, or 0
//!  18   1  tenant's number
//!  19   1  length of the label
//!  20   4  volume a snapshot is of
//!  24   2  made at, µs since 1970
//!  26  10  variant 0: top node, flags, generation (2), size (2), quota (2), reservation (2)
//!  36  10  variant 1
//!  46  64  label: name of an image, of a snapshot
//! ```
//!
//! A process that dies between any two stores leaves a record as it was or as it was to be.

use std::io;

use muster_common::{Digest, VolumeId};
use twox_hash::XxHash3_64;

use crate::{
    PageKind,
    arena::Words,
    memory::Memory,
    sync::{
        Mutex,
        atomic::{
            AtomicU32,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

const MAGIC: [u32; 2] = [u32::from_le_bytes(*b"MUST"), u32::from_le_bytes(*b"ERST")];
const VERSION: u32 = 1;

const TENANTS_AT: usize = 32;
/// Numbers of tenants are 1 to 255; 0 is nobody's, shared by all.
pub(crate) const TENANTS: usize = 255;
const FIRST: usize = 2048;
const RECORD: usize = 128;
/// Images, volumes and snapshots of one host.
pub(crate) const RECORDS: u32 = 65_536;
const VARIANTS_AT: usize = 26;
const VARIANT: usize = 10;
const LABEL_AT: usize = 46;
/// Bytes of a label.
pub(crate) const LABEL: usize = 256;

const HAS_DIGEST: u32 = 1;
const READ_ONLY: u32 = 2;

const _: () = assert!(LABEL_AT + LABEL / 4 <= RECORD && TENANTS_AT + TENANTS * 4 <= FIRST);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Image = 1,
    Volume = 2,
    Snapshot = 3,
}

/// What changes, all at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Variant {
    pub(crate) top: u32,
    /// [`crate::config::WhenFull`] as a number.
    pub(crate) policy: u32,
    pub(crate) generation: u64,
    pub(crate) size: u64,
    /// 0: none.
    pub(crate) quota: u64,
    pub(crate) reservation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) kind: Kind,
    pub(crate) id: VolumeId,
    pub(crate) digest: Option<Digest>,
    pub(crate) read_only: bool,
    pub(crate) origin: u32,
    pub(crate) tenant: u8,
    pub(crate) of: VolumeId,
    pub(crate) made_us: u64,
    pub(crate) label: String,
    pub(crate) variant: Variant,
}

/// Why what lies there cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unusable(pub(crate) String);

/// The header's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) pages: PageKind,
    pub(crate) frames: u32,
    pub(crate) nodes: u32,
}

pub(crate) struct Records {
    words: Words,
    /// Free numbers, and the next one never used.
    free: Mutex<(Vec<u32>, u32)>,
    /// Of whoever changes a variant.
    changing: Mutex<()>,
}

impl Records {
    pub(crate) fn reserve(memory: &Memory) -> io::Result<Records> {
        let words = FIRST + (RECORDS as usize + 1) * RECORD;
        let file = memory.file("store", PageKind::Small)?;
        let words = Words::reserve(words, file.as_ref())?;
        Ok(Records { words, free: Mutex::new((Vec::new(), 1)), changing: Mutex::new(()) })
    }

    fn header(&self) -> &[AtomicU32] {
        &self.words.all()[..FIRST]
    }

    fn record(&self, number: u32) -> &[AtomicU32] {
        let at = FIRST + number as usize * RECORD;
        &self.words.all()[at..at + RECORD]
    }

    fn checksum(&self) -> u32 {
        let words = self.header()[..7].iter().chain(&self.header()[8..16]);
        let bytes: Vec<u8> = words.flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
        XxHash3_64::oneshot(&bytes) as u32
    }

    /// Writes the header of a new store.
    pub(crate) fn begin(&self, layout: Layout, key: &[u8; 32]) {
        let header = self.header();
        for (word, value) in header.iter().zip(MAGIC.into_iter().chain([VERSION])) {
            word.store(value, Relaxed);
        }
        for (word, bytes) in header[8..16].iter().zip(key.as_chunks::<4>().0) {
            word.store(u32::from_le_bytes(*bytes), Relaxed);
        }
        self.set_layout(layout);
        header[18].store(1, Release);
    }

    pub(crate) fn set_layout(&self, layout: Layout) {
        let header = self.header();
        let pages = match layout.pages {
            PageKind::Small => 0,
            PageKind::Transparent => 1,
            PageKind::Huge => 2,
        };
        header[3].store(pages, Relaxed);
        header[4].store(layout.frames, Relaxed);
        header[5].store(layout.nodes, Relaxed);
        header[6].store(RECORDS, Relaxed);
        header[20].store(self.checksum(), Release);
    }

    /// The header an earlier process wrote.
    pub(crate) fn look(&self) -> Result<(Layout, [u8; 32]), Unusable> {
        let header = self.header();
        let word = |at: usize| header[at].load(Acquire);
        let unusable = |why: String| Err(Unusable(why));
        if word(18) != 1 {
            return unusable("it was never finished".into());
        }
        if [word(0), word(1)] != MAGIC {
            return unusable("it is no store of Muster's".into());
        }
        if word(2) != VERSION || word(6) != RECORDS {
            return unusable(format!("it has version {}, this program knows {VERSION}", word(2)));
        }
        if word(20) != self.checksum() {
            return unusable("its header is damaged".into());
        }
        let pages = match word(3) {
            0 => PageKind::Small,
            1 => PageKind::Transparent,
            2 => PageKind::Huge,
            other => return unusable(format!("it has pages of kind {other}")),
        };
        let mut key = [0; 32];
        for (bytes, word) in key.as_chunks_mut::<4>().0.iter_mut().zip(&header[8..16]) {
            *bytes = word.load(Relaxed).to_le_bytes();
        }
        Ok((Layout { pages, frames: word(4), nodes: word(5) }, key))
    }

    /// The tenants by number; number 1 first.
    pub(crate) fn tenants(&self) -> Vec<[u8; 16]> {
        let words = &self.header()[TENANTS_AT..TENANTS_AT + 4 * TENANTS];
        words.chunks(4).map(get_bytes).take_while(|tenant| *tenant != [0; 16]).collect()
    }

    pub(crate) fn set_tenant(&self, number: u8, tenant: [u8; 16]) {
        let at = TENANTS_AT + 4 * (usize::from(number) - 1);
        put_bytes(&self.header()[at..at + 4], &tenant);
    }

    /// All records in use whose fixed part is sound, and the numbers of those that are not, which are freed.
    pub(crate) fn all(&self) -> (Vec<(u32, Record)>, Vec<u32>) {
        let (mut found, mut damaged, mut next) = (Vec::new(), Vec::new(), 1);
        for number in 1..=RECORDS {
            let words = self.record(number);
            if words[0].load(Acquire) == 0 {
                continue;
            }
            next = number + 1;
            match decode(words) {
                Some(record) => found.push((number, record)),
                None => damaged.push(number),
            }
        }
        for number in &damaged {
            self.record(*number)[0].store(0, Release);
        }
        let used: Vec<u32> = found.iter().map(|(number, _)| *number).collect();
        let free = (1..next).rev().filter(|number| used.binary_search(number).is_err()).collect();
        *self.free.lock() = (free, next);
        (found, damaged)
    }

    /// Enters a record; `None` when there is no room for more.
    pub(crate) fn add(&self, record: &Record) -> Option<u32> {
        let number = {
            let mut free = self.free.lock();
            match free.0.pop() {
                Some(number) => number,
                None if free.1 <= RECORDS => {
                    free.1 += 1;
                    free.1 - 1
                }
                None => return None,
            }
        };
        let words = self.record(number);
        encode(words, record);
        words[0].store(1, Release);
        Some(number)
    }

    pub(crate) fn remove(&self, number: u32) {
        if number != 0 {
            self.record(number)[0].store(0, Release);
            self.free.lock().0.push(number);
        }
    }

    #[cfg(test)]
    pub(crate) fn variant(&self, number: u32) -> Variant {
        let words = self.record(number);
        get_variant(&words[variant_at(words[2].load(Acquire))..])
    }

    /// Changes the variant at one instant.
    pub(crate) fn change(&self, number: u32, change: impl FnOnce(&mut Variant)) {
        if number == 0 {
            return;
        }
        let _alone = self.changing.lock();
        let words = self.record(number);
        let now = words[2].load(Relaxed);
        let mut variant = get_variant(&words[variant_at(now)..]);
        change(&mut variant);
        put_variant(&words[variant_at(now ^ 1)..], &variant);
        words[2].store((now ^ 1) & 1, Release);
    }
}

const fn variant_at(which: u32) -> usize {
    VARIANTS_AT + VARIANT * (which & 1) as usize
}

fn get_u64(words: &[AtomicU32]) -> u64 {
    u64::from(words[0].load(Relaxed)) | u64::from(words[1].load(Relaxed)) << 32
}

fn put_u64(words: &[AtomicU32], value: u64) {
    words[0].store(value as u32, Relaxed);
    words[1].store((value >> 32) as u32, Relaxed);
}

fn get_bytes<const N: usize>(words: &[AtomicU32]) -> [u8; N] {
    let mut bytes = [0; N];
    for (bytes, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *bytes = word.load(Relaxed).to_le_bytes();
    }
    bytes
}

fn put_bytes(words: &[AtomicU32], bytes: &[u8]) {
    for (word, bytes) in words.iter().zip(bytes.chunks(4)) {
        let mut whole = [0; 4];
        whole[..bytes.len()].copy_from_slice(bytes);
        word.store(u32::from_le_bytes(whole), Relaxed);
    }
}

fn get_variant(words: &[AtomicU32]) -> Variant {
    Variant {
        top: words[0].load(Relaxed),
        policy: words[1].load(Relaxed),
        generation: get_u64(&words[2..]),
        size: get_u64(&words[4..]),
        quota: get_u64(&words[6..]),
        reservation: get_u64(&words[8..]),
    }
}

fn put_variant(words: &[AtomicU32], variant: &Variant) {
    words[0].store(variant.top, Relaxed);
    words[1].store(variant.policy, Relaxed);
    put_u64(&words[2..], variant.generation);
    put_u64(&words[4..], variant.size);
    put_u64(&words[6..], variant.quota);
    put_u64(&words[8..], variant.reservation);
}

/// Of what never changes.
fn checksum(words: &[AtomicU32]) -> u32 {
    let fixed = words[1..2].iter().chain(&words[4..VARIANTS_AT]).chain(&words[LABEL_AT..LABEL_AT + LABEL / 4]);
    let bytes: Vec<u8> = fixed.flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
    XxHash3_64::oneshot(&bytes) as u32
}

fn encode(words: &[AtomicU32], record: &Record) {
    words[1].store(record.kind as u32, Relaxed);
    words[2].store(0, Relaxed);
    put_bytes(&words[4..8], record.id.uuid().as_bytes());
    put_bytes(&words[8..16], record.digest.map_or([0; 32], |digest| *digest.as_bytes()).as_slice());
    let flags = [(record.digest.is_some(), HAS_DIGEST), (record.read_only, READ_ONLY)];
    words[16].store(flags.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum(), Relaxed);
    words[17].store(record.origin, Relaxed);
    words[18].store(u32::from(record.tenant), Relaxed);
    words[19].store(record.label.len() as u32, Relaxed);
    put_bytes(&words[20..24], record.of.uuid().as_bytes());
    put_u64(&words[24..], record.made_us);
    put_variant(&words[variant_at(0)..], &record.variant);
    let mut label = [0; LABEL];
    label[..record.label.len()].copy_from_slice(record.label.as_bytes());
    put_bytes(&words[LABEL_AT..LABEL_AT + LABEL / 4], &label);
    words[3].store(checksum(words), Relaxed);
}

fn decode(words: &[AtomicU32]) -> Option<Record> {
    if words[3].load(Relaxed) != checksum(words) {
        return None;
    }
    let word = |at: usize| words[at].load(Relaxed);
    let kind = match word(1) {
        1 => Kind::Image,
        2 => Kind::Volume,
        3 => Kind::Snapshot,
        _ => return None,
    };
    let label: [u8; LABEL] = get_bytes(&words[LABEL_AT..LABEL_AT + LABEL / 4]);
    let id = |at: usize| VolumeId::from_bytes(get_bytes(&words[at..at + 4]));
    Some(Record {
        kind,
        id: id(4),
        digest: (word(16) & HAS_DIGEST != 0).then(|| Digest::from_bytes(get_bytes(&words[8..16]))),
        read_only: word(16) & READ_ONLY != 0,
        origin: word(17),
        tenant: u8::try_from(word(18)).ok()?,
        of: id(20),
        made_us: get_u64(&words[24..]),
        label: String::from_utf8(label.get(..word(19) as usize)?.to_vec()).ok()?,
        variant: get_variant(&words[variant_at(word(2))..]),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn record(n: u8) -> Record {
        Record {
            kind: Kind::Volume,
            id: VolumeId::random(),
            digest: n.is_multiple_of(2).then(|| Digest::from_bytes([n; 32])),
            read_only: n.is_multiple_of(3),
            origin: u32::from(n),
            tenant: n,
            of: VolumeId::random(),
            made_us: u64::MAX / 3,
            label: "ä".repeat(usize::from(n) % 100),
            variant: Variant {
                top: 1,
                policy: 1,
                generation: u64::MAX / 5,
                size: 1 << 40,
                quota: 1 << 33,
                reservation: 7,
            },
        }
    }

    proptest! {
        #[test]
        fn any_use_of_records_equals_a_table(steps in prop::collection::vec((0..8u8, any::<u8>()), 1..120)) {
            let records = Records::reserve(&Memory::Private).unwrap();
            let mut model = BTreeMap::new();
            for (step, n) in steps {
                let chosen = model.keys().nth(usize::from(n) % model.len().max(1)).copied();
                match (step, chosen) {
                    (0..3, _) | (_, None) => {
                        let record = record(n);
                        let number = records.add(&record).unwrap();
                        prop_assert!(number > 0 && model.insert(number, record).is_none());
                    }
                    (3, Some(number)) => {
                        records.remove(number);
                        model.remove(&number);
                    }
                    (4, Some(number)) => {
                        // of what never changes: kind, identity, label
                        let word = [1, 4, 9, 17, 19, LABEL_AT][usize::from(n) % 6];
                        records.record(number)[word].fetch_xor(1 << (n % 32), Relaxed);
                        prop_assert_eq!(records.all().1, [number]);
                        model.remove(&number);
                    }
                    (_, Some(number)) => {
                        let change = |variant: &mut Variant| {
                            variant.generation += 1;
                            variant.top = u32::from(n);
                        };
                        records.change(number, change);
                        change(&mut model.get_mut(&number).unwrap().variant);
                    }
                }
                let found: BTreeMap<u32, Record> = records.all().0.into_iter().collect();
                prop_assert_eq!(&found, &model);
            }
        }
    }

    #[test]
    fn records_are_found_again_and_a_damaged_one_is_freed() {
        let records = Records::reserve(&Memory::Private).unwrap();
        let written: Vec<(u32, Record)> = (0..200).map(record).map(|r| (records.add(&r).unwrap(), r)).collect();
        assert_eq!(records.all().0, written);
        for (number, _) in written.iter().skip(100) {
            records.remove(*number);
        }
        records.record(written[5].0)[9].fetch_xor(1 << 7, Relaxed);
        let (found, damaged) = records.all();
        assert_eq!(damaged, [written[5].0]);
        assert_eq!(found.len(), 99);
        // free numbers come again
        assert!(records.add(&record(1)).unwrap() <= 200);
    }

    #[test]
    fn a_change_of_the_variant_is_whole_or_not_there() {
        let records = Records::reserve(&Memory::Private).unwrap();
        let first = record(4);
        let number = records.add(&first).unwrap();
        for generation in 0..5 {
            records.change(number, |variant| variant.generation = generation);
            assert_eq!(records.variant(number), Variant { generation, ..first.variant });
            // what a process that dies while it writes the next one leaves
            let words = records.record(number);
            let other = variant_at(words[2].load(Relaxed) ^ 1);
            words[other + 2].store(0xdead, Relaxed);
            assert_eq!(records.variant(number), Variant { generation, ..first.variant });
            assert_eq!(records.all().0[0].1.variant.generation, generation);
        }
    }

    #[test]
    fn a_header_is_looked_at_before_it_is_believed() {
        let records = Records::reserve(&Memory::Private).unwrap();
        assert!(records.look().is_err());
        let layout = Layout { pages: PageKind::Transparent, frames: 77, nodes: 88 };
        records.begin(layout, &[5; 32]);
        assert_eq!(records.look(), Ok((layout, [5; 32])));
        records.set_tenant(1, [9; 16]);
        records.set_tenant(2, [8; 16]);
        assert_eq!(records.tenants(), [[9; 16], [8; 16]]);
        records.header()[4].store(78, Relaxed);
        assert!(records.look().unwrap_err().0.contains("damaged"));
        records.header()[2].store(2, Relaxed);
        assert!(records.look().unwrap_err().0.contains("version 2"));
    }
}
