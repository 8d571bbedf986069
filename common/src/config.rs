//! Configuration: defaults < TOML file < `PREFIX_*` environment < explicit overrides.
//!
//! `MUSTER_AGENT_STORE__BUDGET=8GiB` sets `store.budget` of the agent: double underscores part the tables.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::{Table, Value};

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read configuration {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("parse configuration {path}")]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("apply setting {key}: {parent} is not a table")]
    NotATable { key: String, parent: String },
    #[error("check the configuration (file, then {prefix}_* environment, then flags)")]
    Invalid {
        prefix: String,
        #[source]
        source: Box<toml::de::Error>,
    },
}

/// Reads the effective configuration. `overrides` are `("store.budget", "8GiB")` pairs and win over all else.
///
/// # Errors
/// When the file cannot be read or parsed, or a key is unknown or of the wrong type: `T` should carry
/// `#[serde(deny_unknown_fields)]`, so that a misspelt key is an error and not silence.
pub fn load<T: DeserializeOwned>(
    file: Option<&Path>,
    prefix: &str,
    environment: impl IntoIterator<Item = (String, String)>,
    overrides: &[(String, String)],
) -> Result<T, ConfigError> {
    let mut table = match file {
        None => Table::new(),
        Some(path) => {
            let text =
                std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
            text.parse::<Table>()
                .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?
        }
    };
    let lead = format!("{prefix}_");
    let mut from_environment: Vec<(String, String)> = environment
        .into_iter()
        .filter_map(|(name, value)| {
            let key = name.strip_prefix(&lead)?;
            Some((key.to_ascii_lowercase().replace("__", "."), value))
        })
        .collect();
    from_environment.sort();
    for (key, value) in from_environment.iter().chain(overrides) {
        set(&mut table, key, parse_value(value))?;
    }
    table.try_into().map_err(|source| ConfigError::Invalid { prefix: prefix.into(), source: Box::new(source) })
}

/// `8`, `true`, `["a", "b"]` are what TOML says they are; anything else is a string.
fn parse_value(text: &str) -> Value {
    format!("v = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(text.to_string()))
}

fn set(table: &mut Table, key: &str, value: Value) -> Result<(), ConfigError> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_string(), value);
            Ok(())
        }
        Some((head, rest)) => match table.entry(head.to_string()).or_insert_with(|| Value::Table(Table::new())) {
            Value::Table(inner) => set(inner, rest, value),
            _ => Err(ConfigError::NotATable { key: key.into(), parent: head.into() }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, Debug, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        name: String,
        #[serde(default)]
        store: Store,
    }
    #[derive(serde::Deserialize, Debug, PartialEq, Default)]
    #[serde(deny_unknown_fields)]
    struct Store {
        budget: crate::ByteLen,
    }

    #[test]
    fn flags_win_over_environment_and_environment_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "name = 'file'\nstore.budget = '1GiB'\n").unwrap();
        let environment = vec![
            ("T_NAME".to_string(), "env".to_string()),
            ("T_STORE__BUDGET".to_string(), "2GiB".to_string()),
            ("OTHER_NAME".to_string(), "x".to_string()),
        ];
        let got: Sample = load(Some(&path), "T", environment, &[("name".to_string(), "flag".to_string())]).unwrap();
        assert_eq!(got, Sample { name: "flag".into(), store: Store { budget: crate::ByteLen::gib(2) } });
    }

    #[test]
    fn a_misspelt_key_is_an_error() {
        let overrides = [("name".to_string(), "x".to_string()), ("stor.budget".to_string(), "1".to_string())];
        let error = load::<Sample>(None, "T", [], &overrides).unwrap_err();
        assert!(crate::Chain(&error).to_string().contains("stor"), "{}", crate::Chain(&error));
    }
}
