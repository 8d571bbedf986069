//! What must last: SQLite, in WAL mode with synchronous=FULL, so that what is committed survives a power loss. The only
//! module that names rusqlite.
//!
//! One connection, owned by the core thread. Writes of one batch of requests are one transaction; each request is a
//! savepoint in it, so that a refused one leaves nothing behind.
//!
//! Schema versions are numbered steps in [`MIGRATIONS`], applied in order at open, each in its own transaction; the number of
//! the last one applied is SQLite's `user_version`. A database of a newer program is refused.

mod commands;
mod fleet;
mod images;
mod logs;

use std::path::{Path, PathBuf};

use muster_common::{ControllerId, ErrorCode};
use rusqlite::{Connection, OptionalExtension, params};

pub use fleet::{DesiredVm, Standing, StoredHost};
pub use images::{StoredImage, StoredTemplate};
pub use logs::{EventFilter, NewEvent, StoredAnswer};

/// Why the database did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("open database {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: rusqlite::Error,
    },
    #[error("database {path} is of schema version {found}; this program knows up to {known}: use a newer version")]
    Newer { path: PathBuf, found: u32, known: u32 },
    #[error("bring the database to schema version {version}")]
    Migrate {
        version: u32,
        #[source]
        source: rusqlite::Error,
    },
    #[error("{what} in the database")]
    Sql {
        what: &'static str,
        #[source]
        source: rusqlite::Error,
    },
    #[error("read {what} from the database: {text:?} is not one")]
    Content { what: &'static str, text: String },
}

impl DbError {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Newer { .. } => ErrorCode::Unsupported,
            Self::Content { .. } => ErrorCode::Corrupt,
            _ => ErrorCode::Io,
        }
    }
}

/// Names what was attempted.
trait Attempt<T> {
    fn attempt(self, what: &'static str) -> Result<T, DbError>;
}
impl<T> Attempt<T> for Result<T, rusqlite::Error> {
    fn attempt(self, what: &'static str) -> Result<T, DbError> {
        self.map_err(|source| DbError::Sql { what, source })
    }
}

/// Reads a typed value out of text.
fn parse<T: std::str::FromStr>(what: &'static str, text: &str) -> Result<T, DbError> {
    text.parse().map_err(|_| DbError::Content { what, text: text.to_string() })
}
fn from_json<T: serde::de::DeserializeOwned>(what: &'static str, text: &str) -> Result<T, DbError> {
    serde_json::from_str(text).map_err(|_| DbError::Content { what, text: text.chars().take(200).collect() })
}
fn to_json<T: serde::Serialize>(value: &T) -> String {
    // our own types with text keys: nothing in them can fail to serialise
    serde_json::to_string(value).unwrap_or_default()
}

const MIGRATIONS: &[&str] = &[include_str!("0001.sql")];

/// The open database.
#[derive(Debug)]
pub struct Db {
    connection: Connection,
    in_batch: bool,
}

impl Db {
    /// Opens or makes the database.
    ///
    /// # Errors
    /// When the file is no database, is of a newer version, or cannot be written.
    pub fn open(path: &Path) -> Result<Self, DbError> {
        let open = |source| DbError::Open { path: path.to_path_buf(), source };
        let connection = Connection::open(path).map_err(open)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(open)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(open)?;
        connection.pragma_update(None, "foreign_keys", "ON").map_err(open)?;
        connection.set_prepared_statement_cache_capacity(64);
        let mut db = Self { connection, in_batch: false };
        db.migrate(path)?;
        Ok(db)
    }

    fn migrate(&mut self, path: &Path) -> Result<(), DbError> {
        let found: u32 = self
            .connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(|source| DbError::Open { path: path.to_path_buf(), source })?;
        let known = MIGRATIONS.len() as u32;
        if found > known {
            return Err(DbError::Newer { path: path.to_path_buf(), found, known });
        }
        for version in found + 1..=known {
            let failed = |source| DbError::Migrate { version, source };
            let transaction = self.connection.transaction().map_err(failed)?;
            transaction.execute_batch(MIGRATIONS[version as usize - 1]).map_err(failed)?;
            transaction.pragma_update(None, "user_version", version).map_err(failed)?;
            transaction.commit().map_err(failed)?;
        }
        Ok(())
    }

