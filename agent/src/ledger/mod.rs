//! The durable record of commands: written before an agent acts, so that a command is carried out at most once and its
//! verdicts can be said again, whatever dies in between.
//!
//! Main types: [`Ledger`] (the file), [`Entry`] (one record), [`mod@format`] (the bytes).
//!
//! Invariants:
//! 1. [`Ledger::append`] returns after `fdatasync`: what it was given survives a power loss.
//! 2. Replay ends at the first record that is cut short or fails its checksum; what is behind it is moved to
//!    `ledger.torn` and said in the log. A torn tail was never acted upon, because of 1.
//! 3. Entries of a command are kept for [`RETENTION_US`] after its deadline. Later, a repeated sample of it is past its
//!    `not_after` and cannot be begun anyway. Results of its verdicts are kept for [`RESULT_RETENTION_US`].
//!
//! No threads, no locks: the caller serialises. Does not decide anything.

pub mod format;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use muster_common::{CommandId, ErrorCode};
use muster_idl::v1::{TargetKind, Verb, Verdict};
use serde::{Deserialize, Serialize};

/// Seven days: longer than any controller is away, and a year of nightly commands to fifty VMs stays below 1 MB a week.
pub const RETENTION_US: u64 = 7 * 24 * 3600 * 1_000_000;

/// A result may be 256 KiB, and `exec` makes one for each VM: kept for a day, in which a controller asks for what it lacks.
/// Outcome, code and message stay for the week.
pub const RESULT_RETENTION_US: u64 = 24 * 3600 * 1_000_000;

/// The file is rewritten without what expired once it is this long.
const COMPACT_BYTES: u64 = 8 << 20;

/// One record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Entry {
    /// A command was received and names members here.
    Command(CommandEntry),
    /// Acting on one member begins.
    Begun { id: CommandId, vm: String, at_us: u64 },
    /// The last word on one member.
    Verdict(Box<Verdict>),
    /// The highest epoch seen of a controller.
    Epoch { controller: String, epoch: u64 },
}

/// What must be known of a command after a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommandEntry {
    pub id: CommandId,
    pub controller: String,
    pub verb: Verb,
    pub target_kind: TargetKind,
    pub not_after_us: u64,
    pub received_us: u64,
    /// VM ids of the members on this host, as received; one empty text for the host itself.
    pub members: Vec<String>,
    /// What reading back needs to know: image digest of a pull.
    pub subject: String,
}

impl CommandEntry {
    /// Whether results of its verdicts are kept still.
    pub fn keeps_results(&self, now_us: u64) -> bool {
        self.not_after_us.max(self.received_us).saturating_add(RESULT_RETENTION_US) > now_us
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("{action} command ledger {path}", path = path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("open command ledger {path}: {reason}", path = path.display())]
    Format { path: PathBuf, reason: String },
    #[error("append to command ledger {path}: a record of more than {} bytes", format::MAX_BODY, path = path.display())]
    TooLong { path: PathBuf },
    #[error("append to command ledger {path}: an earlier write failed, nothing more is accepted until the agent restarts", path = path.display())]
    Broken { path: PathBuf },
}

impl LedgerError {
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Io { .. } | Self::Broken { .. } => ErrorCode::Io,
            Self::Format { .. } => ErrorCode::Corrupt,
            Self::TooLong { .. } => ErrorCode::InvalidArgument,
        }
    }
}

/// The file, open for appending.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    len: u64,
    /// How long it was when it was last rewritten.
    kept: u64,
    /// After a failed write or sync the page cache may lie about what is durable: never retried on this file.
    broken: bool,
}

