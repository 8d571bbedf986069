//! From what the operator wrote to the ones that are meant.
//!
//! A text is a name, an id, a group path, or one of these with its kind said: `host:NAME`, `vm:NAME`, `group:PATH`. For a VM
//! command `host:NAME` means all VMs on that host; a bare host name does not, so that a slip does not stop a whole host. `*`
//! means all.

use std::collections::{BTreeMap, BTreeSet};

use muster_common::{HostId, VmId};

use crate::{
    FleetError,
    groups::{GroupPath, Groups},
    name,
};

/// Names and ids of the moment.
#[derive(Clone, Debug, Default)]
pub struct Names {
    pub hosts: BTreeMap<HostId, String>,
    /// Each VM with its name and its host.
    pub vms: BTreeMap<VmId, (String, HostId)>,
}

impl Names {
    fn hosts_named(&self, text: &str) -> Vec<HostId> {
        self.hosts.iter().filter(|(id, name)| *name == text || id.to_string() == text).map(|(id, _)| *id).collect()
    }
    fn vms_named(&self, text: &str) -> Vec<VmId> {
        self.vms.iter().filter(|(id, (name, _))| name == text || id.to_string() == text).map(|(id, _)| *id).collect()
    }

    /// The one host of this name or id.
    ///
    /// # Errors
    /// `Unknown` with near names, `Ambiguous` with the ids.
    pub fn host(&self, text: &str) -> Result<HostId, FleetError> {
        let text = text.strip_prefix("host:").unwrap_or(text);
        match self.hosts_named(text).as_slice() {
            [one] => Ok(*one),
            [] => Err(FleetError::Unknown {
                what: "host",
                name: text.to_string(),
                near: name::near(text, self.hosts.values().map(String::as_str)),
            }),
            many => Err(ambiguous(text, many.iter().map(|id| format!("host:{id}")))),
        }
    }

    /// The one VM of this name or id.
    ///
    /// # Errors
    /// `Unknown` with near names, `Ambiguous` with the ids.
    pub fn vm(&self, text: &str) -> Result<VmId, FleetError> {
        let text = text.strip_prefix("vm:").unwrap_or(text);
        match self.vms_named(text).as_slice() {
            [one] => Ok(*one),
            [] => Err(FleetError::Unknown {
                what: "VM",
                name: text.to_string(),
                near: name::near(text, self.vms.values().map(|(name, _)| name.as_str())),
            }),
            many => Err(ambiguous(text, many.iter().map(|id| format!("vm:{id}")))),
        }
    }
}

fn ambiguous(text: &str, candidates: impl Iterator<Item = String>) -> FleetError {
    FleetError::Ambiguous { name: text.to_string(), candidates: candidates.collect() }
}

/// The hosts that `texts` mean, each once.
///
/// # Errors
/// `Unknown`, `Ambiguous`; `Empty` when they name a group without hosts, or nothing at all.
pub fn hosts(texts: &[String], names: &Names, groups: &Groups) -> Result<BTreeSet<HostId>, FleetError> {
    let mut found = BTreeSet::new();
    for text in texts {
        if text == "*" {
            found.extend(names.hosts.keys());
            continue;
        }
        if text.starts_with("host:") {
            found.insert(names.host(text)?);
            continue;
        }
        let group = group_named(text, groups)?;
        let named = if text.starts_with("group:") { Vec::new() } else { names.hosts_named(text) };
        match (named.as_slice(), group) {
            ([one], None) => {
                found.insert(*one);
            }
            ([], Some(path)) => {
                let members = groups.expand(&path).0;
                if members.is_empty() {
                    return Err(FleetError::Empty { target: format!("group {path}"), what: "host" });
                }
                found.extend(members.into_iter().filter(|host| names.hosts.contains_key(host)));
            }
            ([], None) => return Err(unknown("host or group", text, names.hosts.values(), groups)),
            (many, group) => {
                let ids = many.iter().map(|id| format!("host:{id}"));
                return Err(ambiguous(text, ids.chain(group.map(|path| format!("group:{path}")))));
            }
        }
    }
    not_empty(found, texts, "host")
}

