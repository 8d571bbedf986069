//! Identities. Each is its own type; all print in their canonical text form and travel as that text.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

/// A text that is not an id of the named kind.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text:?} is not a {kind}: {expected}")]
pub struct ParseIdError {
    kind: &'static str,
    expected: &'static str,
    text: String,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A fresh random id (UUID version 4).
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
            /// Wraps an existing UUID.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }
            pub const fn uuid(self) -> Uuid {
                self.0
            }
            /// The UUID of these bytes (RFC 9562 order).
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
            /// The first eight hexadecimal digits: for file names and tables, not unique.
            pub fn short(self) -> String {
                self.0.simple().to_string()[..8].to_string()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                Uuid::try_parse(text).map(Self).map_err(|_| ParseIdError {
                    kind: $kind,
                    expected: "expected a UUID",
                    text: text.to_string(),
                })
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

uuid_id!(
    /// One host for as long as its state directory lives. Not the DMI UUID: clones and containers share that one.
    HostId, "host id");
uuid_id!(
    /// One run of one agent or controller: random at each start.
    Incarnation, "incarnation");
uuid_id!(
    /// One virtual system; also its libvirt domain UUID.
    VmId, "VM id");
uuid_id!(
    /// One volume; with its generation it names an export.
    VolumeId, "volume id");
uuid_id!(
    /// One kept snapshot of a volume.
    SnapshotId, "snapshot id");
uuid_id!(
    /// Whose blocks are shared among themselves only.
    TenantId, "tenant id");
uuid_id!(
    /// One controller for as long as its database lives.
    ControllerId, "controller id");
uuid_id!(
    /// One group command (UUID version 7: sorts by time of issue).
    CommandId, "command id");

impl CommandId {
    /// A fresh id that sorts after those issued in earlier milliseconds (RFC 9562, section 5.7).
    pub fn now() -> Self {
        Self(Uuid::now_v7())
    }
}

/// A BLAKE3-256 digest, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// An image is named by the digest of its manifest.
pub type ImageId = Digest;

impl Digest {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
    /// The first twelve hexadecimal digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

impl FromStr for Digest {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let wrong =
            || ParseIdError { kind: "digest", expected: "expected 64 hexadecimal digits", text: text.to_string() };
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return Err(wrong());
        }
        for (i, byte) in bytes.iter_mut().enumerate() {
            let pair = &text[2 * i..2 * i + 2];
            if !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_their_text_form() {
        let vm = VmId::random();
        assert_eq!(vm.to_string().parse::<VmId>().unwrap(), vm);
        let digest = Digest::from_bytes([0xa5; 32]);
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!("+5".repeat(32).parse::<Digest>().is_err());
    }

    #[test]
    fn a_wrong_id_says_what_was_expected() {
        let error = "nope".parse::<HostId>().unwrap_err().to_string();
        assert_eq!(error, "\"nope\" is not a host id: expected a UUID");
    }
}
