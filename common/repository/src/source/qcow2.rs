//! A strict reader of qcow2 images (versions 2 and 3), written for files of unknown origin.
//!
//! Everything is checked when the image is opened: header, L1 table, each L2 entry, so that a truncated image is refused
//! before a byte of it is imported. The work is bounded by the length of the file, because no two tables may share a
//! cluster, and for sparse files by the 32 GiB of tables that the limits below allow; memory by 32 MiB of L1 table and a set
//! of the clusters that tables take. Nothing but the file itself is ever opened.
//!
//! Read: all cluster sizes (512 B to 2 MiB), unallocated, zero and zlib-compressed clusters. Internal snapshots are
//! ignored; the active state is read. Refused: backing files and external data files (they name other files of this host),
//! encryption, extended L2 entries, zstd, the dirty and corrupt bits, incompatible feature bits that are not known, reserved
//! bits that are set, tables and clusters that overlap tables or lie outside of the file.
//!
//! | offset | size | field (big-endian) |
//! |---|---|---|
//! | 0 | 4 | magic `QFI\xfb` |
//! | 4 | 4 | version |
//! | 8, 16 | 8, 4 | backing file name: offset, length |
//! | 20 | 4 | log2 of the cluster size |
//! | 24 | 8 | virtual size |
//! | 32 | 4 | encryption method |
//! | 36, 40 | 4, 8 | L1 table: entries, offset |
//! | 48, 56 | 8, 4 | refcount table: offset, clusters |
//! | 60, 64 | 4, 8 | snapshots: count, offset |
//! | 72, 80, 88 | 8 each | version 3: incompatible, compatible, autoclear feature bits |
//! | 96, 100 | 4, 4 | version 3: refcount order, header length |
//! | 104 | 1 | version 3, when the header is longer than 104: compression type |

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use flate2::{Decompress, FlushDecompress};
use muster_common::ByteLen;
use parking_lot::Mutex;

use super::{ReadAt, SourceError, Span};
use crate::manifest::MAX_LOGICAL_SIZE;

const MAGIC: &[u8; 4] = b"QFI\xfb";
const HEADER_V2: usize = 72;
const HEADER_V3: usize = 104;

const EXTENSION_END: u32 = 0;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;

/// The limits of QEMU itself.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Bits 9 to 55 of a table entry: an offset in the file.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const REFCOUNT_RESERVED: u64 = 0x1ff;
const L2_ZERO: u64 = 1;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;

/// L2 tables kept in memory: one of a 2 MiB cluster image covers 512 GiB, eight of them fit.
const L2_CACHE_BYTES: usize = 16 << 20;
/// Inflated clusters kept: neighbours of a scan's units share large ones.
const INFLATED_KEPT: usize = 4;
/// So that one call's answer stays small whatever the cluster size.
const MAX_SPANS: usize = 4096;

