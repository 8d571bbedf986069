//! Named sets of hosts and VMs, nested. `school/lab1` lies in `school` by its path; any group may also be put into another.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use muster_common::{HostId, VmId};
use serde::{Deserialize, Serialize};

use crate::{FleetError, name};

/// Groups below groups: deeper is a mistake, not a school.
const DEPTH_LIMIT: usize = 16;

/// A checked path of a group: names joined by `/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupPath(String);

impl GroupPath {
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// The group it lies in by its path; none at the top.
    pub fn parent(&self) -> Option<GroupPath> {
        self.0.rsplit_once('/').map(|(parent, _)| GroupPath(parent.to_string()))
    }
    /// True when `other` lies below it by its path.
    pub fn is_above(&self, other: &GroupPath) -> bool {
        other.0.strip_prefix(&self.0).is_some_and(|rest| rest.starts_with('/'))
    }
}

impl FromStr for GroupPath {
    type Err = FleetError;
    fn from_str(text: &str) -> Result<Self, FleetError> {
        let parts: Vec<&str> = text.split('/').collect();
        if parts.len() > DEPTH_LIMIT || !parts.iter().all(|part| name::is_valid(part)) {
            return Err(FleetError::InvalidName {
                what: "group",
                name: text.to_string(),
                rule: "names joined by '/', at most 16; each is 1 to 63 letters, digits, '.', '_' or '-'",
            });
        }
        Ok(Self(text.to_string()))
    }
}

impl TryFrom<String> for GroupPath {
    type Error = FleetError;
    fn try_from(text: String) -> Result<Self, FleetError> {
        text.parse()
    }
}

impl From<GroupPath> for String {
    fn from(path: GroupPath) -> String {
        path.0
    }
}

impl fmt::Display for GroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What is directly in a group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    pub hosts: BTreeSet<HostId>,
    pub vms: BTreeSet<VmId>,
    pub groups: BTreeSet<GroupPath>,
}

impl Members {
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty() && self.vms.is_empty() && self.groups.is_empty()
    }
}

/// One group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub members: Members,
    /// Grows with each change of this group.
    pub version: u64,
}

/// All groups. Every change is all or nothing and raises the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    groups: BTreeMap<GroupPath, Group>,
    epoch: u64,
}

impl Groups {
    /// Groups read back from the database.
    pub fn restore(groups: impl IntoIterator<Item = (GroupPath, Group)>, epoch: u64) -> Self {
        Self { groups: groups.into_iter().collect(), epoch }
    }
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
    pub fn get(&self, path: &GroupPath) -> Option<&Group> {
        self.groups.get(path)
    }
    pub fn iter(&self) -> impl Iterator<Item = (&GroupPath, &Group)> {
        self.groups.iter()
    }
    pub fn len(&self) -> usize {
        self.groups.len()
    }
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// The group of this path.
    ///
    /// # Errors
    /// `Unknown`, with near names.
    pub fn find(&self, path: &GroupPath) -> Result<&Group, FleetError> {
        self.groups.get(path).ok_or_else(|| self.unknown(path.as_str()))
    }

    pub(crate) fn unknown(&self, path: &str) -> FleetError {
        FleetError::Unknown {
            what: "group",
            name: path.to_string(),
            near: name::near(path, self.groups.keys().map(GroupPath::as_str)),
        }
    }

    fn check_version(&self, path: &GroupPath, expected: Option<u64>) -> Result<(), FleetError> {
        let actual = self.find(path)?.version;
        match expected {
            Some(expected) if expected != actual => {
                Err(FleetError::Conflict { what: "group", name: path.to_string(), expected, actual })
            }
            _ => Ok(()),
        }
    }

    /// Makes a group, and its parents where they are missing.
    ///
    /// # Errors
    /// `Exists`; what [`Self::change`] says of the members.
    pub fn create(&mut self, path: &GroupPath, members: &Members) -> Result<(), FleetError> {
        if self.groups.contains_key(path) {
            return Err(FleetError::Exists { what: "group", name: path.to_string() });
        }
        let mut next = self.clone();
        next.insert_path(path);
        next.add(path, members)?;
        next.epoch += 1;
        *self = next;
        Ok(())
    }

    /// As [`Self::create`], but content with a group that is there.
    ///
    /// # Errors
    /// What [`Self::change`] says of the members.
    pub fn ensure(&mut self, path: &GroupPath, members: &Members) -> Result<(), FleetError> {
        if self.groups.contains_key(path) {
            self.change(path, members, &Members::default(), None)
        } else {
            self.create(path, members)
        }
    }

    fn insert_path(&mut self, path: &GroupPath) {
        self.groups.entry(path.clone()).or_default().version = self.epoch + 1;
        let mut child = path.clone();
        while let Some(parent) = child.parent() {
            let group = self.groups.entry(parent.clone()).or_default();
            if group.members.groups.insert(child) {
                group.version = self.epoch + 1;
            }
            child = parent;
        }
    }

