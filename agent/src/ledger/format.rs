//! The bytes of the ledger. All integers little-endian.
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 8 | magic | `MSTRLEDG` |
//! | 8 | 4 | version | 1 |
//! | 12 | 4 | incompatible features | a reader refuses bits it does not know; none defined |
//!
//! then records without gaps:
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 4 | body length n | at most 1 MiB |
//! | 4 | 4 | kind | 1: an [`Entry`] in JSON. Unknown kinds are skipped |
//! | 8 | 8 | checksum | first 8 bytes of BLAKE3 over the bytes 0..8 and the body |
//! | 16 | n | body | |
//!
//! JSON, because an entry may grow and is read by people after accidents; a record is some hundred bytes, and there are
//! three a command.

use super::Entry;

const MAGIC: &[u8; 8] = b"MSTRLEDG";
const VERSION: u32 = 1;
pub const HEADER_LEN: usize = 16;
const RECORD_HEAD: usize = 16;
const KIND_ENTRY: u32 = 1;
/// Far above any entry (a verdict with a megabyte of program output is cut before it comes here).
pub const MAX_BODY: usize = 1 << 20;

const _: () = assert!(HEADER_LEN == 8 + 4 + 4 && RECORD_HEAD == 4 + 4 + 8);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("wrong magic, this is not a command ledger")]
    Magic,
    #[error("version {0} is not supported (this program reads version {VERSION})")]
    Version(u32),
    #[error("needs features this program does not have (bits {0:#x}); use a newer version")]
    Features(u32),
}

/// What a file holds.
#[derive(Debug)]
pub struct Replay {
    pub entries: Vec<Entry>,
    /// Records read, skipped kinds included.
    pub count: usize,
    /// Bytes that are sound; behind them is a torn tail.
    pub good: usize,
    /// Where each record ends.
    pub ends: Vec<usize>,
}

pub fn header() -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

fn checksum(head: &[u8], body: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(head).update(body);
    let mut out = [0; 8];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    out
}

/// Appends one record to `out`; false, and nothing, when it is longer than a reader accepts: it would end the replay.
#[must_use]
pub fn encode(entry: &Entry, out: &mut Vec<u8>) -> bool {
    let body = serde_json::to_vec(entry).expect("an entry has only texts, numbers and lists");
    if body.len() > MAX_BODY {
        return false;
    }
    let mut head = [0; 8];
    head[..4].copy_from_slice(&(body.len() as u32).to_le_bytes());
    head[4..].copy_from_slice(&KIND_ENTRY.to_le_bytes());
    out.extend_from_slice(&head);
    out.extend_from_slice(&checksum(&head, &body));
    out.extend_from_slice(&body);
    true
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

/// Reads a file of at least [`HEADER_LEN`] bytes.
pub fn replay(bytes: &[u8]) -> Result<Replay, FormatError> {
    if bytes.len() < HEADER_LEN || &bytes[..8] != MAGIC {
        return Err(FormatError::Magic);
    }
    match (u32_at(bytes, 8), u32_at(bytes, 12)) {
        (VERSION, 0) => {}
        (VERSION, features) => return Err(FormatError::Features(features)),
        (version, _) => return Err(FormatError::Version(version)),
    }
    let mut replay = Replay { entries: Vec::new(), count: 0, good: HEADER_LEN, ends: Vec::new() };
    while let Some(head) = bytes.get(replay.good..replay.good + RECORD_HEAD) {
        let len = u32_at(head, 0) as usize;
        let start = replay.good + RECORD_HEAD;
        let Some(body) = (len <= MAX_BODY).then(|| bytes.get(start..start + len)).flatten() else { break };
        if checksum(&head[..8], body) != head[8..] {
            break;
        }
        if u32_at(head, 4) == KIND_ENTRY {
            match serde_json::from_slice(body) {
                Ok(entry) => replay.entries.push(entry),
                // its checksum is right: a newer version wrote it
                Err(e) => tracing::warn!(err = %e, "skipped a command ledger entry this version cannot read"),
            }
        }
        replay.count += 1;
        replay.good = start + len;
        replay.ends.push(replay.good);
    }
    Ok(replay)
}

#[cfg(test)]
pub(crate) mod tests {
    use muster_common::CommandId;
    use muster_idl::v1::{Outcome, TargetKind, Verb, Verdict};
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::CommandEntry;

    pub(crate) fn command(n: u128) -> CommandEntry {
        CommandEntry {
            id: CommandId::from_uuid(uuid::Uuid::from_u128(n)),
            controller: "c".into(),
            verb: Verb::PowerOn,
            target_kind: TargetKind::Vm,
            not_after_us: 1000,
            received_us: 10,
            members: vec!["v".into()],
            subject: String::new(),
        }
    }

    pub(crate) fn verdict(n: u128) -> Verdict {
        Verdict {
            command: command(n).id.to_string(),
            host: "h".into(),
            vm: "v".into(),
            incarnation: "i".into(),
            outcome: Outcome::Done,
            code: "ok".into(),
            message: String::new(),
            enabled_state: 2,
            guest_up: false,
            result: String::new(),
            received_at_us: 1,
            started_at_us: 2,
            ended_at_us: 3,
        }
    }

    #[test]
    fn the_bytes_are_pinned() {
        let mut bytes = header().to_vec();
        let _ = encode(&Entry::Command(command(1)), &mut bytes);
        let _ = encode(&Entry::Begun { id: command(1).id, vm: "v".into(), at_us: 11 }, &mut bytes);
        let _ = encode(&Entry::Verdict(Box::new(verdict(1))), &mut bytes);
        let _ = encode(&Entry::Epoch { controller: "c".into(), epoch: 7 }, &mut bytes);
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/ledger-v1.bin");
        if std::env::var_os("MUSTER_WRITE_GOLDEN").is_some() {
            std::fs::write(golden, &bytes).unwrap();
        }
        assert_eq!(std::fs::read(golden).unwrap(), bytes, "the ledger's format changed: it needs a new version");
        assert_eq!(replay(&bytes).unwrap().entries.len(), 4);
    }

    #[test]
    fn other_versions_and_features_are_refused_by_name() {
        let mut bytes = header();
        bytes[8] = 2;
        assert_eq!(replay(&bytes).unwrap_err(), FormatError::Version(2));
        bytes[8] = 1;
        bytes[12] = 4;
        assert_eq!(replay(&bytes).unwrap_err(), FormatError::Features(4));
    }

    proptest! {
        #[test]
        fn damage_never_panics_and_never_yields_more_than_was_written(
            count in 1u128..6, at in any::<prop::sample::Index>(), xor in 1u8.., cut in any::<prop::sample::Index>()
        ) {
            let mut bytes = header().to_vec();
            for n in 0..count {
                let _ = encode(&Entry::Command(command(n)), &mut bytes);
            }
            let at = HEADER_LEN + at.index(bytes.len() - HEADER_LEN);
            bytes[at] ^= xor;
            bytes.truncate(HEADER_LEN + cut.index(bytes.len() - HEADER_LEN + 1));
            let replay = replay(&bytes).unwrap();
            for (n, entry) in replay.entries.iter().enumerate() {
                prop_assert_eq!(entry, &Entry::Command(command(n as u128)));
            }
        }
    }
}