/// A qcow2 image. Reads may come from any thread.
pub struct Qcow2Image {
    container: Box<dyn ReadAt>,
    size: u64,
    cluster_bits: u32,
    version: u32,
    /// Offsets of the L2 tables that the virtual size needs; 0 is none.
    l1: Vec<u64>,
    l2: Mutex<HashMap<usize, Arc<Vec<u64>>>>,
    inflated: Mutex<Vec<(u64, Arc<Vec<u8>>)>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cluster {
    Hole,
    Data { host: u64 },
    Compressed { entry: u64, host: u64, len: u64 },
}

fn corrupt(what: impl Into<String>) -> SourceError {
    SourceError::Corrupt { what: what.into() }
}

fn unsupported(what: impl Into<String>) -> SourceError {
    SourceError::Unsupported { what: what.into() }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(raw)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(raw)
}

/// The clusters that tables occupy. Each may have one owner.
struct Occupied {
    clusters: HashSet<u64>,
    cluster_bits: u32,
    file: u64,
}

impl Occupied {
    /// Claims a table; refuses one that is unaligned, outside of the file, or on another table.
    fn claim(&mut self, what: &str, offset: u64, len: u64) -> Result<(), SourceError> {
        if offset & ((1 << self.cluster_bits) - 1) != 0 {
            return Err(corrupt(format!("{what} at {offset:#x} is not aligned to a cluster")));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.file => {}
            _ => return Err(corrupt(format!("{what} at {offset:#x} lies outside of the file of {} bytes", self.file))),
        }
        for cluster in offset >> self.cluster_bits..(offset + len).div_ceil(1 << self.cluster_bits) {
            if !self.clusters.insert(cluster) {
                return Err(corrupt(format!("{what} at {offset:#x} overlaps another table")));
            }
        }
        Ok(())
    }
}

impl Qcow2Image {
    /// Opens and checks an image that lies in `container`.
    pub fn open(container: Box<dyn ReadAt>) -> Result<Self, SourceError> {
        let file = container.size().0;
        let mut head = vec![0; file.min(4096) as usize];
        container.read_at(0, &mut head)?;
        if !head.starts_with(MAGIC) {
            return Err(SourceError::NotQcow2);
        }
        if head.len() < HEADER_V2 {
            return Err(corrupt("the header is cut"));
        }
        let version = be32(&head, 4);
        if !(2..=3).contains(&version) {
            return Err(unsupported(format!("version {version}")));
        }
        if be64(&head, 8) != 0 {
            return Err(SourceError::ExternalReference { what: "a backing file" });
        }
        let cluster_bits = be32(&head, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(unsupported(format!("a cluster size of 2^{cluster_bits} bytes")));
        }
        let cluster = 1u64 << cluster_bits;
        let header_length = match version {
            2 => HEADER_V2,
            _ => check_features(&head, cluster)?,
        };
        match be32(&head, 32) {
            0 => {}
            method => return Err(unsupported(format!("encryption (method {method})"))),
        }
        check_extensions(&*container, header_length as u64, cluster.min(file))?;

        let size = be64(&head, 24);
        if size == 0 {
            return Err(SourceError::Empty);
        }
        if size > MAX_LOGICAL_SIZE {
            return Err(SourceError::TooLarge { size, limit: MAX_LOGICAL_SIZE });
        }
        if !size.is_multiple_of(512) {
            return Err(SourceError::OddSize { size });
        }

        let mut occupied = Occupied { clusters: HashSet::from([0]), cluster_bits, file };
        check_refcounts(&*container, &head, &mut occupied)?;
        check_snapshots(&head, cluster, file)?;

        let l1_entries = u64::from(be32(&head, 36));
        let needed = size.div_ceil(cluster * (cluster / 8));
        if l1_entries < needed {
            return Err(corrupt(format!("the L1 table has {l1_entries} entries, its size needs {needed}")));
        }
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err(unsupported(format!("an L1 table of {l1_entries} entries")));
        }
        let l1_offset = be64(&head, 40);
        occupied.claim("the L1 table", l1_offset, l1_entries * 8)?;
        let mut raw = vec![0; needed as usize * 8];
        container.read_at(l1_offset, &mut raw)?;
        let mut l1 = Vec::with_capacity(needed as usize);
        for (i, entry) in raw.chunks_exact(8).map(|raw| be64(raw, 0)).enumerate() {
            if entry & L1_RESERVED != 0 {
                return Err(corrupt(format!("L1 entry {i} ({entry:#x}) has reserved bits set")));
            }
            let offset = entry & OFFSET_MASK;
            if offset != 0 {
                occupied.claim(&format!("L2 table {i}"), offset, cluster)?;
            }
            l1.push(offset);
        }

