//! Sizes. A `ByteLen` is a number of bytes; people write it with binary suffixes (IEC 80000-13).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes. Serialised as a number; read from a number or from text such as `"8GiB"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteLen(pub u64);

impl ByteLen {
    pub const ZERO: ByteLen = ByteLen(0);

    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ByteLen {
    /// Three significant digits at most: `512 MiB`, `1.46 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = if value.fract() == 0.0 || value >= 100.0 {
            format!("{value:.0} {}", UNITS[unit])
        } else if value >= 10.0 {
            format!("{value:.1} {}", UNITS[unit])
        } else {
            format!("{value:.2} {}", UNITS[unit])
        };
        f.pad(&text)
    }
}

/// A text that is not a size.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text:?} is not a size: write a number of bytes, or a number with KiB, MiB, GiB or TiB")]
pub struct ParseSizeError {
    text: String,
}

impl FromStr for ByteLen {
    type Err = ParseSizeError;
    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let wrong = || ParseSizeError { text: text.to_string() };
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(wrong()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(Self).ok_or_else(wrong);
        }
        let value = number.parse::<f64>().map_err(|_| wrong())? * (1u64 << shift) as f64;
        if value.fract() != 0.0 || value >= u64::MAX as f64 {
            return Err(wrong());
        }
        Ok(Self(value as u64))
    }
}

impl Serialize for ByteLen {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteLen {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = ByteLen;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes or a text such as \"8GiB\"")
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<ByteLen, E> {
                Ok(ByteLen(v))
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<ByteLen, E> {
                u64::try_from(v).map(ByteLen).map_err(|_| E::custom("a size cannot be negative"))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<ByteLen, E> {
                v.parse().map_err(E::custom)
            }
        }
        d.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_with_binary_suffixes() {
        assert_eq!("8GiB".parse::<ByteLen>().unwrap(), ByteLen::gib(8));
        assert_eq!("1.5 MiB".parse::<ByteLen>().unwrap(), ByteLen(3 << 19));
        assert_eq!("4096".parse::<ByteLen>().unwrap(), ByteLen(4096));
        for bad in ["", "GiB", "-1", "8 gigs", "99999999999 TiB", "0.3"] {
            assert!(bad.parse::<ByteLen>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_print_for_people() {
        assert_eq!(ByteLen::mib(512).to_string(), "512 MiB");
        assert_eq!(ByteLen(1_567_000_000).to_string(), "1.46 GiB");
    }
}
