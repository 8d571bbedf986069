//! Images and templates.

use muster_api::{BootFiles, DiskLimits, ImageFormat, NetworkMode};
use muster_common::{ByteLen, Digest};
use rusqlite::params;
use serde::{Deserialize, Serialize};

use super::{Attempt, Db, DbError, from_json, parse, to_json};

/// An image; its bytes are in the repository.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredImage {
    #[serde(skip, default = "no_digest")]
    pub digest: Digest,
    #[serde(skip)]
    pub name: String,
    #[serde(skip)]
    pub revision: u32,
    pub format: ImageFormat,
    pub logical_bytes: u64,
    pub new_bytes: u64,
    pub resident_estimate_bytes: u64,
    pub boot: BootFiles,
    pub imported_at_us: u64,
    pub version: u64,
    /// What the volume it was committed from is a clone of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Digest>,
    /// Where it came from, when not from a file.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub origin: String,
}

fn no_digest() -> Digest {
    Digest::from_bytes([0; 32])
}

impl StoredImage {
    /// `name@revision`.
    pub fn full_name(&self) -> String {
        format!("{}@{}", self.name, self.revision)
    }
}

/// A template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredTemplate {
    #[serde(skip)]
    pub name: String,
    #[serde(skip, default = "no_digest")]
    pub image: Digest,
    pub vcpus: u32,
    pub memory: ByteLen,
    pub data_volume: Option<ByteLen>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub applications: Vec<Digest>,
    pub boot: BootFiles,
    pub network: NetworkMode,
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub system_limits: DiskLimits,
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub data_limits: DiskLimits,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    pub created_at_us: u64,
    pub version: u64,
}

impl Db {
    pub fn images(&self) -> Result<Vec<StoredImage>, DbError> {
        const WHAT: &str = "read images";
        let mut statement =
            self.connection.prepare("SELECT digest, name, revision, facts FROM images").attempt(WHAT)?;
        let rows = statement
            .query_map([], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get(2)?, row.get::<_, String>(3)?))
            })
            .attempt(WHAT)?;
        let mut images = Vec::new();
        for row in rows {
            let (digest, name, revision, facts) = row.attempt(WHAT)?;
            let image: StoredImage = from_json("an image", &facts)?;
            images.push(StoredImage { digest: parse("image digest", &digest)?, name, revision, ..image });
        }
        Ok(images)
    }

    pub fn put_image(&self, image: &StoredImage) -> Result<(), DbError> {
        self.run(
            "write an image",
            "INSERT INTO images (digest, name, revision, facts) VALUES (?1, ?2, ?3, ?4)",
            params![image.digest.to_string(), image.name, image.revision, to_json(image)],
        )
    }

    pub fn delete_image(&self, digest: &Digest) -> Result<(), DbError> {
        self.run("delete an image", "DELETE FROM images WHERE digest = ?1", [digest.to_string()])
    }

    pub fn templates(&self) -> Result<Vec<StoredTemplate>, DbError> {
        const WHAT: &str = "read templates";
        let mut statement = self.connection.prepare("SELECT name, image, facts FROM templates").attempt(WHAT)?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?)))
            .attempt(WHAT)?;
        let mut templates = Vec::new();
        for row in rows {
            let (name, image, facts) = row.attempt(WHAT)?;
            let template: StoredTemplate = from_json("a template", &facts)?;
            templates.push(StoredTemplate { name, image: parse("image digest", &image)?, ..template });
        }
        Ok(templates)
    }

    pub fn put_template(&self, template: &StoredTemplate) -> Result<(), DbError> {
        self.run(
            "write a template",
            "INSERT OR REPLACE INTO templates (name, image, facts) VALUES (?1, ?2, ?3)",
            params![template.name, template.image.to_string(), to_json(template)],
        )
    }

    pub fn delete_template(&self, name: &str) -> Result<(), DbError> {
        self.run("delete a template", "DELETE FROM templates WHERE name = ?1", [name])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_written_before_there_were_commits_and_applications_are_read() {
        let image = r#"{"format":"raw","logical_bytes":1,"new_bytes":2,"resident_estimate_bytes":3,
            "boot":{"cmdline":""},"imported_at_us":4,"version":1}"#;
        let image: StoredImage = from_json("an image", image).unwrap();
        assert_eq!((image.parent, image.origin.as_str()), (None, ""));
        let template = r#"{"vcpus":1,"memory":268435456,"data_volume":null,"boot":{"cmdline":""},
            "network":{"kind":"none"},"created_at_us":1,"version":1}"#;
        let template: StoredTemplate = from_json("a template", template).unwrap();
        assert!(template.applications.is_empty());
        // and what has none is written as it was: an older program can read it
        assert!(!to_json(&template).contains("limits") && !to_json(&template).contains("tenant"));
        assert!(!to_json(&template).contains("applications") && !to_json(&image).contains("parent"));
    }
}
