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
    let mut dated: Vec<Dated> = records.iter().map(|r| Dated { created_at_us: r.created_at_us, id: r.id }).collect();
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn id(n: usize) -> BackupId {
        BackupId::from_uuid(Uuid::from_u128(n as u128))
    }

    /// Calendar date of a day since 1970, counted day by day.
    fn slow_date(day: u64) -> (u64, u64) {
        let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
        let (mut year, mut month, mut left) = (1970, 1, day);
        loop {
            let days = match month {
                2 => 28 + u64::from(leap(year)),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            if left < days {
                return (year, month);
            }
            left -= days;
            month += 1;
            if month == 13 {
                (year, month) = (year + 1, 1);
            }
        }
    }

    #[test]
    fn months_begin_and_end_where_the_calendar_says() {
        let mut previous = month_of(0);
        for day in 1..80 * 366 {
            let changes = slow_date(day) != slow_date(day - 1);
            let now = month_of(day);
            assert_eq!(now, previous + u64::from(changes), "day {day}");
            previous = now;
        }
    }

    #[test]
    fn weeks_begin_on_monday() {
        // 2026-11-22 is a Sunday, the next day a Monday
        let sunday = 1_795_305_600_000_000 / DAY_US;
        let week = |day: u64| (day + 3) / 7;
        assert_eq!(week(sunday), week(sunday - 6));
        assert_eq!(week(sunday + 1), week(sunday) + 1);
    }

    /// The slow oracle: each rule asked of each backup, by counting.
    fn oracle(all: &[Dated], policy: &Policy) -> BTreeSet<BackupId> {
        type Key = fn(u64) -> (u64, u64);
        let rules: [(u32, Key); 4] = [
            (policy.hourly, |t| (t / HOUR_US, 0)),
            (policy.daily, |t| (t / DAY_US, 0)),
            (policy.weekly, |t| ((t / DAY_US + 3) / 7, 0)),
            (policy.monthly, |t| slow_date(t / DAY_US)),
        ];
        let mut kept = BTreeSet::new();
        for one in all {
            let newer = all.iter().filter(|other| *other > one);
            let rank = newer.clone().count();
            let mut keep = rank == 0 || rank < policy.last as usize;
            for (count, key) in rules {
                let mine = key(one.created_at_us);
                let newest_of_mine = newer.clone().all(|o| key(o.created_at_us) != mine);
                let later: BTreeSet<_> = newer.clone().map(|o| key(o.created_at_us)).collect();
                keep |= newest_of_mine && later.len() < count as usize;
            }
            if keep {
                kept.insert(one.id);
            }
        }
        kept
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn the_planner_agrees_with_the_slow_oracle(
            hours in proptest::collection::vec(400_000u64..420_000, 0..60),
            minutes in 0u64..60,
            last in 0u32..5, hourly in 0u32..5, daily in 0u32..8, weekly in 0u32..5, monthly in 0u32..5,
        ) {
            let all: Vec<Dated> = hours
                .iter()
                .enumerate()
                .map(|(n, h)| Dated { created_at_us: h * HOUR_US + minutes * 60_000_000 + n as u64 % 2, id: id(n) })
                .collect();
            let policy = Policy { last, hourly, daily, weekly, monthly };
            let verdict = plan(&all, &policy);
            let kept: BTreeSet<BackupId> = verdict.keep.keys().copied().collect();
            prop_assert_eq!(&kept, &oracle(&all, &policy));
            let removed: BTreeSet<BackupId> = verdict.remove.iter().copied().collect();
            prop_assert_eq!(removed.len() + kept.len(), all.len());
            prop_assert!(removed.is_disjoint(&kept));
            // what is kept today is kept when asked again over what is left
            let left: Vec<Dated> = all.iter().filter(|b| kept.contains(&b.id)).copied().collect();
            prop_assert!(plan(&left, &policy).remove.is_empty());
        }
    }
}
