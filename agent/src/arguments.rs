//! Reads the arguments of an order; what is wrong with them is said in a way an operator can act upon.

use std::time::Duration;

use muster_cim::DiskLimits;
use muster_common::{ByteLen, Digest, ErrorCode};
use muster_idl::arguments::{TemplateSpec, name};

use crate::{dispatcher::Order, records::DiskRole};

/// An argument that is missing or makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("argument {name}: {reason}")]
pub struct ArgumentError {
    name: &'static str,
    reason: String,
}

impl ArgumentError {
    fn new(name: &'static str, reason: impl Into<String>) -> Self {
        Self { name, reason: reason.into() }
    }

    pub const fn code(&self) -> ErrorCode {
        ErrorCode::InvalidArgument
    }
}

/// What to do when a guest has not shut down in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShutdownPolicy {
    #[default]
    Fail,
    PowerOff,
}

/// `vdc` to `vdz`.
pub const MOST_APPLICATIONS: usize = 24;
/// A snapshot that is to go by itself goes within a day.
const KEEP_LIMIT_SECONDS: u64 = 24 * 3600;

/// A template whose fields were checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    pub spec: TemplateSpec,
    pub image: Digest,
    pub memory: ByteLen,
    pub data: Option<ByteLen>,
    /// Digest and name of each application image, in the order of their disks.
    pub applications: Vec<(Digest, String)>,
    pub kernel: Option<Digest>,
    pub initrd: Option<Digest>,
    pub system_limits: DiskLimits,
    pub data_limits: DiskLimits,
}

fn required<'a>(order: &'a Order, name: &'static str) -> Result<&'a str, ArgumentError> {
    order.argument(name).filter(|v| !v.is_empty()).ok_or_else(|| ArgumentError::new(name, "it is missing"))
}

pub fn template(order: &Order) -> Result<Template, ArgumentError> {
    let wrong = |reason: String| ArgumentError::new(name::TEMPLATE, reason);
    let spec: TemplateSpec =
        serde_json::from_str(required(order, name::TEMPLATE)?).map_err(|e| wrong(format!("not a template: {e}")))?;
    check_template(spec)
}

/// Checks what came as JSON, from a command or from a record.
pub fn check_template(spec: TemplateSpec) -> Result<Template, ArgumentError> {
    let wrong = |reason: String| ArgumentError::new(name::TEMPLATE, reason);
    let digest = |what: &str, text: &str| text.parse::<Digest>().map_err(|e| wrong(format!("{what}: {e}")));
    let image = digest("image", &spec.image)?;
    let kernel = spec.boot.kernel.as_deref().map(|t| digest("kernel", t)).transpose()?;
    let initrd = spec.boot.initrd.as_deref().map(|t| digest("initrd", t)).transpose()?;
    if kernel.is_none() && initrd.is_some() {
        return Err(wrong("an initrd without a kernel".into()));
    }
    if spec.vcpus == 0 || spec.vcpus > 256 {
        return Err(wrong(format!("{} processors: 1 to 256 are possible", spec.vcpus)));
    }
    if spec.memory_bytes < 1 << 20 {
        return Err(wrong(format!("{} of memory is too little", ByteLen(spec.memory_bytes))));
    }
    let data = spec.data_volume_bytes.map(ByteLen);
    if data.is_some_and(|d| d.bytes() == 0 || !d.bytes().is_multiple_of(4096)) {
        return Err(wrong("the data volume's size has to be a multiple of 4096 bytes".into()));
    }
    if spec.applications.len() > MOST_APPLICATIONS {
        let count = spec.applications.len();
        return Err(wrong(format!("{count} application images: at most {MOST_APPLICATIONS} are possible")));
    }
    let mut applications: Vec<(Digest, String)> = Vec::new();
    for application in &spec.applications {
        let image = digest("application image", &application.image)?;
        if applications.iter().any(|(other, _)| *other == image) {
            return Err(wrong(format!("application image {} is named twice", image.short())));
        }
        applications.push((image, application.image_name.clone()));
    }
    let limits = |disk: &str, limits| DiskLimits::read(limits).map_err(|e| wrong(format!("the {disk} disk: {e}")));
    let system_limits = limits("system", spec.system_limits.as_ref())?;
    let data_limits = limits("data", spec.data_limits.as_ref())?;
    match data {
        None if data_limits != DiskLimits::default() => {
            return Err(wrong("limits of a data disk, and no such disk".into()));
        }
        None => {}
        Some(size) => data_limits.check_size(size).map_err(|e| wrong(format!("the data disk: {e}")))?,
    }
    spec.tenant.as_deref().map_or(Ok(()), muster_cim::check_tenant).map_err(|e| wrong(e.to_string()))?;
    let memory = ByteLen(spec.memory_bytes);
    Ok(Template { image, memory, data, applications, kernel, initrd, system_limits, data_limits, spec })
}