    /// Who this controller is, and the epoch of this start: one more than that of the last.
    pub fn begin_epoch(&mut self) -> Result<(ControllerId, u64), DbError> {
        let id = match self.meta("controller")? {
            Some(text) => parse("controller id", &text)?,
            None => {
                let id = ControllerId::random();
                self.set_meta("controller", &id.to_string())?;
                id
            }
        };
        let epoch = match self.meta("epoch")? {
            Some(text) => parse::<u64>("epoch", &text)? + 1,
            None => 1,
        };
        self.set_meta("epoch", &epoch.to_string())?;
        Ok((id, epoch))
    }

    fn meta(&self, key: &str) -> Result<Option<String>, DbError> {
        self.connection
            .query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0))
            .optional()
            .attempt("read a setting")
    }
    fn set_meta(&self, key: &str, value: &str) -> Result<(), DbError> {
        self.run("write a setting", "INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)", params![key, value])
    }

    fn run(&self, what: &'static str, sql: &str, params: impl rusqlite::Params) -> Result<(), DbError> {
        let mut statement = self.connection.prepare_cached(sql).attempt(what)?;
        statement.execute(params).attempt(what).map(drop)
    }
    fn run_outside_cache(&self, what: &'static str, sql: &str) -> Result<(), DbError> {
        self.connection.execute_batch(sql).attempt(what)
    }

    /// Begins the transaction of a batch, when none is open.
    pub fn begin(&mut self) -> Result<(), DbError> {
        if !self.in_batch {
            self.run_outside_cache("begin a transaction", "BEGIN IMMEDIATE")?;
            self.in_batch = true;
        }
        Ok(())
    }
    /// Makes the batch durable.
    pub fn commit(&mut self) -> Result<(), DbError> {
        if self.in_batch {
            self.in_batch = false;
            if let Err(error) = self.run_outside_cache("commit", "COMMIT") {
                // a failed commit may leave the transaction open
                let _ = self.run_outside_cache("roll back", "ROLLBACK");
                return Err(error);
            }
        }
        Ok(())
    }
    pub fn rollback(&mut self) {
        if self.in_batch {
            self.in_batch = false;
            let _ = self.run_outside_cache("roll back", "ROLLBACK");
        }
    }
    /// Within a batch: what comes until [`Self::release`] or [`Self::undo`] belongs together.
    pub fn savepoint(&mut self) -> Result<(), DbError> {
        self.begin()?;
        self.run_outside_cache("set a savepoint", "SAVEPOINT request")
    }
    pub fn release(&mut self) -> Result<(), DbError> {
        self.run_outside_cache("release a savepoint", "RELEASE request")
    }
    pub fn undo(&mut self) -> Result<(), DbError> {
        self.run_outside_cache("undo to a savepoint", "ROLLBACK TO request; RELEASE request")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_lasts_and_the_epoch_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.db");
        let (id, epoch) = Db::open(&path).unwrap().begin_epoch().unwrap();
        let (again, next) = Db::open(&path).unwrap().begin_epoch().unwrap();
        assert_eq!((again, next), (id, epoch + 1));
    }

    #[test]
    fn a_newer_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.db");
        Db::open(&path).unwrap().connection.pragma_update(None, "user_version", 99).unwrap();
        let error = Db::open(&path).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unsupported);
        assert!(error.to_string().contains("use a newer version"), "{error}");
    }

    #[test]
    fn something_else_is_not_taken_for_a_database() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.db");
        std::fs::write(&path, "precious, and not SQLite, and long enough to be looked at".repeat(40)).unwrap();
        Db::open(&path).unwrap_err();
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("precious"));
    }

    #[test]
    fn an_undone_request_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut db = Db::open(&dir.path().join("c.db")).unwrap();
        db.savepoint().unwrap();
        db.set_meta("a", "1").unwrap();
        db.release().unwrap();
        db.savepoint().unwrap();
        db.set_meta("b", "1").unwrap();
        db.undo().unwrap();
        db.commit().unwrap();
        assert_eq!((db.meta("a").unwrap().is_some(), db.meta("b").unwrap()), (true, None));
    }
}
