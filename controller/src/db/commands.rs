//! Commands with their verdicts.

use std::collections::BTreeSet;

use muster_common::CommandId;
use muster_fleet::command::{Order, Record, Verdict};
use rusqlite::{OptionalExtension, Row, params};

use super::{Attempt, Db, DbError, from_json, to_json};

const COLUMNS: &str = "SELECT body, published, ended_at_us, id FROM commands";
const WHAT: &str = "read commands";

type RawCommand = (String, String, i64, String);

fn raw(row: &Row<'_>) -> rusqlite::Result<RawCommand> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
}

impl Db {
    /// Makes an order durable, with its frozen members, before it is published.
    pub fn put_command(&self, order: &Order) -> Result<(), DbError> {
        self.run(
            "write a command",
            "INSERT INTO commands (id, body) VALUES (?1, ?2)",
            params![order.id.to_string(), to_json(order)],
        )
    }

    pub fn put_published(&self, id: CommandId, cells: &BTreeSet<u16>) -> Result<(), DbError> {
        self.run(
            "write where a command was published",
            "UPDATE commands SET published = ?2 WHERE id = ?1",
            params![id.to_string(), to_json(cells)],
        )
    }

    pub fn put_verdict(&self, id: CommandId, member: usize, verdict: &Verdict) -> Result<(), DbError> {
        self.run(
            "write a verdict",
            "INSERT OR REPLACE INTO verdicts (command, member, body) VALUES (?1, ?2, ?3)",
            params![id.to_string(), member as i64, to_json(verdict)],
        )
    }

    pub fn put_end(&self, id: CommandId, ended_at_us: u64) -> Result<(), DbError> {
        self.run(
            "write the end of a command",
            "UPDATE commands SET ended_at_us = ?2 WHERE id = ?1",
            params![id.to_string(), ended_at_us.cast_signed()],
        )
    }

    pub fn command(&self, id: CommandId) -> Result<Option<Record>, DbError> {
        let found = self
            .connection
            .prepare_cached(&format!("{COLUMNS} WHERE id = ?1"))
            .attempt(WHAT)?
            .query_row([id.to_string()], raw)
            .optional()
            .attempt(WHAT)?;
        found.map(|found| self.record(found)).transpose()
    }

    /// Those that have not ended, and those that ended after `ended_after_us`.
    pub fn live_commands(&self, ended_after_us: u64) -> Result<Vec<Record>, DbError> {
        let sql = format!("{COLUMNS} WHERE ended_at_us = 0 OR ended_at_us > ?1 ORDER BY id");
        self.records(&sql, params![ended_after_us.cast_signed()])
    }

    /// Newest first, those before `before`.
    pub fn commands(&self, before: Option<CommandId>, open: bool, limit: usize) -> Result<Vec<Record>, DbError> {
        let before = before.map_or_else(|| "~".to_string(), |id| id.to_string());
        let sql = format!("{COLUMNS} WHERE id < ?1 AND (NOT ?2 OR ended_at_us = 0) ORDER BY id DESC LIMIT ?3");
        self.records(&sql, params![before, open, limit as i64])
    }

    fn records(&self, sql: &str, params: impl rusqlite::Params) -> Result<Vec<Record>, DbError> {
        let mut statement = self.connection.prepare_cached(sql).attempt(WHAT)?;
        let found: Vec<RawCommand> =
            statement.query_map(params, raw).attempt(WHAT)?.collect::<Result<_, _>>().attempt(WHAT)?;
        found.into_iter().map(|found| self.record(found)).collect()
    }

    fn record(&self, (body, published, ended_at_us, id): RawCommand) -> Result<Record, DbError> {
        let mut record = Record::new(from_json("a command", &body)?);
        record.published = from_json("the cells of a command", &published)?;
        record.ended_at_us = ended_at_us.cast_unsigned();
        let mut statement =
            self.connection.prepare_cached("SELECT member, body FROM verdicts WHERE command = ?1").attempt(WHAT)?;
        let rows =
            statement.query_map([id], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?))).attempt(WHAT)?;
        for row in rows {
            let (member, body) = row.attempt(WHAT)?;
            if let Some(place) = usize::try_from(member).ok().and_then(|at| record.verdicts.get_mut(at)) {
                *place = Some(from_json("a verdict", &body)?);
            }
        }
        // grows with what is stored, so that a reader's version never goes back over a restart
        record.version = 1
            + record.answered() as u64
            + record.published.len() as u64
            + u64::from(record.ended_at_us > 0)
            + record.verdicts.iter().flatten().filter(|verdict| verdict.late).count() as u64;
        Ok(record)
    }

    /// Forgets commands that ended before `before_us`.
    pub fn prune_commands(&self, before_us: u64) -> Result<(), DbError> {
        self.run(
            "delete old commands",
            "DELETE FROM commands WHERE ended_at_us > 0 AND ended_at_us < ?1",
            [before_us.cast_signed()],
        )
    }
}