    /// Adds and removes members.
    ///
    /// # Errors
    /// `Unknown` for a group that is not there, `Cycle`, `Conflict` when `version` is not the group's, `Invalid` for a
    /// removed group that lies there by its path.
    pub fn change(
        &mut self,
        path: &GroupPath,
        add: &Members,
        remove: &Members,
        version: Option<u64>,
    ) -> Result<(), FleetError> {
        self.check_version(path, version)?;
        if let Some(child) = remove.groups.iter().find(|child| child.parent().as_ref() == Some(path)) {
            return Err(FleetError::Invalid(format!(
                "group {child} lies in {path} by its path and cannot be taken out; delete it instead"
            )));
        }
        let mut next = self.clone();
        if let Some(group) = next.groups.get_mut(path) {
            let members = &mut group.members;
            members.hosts.retain(|host| !remove.hosts.contains(host));
            members.vms.retain(|vm| !remove.vms.contains(vm));
            members.groups.retain(|inner| !remove.groups.contains(inner));
        }
        next.add(path, add)?;
        if next.groups != self.groups {
            next.epoch += 1;
            if let Some(group) = next.groups.get_mut(path) {
                group.version = next.epoch;
            }
            *self = next;
        }
        Ok(())
    }

    fn add(&mut self, path: &GroupPath, add: &Members) -> Result<(), FleetError> {
        for inner in &add.groups {
            self.find(inner)?;
            if let Some(chain) = self.path_between(inner, path) {
                return Err(FleetError::Cycle {
                    outer: path.to_string(),
                    inner: inner.to_string(),
                    path: chain.iter().map(GroupPath::as_str).collect::<Vec<_>>().join(" > "),
                });
            }
        }
        if let Some(group) = self.groups.get_mut(path) {
            group.members.hosts.extend(&add.hosts);
            group.members.vms.extend(&add.vms);
            group.members.groups.extend(add.groups.iter().cloned());
        }
        Ok(())
    }

    /// The chain of groups from `from` down to `to`, both included; none when `to` does not lie in `from`.
    fn path_between(&self, from: &GroupPath, to: &GroupPath) -> Option<Vec<GroupPath>> {
        let mut came_from: BTreeMap<&GroupPath, &GroupPath> = BTreeMap::new();
        let mut open = vec![from];
        let mut seen = BTreeSet::from([from]);
        while let Some(at) = open.pop() {
            if at == to {
                let mut chain = vec![at.clone()];
                let mut back = at;
                while let Some(previous) = came_from.get(back) {
                    chain.push((*previous).clone());
                    back = previous;
                }
                chain.reverse();
                return Some(chain);
            }
            for inner in self.groups.get(at).into_iter().flat_map(|group| &group.members.groups) {
                if seen.insert(inner) {
                    came_from.insert(inner, at);
                    open.push(inner);
                }
            }
        }
        None
    }

    /// Deletes a group and those below it by path. Their members stay what they are.
    ///
    /// # Errors
    /// `Unknown`, `Conflict`.
    pub fn delete(&mut self, path: &GroupPath, version: Option<u64>) -> Result<(), FleetError> {
        self.check_version(path, version)?;
        self.epoch += 1;
        let epoch = self.epoch;
        self.groups.retain(|other, _| other != path && !path.is_above(other));
        for group in self.groups.values_mut() {
            let before = group.members.groups.len();
            group.members.groups.retain(|inner| inner != path && !path.is_above(inner));
            if group.members.groups.len() != before {
                group.version = epoch;
            }
        }
        Ok(())
    }

    /// Takes hosts and VMs that are no more out of all groups. True when anything changed.
    pub fn forget(&mut self, hosts: &[HostId], vms: &[VmId]) -> bool {
        let epoch = self.epoch + 1;
        let mut changed = false;
        for group in self.groups.values_mut() {
            let members = &mut group.members;
            let before = members.hosts.len() + members.vms.len();
            members.hosts.retain(|host| !hosts.contains(host));
            members.vms.retain(|vm| !vms.contains(vm));
            if members.hosts.len() + members.vms.len() != before {
                group.version = epoch;
                changed = true;
            }
        }
        if changed {
            self.epoch = epoch;
        }
        changed
    }

    /// All hosts and VMs in a group and in the groups below it, each once.
    pub fn expand(&self, path: &GroupPath) -> (BTreeSet<HostId>, BTreeSet<VmId>) {
        let (mut hosts, mut vms) = (BTreeSet::new(), BTreeSet::new());
        let mut seen = BTreeSet::from([path]);
        let mut open = vec![path];
        while let Some(group) = open.pop().and_then(|at| self.groups.get(at)) {
            hosts.extend(&group.members.hosts);
            vms.extend(&group.members.vms);
            open.extend(group.members.groups.iter().filter(|inner| seen.insert(inner)));
        }
        (hosts, vms)
    }
}

#[cfg(test)]
mod tests {
    use muster_common::ErrorCode;
    use proptest::prelude::*;

    use super::*;

    fn path(text: &str) -> GroupPath {
        text.parse().unwrap()
    }
    fn groups_of(paths: &[&str]) -> Members {
        Members { groups: paths.iter().map(|p| path(p)).collect(), ..Members::default() }
    }