        let image =
            Self { container, size, cluster_bits, version, l1, l2: Mutex::default(), inflated: Mutex::default() };
        image.check_entries(&occupied)?;
        Ok(image)
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Looks at every L2 entry once.
    fn check_entries(&self, occupied: &Occupied) -> Result<(), SourceError> {
        let per_table = self.cluster() / 8;
        for index in (0..self.l1.len()).filter(|&i| self.l1[i] != 0) {
            for (i, entry) in self.read_l2(index)?.into_iter().enumerate() {
                if entry == 0 {
                    continue;
                }
                let guest = (index as u64 * per_table + i as u64) << self.cluster_bits;
                let wrong =
                    |what: &str| corrupt(format!("the L2 entry of guest offset {guest:#x} ({entry:#x}) {what}"));
                let (host, len) = match self.decode(entry).map_err(wrong)? {
                    Cluster::Hole => {
                        // a preallocated zero cluster has a place all the same
                        (entry & OFFSET_MASK, 0)
                    }
                    // bytes behind the end of the disk need not be there
                    Cluster::Data { host } => (host, self.size.saturating_sub(guest).min(self.cluster())),
                    Cluster::Compressed { host, .. } => (host, 1),
                };
                if host.checked_add(len).is_none_or(|end| end > occupied.file) {
                    return Err(wrong("points outside of the file"));
                }
                if host != 0 && occupied.clusters.contains(&(host >> self.cluster_bits)) {
                    return Err(wrong("points into a table"));
                }
            }
        }
        Ok(())
    }

    fn decode(&self, entry: u64) -> Result<Cluster, &'static str> {
        if entry & COMPRESSED != 0 {
            if entry & COPIED != 0 {
                return Err("is compressed and marked as writable in place");
            }
            let split = 62 - (self.cluster_bits - 8);
            let host = entry & ((1 << split) - 1);
            if host == 0 {
                return Err("is compressed and has no place");
            }
            let sectors = ((entry & (COMPRESSED - 1)) >> split) + 1;
            return Ok(Cluster::Compressed { entry, host, len: sectors * 512 - host % 512 });
        }
        if entry & L2_RESERVED != 0 || (self.version == 2 && entry & L2_ZERO != 0) {
            return Err("has reserved bits set");
        }
        let host = entry & OFFSET_MASK;
        if host & (self.cluster() - 1) != 0 {
            return Err("is not aligned to a cluster");
        }
        Ok(if entry & L2_ZERO != 0 || host == 0 { Cluster::Hole } else { Cluster::Data { host } })
    }

    fn read_l2(&self, index: usize) -> Result<Vec<u64>, SourceError> {
        let mut raw = vec![0; self.cluster() as usize];
        self.container.read_at(self.l1[index], &mut raw)?;
        Ok(raw.chunks_exact(8).map(|raw| be64(raw, 0)).collect())
    }

    /// The L2 table of an L1 index; `None` where there is none.
    fn l2(&self, index: usize) -> Result<Option<Arc<Vec<u64>>>, SourceError> {
        if self.l1[index] == 0 {
            return Ok(None);
        }
        if let Some(table) = self.l2.lock().get(&index) {
            return Ok(Some(table.clone()));
        }
        let table = Arc::new(self.read_l2(index)?);
        let mut tables = self.l2.lock();
        if (tables.len() + 1) * self.cluster() as usize > L2_CACHE_BYTES {
            tables.clear();
        }
        tables.insert(index, table.clone());
        Ok(Some(table))
    }

    /// Calls back for each cluster of a range: (guest offset, length within the range, what it is), until it says false.
    fn walk(
        &self,
        offset: u64,
        len: u64,
        each: &mut dyn FnMut(u64, u64, Cluster) -> Result<bool, SourceError>,
    ) -> Result<(), SourceError> {
        let per_table = self.cluster() / 8;
        let table_span = per_table << self.cluster_bits;
        let stop = offset + len;
        let mut at = offset;
        while at < stop {
            let index = at / table_span;
            let table = self.l2(index as usize)?;
            let table_end = ((index + 1) * table_span).min(stop);
            let Some(table) = table else {
                if !each(at, table_end - at, Cluster::Hole)? {
                    return Ok(());
                }
                at = table_end;
                continue;
            };
            while at < table_end {
                let end = ((at >> self.cluster_bits) + 1) << self.cluster_bits;
                let end = end.min(table_end);
                let entry = table[((at >> self.cluster_bits) % per_table) as usize];
                // entries were checked at open; the file may have changed since
                let cluster = self.decode(entry).map_err(|what| corrupt(format!("an L2 entry {what}")))?;
                if !each(at, end - at, cluster)? {
                    return Ok(());
                }
                at = end;
            }
        }
        Ok(())
    }

