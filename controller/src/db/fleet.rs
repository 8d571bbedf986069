//! Hosts, groups and the VMs that are wanted.

use muster_common::{CommandId, HostId, VmId};
use muster_fleet::groups::{Group, GroupPath, Groups};
use muster_idl::{arguments::TemplateSpec, v1::PhysicalHost};
use rusqlite::params;
use serde::{Deserialize, Serialize};

use super::{Attempt, Db, DbError, from_json, parse, to_json};

/// A host as last heard.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredHost {
    pub id: HostId,
    pub cell: u16,
    pub description: Option<PhysicalHost>,
}

/// How a wanted VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    Creating,
    Present,
    Deleting,
    /// Its create or delete command ended without a clear word.
    Doubtful,
}

/// A VM the controller made or is making.
#[derive(Clone, Debug, PartialEq)]
pub struct DesiredVm {
    pub id: VmId,
    pub name: String,
    pub host: HostId,
    pub template: String,
    pub spec: TemplateSpec,
    pub standing: Standing,
    /// The command that makes or deletes it.
    pub command: Option<CommandId>,
    pub created_at_us: u64,
    pub version: u64,
}

impl Db {
    pub fn hosts(&self) -> Result<Vec<StoredHost>, DbError> {
        const WHAT: &str = "read hosts";
        let mut statement = self.connection.prepare("SELECT id, cell, description FROM hosts").attempt(WHAT)?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get(1)?, row.get::<_, String>(2)?)))
            .attempt(WHAT)?;
        let mut hosts = Vec::new();
        for row in rows {
            let (id, cell, description) = row.attempt(WHAT)?;
            let description =
                if description.is_empty() { None } else { Some(from_json("a host's description", &description)?) };
            hosts.push(StoredHost { id: parse("host id", &id)?, cell, description });
        }
        Ok(hosts)
    }

    pub fn put_host(&self, host: &StoredHost) -> Result<(), DbError> {
        let description = host.description.as_ref().map(to_json).unwrap_or_default();
        self.run(
            "write a host",
            "INSERT OR REPLACE INTO hosts (id, cell, description) VALUES (?1, ?2, ?3)",
            params![host.id.to_string(), host.cell, description],
        )
    }

    pub fn delete_host(&self, id: HostId) -> Result<(), DbError> {
        self.run("delete a host", "DELETE FROM hosts WHERE id = ?1", [id.to_string()])
    }

    pub fn groups(&self) -> Result<Groups, DbError> {
        const WHAT: &str = "read groups";
        let mut statement = self.connection.prepare("SELECT path, members, version FROM groups").attempt(WHAT)?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, i64>(2)?)))
            .attempt(WHAT)?;
        let mut groups = Vec::new();
        for row in rows {
            let (path, members, version) = row.attempt(WHAT)?;
            let path: GroupPath = parse("group path", &path)?;
            let members = from_json("a group's members", &members)?;
            groups.push((path, Group { members, version: version.cast_unsigned() }));
        }
        let epoch = match self.meta("group_epoch")? {
            Some(text) => parse("group epoch", &text)?,
            None => 0,
        };
        Ok(Groups::restore(groups, epoch))
    }

    /// Writes what differs between two sets of groups.
    pub fn change_groups(&self, before: &Groups, after: &Groups) -> Result<(), DbError> {
        for (path, _) in before.iter().filter(|(path, _)| after.get(path).is_none()) {
            self.run("delete a group", "DELETE FROM groups WHERE path = ?1", [path.as_str()])?;
        }
        for (path, group) in after.iter().filter(|(path, group)| before.get(path) != Some(group)) {
            self.run(
                "write a group",
                "INSERT OR REPLACE INTO groups (path, members, version) VALUES (?1, ?2, ?3)",
                params![path.as_str(), to_json(&group.members), group.version.cast_signed()],
            )?;
        }
        self.set_meta("group_epoch", &after.epoch().to_string())
    }

    pub fn vms(&self) -> Result<Vec<DesiredVm>, DbError> {
        const WHAT: &str = "read VMs";
        let mut statement = self
            .connection
            .prepare("SELECT id, name, host, template, spec, standing, command, created_at_us, version FROM vms")
            .attempt(WHAT)?;
        let mut rows = statement.query([]).attempt(WHAT)?;
        let mut vms = Vec::new();
        while let Some(row) = rows.next().attempt(WHAT)? {
            let text = |column: usize| row.get::<_, String>(column).attempt(WHAT);
            let number = |column: usize| row.get::<_, i64>(column).attempt(WHAT).map(i64::cast_unsigned);
            vms.push(DesiredVm {
                id: parse("VM id", &text(0)?)?,
                name: text(1)?,
                host: parse("host id", &text(2)?)?,
                template: text(3)?,
                spec: from_json("a VM's template", &text(4)?)?,
                standing: from_json("a VM's standing", &format!("\"{}\"", text(5)?))?,
                command: text(6)?.parse().ok(),
                created_at_us: number(7)?,
                version: number(8)?,
            });
        }
        Ok(vms)
    }

    pub fn put_vm(&self, vm: &DesiredVm) -> Result<(), DbError> {
        let standing = to_json(&vm.standing);
        self.run(
            "write a VM",
            "INSERT OR REPLACE INTO vms (id, name, host, template, spec, standing, command, created_at_us, version)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            params![
                vm.id.to_string(),
                vm.name,
                vm.host.to_string(),
                vm.template,
                to_json(&vm.spec),
                standing.trim_matches('"'),
                vm.command.map(|id| id.to_string()).unwrap_or_default(),
                vm.created_at_us.cast_signed(),
                vm.version.cast_signed(),
            ],
        )
    }

    pub fn delete_vm(&self, id: VmId) -> Result<(), DbError> {
        self.run("delete a VM", "DELETE FROM vms WHERE id = ?1", [id.to_string()])
    }
}