/// What a disk is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    pub role: DiskRole,
    /// `None`: it stays.
    pub size: Option<ByteLen>,
    /// `None`: it stays; `Some(None)`: no quota any more.
    pub quota: Option<Option<ByteLen>>,
}

pub fn resize(order: &Order) -> Result<Resize, ArgumentError> {
    let role = match required(order, name::DISK)? {
        "system" => DiskRole::System,
        "data" => DiskRole::Data,
        other => return Err(ArgumentError::new(name::DISK, format!("{other:?} is neither \"system\" nor \"data\""))),
    };
    let bytes = |name: &'static str| {
        let wrong = |_| ArgumentError::new(name, "it has to be a number of bytes");
        order.argument(name).filter(|text| !text.is_empty()).map(|text| text.parse().map_err(wrong)).transpose()
    };
    let size: Option<u64> = bytes(name::SIZE_BYTES)?;
    let quota: Option<u64> = bytes(name::QUOTA_BYTES)?;
    if size.is_none() && quota.is_none() {
        return Err(ArgumentError::new(name::SIZE_BYTES, "it is missing, and so is quota_bytes: say one or both"));
    }
    if size.is_some_and(|size| size == 0 || !size.is_multiple_of(4096)) {
        return Err(ArgumentError::new(name::SIZE_BYTES, "it has to be a multiple of 4096 above 0"));
    }
    let quota = quota.map(|quota| Some(ByteLen(quota)).filter(|quota| *quota > ByteLen::ZERO));
    Ok(Resize { role, size: size.map(ByteLen), quota })
}

/// The target of the `n`th application's disk, from 0.
pub fn application_target(n: usize) -> String {
    let letter = u8::try_from(n).ok().and_then(|n| b'c'.checked_add(n)).map_or('?', char::from);
    format!("vd{letter}")
}

/// Names become file names and libvirt domain names.
pub fn vm_name(order: &Order) -> Result<String, ArgumentError> {
    let wrong = |reason| Err(ArgumentError::new("member name", reason));
    let name = order.name.trim();
    if name.is_empty() {
        return wrong("a VM needs a name");
    }
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | ' ');
    if name.len() > 100 || name.starts_with('.') || !name.chars().all(plain) {
        return wrong("at most 100 bytes of letters, digits, blanks and . _ -, not starting with a dot");
    }
    Ok(name.to_string())
}

pub fn policy(order: &Order) -> Result<ShutdownPolicy, ArgumentError> {
    match order.argument(name::POLICY).unwrap_or("fail") {
        "fail" | "" => Ok(ShutdownPolicy::Fail),
        "power-off" => Ok(ShutdownPolicy::PowerOff),
        other => Err(ArgumentError::new(name::POLICY, format!("{other:?} is neither \"fail\" nor \"power-off\""))),
    }
}

pub fn digest(order: &Order) -> Result<Digest, ArgumentError> {
    required(order, name::DIGEST)?.parse().map_err(|e| ArgumentError::new(name::DIGEST, format!("{e}")))
}

pub fn image_name(order: &Order) -> String {
    // older senders say "name"
    order.argument(name::IMAGE_NAME).or_else(|| order.argument(name::NAME)).unwrap_or_default().to_string()
}

/// Where to pull from, when the command says so. In lab mode whoever commands may name any place.
pub fn source(order: &Order) -> Result<Option<String>, ArgumentError> {
    match order.argument(name::SOURCE).filter(|s| !s.is_empty()) {
        None => Ok(None),
        Some(url) if url.starts_with("http://") => Ok(Some(url.trim_end_matches('/').to_string())),
        Some(_) => Err(ArgumentError::new(name::SOURCE, "it has to begin with http://")),
    }
}

pub fn argv(order: &Order) -> Result<Vec<String>, ArgumentError> {
    let argv: Vec<String> = serde_json::from_str(required(order, name::ARGV)?)
        .map_err(|e| ArgumentError::new(name::ARGV, format!("not a JSON list of texts: {e}")))?;
    if argv.first().is_none_or(String::is_empty) {
        return Err(ArgumentError::new(name::ARGV, "no program is named"));
    }
    Ok(argv)
}

pub fn guest_path(order: &Order) -> Result<String, ArgumentError> {
    let path = required(order, name::PATH)?;
    if !path.starts_with('/') || path.contains('\0') {
        return Err(ArgumentError::new(name::PATH, "it has to be an absolute path in the guest"));
    }
    Ok(path.to_string())
}

