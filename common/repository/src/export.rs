//! Writing images out as qcow2, front to back, so that the file can be made on the other end of a connection.
//!
//! What is written: version 3, clusters of 64 KiB, no compression, no backing file, no feature bits, 16-bit reference
//! counts. A cluster that the source says is zero is not allocated. Everything before the data is known from the source's
//! spans, so nothing is ever written twice.
//!
//! | cluster | what |
//! |---|---|
//! | 0 | header (see `source::qcow2`), end of extensions |
//! | 1 .. | L1 table, one entry for each 512 MiB of the disk |
//! | .. | reference count table, one entry for each 2 GiB of the file |
//! | .. | reference count blocks: 1 for every cluster of the file |
//! | .. | L2 tables, one for each 512 MiB that have data |
//! | .. | data, in the order of the disk; the last one is filled up with zeros |

use std::{ops::Range, sync::Arc};

use crate::source::{ReadAt, SourceError};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of 8 bytes in a cluster.
const ENTRIES: u64 = CLUSTER / 8;
/// Reference counts of 2 bytes in a cluster.
const COUNTS: u64 = CLUSTER / 2;
const HEADER: usize = 104;
/// The one reference there is: the active state may write in place.
const COPIED: u64 = 1 << 63;
/// Bytes read at once.
const PIECE: u64 = 1 << 20;

/// A source about to be written as qcow2.
pub struct Qcow2Writer {
    source: Arc<dyn ReadAt>,
    size: u64,
    /// Clusters of the disk that are allocated, ascending.
    runs: Vec<Range<u64>>,
    layout: Layout,
}

/// Where things stand in the file, in clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    l1_entries: u64,
    l1: u64,
    refcount_table: u64,
    refcount_blocks: u64,
    l2: u64,
    data: u64,
    end: u64,
}

impl Layout {
    fn new(size: u64, runs: &[Range<u64>]) -> Self {
        let l1_entries = size.div_ceil(CLUSTER * ENTRIES);
        let l1_clusters = l1_entries.div_ceil(ENTRIES);
        let data_clusters: u64 = runs.iter().map(|r| r.end - r.start).sum();
        let mut l2_tables = 0;
        let mut next = 0;
        for run in runs {
            let (first, last) = (run.start / ENTRIES, (run.end - 1) / ENTRIES);
            l2_tables += (last + 1).saturating_sub(first.max(next));
            next = last + 1;
        }
        // the counts count themselves too: a few rounds until nothing grows any more
        let (mut blocks, mut tables) = (1, 1);
        loop {
            let total = 1 + l1_clusters + tables + blocks + l2_tables + data_clusters;
            let (needed, needed_tables) = (total.div_ceil(COUNTS), total.div_ceil(COUNTS).div_ceil(ENTRIES));
            if needed <= blocks && needed_tables <= tables {
                break;
            }
            (blocks, tables) = (needed, needed_tables);
        }
        let l1 = 1;
        let refcount_table = l1 + l1_clusters;
        let refcount_blocks = refcount_table + tables;
        let l2 = refcount_blocks + blocks;
        let data = l2 + l2_tables;
        Self { l1_entries, l1, refcount_table, refcount_blocks, l2, data, end: data + data_clusters }
    }
}

/// The allocated clusters, from the source's spans.
fn allocated(source: &dyn ReadAt) -> Result<Vec<Range<u64>>, SourceError> {
    let size = source.size().0;
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < size {
        let mut spans = Vec::new();
        source.spans(at, size - at, &mut spans)?;
        let before = at;
        for span in spans {
            let end = at.saturating_add(span.len).min(size);
            if !span.zero && end > at {
                let run = at / CLUSTER..end.div_ceil(CLUSTER);
                match runs.last_mut() {
                    Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                    _ => runs.push(run),
                }
            }
            at = end;
        }
        if at == before {
            // a source that says nothing: take it all
            runs.push(at / CLUSTER..size.div_ceil(CLUSTER));
            break;
        }
    }
    Ok(runs)
}

/// Collects what is written into pieces.
struct Out<'a, E> {
    sink: &'a mut dyn FnMut(&[u8]) -> Result<(), E>,
    buffer: Vec<u8>,
}

