//! What grows: events, usage, backups, and stored answers.

use muster_api::{Event, Severity, Usage};
use muster_common::{CommandId, HostId, VmId};
use muster_idl::arguments::BackupResult;
use rusqlite::{OptionalExtension, params};

use super::{Attempt, Db, DbError, from_json, parse, to_json};

/// An event before it has a place in the log.
#[derive(Clone, Debug, Default)]
pub struct NewEvent {
    /// Empty: the controller itself.
    pub host: String,
    pub vm: String,
    pub incarnation: String,
    pub counter: u64,
    pub occurred_at_us: u64,
    pub received_at_us: u64,
    pub severity: Option<Severity>,
    pub kind: String,
    pub message: String,
    pub from_state: u16,
    pub to_state: u16,
    pub command: String,
}

/// Which events are wanted.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    pub after: u64,
    pub limit: usize,
    pub host: Option<HostId>,
    pub vm: Option<VmId>,
    pub kind: Option<String>,
}

/// An answer kept under its Idempotency-Key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredAnswer {
    pub request: String,
    pub status: u16,
    pub body: String,
}

fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Error => "error",
    }
}

impl Db {
    /// Adds an event; false when it is there already.
    pub fn add_event(&self, event: &NewEvent) -> Result<bool, DbError> {
        const WHAT: &str = "write an event";
        let mut statement = self
            .connection
            .prepare_cached(
                "INSERT OR IGNORE INTO events (host, vm, incarnation, counter, occurred_at_us, received_at_us, severity,
                 kind, message, from_state, to_state, command)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            )
            .attempt(WHAT)?;
        let added = statement
            .execute(params![
                event.host,
                event.vm,
                event.incarnation,
                event.counter.cast_signed(),
                event.occurred_at_us.cast_signed(),
                event.received_at_us.cast_signed(),
                word(event.severity.unwrap_or(Severity::Info)),
                event.kind,
                event.message,
                event.from_state,
                event.to_state,
                event.command,
            ])
            .attempt(WHAT)?;
        Ok(added > 0)
    }

    /// The place of the newest event; 0 when there is none.
    pub fn last_event(&self) -> Result<u64, DbError> {
        self.connection
            .query_row("SELECT COALESCE(MAX(sequence), 0) FROM events", [], |row| row.get::<_, i64>(0))
            .attempt("read events")
            .map(i64::cast_unsigned)
    }

    /// Oldest first; names are left for the caller to fill in.
    pub fn events(&self, filter: &EventFilter) -> Result<Vec<Event>, DbError> {
        const WHAT: &str = "read events";
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT sequence, host, vm, occurred_at_us, received_at_us, severity, kind, message, from_state,
                 to_state, command FROM events
                 WHERE sequence > ?1 AND (?2 = '' OR host = ?2) AND (?3 = '' OR vm = ?3) AND (?4 = '' OR kind = ?4)
                 ORDER BY sequence LIMIT ?5",
            )
            .attempt(WHAT)?;
        let mut rows = statement
            .query(params![
                filter.after.cast_signed(),
                filter.host.map(|id| id.to_string()).unwrap_or_default(),
                filter.vm.map(|id| id.to_string()).unwrap_or_default(),
                filter.kind.clone().unwrap_or_default(),
                filter.limit as i64,
            ])
            .attempt(WHAT)?;
        let mut events = Vec::new();
        while let Some(row) = rows.next().attempt(WHAT)? {
            let text = |column: usize| row.get::<_, String>(column).attempt(WHAT);
            let number = |column: usize| row.get::<_, i64>(column).attempt(WHAT).map(i64::cast_unsigned);
            events.push(Event {
                sequence: number(0)?,
                host: text(1)?.parse().ok(),
                host_name: String::new(),
                vm: text(2)?.parse().ok(),
                vm_name: String::new(),
                occurred_at_us: number(3)?,
                received_at_us: number(4)?,
                severity: from_json("a severity", &format!("\"{}\"", text(5)?))?,
                kind: text(6)?,
                message: text(7)?,
                from_state: row.get(8).attempt(WHAT)?,
                to_state: row.get(9).attempt(WHAT)?,
                command: text(10)?,
            });
        }
        Ok(events)
    }

    /// Adds a minute of usage; its place is given by the database.
    pub fn add_usage(&self, usage: &Usage) -> Result<(), DbError> {
        self.run(
            "write usage",
            "INSERT INTO usage (minute_us, host, vm, samples, processor_percent, memory_bytes, network_bytes, disk_bytes)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                usage.minute_us.cast_signed(),
                usage.host.to_string(),
                usage.vm.map(|vm| vm.to_string()).unwrap_or_default(),
                usage.samples,
                usage.processor_percent,
                usage.memory_bytes.cast_signed(),
                usage.network_bytes.cast_signed(),
                usage.disk_bytes.cast_signed(),
            ],
        )
    }

    /// Oldest first from `after`. With a host and no VM: the host itself and all on it.
    pub fn usage(
        &self,
        after: u64,
        limit: usize,
        host: Option<HostId>,
        vm: Option<VmId>,
    ) -> Result<Vec<Usage>, DbError> {
        const WHAT: &str = "read usage";
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT sequence, minute_us, host, vm, samples, processor_percent, memory_bytes, network_bytes, disk_bytes
                 FROM usage WHERE sequence > ?1 AND (?2 = '' OR host = ?2) AND (?3 = '' OR vm = ?3)
                 ORDER BY sequence LIMIT ?4",
            )
            .attempt(WHAT)?;
        let mut rows = statement
            .query(params![
                after.cast_signed(),
                host.map(|id| id.to_string()).unwrap_or_default(),
                vm.map(|id| id.to_string()).unwrap_or_default(),
                limit as i64,
            ])
            .attempt(WHAT)?;
        let mut usage = Vec::new();
        while let Some(row) = rows.next().attempt(WHAT)? {
            let text = |column: usize| row.get::<_, String>(column).attempt(WHAT);
            let number = |column: usize| row.get::<_, i64>(column).attempt(WHAT).map(i64::cast_unsigned);
            usage.push(Usage {
                sequence: number(0)?,
                minute_us: number(1)?,
                host: parse("host id", &text(2)?)?,
                vm: text(3)?.parse().ok(),
                samples: row.get(4).attempt(WHAT)?,
                processor_percent: row.get(5).attempt(WHAT)?,
                memory_bytes: number(6)?,
                network_bytes: number(7)?,
                disk_bytes: number(8)?,
            });
        }
        Ok(usage)
    }

    pub fn put_backup(&self, host: HostId, command: CommandId, backup: &BackupResult) -> Result<(), DbError> {
        self.run(
            "write a backup",
            "INSERT OR REPLACE INTO backups (id, vm, host, taken_at_us, command, body) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![
                backup.id,
                backup.vm,
                host.to_string(),
                backup.taken_at_us.cast_signed(),
                command.to_string(),
                to_json(backup),
            ],
        )
    }

    /// All, newest first.
    pub fn backups(&self) -> Result<Vec<(HostId, CommandId, BackupResult)>, DbError> {
        const WHAT: &str = "read backups";
        let mut statement = self
            .connection
            .prepare_cached("SELECT host, command, body FROM backups ORDER BY taken_at_us DESC, id, vm")
            .attempt(WHAT)?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?)))
            .attempt(WHAT)?;
        let mut backups = Vec::new();
        for row in rows {
            let (host, command, body) = row.attempt(WHAT)?;
            let backup = from_json("a backup", &body)?;
            backups.push((parse("host id", &host)?, parse("command id", &command)?, backup));
        }
        Ok(backups)
    }

    pub fn answer(&self, key: &str) -> Result<Option<StoredAnswer>, DbError> {
        self.connection
            .query_row("SELECT request, status, body FROM answers WHERE key = ?1", [key], |row| {
                Ok(StoredAnswer { request: row.get(0)?, status: row.get(1)?, body: row.get(2)? })
            })
            .optional()
            .attempt("read a stored answer")
    }

    pub fn put_answer(&self, key: &str, answer: &StoredAnswer, now_us: u64) -> Result<(), DbError> {
        self.run(
            "store an answer",
            "INSERT INTO answers (key, request, status, body, at_us) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![key, answer.request, answer.status, answer.body, now_us.cast_signed()],
        )
    }

    /// Forgets events, usage and answers from before the given times.
    pub fn prune_logs(&self, events_us: u64, usage_us: u64, answers_us: u64) -> Result<(), DbError> {
        self.run("delete old events", "DELETE FROM events WHERE received_at_us < ?1", [events_us.cast_signed()])?;
        self.run("delete old usage", "DELETE FROM usage WHERE minute_us < ?1", [usage_us.cast_signed()])?;
        self.run("delete old answers", "DELETE FROM answers WHERE at_us < ?1", [answers_us.cast_signed()])
    }
}
