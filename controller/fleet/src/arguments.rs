//! What each verb is given to, what it takes, and how long it may take. The agents check again; this is the clear answer to
//! the operator before anything is published.

use std::collections::BTreeMap;

use muster_common::Digest;
use muster_idl::{
    arguments::{TemplateSpec, name},
    v1::{TargetKind, Verb},
};

use crate::FleetError;

/// True when `verb` can be given to members of `kind`.
pub const fn applies(verb: Verb, kind: TargetKind) -> bool {
    use Verb::{Backup, Drain, ImageDrop, ImagePull, Ping, Undrain};
    match kind {
        TargetKind::Host => matches!(verb, Ping | Backup | Drain | Undrain | ImagePull | ImageDrop),
        TargetKind::Vm => !matches!(verb, Ping | Drain | Undrain | ImagePull | ImageDrop),
    }
}

/// The kind a verb is given to when the operator does not say.
pub const fn default_kind(verb: Verb) -> TargetKind {
    if applies(verb, TargetKind::Vm) { TargetKind::Vm } else { TargetKind::Host }
}

/// Seconds within which it must have been begun when the operator does not say: several times what it takes on a busy host
/// without KVM.
pub const fn default_timeout_seconds(verb: Verb) -> u32 {
    match verb {
        Verb::Ping => 10,
        Verb::Pause | Verb::Drain | Verb::Undrain => 30,
        Verb::PowerOff | Verb::Reset | Verb::ImageDrop | Verb::DestroyVolumes => 60,
        Verb::Delete | Verb::Resume | Verb::Snapshot | Verb::Exec | Verb::FileWrite | Verb::Resize => 120,
        Verb::PowerOn | Verb::Shutdown | Verb::ResetSession => 180,
        Verb::Reboot | Verb::Suspend | Verb::Create => 300,
        Verb::Backup | Verb::Restore | Verb::ImagePull => 3600,
    }
}

/// The longest a command may be told to take.
pub const TIMEOUT_LIMIT_SECONDS: u32 = 24 * 3600;
/// A file written into a guest travels in the command; RTPS fragments it, but a command is not a file transfer.
const CONTENT_LIMIT: usize = 256 << 10;

/// Checks the arguments of a verb: nothing missing, nothing unknown, everything readable.
///
/// # Errors
/// `Invalid`, naming the argument.
pub fn check(verb: Verb, arguments: &BTreeMap<String, String>) -> Result<(), FleetError> {
    let (required, optional): (&[&str], &[&str]) = match verb {
        Verb::Create => (&[name::TEMPLATE], &[name::SOURCE]),
        Verb::Shutdown => (&[], &[name::POLICY]),
        Verb::Snapshot => (&[], &[name::NAME, name::KEEP_SECONDS]),
        Verb::Restore => (&[], &[name::BACKUP]),
        Verb::Exec => (&[name::ARGV], &[]),
        Verb::FileWrite => (&[name::PATH, name::CONTENT], &[]),
        Verb::ImagePull => (&[name::DIGEST], &[name::IMAGE_NAME, name::SOURCE]),
        Verb::ImageDrop => (&[name::DIGEST], &[]),
        Verb::Resize => (&[name::DISK], &[name::SIZE_BYTES, name::QUOTA_BYTES]),
        _ => (&[], &[]),
    };
    for wanted in required {
        if !arguments.contains_key(*wanted) {
            return Err(FleetError::Invalid(format!("{verb} needs the argument {wanted:?}")));
        }
    }
    for (key, value) in arguments {
        if !required.contains(&key.as_str()) && !optional.contains(&key.as_str()) {
            return Err(FleetError::Invalid(format!("{verb} has no argument {key:?}")));
        }
        check_value(verb, key, value)?;
    }
    if verb == Verb::Resize && arguments.len() < 2 {
        let text = format!("{verb} needs the argument {:?}, {:?} or both", name::SIZE_BYTES, name::QUOTA_BYTES);
        return Err(FleetError::Invalid(text));
    }
    Ok(())
}

fn check_value(verb: Verb, key: &str, value: &str) -> Result<(), FleetError> {
    let wrong = |expected: &str| {
        let shown: String = value.chars().take(80).collect();
        Err(FleetError::Invalid(format!("argument {key:?} of {verb} is {shown:?}: expected {expected}")))
    };
    match key {
        name::POLICY if !matches!(value, "fail" | "power-off") => wrong("\"fail\" or \"power-off\""),
        name::DIGEST if value.parse::<Digest>().is_err() => wrong("an image digest of 64 hexadecimal digits"),
        name::ARGV if !serde_json::from_str::<Vec<String>>(value).is_ok_and(|argv| !argv.is_empty()) => {
            wrong("a JSON list of texts with at least the program")
        }
        name::TEMPLATE if serde_json::from_str::<TemplateSpec>(value).is_err() => wrong("a template in JSON"),
        name::PATH if !value.starts_with('/') => wrong("an absolute path in the guest"),
        name::CONTENT if value.len() > CONTENT_LIMIT => {
            wrong("at most 256 KiB of base64; use a data volume or the network for more")
        }
        name::CONTENT
            if !value.len().is_multiple_of(4)
                || !value.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b)) =>
        {
            wrong("base64")
        }
        name::KEEP_SECONDS if !value.parse::<u32>().is_ok_and(|seconds| (1..=86_400).contains(&seconds)) => {
            wrong("a number of seconds, 1 to 86400")
        }
        name::DISK if !matches!(value, "system" | "data") => wrong("\"system\" or \"data\""),
        name::SIZE_BYTES if !value.parse::<u64>().is_ok_and(|size| size > 0 && size.is_multiple_of(4096)) => {
            wrong("a number of bytes, a multiple of 4096")
        }
        name::QUOTA_BYTES if value.parse::<u64>().is_err() => wrong("a number of bytes, 0 for no quota"),
        name::BACKUP | name::NAME if value.is_empty() => wrong("a name"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_string(), value.to_string())])
    }

    #[test]
    fn every_verb_applies_to_something() {
        for verb in Verb::ALL {
            assert!(applies(*verb, default_kind(*verb)), "{verb}");
            assert!(default_timeout_seconds(*verb) <= TIMEOUT_LIMIT_SECONDS);
        }
    }

    #[test]
    fn arguments_are_checked_by_name_and_value() {
        let text = |verb, arguments: &BTreeMap<String, String>| check(verb, arguments).unwrap_err().to_string();
        assert_eq!(text(Verb::Exec, &BTreeMap::new()), "exec needs the argument \"argv\"");
        assert_eq!(text(Verb::PowerOn, &one("force", "1")), "power-on has no argument \"force\"");
        assert!(text(Verb::Shutdown, &one("policy", "kill")).contains("expected \"fail\""));
        assert!(text(Verb::Exec, &one("argv", "ls")).contains("JSON list"));
        assert!(text(Verb::Snapshot, &one("keep_seconds", "0")).contains("1 to 86400"));
        assert!(text(Verb::Resize, &one("disk", "data")).contains("or both"));
        assert!(text(Verb::Resize, &one("disk", "vda")).contains("expected \"system\""));
        let resize = |size: &str| [("disk", "data"), ("size_bytes", size)].map(|(k, v)| (k.to_string(), v.to_string()));
        assert!(text(Verb::Resize, &resize("20GiB").into()).contains("number of bytes"));
        check(Verb::Resize, &resize("8192").into()).unwrap();
        check(Verb::Exec, &one("argv", "[\"ls\"]")).unwrap();
        check(Verb::Shutdown, &BTreeMap::new()).unwrap();
    }
}