impl<E> Out<'_, E> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), E> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() as u64 >= PIECE { self.flush() } else { Ok(()) }
    }

    /// Zeros up to the next cluster.
    fn fill(&mut self) -> Result<(), E> {
        // pieces are flushed at any length, so only whole tables are put before a call of this
        let len = self.buffer.len().next_multiple_of(CLUSTER as usize);
        self.buffer.resize(len, 0);
        self.flush()
    }

    fn flush(&mut self) -> Result<(), E> {
        let result = (self.sink)(&self.buffer);
        self.buffer.clear();
        result
    }
}

impl Qcow2Writer {
    /// Looks at the source's spans; reads nothing of it yet.
    ///
    /// # Errors
    /// When its spans cannot be read, or its size is none of a disk (no multiple of 512).
    pub fn new(source: Arc<dyn ReadAt>) -> Result<Self, SourceError> {
        let size = source.size().0;
        if size == 0 {
            return Err(SourceError::Empty);
        }
        if !size.is_multiple_of(512) {
            return Err(SourceError::OddSize { size });
        }
        let runs = allocated(&*source)?;
        let layout = Layout::new(size, &runs);
        Ok(Self { source, size, runs, layout })
    }

    /// Length of the file.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.layout.end * CLUSTER
    }

    /// Gives the file's bytes in order, in pieces of about 1 MiB.
    ///
    /// # Errors
    /// That of the source, or of `sink`; what was given before is no image then.
    pub fn write<E: From<SourceError>>(&self, sink: &mut dyn FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut out = Out { sink, buffer: Vec::with_capacity(PIECE as usize + CLUSTER as usize) };
        out.put(&self.header())?;
        out.fill()?;
        self.write_l1(&mut out)?;
        let layout = self.layout;
        for block in layout.refcount_blocks..layout.l2 {
            out.put(&(block << CLUSTER_BITS).to_be_bytes())?;
        }
        self.fill_to(
            &mut out,
            layout.refcount_blocks - layout.refcount_table,
            (layout.l2 - layout.refcount_blocks) * 8,
        )?;
        for _ in 0..layout.end {
            out.put(&1u16.to_be_bytes())?;
        }
        self.fill_to(&mut out, layout.l2 - layout.refcount_blocks, layout.end * 2)?;
        self.write_l2(&mut out)?;
        out.flush()?;
        self.write_data(&mut out)
    }

    /// Zeros behind `written` bytes of a table of so many clusters.
    fn fill_to<E>(&self, out: &mut Out<'_, E>, clusters: u64, written: u64) -> Result<(), E> {
        let mut left = clusters * CLUSTER - written;
        let zeros = [0; 4096];
        while left > 0 {
            let len = left.min(zeros.len() as u64);
            out.put(&zeros[..len as usize])?;
            left -= len;
        }
        Ok(())
    }

    fn header(&self) -> [u8; HEADER + 8] {
        let layout = self.layout;
        let mut header = [0; HEADER + 8];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb");
        put(4, &3u32.to_be_bytes());
        put(20, &CLUSTER_BITS.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &(layout.l1_entries as u32).to_be_bytes());
        put(40, &(layout.l1 << CLUSTER_BITS).to_be_bytes());
        put(48, &(layout.refcount_table << CLUSTER_BITS).to_be_bytes());
        put(56, &((layout.refcount_blocks - layout.refcount_table) as u32).to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &(HEADER as u32).to_be_bytes());
        header
    }

    fn write_l1<E>(&self, out: &mut Out<'_, E>) -> Result<(), E> {
        let mut table = self.layout.l2;
        let mut next = 0;
        for run in &self.runs {
            for index in (run.start / ENTRIES).max(next)..=(run.end - 1) / ENTRIES {
                for _ in next..index {
                    out.put(&[0; 8])?;
                }
                out.put(&(table << CLUSTER_BITS | COPIED).to_be_bytes())?;
                table += 1;
                next = index + 1;
            }
        }
        self.fill_to(out, self.layout.refcount_table - self.layout.l1, next * 8)
    }

    fn write_l2<E>(&self, out: &mut Out<'_, E>) -> Result<(), E> {
        let mut table: Option<(u64, Vec<u8>)> = None;
        for (host, guest) in (self.layout.data..).zip(self.runs.iter().flat_map(Clone::clone)) {
            let index = guest / ENTRIES;
            if table.as_ref().is_none_or(|(at, _)| *at != index) {
                if let Some((_, bytes)) = table.take() {
                    out.put(&bytes)?;
                }
                table = Some((index, vec![0; CLUSTER as usize]));
            }
            if let Some((_, bytes)) = &mut table {
                let at = (guest % ENTRIES * 8) as usize;
                bytes[at..at + 8].copy_from_slice(&(host << CLUSTER_BITS | COPIED).to_be_bytes());
            }
        }
        match table {
            Some((_, bytes)) => out.put(&bytes),
            None => Ok(()),
        }
    }

    fn write_data<E: From<SourceError>>(&self, out: &mut Out<'_, E>) -> Result<(), E> {
        for run in &self.runs {
            let (mut at, end) = (run.start * CLUSTER, run.end * CLUSTER);
            while at < end {
                let len = (end - at).min(PIECE);
                out.buffer.resize(len as usize, 0);
                let there = (self.size - at).min(len) as usize;
                self.source.read_at(at, &mut out.buffer[..there])?;
                out.buffer[there..].fill(0);
                out.flush()?;
                at += len;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::source::{Qcow2Image, Span};

    /// A disk of clusters told by numbers; 0 is a hole.
    struct Disk {
        size: u64,
        clusters: Vec<u8>,
    }

    impl ReadAt for Disk {
        fn size(&self) -> muster_common::ByteLen {
            muster_common::ByteLen(self.size)
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
            assert!(offset + buf.len() as u64 <= self.size);
            for (i, byte) in buf.iter_mut().enumerate() {
                *byte = self.clusters.get(((offset + i as u64) / CLUSTER) as usize).copied().unwrap_or(0);
            }
            Ok(())
        }
        fn spans(&self, offset: u64, len: u64, out: &mut Vec<Span>) -> Result<(), SourceError> {
            // one span a call, to the end of its cluster
            let zero = self.clusters.get((offset / CLUSTER) as usize).is_none_or(|c| *c == 0);
            let here =
                if (offset / CLUSTER) as usize >= self.clusters.len() { len } else { CLUSTER - offset % CLUSTER };
            out.push(Span { len: here.min(len), zero });
            Ok(())
        }
    }

    fn written(disk: Disk) -> Vec<u8> {
        let writer = Qcow2Writer::new(Arc::new(disk)).unwrap();
        let mut bytes = Vec::new();
        writer
            .write(&mut |piece: &[u8]| {
                bytes.extend_from_slice(piece);
                Ok::<_, SourceError>(())
            })
            .unwrap();
        assert_eq!(bytes.len() as u64, writer.file_len());
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_written_is_read_by_our_own_reader(
            clusters in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 1..40),
            cut in 0u64..128,
            behind in prop_oneof![Just(0u64), 1u64..40_000],
        ) {
            let size = clusters.len() as u64 * CLUSTER - cut * 512 + behind * CLUSTER;
            let bytes = written(Disk { size, clusters: clusters.clone() });
            let image = Qcow2Image::open(Box::new(bytes)).unwrap();
            prop_assert_eq!(image.size().0, size);
            let expected = Disk { size, clusters };
            let len = size.min(40 * CLUSTER) as usize;
            let (mut a, mut b) = (vec![1; len], vec![2; len]);
            image.read_at(0, &mut a).unwrap();
            expected.read_at(0, &mut b).unwrap();
            prop_assert!(a == b);
        }
    }

    #[test]
    fn a_disk_without_data_is_its_tables_only() {
        let bytes = written(Disk { size: 3 << 40, clusters: Vec::new() });
        assert_eq!(bytes.len() as u64, 4 * CLUSTER);
        assert!(Qcow2Image::open(Box::new(bytes)).is_ok());
    }

    #[test]
    fn the_counts_count_themselves_also_where_a_block_begins() {
        for clusters in [COUNTS - 6, COUNTS - 5, COUNTS - 4, COUNTS, 3 * COUNTS, COUNTS * ENTRIES] {
            let layout = Layout::new(64 << 40, std::slice::from_ref(&(0..clusters)));
            let blocks = layout.l2 - layout.refcount_blocks;
            assert!(blocks * COUNTS >= layout.end, "{clusters}: {layout:?}");
            assert!((layout.refcount_blocks - layout.refcount_table) * ENTRIES >= blocks, "{clusters}: {layout:?}");
        }
    }

    #[test]
    fn sizes_that_no_disk_has_are_refused() {
        assert!(matches!(Qcow2Writer::new(Arc::new(vec![1u8; 1000])), Err(SourceError::OddSize { size: 1000 })));
        assert!(matches!(Qcow2Writer::new(Arc::new(Vec::<u8>::new())), Err(SourceError::Empty)));
    }
}
