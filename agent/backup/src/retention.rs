//! Which backups may go. Pure: takes what is there, gives what to keep and what to remove.

use std::collections::{BTreeMap, BTreeSet};

use muster_common::VmId;
use serde::{Deserialize, Serialize};

use crate::{BackupId, BackupRecord};

/// How many backups to keep. Each rule keeps on its own; a backup goes when no rule keeps it. Days, weeks (from Monday) and
/// months are those of UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// The newest n.
    pub last: u32,
    /// The newest of each of the newest n hours that have one.
    pub hourly: u32,
    /// The newest of each of the newest n days that have one.
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
}

/// A backup as the planner sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dated {
    pub created_at_us: u64,
    pub id: BackupId,
}

/// Why a backup is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The newest one is always kept.
    Newest,
    Last,
    Hourly,
    Daily,
    Weekly,
    Monthly,
}

/// What a policy says about a set of backups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub keep: BTreeMap<BackupId, Vec<Reason>>,
    /// Oldest first.
    pub remove: Vec<BackupId>,
}

/// Gives the number of the period a time lies in.
type Period = fn(u64) -> u64;

const HOUR_US: u64 = 3_600_000_000;
const DAY_US: u64 = 24 * HOUR_US;

/// Applies a policy to the backups of one thing (one VM). The newest is always kept.
pub fn plan(backups: &[Dated], policy: &Policy) -> Verdict {
    let mut newest_first = backups.to_vec();
    newest_first.sort_unstable_by(|a, b| b.cmp(a));
    newest_first.dedup();
    let mut keep = BTreeMap::<BackupId, Vec<Reason>>::new();
    if let Some(newest) = newest_first.first() {
        keep.entry(newest.id).or_default().push(Reason::Newest);
    }
    let rules: [(u32, Reason, Period); 5] = [
        (policy.last, Reason::Last, |_| 0),
        (policy.hourly, Reason::Hourly, |t| t / HOUR_US),
        (policy.daily, Reason::Daily, |t| t / DAY_US),
        // 1970-01-01 was a Thursday, three days after a Monday
        (policy.weekly, Reason::Weekly, |t| (t / DAY_US + 3) / 7),
        (policy.monthly, Reason::Monthly, |t| month_of(t / DAY_US)),
    ];
    for (count, reason, period) in rules {
        let mut previous = None;
        let mut left = count;
        for backup in &newest_first {
            if left == 0 {
                break;
            }
            let this = period(backup.created_at_us);
            if reason != Reason::Last && previous == Some(this) {
                continue;
            }
            previous = Some(this);
            left -= 1;
            keep.entry(backup.id).or_default().push(reason);
        }
    }
    let remove = newest_first.iter().rev().map(|b| b.id).filter(|id| !keep.contains_key(id)).collect();
    Verdict { keep, remove }
}

/// Applies a policy to each VM's backups by itself. A backup of several VMs goes only when it may go for all of them; one
/// of no VM belongs to the set of such backups.
pub fn plan_records(records: &[BackupRecord], policy: &Policy) -> Verdict {
    let mut sets = BTreeMap::<Option<VmId>, Vec<Dated>>::new();
    for record in records {
        let dated = Dated { created_at_us: record.created_at_us, id: record.id };
        let vms: BTreeSet<Option<VmId>> = record.vms.iter().map(|vm| Some(vm.id)).collect();
        for vm in if vms.is_empty() { BTreeSet::from([None]) } else { vms } {
            sets.entry(vm).or_default().push(dated);
        }
    }
    let mut all = Verdict::default();
    for set in sets.values() {
        for (id, reasons) in plan(set, policy).keep {
            let kept = all.keep.entry(id).or_default();
            kept.extend(reasons);
            kept.sort_unstable();
            kept.dedup();
        }
    }
    let mut dated: Vec<Dated> =
        records.iter().map(|r| Dated { created_at_us: r.created_at_us, id: r.id }).collect();
    dated.sort_unstable();
    dated.dedup();
    all.remove = dated.iter().map(|d| d.id).filter(|id| !all.keep.contains_key(id)).collect();
    all
}

/// Months since year 0 of a day since 1970-01-01 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn month_of(day: u64) -> u64 {
    let z = day + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    // months counted from March of year 0: a month is a period of its own, whatever the first one is called
    (era * 400 + year_of_era) * 12 + month_from_march
}
