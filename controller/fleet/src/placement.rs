//! Where new VMs go: evenly over the hosts that have the memory.

use muster_common::{ByteLen, HostId};

use crate::FleetError;

/// What placement needs to know of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub host: HostId,
    pub name: String,
    pub online: bool,
    pub draining: bool,
    /// A hypervisor is there.
    pub capable: bool,
    /// VMs it has or is getting.
    pub vms: u32,
    /// What VMs may take in all: the memory of the host less the store's budget.
    pub memory: ByteLen,
    /// What the VMs it has would take when all run.
    pub committed: ByteLen,
}

/// How many VMs are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    Total(u32),
    PerHost(u32),
}

/// One request makes at most so many VMs: more is a slip of the finger.
pub const VM_LIMIT: u32 = 1000;

/// Picks a host for each new VM of `memory` bytes. `overcommit_percent`: how much memory may be promised, 100 = what is there.
///
/// # Errors
/// `Invalid` when no host takes work or the amount is out of range, `NoSpace` when the memory does not suffice.
pub fn place(
    candidates: &[Candidate],
    amount: Amount,
    memory: ByteLen,
    overcommit_percent: u32,
) -> Result<Vec<HostId>, FleetError> {
    let mut usable: Vec<Candidate> =
        candidates.iter().filter(|c| c.online && !c.draining && c.capable).cloned().collect();
    usable.sort_by(|a, b| (&a.name, a.host).cmp(&(&b.name, b.host)));
    if usable.is_empty() {
        let why: Vec<String> = candidates.iter().map(|c| format!("{} {}", c.name, reason(c))).collect();
        return Err(FleetError::Invalid(if why.is_empty() {
            "no host is known yet".to_string()
        } else {
            format!("no host takes new VMs: {}", why.join(", "))
        }));
    }
    let total = match amount {
        Amount::Total(n) => u64::from(n),
        Amount::PerHost(n) => u64::from(n) * usable.len() as u64,
    };
    if total == 0 || total > u64::from(VM_LIMIT) {
        return Err(FleetError::Invalid(format!("{total} VMs asked for: it must be 1 to {VM_LIMIT}")));
    }
    let limit = |c: &Candidate| u128::from(c.memory.0) * u128::from(overcommit_percent) / 100;
    let fits = |c: &Candidate| u128::from(c.committed.0) + u128::from(memory.0) <= limit(c);
    let mut chosen = Vec::new();
    match amount {
        Amount::PerHost(n) => {
            for candidate in &mut usable {
                for _ in 0..n {
                    if !fits(candidate) {
                        return Err(no_space(candidate, memory));
                    }
                    candidate.committed.0 += memory.0;
                    chosen.push(candidate.host);
                }
            }
        }
        Amount::Total(n) => {
            for _ in 0..n {
                // fewest VMs first; among equals the one with most memory left; the name decides the rest, so that
                // the same request on the same fleet is placed the same
                let best = usable.iter_mut().filter(|c| fits(c)).min_by_key(|c| {
                    (c.vms, std::cmp::Reverse(c.memory.0.saturating_sub(c.committed.0)), c.name.clone())
                });
                match best {
                    Some(candidate) => {
                        candidate.vms += 1;
                        candidate.committed.0 += memory.0;
                        chosen.push(candidate.host);
                    }
                    None => return Err(no_space(&usable[0], memory)),
                }
            }
        }
    }
    Ok(chosen)
}

fn reason(c: &Candidate) -> &'static str {
    if !c.online {
        "is offline"
    } else if c.draining {
        "is draining"
    } else {
        "has no hypervisor"
    }
}

fn no_space(c: &Candidate, memory: ByteLen) -> FleetError {
    FleetError::NoSpace(format!(
        "host {} has {} for VMs, {} of it promised: another VM of {memory} does not fit",
        c.name, c.memory, c.committed
    ))
}

#[cfg(test)]
mod tests {
    use muster_common::ErrorCode;

    use super::*;

    fn host(name: &str, vms: u32, gib: u64) -> Candidate {
        Candidate {
            host: HostId::random(),
            name: name.into(),
            online: true,
            draining: false,
            capable: true,
            vms,
            memory: ByteLen::gib(gib),
            committed: ByteLen::gib(u64::from(vms)),
        }
    }

    #[test]
    fn new_vms_even_the_hosts_out() {
        let hosts = [host("a", 3, 64), host("b", 0, 64), host("c", 1, 64)];
        let chosen = place(&hosts, Amount::Total(5), ByteLen::gib(1), 100).unwrap();
        let on = |i: usize| chosen.iter().filter(|h| **h == hosts[i].host).count();
        assert_eq!((on(0), on(1), on(2)), (0, 3, 2));
    }

    #[test]
    fn a_full_host_is_passed_over_and_a_full_fleet_is_an_error() {
        let hosts = [host("a", 0, 1), host("b", 5, 8)];
        let chosen = place(&hosts, Amount::Total(3), ByteLen::gib(1), 100).unwrap();
        assert_eq!(chosen.iter().filter(|h| **h == hosts[0].host).count(), 1);
        assert_eq!(place(&hosts, Amount::Total(5), ByteLen::gib(1), 100).unwrap_err().code(), ErrorCode::NoSpace);
        assert!(place(&hosts, Amount::Total(5), ByteLen::gib(1), 200).is_ok());
    }

    #[test]
    fn hosts_that_take_no_work_are_named_with_the_reason() {
        let mut hosts = [host("a", 0, 8), host("b", 0, 8)];
        hosts[0].online = false;
        hosts[1].draining = true;
        let error = place(&hosts, Amount::PerHost(2), ByteLen::gib(1), 100).unwrap_err();
        assert_eq!(error.to_string(), "no host takes new VMs: a is offline, b is draining");
    }
}