impl Ledger {
    /// Opens or creates the file and returns what it holds, oldest first, without what expired before `now_us`.
    pub fn open(path: &Path, now_us: u64) -> Result<(Self, Vec<Entry>), LedgerError> {
        let io = |action| {
            let path = path.to_path_buf();
            move |source| LedgerError::Io { action, path, source }
        };
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(io("read")(e)),
        };
        // a crash while the file was made leaves less than a header: nothing was recorded yet
        if bytes.len() < format::HEADER_LEN {
            let ledger = Self::rewrite(path, &[])?;
            return Ok((ledger, Vec::new()));
        }
        let replay =
            format::replay(&bytes).map_err(|e| LedgerError::Format { path: path.into(), reason: e.to_string() })?;
        if replay.good < bytes.len() {
            let torn = path.with_extension("torn");
            fs::write(&torn, &bytes[replay.good..]).map_err(io("save the torn tail of"))?;
            tracing::warn!(
                bytes = bytes.len() - replay.good,
                saved = %torn.display(),
                "command ledger ended in a torn record"
            );
        }
        let kept = unexpired(replay.entries, now_us);
        let ledger = if replay.good < bytes.len() || bytes.len() as u64 > COMPACT_BYTES || kept.len() < replay.count {
            Self::rewrite(path, &kept)?
        } else {
            let mut file = OpenOptions::new().write(true).open(path).map_err(io("open"))?;
            file.seek(SeekFrom::End(0)).map_err(io("open"))?;
            let len = bytes.len() as u64;
            Self { path: path.into(), file, len, kept: len, broken: false }
        };
        Ok((ledger, kept))
    }

    /// Writes a new file with just these entries in place of the old one.
    fn rewrite(path: &Path, entries: &[Entry]) -> Result<Self, LedgerError> {
        let io = |source| LedgerError::Io { action: "rewrite", path: path.into(), source };
        let mut bytes = format::header().to_vec();
        for entry in entries {
            // what was read or appended was not too long
            let _ = format::encode(entry, &mut bytes);
        }
        crate::identity::write_durably(path, &bytes).map_err(io)?;
        let mut file = OpenOptions::new().write(true).open(path).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        let len = bytes.len() as u64;
        Ok(Self { path: path.into(), file, len, kept: len, broken: false })
    }

    /// Appends all entries and makes them durable with one `fdatasync`.
    pub fn append(&mut self, entries: &[Entry]) -> Result<(), LedgerError> {
        if entries.is_empty() {
            return Ok(());
        }
        if self.broken {
            return Err(LedgerError::Broken { path: self.path.clone() });
        }
        let mut bytes = Vec::new();
        for entry in entries {
            if !format::encode(entry, &mut bytes) {
                return Err(LedgerError::TooLong { path: self.path.clone() });
            }
        }
        let result = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        if let Err(source) = result {
            self.broken = true;
            return Err(LedgerError::Io { action: "append to", path: self.path.clone(), source });
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// True when [`Ledger::compact`] is worth its write: what has not expired yet would only be written again.
    pub fn wants_compaction(&self) -> bool {
        self.len > COMPACT_BYTES && self.len / 2 > self.kept
    }

    /// So many bytes of what the file holds need not be written again.
    pub fn may_drop(&mut self, bytes: u64) {
        self.kept = self.kept.saturating_sub(bytes);
    }

    /// Replaces the contents by what is known and not expired.
    pub fn compact(&mut self, entries: Vec<Entry>, now_us: u64) -> Result<(), LedgerError> {
        match Self::rewrite(&self.path, &unexpired(entries, now_us)) {
            Ok(new) => *self = new,
            Err(e) => {
                // the new file may be in place already: what is appended to the old one would be lost with it
                self.broken |= !self.is_in_place();
                return Err(e);
            }
        }
        Ok(())
    }

    /// Whether the open file is the one of that name.
    fn is_in_place(&self) -> bool {
        match (self.file.metadata(), fs::metadata(&self.path)) {
            (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
            _ => false,
        }
    }
}

/// Drops the entries of commands that expired more than [`RETENTION_US`] ago, results of those that expired more than
/// [`RESULT_RETENTION_US`] ago, and all but the last epoch of each controller.
fn unexpired(entries: Vec<Entry>, now_us: u64) -> Vec<Entry> {
    let live: std::collections::HashSet<CommandId> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Command(c) if c.not_after_us.max(c.received_us).saturating_add(RETENTION_US) > now_us => Some(c.id),
            _ => None,
        })
        .collect();
    let with_results: std::collections::HashSet<CommandId> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Command(c) if c.keeps_results(now_us) => Some(c.id),
            _ => None,
        })
        .collect();
    let mut epochs = std::collections::BTreeMap::new();
    let mut kept: Vec<Entry> = Vec::new();
    for mut entry in entries {
        if let Entry::Verdict(v) = &mut entry
            && !v.command.parse().is_ok_and(|id| with_results.contains(&id))
        {
            v.result = String::new();
        }
        let keep = match &entry {
            Entry::Command(c) => live.contains(&c.id),
            Entry::Begun { id, .. } => live.contains(id),
            Entry::Verdict(v) => v.command.parse().is_ok_and(|id| live.contains(&id)),
            Entry::Epoch { controller, epoch } => {
                let known = epochs.entry(controller.clone()).or_insert(0);
                *known = (*known).max(*epoch);
                false
            }
        };
        if keep {
            kept.push(entry);
        }
    }
    let epochs = epochs.into_iter().map(|(controller, epoch)| Entry::Epoch { controller, epoch });
    epochs.chain(kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::format::tests::{command, verdict};

    #[test]
    fn what_was_appended_is_there_after_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let entries = vec![
            Entry::Epoch { controller: "c".into(), epoch: 3 },
            Entry::Command(command(1)),
            Entry::Begun { id: command(1).id, vm: "v".into(), at_us: 5 },
            Entry::Verdict(Box::new(verdict(1))),
        ];
        let (mut ledger, found) = Ledger::open(&path, 0).unwrap();
        assert!(found.is_empty());
        ledger.append(&entries[..2]).unwrap();
        ledger.append(&entries[2..]).unwrap();
        drop(ledger);
        let (_, found) = Ledger::open(&path, 0).unwrap();
        assert_eq!(found, entries);
    }

    #[test]
    fn a_torn_tail_is_set_aside_and_the_rest_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let (mut ledger, _) = Ledger::open(&path, 0).unwrap();
        ledger.append(&[Entry::Command(command(1)), Entry::Command(command(2))]).unwrap();
        drop(ledger);
        let whole = fs::read(&path).unwrap();
        let one = format::replay(&whole).unwrap().ends[0];
        for cut in one..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut ledger, found) = Ledger::open(&path, 0).unwrap();
            assert_eq!(found, [Entry::Command(command(1))], "cut at {cut}");
            ledger.append(&[Entry::Command(command(3))]).unwrap();
            let (_, found) = Ledger::open(&path, 0).unwrap();
            assert_eq!(found.len(), 2, "cut at {cut}");
        }
        // a flipped bit in the last record is the same
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&path, &flipped).unwrap();
        assert_eq!(Ledger::open(&path, 0).unwrap().1.len(), 1);
        assert!(path.with_extension("torn").exists());
    }

    #[test]
    fn a_file_that_is_no_ledger_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        fs::write(&path, b"something else entirely").unwrap();
        assert!(matches!(Ledger::open(&path, 0), Err(LedgerError::Format { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"something else entirely");
    }

    #[test]
    fn a_crash_while_the_file_was_made_leaves_an_empty_ledger() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        fs::write(&path, &format::header()[..7]).unwrap();
        assert!(Ledger::open(&path, 0).unwrap().1.is_empty());
    }

    #[test]
    fn a_ledger_is_not_rewritten_again_and_again_for_what_cannot_expire_yet() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let (mut ledger, _) = Ledger::open(&path, 0).unwrap();
        let long = Verdict { result: "x".repeat(900 << 10), ..verdict(1) };
        let entries: Vec<Entry> = std::iter::once(Entry::Command(command(1)))
            .chain((0..10).map(|_| Entry::Verdict(Box::new(long.clone()))))
            .collect();
        ledger.append(&entries).unwrap();
        assert!(ledger.wants_compaction());
        ledger.compact(entries.clone(), 0).unwrap();
        assert!(!ledger.wants_compaction(), "nothing had expired");
        ledger.append(&entries[1..]).unwrap();
        ledger.append(&entries[..2]).unwrap();
        assert!(ledger.wants_compaction());
        ledger.compact(entries[..2].to_vec(), 0).unwrap();
        assert_eq!(Ledger::open(&path, 0).unwrap().1.len(), 2);
    }

    #[test]
    fn a_record_no_reader_would_accept_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let (mut ledger, _) = Ledger::open(&path, 0).unwrap();
        let long = Verdict { result: "x".repeat(1 << 20), ..verdict(1) };
        let entries = [Entry::Command(command(1)), Entry::Verdict(Box::new(long))];
        assert!(matches!(ledger.append(&entries), Err(LedgerError::TooLong { .. })));
        ledger.append(&[Entry::Command(command(2))]).unwrap();
        assert_eq!(Ledger::open(&path, 0).unwrap().1, [Entry::Command(command(2))]);
    }

    #[test]
    fn a_compaction_that_fails_leaves_the_ledger_in_use_only_when_it_is_still_the_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let (mut ledger, _) = Ledger::open(&path, 0).unwrap();
        ledger.append(&[Entry::Command(command(1))]).unwrap();
        // nothing can be written beside it
        fs::create_dir(dir.path().join("ledger.new")).unwrap();
        assert!(ledger.compact(Vec::new(), 0).is_err());
        ledger.append(&[Entry::Command(command(2))]).unwrap();
        assert_eq!(Ledger::open(&path, 0).unwrap().1.len(), 2);
        // replaced behind its back, as by a rewrite that failed after its rename
        fs::rename(&path, dir.path().join("old")).unwrap();
        fs::write(&path, format::header()).unwrap();
        assert!(ledger.compact(Vec::new(), 0).is_err());
        assert!(matches!(ledger.append(&[Entry::Command(command(3))]), Err(LedgerError::Broken { .. })));
    }

    #[test]
    fn commands_expire_a_week_after_their_deadline_and_epochs_never() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let (mut ledger, _) = Ledger::open(&path, 0).unwrap();
        let epoch = |epoch| Entry::Epoch { controller: "c".into(), epoch };
        ledger.append(&[epoch(1), Entry::Command(command(1)), epoch(2), Entry::Verdict(Box::new(verdict(1)))]).unwrap();
        let deadline = command(1).not_after_us;
        assert_eq!(Ledger::open(&path, deadline + RETENTION_US - 1).unwrap().1.len(), 3);
        let (_, found) = Ledger::open(&path, deadline + RETENTION_US).unwrap();
        assert_eq!(found, [epoch(2)]);
    }

    #[test]
    fn results_expire_a_day_after_the_deadline_and_leave_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let (mut ledger, _) = Ledger::open(&path, 0).unwrap();
        let long = || Entry::Verdict(Box::new(Verdict { result: "x".repeat(900 << 10), ..verdict(1) }));
        let mut entries = vec![Entry::Command(command(1))];
        entries.extend((0..10).map(|_| long()));
        ledger.append(&entries).unwrap();
        ledger.compact(entries.clone(), 0).unwrap();
        assert!(!ledger.wants_compaction());
        ledger.may_drop(9000 << 10);
        assert!(ledger.wants_compaction());
        let day = command(1).not_after_us + RESULT_RETENTION_US;
        assert_eq!(Ledger::open(&path, day - 1).unwrap().1, entries);
        let (_, found) = Ledger::open(&path, day).unwrap();
        assert_eq!((found.len(), &found[1]), (11, &Entry::Verdict(Box::new(verdict(1)))));
        assert!(fs::metadata(&path).unwrap().len() < 10 << 10);
    }
}