    fn inflate(&self, entry: u64, host: u64, len: u64) -> Result<Arc<Vec<u8>>, SourceError> {
        if let Some((_, bytes)) = self.inflated.lock().iter().find(|(of, _)| *of == entry) {
            return Ok(bytes.clone());
        }
        // the length is counted in sectors: the last one may be cut by the end of the file
        let len = len.min(self.container.size().0.saturating_sub(host));
        let mut packed = vec![0; len as usize];
        self.container.read_at(host, &mut packed)?;
        let mut bytes = vec![0; self.cluster() as usize];
        let mut inflater = Decompress::new(false);
        let outcome = inflater.decompress(&packed, &mut bytes, FlushDecompress::Finish);
        if outcome.is_err() || inflater.total_out() != self.cluster() {
            return Err(corrupt(format!("the compressed cluster at {host:#x} does not inflate to a cluster")));
        }
        let bytes = Arc::new(bytes);
        let mut kept = self.inflated.lock();
        if kept.len() >= INFLATED_KEPT {
            kept.remove(0);
        }
        kept.push((entry, bytes.clone()));
        Ok(bytes)
    }
}

fn check_features(head: &[u8], cluster: u64) -> Result<usize, SourceError> {
    if head.len() < HEADER_V3 {
        return Err(corrupt("the header is cut"));
    }
    let bits = be64(head, 72);
    if bits & 0b0001 != 0 {
        return Err(corrupt("the dirty bit is set (it was not closed; run qemu-img check -r all)"));
    }
    if bits & 0b0010 != 0 {
        return Err(corrupt("the corrupt bit is set"));
    }
    if bits & 0b0100 != 0 {
        return Err(SourceError::ExternalReference { what: "an external data file" });
    }
    if bits & 0b1_0000 != 0 {
        return Err(unsupported("an extended L2 table"));
    }
    let unknown = bits & !0b1_1111;
    if unknown != 0 {
        return Err(unsupported(format!("incompatible feature bit {}", unknown.trailing_zeros())));
    }
    let header_length = be32(head, 100) as usize;
    if header_length < HEADER_V3 || !header_length.is_multiple_of(8) || header_length as u64 > cluster {
        return Err(corrupt(format!("the header length is {header_length}")));
    }
    let compression = if header_length > HEADER_V3 { head.get(HEADER_V3).copied().unwrap_or(0) } else { 0 };
    match (bits & 0b1000 != 0, compression) {
        (false, 0) => {}
        (true, 1) => return Err(unsupported("zstd compression (convert it first: qemu-img convert -O raw)")),
        (_, other) => return Err(unsupported(format!("compression type {other}"))),
    }
    if be32(head, 96) > 6 {
        return Err(corrupt("the refcount width is above 64 bits"));
    }
    Ok(header_length)
}

fn check_extensions(container: &dyn ReadAt, start: u64, end: u64) -> Result<(), SourceError> {
    let mut at = start;
    let mut head = [0; 8];
    // the extensions end with their end marker or with the first cluster
    while at + 8 <= end {
        container.read_at(at, &mut head)?;
        match be32(&head, 0) {
            EXTENSION_END => return Ok(()),
            EXTENSION_DATA_FILE => return Err(SourceError::ExternalReference { what: "an external data file" }),
            EXTENSION_ENCRYPTION => return Err(unsupported("encryption")),
            _ => {}
        }
        let len = u64::from(be32(&head, 4)).next_multiple_of(8);
        at += 8 + len;
        if at > end {
            return Err(corrupt("a header extension is longer than the header's cluster"));
        }
    }
    Ok(())
}