pub fn content(order: &Order) -> Result<Vec<u8>, ArgumentError> {
    let text = order.argument(name::CONTENT).ok_or_else(|| ArgumentError::new(name::CONTENT, "it is missing"))?;
    decode_base64(text).ok_or_else(|| ArgumentError::new(name::CONTENT, "not base64 (RFC 4648, section 4)"))
}

/// A snapshot's name.
pub fn snapshot_name(order: &Order) -> Result<String, ArgumentError> {
    let name = required(order, name::NAME)?;
    if name.len() > 100 || name.chars().any(char::is_control) {
        return Err(ArgumentError::new(name::NAME, "at most 100 bytes without control characters"));
    }
    Ok(name.to_string())
}

/// How long a snapshot is kept after somebody last read of it; `None`: until it is cleared.
pub fn keep(order: &Order) -> Result<Option<Duration>, ArgumentError> {
    let Some(text) = order.argument(name::KEEP_SECONDS).filter(|text| !text.is_empty()) else { return Ok(None) };
    match text.parse::<u64>() {
        Ok(seconds) if (1..=KEEP_LIMIT_SECONDS).contains(&seconds) => Ok(Some(Duration::from_secs(seconds))),
        _ => {
            Err(ArgumentError::new(name::KEEP_SECONDS, format!("{text:?} is no number from 1 to {KEEP_LIMIT_SECONDS}")))
        }
    }
}

/// Backup id, or `None` for the latest.
pub fn backup(order: &Order) -> Result<Option<muster_backup::BackupId>, ArgumentError> {
    match order.argument(name::BACKUP).unwrap_or("latest") {
        "latest" | "" => Ok(None),
        text => text.parse().map(Some).map_err(|e| ArgumentError::new(name::BACKUP, format!("{e}, or \"latest\""))),
    }
}