/// The VMs that `texts` mean, each once.
///
/// # Errors
/// As [`hosts`].
pub fn vms(texts: &[String], names: &Names, groups: &Groups) -> Result<BTreeSet<VmId>, FleetError> {
    let mut found = BTreeSet::new();
    for text in texts {
        if text == "*" {
            found.extend(names.vms.keys());
            continue;
        }
        if text.starts_with("vm:") {
            found.insert(names.vm(text)?);
            continue;
        }
        if text.starts_with("host:") {
            let host = names.host(text)?;
            found.extend(names.vms.iter().filter(|(_, (_, on))| *on == host).map(|(id, _)| *id));
            continue;
        }
        let group = group_named(text, groups)?;
        let named = if text.starts_with("group:") { Vec::new() } else { names.vms_named(text) };
        match (named.as_slice(), group) {
            ([one], None) => {
                found.insert(*one);
            }
            ([], Some(path)) => {
                let members = groups.expand(&path).1;
                if members.is_empty() {
                    return Err(FleetError::Empty { target: format!("group {path}"), what: "VM" });
                }
                found.extend(members.into_iter().filter(|vm| names.vms.contains_key(vm)));
            }
            ([], None) => {
                let mut error = unknown("VM or group", text, names.vms.values().map(|(name, _)| name), groups);
                // the likeliest slip: a host's name where VMs are meant
                if let FleetError::Unknown { near, .. } = &mut error
                    && !names.hosts_named(text).is_empty()
                {
                    near.insert(0, format!("host:{text}"));
                }
                return Err(error);
            }
            (many, group) => {
                let ids = many.iter().map(|id| format!("vm:{id}"));
                return Err(ambiguous(text, ids.chain(group.map(|path| format!("group:{path}")))));
            }
        }
    }
    not_empty(found, texts, "VM")
}

fn not_empty<T>(found: BTreeSet<T>, texts: &[String], what: &'static str) -> Result<BTreeSet<T>, FleetError> {
    if found.is_empty() {
        let target = if texts.is_empty() { "an empty target".to_string() } else { texts.join(", ") };
        return Err(FleetError::Empty { target, what });
    }
    Ok(found)
}

/// The group of this path; an error only when the text says that it is one.
fn group_named(text: &str, groups: &Groups) -> Result<Option<GroupPath>, FleetError> {
    if let Some(path) = text.strip_prefix("group:") {
        let path: GroupPath = path.parse()?;
        groups.find(&path)?;
        return Ok(Some(path));
    }
    Ok(text.parse::<GroupPath>().ok().filter(|path| groups.get(path).is_some()))
}

fn unknown<'a>(
    what: &'static str,
    text: &str,
    known: impl Iterator<Item = &'a String>,
    groups: &'a Groups,
) -> FleetError {
    let paths = groups.iter().map(|(path, _)| path.as_str());
    FleetError::Unknown { what, name: text.to_string(), near: name::near(text, known.map(String::as_str).chain(paths)) }
}

#[cfg(test)]
mod tests {
    use muster_common::ErrorCode;

    use super::*;
    use crate::groups::Members;

    fn fleet() -> (Names, Groups, Vec<VmId>) {
        let host = HostId::random();
        let ids: Vec<VmId> = (0..3).map(|_| VmId::random()).collect();
        let mut names = Names::default();
        names.hosts.insert(host, "host1".into());
        for (i, id) in ids.iter().enumerate() {
            names.vms.insert(*id, (format!("desk-{i}"), host));
        }
        let mut groups = Groups::default();
        let vms = Members { vms: [ids[0], ids[1]].into(), ..Members::default() };
        groups.create(&"school/lab1".parse().unwrap(), &vms).unwrap();
        groups.create(&"desk-2".parse().unwrap(), &Members::default()).unwrap();
        (names, groups, ids)
    }
    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| t.to_string()).collect()
    }

    #[test]
    fn several_targets_name_each_member_once() {
        let (names, groups, ids) = fleet();
        let got = vms(&texts(&["school", "desk-0", "school/lab1"]), &names, &groups).unwrap();
        assert_eq!(got, [ids[0], ids[1]].into());
        assert_eq!(vms(&texts(&["host:host1"]), &names, &groups).unwrap().len(), 3);
        assert_eq!(vms(&[ids[2].to_string()], &names, &groups).unwrap(), [ids[2]].into());
    }

    #[test]
    fn unclear_targets_are_refused_with_what_they_could_be() {
        let (names, groups, ids) = fleet();
        let error = |t: &[&str]| vms(&texts(t), &names, &groups).unwrap_err();
        assert_eq!(error(&["desk-9"]).code(), ErrorCode::NotFound);
        assert!(error(&["desk-9"]).near().contains(&"desk-0".to_string()));
        assert_eq!(error(&["desk-2"]).near(), [format!("vm:{}", ids[2]), "group:desk-2".to_string()]);
        assert_eq!(error(&["host1"]).near(), ["host:host1"]);
        assert_eq!(error(&["group:desk-2"]).to_string(), "group desk-2 names no VM");
        assert_eq!(error(&[]).to_string(), "an empty target names no VM");
        assert_eq!(hosts(&texts(&["school"]), &names, &groups).unwrap_err().to_string(), "group school names no host");
    }
}
