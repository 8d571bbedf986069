//! Groups.

use muster_api::{ChangeGroup, CreateGroup, Group, GroupMembers};

use super::Session;
use crate::{
    Ended,
    args::{GroupVerb, MembersArgs},
    output::{Table, print, print_deleted},
};

pub async fn run(session: &Session, verb: GroupVerb) -> anyhow::Result<Ended> {
    let client = &session.client;
    match verb {
        GroupVerb::Ls => {
            let groups = client.all_groups().await?;
            print(session.output, &groups, |groups| {
                let mut table = Table::new(&["PATH", ">HOSTS", ">VMS", ">ALL HOSTS", ">ALL VMS", "GROUPS"]);
                for g in groups {
                    table.row([
                        g.path.clone(),
                        g.hosts.len().to_string(),
                        g.vms.len().to_string(),
                        g.total_hosts.to_string(),
                        g.total_vms.to_string(),
                        g.groups.join(" "),
                    ]);
                }
                table.render()
            })?;
        }
        GroupVerb::Show { path } => print(session.output, &client.group(&path).await?, show)?,
        GroupVerb::Create { path } => {
            let create = CreateGroup { path, members: GroupMembers::default() };
            print(session.output, &client.create_group(&create).await?, show)?;
        }
        GroupVerb::Delete { path } => {
            client.delete_group(&path, None).await?;
            print_deleted(session.output, &path)?;
        }
        GroupVerb::Add(args) => change(session, args, true).await?,
        GroupVerb::Remove(args) => change(session, args, false).await?,
    }
    Ok(Ended::AllDone)
}

async fn change(session: &Session, args: MembersArgs, add: bool) -> anyhow::Result<()> {
    let members = GroupMembers { hosts: args.hosts, vms: args.vms, groups: args.groups };
    if members == GroupMembers::default() {
        anyhow::bail!("name at least one --host, --vm or --group");
    }
    let change = if add {
        ChangeGroup { add: members, ..ChangeGroup::default() }
    } else {
        ChangeGroup { remove: members, ..ChangeGroup::default() }
    };
    print(session.output, &session.client.change_group(&args.path, &change, None).await?, show)
}

fn show(group: &Group) -> String {
    let mut table = Table::new(&["KIND", "NAME", "ID"]);
    for path in &group.groups {
        table.row(["group".into(), path.clone(), "-".into()]);
    }
    for (kind, members) in [("host", &group.hosts), ("vm", &group.vms)] {
        for member in members {
            table.row([kind.into(), member.name.clone(), member.id.clone()]);
        }
    }
    format!(
        "{}: {} hosts and {} VMs with all its groups\n{}",
        group.path,
        group.total_hosts,
        group.total_vms,
        table.render()
    )
}