/// Strict: padding is required, nothing else than the alphabet is allowed.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let bytes = text.as_bytes();
    if !bytes.len().is_multiple_of(4) {
        return None;
    }
    let mut out = Vec::with_capacity(bytes.len() / 4 * 3);
    let groups = bytes.len() / 4;
    for (i, group) in bytes.chunks_exact(4).enumerate() {
        let padding = if i + 1 == groups { group.iter().rev().take_while(|c| **c == b'=').count() } else { 0 };
        if padding > 2 {
            return None;
        }
        let mut bits = 0u32;
        for c in &group[..4 - padding] {
            bits = bits << 6 | u32::from(value(*c)?);
        }
        bits <<= 6 * padding;
        let raw = [(bits >> 16) as u8, (bits >> 8) as u8, bits as u8];
        if raw[3 - padding..].iter().any(|b| *b != 0) {
            return None;
        }
        out.extend_from_slice(&raw[..3 - padding]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use muster_common::{CommandId, VmId};
    use muster_idl::arguments::LimitSpec;
    use muster_idl::v1::{Argument, TargetKind, Verb};

    use super::*;

    fn order(arguments: &[(&str, &str)]) -> Order {
        let vm = VmId::random();
        Order {
            task: 0,
            command: CommandId::now(),
            controller: String::new(),
            verb: Verb::Create,
            target_kind: TargetKind::Vm,
            member: vm.to_string(),
            vm: Some(vm),
            name: "desk 1".into(),
            arguments: arguments.iter().map(|(n, v)| Argument { name: (*n).into(), value: (*v).into() }).collect(),
            deadline_us: 0,
            received_us: 0,
        }
    }

    #[test]
    fn base64_is_decoded_strictly() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYg==", "foob")] {
            assert_eq!(decode_base64(text).unwrap(), bytes.as_bytes(), "{text}");
        }
        for bad in ["Zg", "Zg=", "Z===", "Zm9v\n", "Zh==", "Zg==Zg==", "Zm-_"] {
            assert_eq!(decode_base64(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_wrong_argument_is_named_with_its_reason() {
        assert_eq!(argv(&order(&[])).unwrap_err().to_string(), "argument argv: it is missing");
        assert!(argv(&order(&[("argv", "[]")])).is_err());
        assert_eq!(argv(&order(&[("argv", "[\"ls\", \"/\"]")])).unwrap(), ["ls", "/"]);
        assert!(policy(&order(&[("policy", "hope")])).unwrap_err().to_string().contains("power-off"));
        assert_eq!(policy(&order(&[])).unwrap(), ShutdownPolicy::Fail);
        assert!(guest_path(&order(&[("path", "etc/passwd")])).is_err());
        assert!(source(&order(&[("source", "file:///etc")])).is_err());
        assert_eq!(backup(&order(&[])).unwrap(), None);
        assert!(backup(&order(&[("backup", "newest")])).is_err());
        assert_eq!(keep(&order(&[])).unwrap(), None);
        assert_eq!(keep(&order(&[("keep_seconds", "60")])).unwrap(), Some(Duration::from_secs(60)));
        for bad in ["0", "-1", "soon", "86401"] {
            assert!(keep(&order(&[("keep_seconds", bad)])).is_err(), "{bad}");
        }
    }

    #[test]
    fn templates_are_checked_field_by_field() {
        let image = "ab".repeat(32);
        let good = crate::records::tests::template(&image);
        let json = serde_json::to_string(&good).unwrap();
        assert_eq!(template(&order(&[("template", &json)])).unwrap().image.to_string(), image);
        for (field, value) in [("image", "\"abc\""), ("vcpus", "0"), ("memory_bytes", "5"), ("data_volume_bytes", "7")]
        {
            let mut value_of: serde_json::Value = serde_json::from_str(&json).unwrap();
            value_of[field] = serde_json::from_str(value).unwrap();
            assert!(template(&order(&[("template", &value_of.to_string())])).is_err(), "{field}");
        }
        assert!(template(&order(&[("template", "{}")])).unwrap_err().to_string().contains("name"));
        let application =
            |image: &str| muster_idl::arguments::ApplicationSpec { image: image.into(), image_name: "tools@1".into() };
        let with = |images: &[&str]| {
            let applications = images.iter().map(|i| application(i)).collect();
            check_template(TemplateSpec { applications, ..good.clone() })
        };
        let other = "cd".repeat(32);
        assert_eq!(with(&[&image, &other]).unwrap().applications[1].1, "tools@1");
        assert!(with(&["abc"]).unwrap_err().to_string().contains("application image"));
        assert!(with(&[&other, &other]).unwrap_err().to_string().contains("twice"));
        let many: Vec<String> = (0..25).map(|n| format!("{n:064x}")).collect();
        assert!(
            with(&many.iter().map(String::as_str).collect::<Vec<_>>()).unwrap_err().to_string().contains("at most 24")
        );
        assert_eq!((application_target(0), application_target(23)), ("vdc".into(), "vdz".into()));
    }

    #[test]
    fn limits_of_a_template_are_checked_with_its_disks() {
        let limits = |reservation: u64| LimitSpec { reservation_bytes: Some(reservation), ..LimitSpec::default() };
        let good = crate::records::tests::template(&"ab".repeat(32));
        let text = |spec| check_template(spec).unwrap_err().to_string();
        let spec = TemplateSpec { data_limits: Some(limits(65 << 20)), ..good.clone() };
        assert!(text(spec).contains("the data disk: a reservation of 65 MiB is more than"));
        let spec = TemplateSpec { data_limits: Some(limits(1)), data_volume_bytes: None, ..good.clone() };
        assert!(text(spec).contains("no such disk"));
        let spec = TemplateSpec { tenant: Some("School A".into()), ..good.clone() };
        assert!(text(spec).contains("lower-case"));
        let spec = TemplateSpec { system_limits: Some(limits(1 << 20)), tenant: Some("a".into()), ..good };
        assert_eq!(check_template(spec).unwrap().system_limits.reservation, Some(ByteLen::mib(1)));
    }

    #[test]
    fn a_resize_says_which_disk_and_what_it_is_to_be() {
        let read = |arguments: &[(&str, &str)]| resize(&order(arguments));
        let text = |arguments: &[(&str, &str)]| read(arguments).unwrap_err().to_string();
        assert!(text(&[("size_bytes", "4096")]).contains("argument disk: it is missing"));
        assert!(text(&[("disk", "vdb"), ("size_bytes", "4096")]).contains("neither"));
        assert!(text(&[("disk", "data")]).contains("say one or both"));
        assert!(text(&[("disk", "data"), ("size_bytes", "1GiB")]).contains("number of bytes"));
        assert!(text(&[("disk", "data"), ("size_bytes", "1000")]).contains("multiple"));
        let both = read(&[("disk", "data"), ("size_bytes", "8192"), ("quota_bytes", "0")]).unwrap();
        assert_eq!(both, Resize { role: DiskRole::Data, size: Some(ByteLen(8192)), quota: Some(None) });
        let quota = read(&[("disk", "system"), ("quota_bytes", "4194304")]).unwrap();
        assert_eq!((quota.size, quota.quota), (None, Some(Some(ByteLen::mib(4)))));
    }

    #[test]
    fn names_that_would_be_paths_are_refused() {
        for bad in ["", " ", ".x", "a/b", "a\nb"] {
            assert!(vm_name(&Order { name: bad.into(), ..order(&[]) }).is_err(), "{bad:?}");
        }
        assert_eq!(vm_name(&order(&[])).unwrap(), "desk 1");
    }
}