    #[test]
    fn parents_are_created_and_contain_their_children() {
        let mut groups = Groups::default();
        let vm = VmId::random();
        let members = Members { vms: [vm].into(), ..Members::default() };
        groups.create(&path("school/lab1"), &members).unwrap();
        assert!(groups.expand(&path("school")).1.contains(&vm));
        assert_eq!(groups.epoch(), 1);
        assert_eq!(groups.create(&path("school"), &members).unwrap_err().code(), ErrorCode::AlreadyExists);
    }

    #[test]
    fn a_cycle_is_refused_and_nothing_is_changed() {
        let mut groups = Groups::default();
        groups.create(&path("school/lab1"), &Members::default()).unwrap();
        groups.create(&path("staff"), &groups_of(&["school"])).unwrap();
        let before = groups.clone();
        for outer in ["school/lab1", "school", "staff"] {
            let error = groups.change(&path(outer), &groups_of(&["staff"]), &Members::default(), None).unwrap_err();
            assert_eq!(error.code(), ErrorCode::GroupCycle, "{error}");
        }
        assert_eq!(groups, before);
    }

    #[test]
    fn a_changed_group_is_a_conflict() {
        let mut groups = Groups::default();
        groups.create(&path("a"), &Members::default()).unwrap();
        let version = groups.get(&path("a")).unwrap().version;
        let add = Members { vms: [VmId::random()].into(), ..Members::default() };
        groups.change(&path("a"), &add, &Members::default(), Some(version)).unwrap();
        let error = groups.delete(&path("a"), Some(version)).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Conflict);
    }

    #[test]
    fn deleting_takes_those_below_along() {
        let mut groups = Groups::default();
        groups.create(&path("school/lab1"), &Members::default()).unwrap();
        groups.create(&path("schools"), &groups_of(&["school/lab1"])).unwrap();
        groups.delete(&path("school"), None).unwrap();
        assert_eq!(groups.iter().map(|(p, _)| p.as_str()).collect::<Vec<_>>(), ["schools"]);
        assert!(groups.get(&path("schools")).unwrap().members.groups.is_empty());
    }

    #[test]
    fn an_unknown_group_comes_with_near_names() {
        let mut groups = Groups::default();
        groups.create(&path("school/lab1"), &Members::default()).unwrap();
        let error = groups.find(&path("school/lab2")).unwrap_err();
        assert_eq!(error.near()[0], "school/lab1");
    }

    /// Slow and obvious: reachability by walking edges until nothing new turns up.
    fn reaches(edges: &BTreeSet<(u8, u8)>, from: u8, to: u8) -> bool {
        let mut reached = BTreeSet::from([from]);
        loop {
            let more: BTreeSet<u8> = edges.iter().filter(|(a, _)| reached.contains(a)).map(|(_, b)| *b).collect();
            let before = reached.len();
            reached.extend(more);
            if reached.len() == before {
                return reached.contains(&to);
            }
        }
    }

    proptest! {
        #[test]
        fn groups_behave_like_the_slow_oracle(steps in prop::collection::vec((0u8..4, 0u8..6, 0u8..6), 0..60)) {
            let node = |n: u8| path(&format!("g{n}"));
            let vms: Vec<VmId> = (0..6).map(|n| VmId::from_uuid(uuid_of(n))).collect();
            let mut groups = Groups::default();
            for n in 0..6 { groups.create(&node(n), &Members::default()).unwrap(); }
            let mut edges: BTreeSet<(u8, u8)> = BTreeSet::new();
            let mut held: BTreeSet<(u8, u8)> = BTreeSet::new();
            for (kind, a, b) in steps {
                let none = Members::default();
                match kind {
                    0 => {
                        let add = Members { groups: [node(b)].into(), ..Members::default() };
                        let result = groups.change(&node(a), &add, &none, None);
                        prop_assert_eq!(result.is_err(), reaches(&edges, b, a));
                        if result.is_ok() { edges.insert((a, b)); }
                    }
                    1 => {
                        let remove = Members { groups: [node(b)].into(), ..Members::default() };
                        groups.change(&node(a), &none, &remove, None).unwrap();
                        edges.remove(&(a, b));
                    }
                    2 => {
                        let add = Members { vms: [vms[b as usize]].into(), ..Members::default() };
                        groups.change(&node(a), &add, &none, None).unwrap();
                        held.insert((a, b));
                    }
                    _ => {
                        let remove = Members { vms: [vms[b as usize]].into(), ..Members::default() };
                        groups.change(&node(a), &none, &remove, None).unwrap();
                        held.remove(&(a, b));
                    }
                }
                for n in 0..6u8 {
                    let expected: BTreeSet<VmId> = held
                        .iter()
                        .filter(|(group, _)| reaches(&edges, n, *group))
                        .map(|(_, vm)| vms[*vm as usize])
                        .collect();
                    prop_assert_eq!(groups.expand(&node(n)).1, expected);
                }
            }
        }
    }

    fn uuid_of(n: u8) -> uuid::Uuid {
        uuid::Uuid::from_u128(u128::from(n) + 1)
    }
}