fn check_refcounts(container: &dyn ReadAt, head: &[u8], occupied: &mut Occupied) -> Result<(), SourceError> {
    let (offset, clusters) = (be64(head, 48), u64::from(be32(head, 56)));
    let len = clusters << occupied.cluster_bits;
    if clusters == 0 || len > MAX_REFCOUNT_TABLE_BYTES {
        return Err(corrupt(format!("the refcount table has {clusters} clusters")));
    }
    occupied.claim("the refcount table", offset, len)?;
    let mut raw = vec![0; len as usize];
    container.read_at(offset, &mut raw)?;
    for (i, entry) in raw.chunks_exact(8).map(|raw| be64(raw, 0)).enumerate().filter(|(_, e)| *e != 0) {
        if entry & REFCOUNT_RESERVED != 0 {
            return Err(corrupt(format!("refcount table entry {i} ({entry:#x}) has reserved bits set")));
        }
        occupied.claim(&format!("refcount block {i}"), entry, 1 << occupied.cluster_bits)?;
    }
    Ok(())
}

fn check_snapshots(head: &[u8], cluster: u64, file: u64) -> Result<(), SourceError> {
    let (count, offset) = (be32(head, 60), be64(head, 64));
    if count > 0 && (offset & (cluster - 1) != 0 || offset >= file || offset == 0) {
        return Err(corrupt(format!("the snapshot table at {offset:#x} lies outside of the file")));
    }
    Ok(())
}

impl ReadAt for Qcow2Image {
    fn size(&self) -> ByteLen {
        ByteLen(self.size)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(SourceError::OutOfRange { offset, len, size: self.size });
        }
        // neighbours in the guest are mostly neighbours in the file: read them at once
        let mut run: Option<(usize, u64, u64)> = None; // (place in buf, host offset, length)
        let read_run = |run: &mut Option<(usize, u64, u64)>, buf: &mut [u8]| match run.take() {
            Some((at, host, len)) => self.container.read_at(host, &mut buf[at..at + len as usize]),
            None => Ok(()),
        };
        self.walk(offset, len, &mut |guest, len, cluster| {
            let place = (guest - offset) as usize;
            let within = guest & (self.cluster() - 1);
            if let Cluster::Data { host } = cluster {
                match &mut run {
                    Some((_, start, so_far)) if *start + *so_far == host + within => *so_far += len,
                    _ => {
                        read_run(&mut run, buf)?;
                        run = Some((place, host + within, len));
                    }
                }
                return Ok(true);
            }
            read_run(&mut run, buf)?;
            let target = &mut buf[place..place + len as usize];
            match cluster {
                Cluster::Compressed { entry, host, len: packed } => {
                    let bytes = self.inflate(entry, host, packed)?;
                    target.copy_from_slice(&bytes[within as usize..(within + len) as usize]);
                }
                _ => target.fill(0),
            }
            Ok(true)
        })?;
        read_run(&mut run, buf)
    }

    fn is_cold(&self) -> bool {
        self.container.is_cold()
    }

    fn spans(&self, offset: u64, len: u64, out: &mut Vec<Span>) -> Result<(), SourceError> {
        let len = len.min(self.size.saturating_sub(offset));
        let first = out.len();
        self.walk(offset, len, &mut |_, len, cluster| {
            let zero = cluster == Cluster::Hole;
            let count = out.len() - first;
            match out[first..].last_mut() {
                Some(last) if last.zero == zero => last.len += len,
                _ if count >= MAX_SPANS => return Ok(false),
                _ => out.push(Span { len, zero }),
            }
            Ok(true)
        })
    }
}
