//! What a disk may take of its host's memory (CIM: the allocation of a storage extent), read from the wire and checked.

use muster_common::ByteLen;
use muster_idl::arguments::LimitSpec;

/// A quota is met in pieces of at most 256 KiB; one below this would be met before anything is written.
const LEAST_QUOTA: ByteLen = ByteLen::mib(1);
/// Names of tenants: what a label of Kubernetes or a project of OpenStack may be.
const TENANT_LENGTH: usize = 63;

/// What happens to a disk whose host has no memory left for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// Its VM stands still until there is room again.
    #[default]
    Pause,
    /// Its coldest blocks go to a file on the host's disk.
    Spill,
}

impl WhenFull {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Spill => "spill",
        }
    }
}

/// Checked limits of one disk. The default: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskLimits {
    pub quota: Option<ByteLen>,
    pub reservation: Option<ByteLen>,
    pub when_full: WhenFull,
}

/// Limits that make no sense. Texts for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    #[error("a quota of {0}: at least {LEAST_QUOTA} is possible; leave it out for none")]
    SmallQuota(ByteLen),
    #[error("a reservation of 0 bytes: leave it out for none")]
    NoReservation,
    #[error("a quota of {quota} is below the reservation of {reservation}: what is reserved could not be written")]
    QuotaBelowReservation { quota: ByteLen, reservation: ByteLen },
    #[error("a reservation of {reservation} is more than the disk of {size} can hold")]
    ReservationAboveSize { reservation: ByteLen, size: ByteLen },
    #[error("when full {0:?}: \"pause\" and \"spill\" are possible")]
    WhenFull(String),
    #[error(
        "tenant {0:?}: 1 to {TENANT_LENGTH} lower-case letters, digits, dots, hyphens and underscores are possible"
    )]
    Tenant(String),
}

impl DiskLimits {
    /// Reads and checks; `None` is a disk without limits.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn read(spec: Option<&LimitSpec>) -> Result<Self, LimitError> {
        let Some(spec) = spec else { return Ok(Self::default()) };
        let when_full = match spec.when_full.as_deref() {
            None | Some("pause") => WhenFull::Pause,
            Some("spill") => WhenFull::Spill,
            Some(other) => return Err(LimitError::WhenFull(other.chars().take(80).collect())),
        };
        let limits =
            Self { quota: spec.quota_bytes.map(ByteLen), reservation: spec.reservation_bytes.map(ByteLen), when_full };
        limits.check()?;
        Ok(limits)
    }

    /// What holds of every disk.
    fn check(&self) -> Result<(), LimitError> {
        match (self.quota, self.reservation) {
            (Some(quota), _) if quota < LEAST_QUOTA => Err(LimitError::SmallQuota(quota)),
            (_, Some(ByteLen::ZERO)) => Err(LimitError::NoReservation),
            (Some(quota), Some(reservation)) if quota < reservation => {
                Err(LimitError::QuotaBelowReservation { quota, reservation })
            }
            _ => Ok(()),
        }
    }

    /// What holds of a disk of this size.
    ///
    /// # Errors
    /// The reservation is larger.
    pub fn check_size(&self, size: ByteLen) -> Result<(), LimitError> {
        match self.reservation {
            Some(reservation) if reservation > size => Err(LimitError::ReservationAboveSize { reservation, size }),
            _ => Ok(()),
        }
    }

    /// The same with another quota; `None`: with none.
    ///
    /// # Errors
    /// It is too small.
    pub fn with_quota(self, quota: Option<ByteLen>) -> Result<Self, LimitError> {
        let changed = Self { quota, ..self };
        changed.check().map(|()| changed)
    }

    /// As it travels; `None` when nothing is limited.
    pub fn spec(&self) -> Option<LimitSpec> {
        (*self != Self::default()).then(|| LimitSpec {
            quota_bytes: self.quota.map(ByteLen::bytes),
            reservation_bytes: self.reservation.map(ByteLen::bytes),
            when_full: (self.when_full != WhenFull::default()).then(|| self.when_full.as_str().to_string()),
        })
    }
}

/// Refuses what is no name of a tenant.
///
/// # Errors
/// Says what is one.
pub fn check_tenant(name: &str) -> Result<(), LimitError> {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_');
    if name.is_empty() || name.len() > TENANT_LENGTH || !name.bytes().all(plain) {
        return Err(LimitError::Tenant(name.chars().take(80).collect()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(quota: Option<u64>, reservation: Option<u64>, when_full: Option<&str>) -> LimitSpec {
        LimitSpec {
            quota_bytes: quota.map(|mib| mib << 20),
            reservation_bytes: reservation.map(|mib| mib << 20),
            when_full: when_full.map(Into::into),
        }
    }

    #[test]
    fn limits_that_cannot_be_are_refused_with_what_is_possible() {
        let text = |spec: LimitSpec| DiskLimits::read(Some(&spec)).unwrap_err().to_string();
        assert!(text(spec(Some(0), None, None)).contains("at least 1 MiB"), "{}", text(spec(Some(0), None, None)));
        assert!(text(spec(None, Some(0), None)).contains("leave it out"));
        assert!(text(spec(Some(4), Some(5), None)).contains("below the reservation"));
        assert!(text(spec(None, None, Some("hope"))).contains("\"spill\""));
        let reserved = DiskLimits::read(Some(&spec(Some(8), Some(8), Some("spill")))).unwrap();
        assert_eq!(reserved.check_size(ByteLen::mib(8)), Ok(()));
        assert!(reserved.check_size(ByteLen::mib(7)).unwrap_err().to_string().contains("can hold"));
        assert!(reserved.with_quota(Some(ByteLen::mib(7))).is_err());
        assert_eq!(reserved.with_quota(None).unwrap().quota, None);
        for bad in ["", "A", "a b", &"x".repeat(64)] {
            assert!(check_tenant(bad).is_err(), "{bad:?}");
        }
        assert_eq!(check_tenant("school-a.7_b"), Ok(()));
    }

    #[test]
    fn limits_travel_and_come_back_and_none_are_not_sent() {
        assert_eq!(DiskLimits::read(None).unwrap().spec(), None);
        for given in [spec(Some(2), Some(1), Some("spill")), spec(None, Some(1), None), spec(Some(2), None, None)] {
            let limits = DiskLimits::read(Some(&given)).unwrap();
            assert_eq!(limits.spec(), Some(given));
        }
    }
}
