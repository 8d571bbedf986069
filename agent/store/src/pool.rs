//! Which frames and nodes are free, and what the machine has lent us.
//!
//! A [`Pool`] deals out numbers 1, 2, 3, ... (0 always means "none"). Numbers given back are dealt again first, the ones
//! whose memory is still ours before the ones whose memory went back to the machine, before new ones. Each thread slot
//! has a small cache, so that most calls touch no shared line. Memory is taken and given back in granules: the numbers
//! that share one page of the machine. A [`Budget`] is charged for a granule when it is taken and credited when it goes
//! back; what a freed number still occupies stays charged, because the machine does not have it. Where the free numbers are
//! strewn among used ones no granule is free: [`Pool::cut`] gives their memory back number by number, where that can be done.
//!
//! Which numbers are free is known in this process only: [`Pool::adopt`] finds it out again from who is referred to. What
//! cannot be found out lies in [`Words`] that may outlive the process: how far numbers were dealt (word 0), and a bit for
//! each granule whose memory is ours (from word [`BITS_AT`] on), set before it is touched and cleared after it went back.
//!
//! Lock order: cache, then central. `purging` is taken before both, by one purge or cut at a time.

use std::ops::Range;

use crate::{
    arena::Words,
    sync::{
        Mutex, Padded, SLOTS,
        atomic::{AtomicU64, Ordering::Relaxed},
        slot,
    },
};

/// Numbers moved between a cache and the central list at once: large enough that the central lock is rare, small enough
/// that what sits in caches is nothing (16 slots x 64 frames = 4 MiB). (Few where schedules are tried out.)
const BATCH: usize = if cfg!(feature = "shuttle") { 2 } else { 32 };

/// Strewn numbers that are searched for neighbours at once.
const SORTED: usize = 4096;

/// Where the bits begin: on a cache line of their own.
const BITS_AT: usize = 16;

/// Bytes the machine has lent us against the most it may.
pub(crate) struct Budget {
    limit: AtomicU64,
    charged: AtomicU64,
}

impl Budget {
    pub(crate) const fn new(limit: u64) -> Self {
        Self { limit: AtomicU64::new(limit), charged: AtomicU64::new(0) }
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit.load(Relaxed)
    }

    pub(crate) fn charged(&self) -> u64 {
        self.charged.load(Relaxed)
    }

    /// Takes `bytes` when they fit.
    #[must_use]
    pub(crate) fn charge(&self, bytes: u64) -> bool {
        self.charged
            .fetch_update(Relaxed, Relaxed, |charged| charged.checked_add(bytes).filter(|sum| *sum <= self.limit()))
            .is_ok()
    }

    /// Takes `bytes` that are taken already, whether they fit or not.
    pub(crate) fn charge_anyway(&self, bytes: u64) {
        self.charged.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn credit(&self, bytes: u64) {
        let before = self.charged.fetch_sub(bytes, Relaxed);
        debug_assert!(before >= bytes, "credited {bytes} of {before}");
    }
}

/// What one number stands for.
#[derive(Clone, Copy)]
pub(crate) struct Unit {
    /// Bytes that go back to the machine when its granule is free.
    pub(crate) bytes: u64,
    /// Bytes beside it (reference count, tag) that stay once touched.
    pub(crate) beside: u64,
    /// Numbers that share a page of the machine. A power of two.
    pub(crate) granule: u32,
    /// More free numbers than this, and the rest goes back to the machine.
    pub(crate) keep: usize,
}

pub(crate) struct Pool {
    unit: Unit,
    /// The highest number.
    capacity: u32,
    caches: [Padded<Mutex<Vec<u32>>>; SLOTS],
    central: Mutex<Central>,
    purging: Mutex<()>,
    lent: Words,
}

struct Central {
    /// Free, and their memory is ours.
    kept: Vec<u32>,
    /// First numbers of granules that are free and whose memory went back.
    returned: Vec<u32>,
    /// Free without memory, in granules whose other memory is ours, or may be: never used, the last ones are neighbours.
    hollow: Vec<u32>,
    /// The same, used before and one by one.
    strewn: Vec<u32>,
    /// Some of those, in order, the lowest last.
    sorted: Vec<u32>,
    /// So many of all three are for [`Pool::take_hollow`] only.
    spare: usize,
    /// Never dealt yet.
    next: u32,
    /// Purge when `kept` is longer.
    purge_above: usize,
}

/// How the numbers of a pool are spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolStats {
    pub(crate) used: u64,
    /// Free, memory still ours.
    pub(crate) kept: u64,
    /// Charged for `Unit::bytes` of these.
    pub(crate) resident: u64,
    /// No number at or above this was ever dealt.
    pub(crate) next: u32,
}

impl Central {
    /// Free numbers without memory, but for those of `returned`.
    fn hollow(&self) -> usize {
        self.hollow.len() + self.strewn.len() + self.sorted.len()
    }

    fn sort_some(&mut self) -> bool {
        if self.sorted.is_empty() {
            let rest = self.strewn.len().saturating_sub(SORTED);
            self.sorted = self.strewn.split_off(rest);
            self.sorted.sort_unstable_by_key(|number| std::cmp::Reverse(*number));
        }
        !self.sorted.is_empty()
    }
}

impl Pool {
    /// `lent` has [`Pool::words`] words, all zero or what an earlier process left; then [`Pool::adopt`] comes next.
    pub(crate) fn new(capacity: u32, unit: Unit, lent: Words) -> Self {
        let central = Central {
            kept: Vec::new(),
            returned: Vec::new(),
            hollow: Vec::new(),
            strewn: Vec::new(),
            sorted: Vec::new(),
            spare: 0,
            next: 1,
            purge_above: unit.keep,
        };
        Self { unit, capacity, caches: Default::default(), central: Mutex::new(central), purging: Mutex::new(()), lent }
    }

    /// Words that a pool needs.
    pub(crate) fn words(capacity: u32, granule: u32) -> usize {
        BITS_AT + (capacity as usize / granule as usize + 1).div_ceil(32)
    }

    /// Notes whether the memory of these numbers, whole granules but for the first and last, is ours.
    fn set_lent(&self, numbers: Range<u32>, lent: bool) {
        let words = self.lent.all();
        for granule in numbers.start / self.unit.granule..numbers.end.div_ceil(self.unit.granule) {
            let (word, bit) = (&words[BITS_AT + granule as usize / 32], 1 << (granule % 32));
            if lent {
                word.fetch_or(bit, Relaxed)
            } else {
                word.fetch_and(!bit, Relaxed)
            };
        }
    }

    fn is_lent(&self, granule: u32) -> bool {
        self.lent.all()[BITS_AT + granule as usize / 32].load(Relaxed) >> (granule % 32) & 1 == 1
    }

    /// No number from this on was dealt by the process before.
    pub(crate) fn dealt_before(&self) -> u32 {
        self.lent.all()[0].load(Relaxed).clamp(1, self.capacity + 1)
    }

    /// Takes over what an earlier process left, before anything else is done here. All numbers `used` says yes to are used,
    /// the others are free. What that takes from the machine is charged, whether the budget holds it or not, for used ones even
    /// where `without` says that they have no memory. How many others were said not to be ours: damage.
    pub(crate) fn adopt(&self, used: impl Fn(u32) -> bool, without: impl Fn(u32) -> bool, budget: &Budget) -> usize {
        let Unit { bytes, beside, granule, .. } = self.unit;
        let mut central = self.central.lock();
        let next = self.dealt_before();
        let (mut numbers, mut wrong) = (0, 0);
        for n in (0..next.div_ceil(granule)).rev() {
            let range = (n * granule).max(1)..((n + 1) * granule).min(next);
            let whole = range.len() == granule as usize;
            if !self.is_lent(n) {
                let in_use = range.clone().filter(|&number| used(number)).count();
                if in_use == 0 && whole {
                    central.returned.push(range.start);
                    continue;
                }
                let with_memory = range.clone().filter(|&number| used(number) && !without(number)).count();
                wrong += with_memory;
                self.set_lent(range.clone(), granule > 1 || with_memory > 0);
            }
            numbers += range.len() as u64;
            central.kept.extend(range.rev().filter(|&number| !used(number)));
        }
        central.next = next;
        central.purge_above = self.unit.keep.max(central.kept.len() / 4 * 5);
        budget.charge_anyway(numbers * bytes + u64::from(next - 1) * beside);
        wrong
    }

    /// A free number, now the caller's; `None` when there is none or the budget does not hold more.
    pub(crate) fn take(&self, budget: &Budget) -> Option<u32> {
        {
            let mut cache = self.caches[slot()].0.lock();
            if cache.is_empty() {
                self.refill(&mut cache, budget);
            }
            if let Some(number) = cache.pop() {
                return Some(number);
            }
        }
        // the last free ones may sit in other threads' caches
        self.caches.iter().find_map(|cache| cache.0.lock().pop())
    }

    fn refill(&self, cache: &mut Vec<u32>, budget: &Budget) {
        let mut central = self.central.lock();
        if central.kept.is_empty() {
            while central.kept.len() < BATCH / 2 && self.grow(&mut central, budget) {}
        }
        let from = central.kept.len().saturating_sub(BATCH);
        cache.extend(central.kept.drain(from..));
    }

    /// Takes more memory from the machine. The lowest number ends last in `kept`, so that it is dealt first.
    fn grow(&self, central: &mut Central, budget: &Budget) -> bool {
        let Unit { bytes, beside, granule, .. } = self.unit;
        if central.hollow() > central.spare {
            if !budget.charge(bytes) {
                return false;
            }
            let number = central.strewn.pop().or_else(|| central.sorted.pop()).or_else(|| central.hollow.pop());
            self.lend(number.unwrap_or_default());
            central.kept.extend(number);
            return true;
        }
        if let Some(&first) = central.returned.last() {
            if !budget.charge(u64::from(granule) * bytes) {
                return false;
            }
            central.returned.pop();
            self.set_lent(first..first + granule, true);
            central.kept.extend((first..first + granule).rev());
            return true;
        }
        let dealt = self.deal(central, |count| budget.charge(count * (bytes + beside)));
        self.set_lent(dealt.clone(), true);
        central.kept.extend(dealt.clone().rev());
        !dealt.is_empty()
    }

    /// Notes that a number that had no memory is about to have some.
    pub(crate) fn lend(&self, number: u32) {
        self.set_lent(number..number + 1, true);
    }

    /// Notes that these numbers are free without memory, or go to somebody who has none for them. With larger granules nobody
    /// can tell such numbers from their neighbours.
    fn set_hollow(&self, numbers: Range<u32>) {
        self.set_lent(numbers, self.unit.granule > 1);
    }

    /// Numbers never dealt before, to the end of a granule or of more; none when `charge` for so many says no.
    fn deal(&self, central: &mut Central, charge: impl Fn(u64) -> bool) -> Range<u32> {
        let granule = self.unit.granule;
        for step in [granule.max(BATCH as u32), granule] {
            let end = (u64::from(central.next / step + 1) * u64::from(step)).min(u64::from(self.capacity) + 1) as u32;
            let dealt = central.next..end;
            if !dealt.is_empty() && charge(dealt.len() as u64) {
                self.lent.all()[0].store(end, Relaxed);
                central.next = end;
                return dealt;
            }
        }
        0..0
    }

    /// From now on keeps so many numbers without memory for [`Pool::take_hollow`], so that there are some when the budget is
    /// spent. What is beside them is charged, whether the budget holds it or not.
    pub(crate) fn set_spare(&self, spare: usize, budget: &Budget, one_by_one: impl Fn(Range<u32>)) {
        let mut central = self.central.lock();
        central.spare = spare;
        let charge = |bytes| {
            budget.charge_anyway(bytes);
            true
        };
        self.fill_spare(&mut central, charge, &one_by_one);
    }

    /// Whether as many numbers without memory are there as are to be kept, neighbours as far as there are some; perhaps after
    /// charging for what is beside new ones. `one_by_one` is called with numbers that will have memory without their neighbours.
    pub(crate) fn has_spare(&self, budget: &Budget, one_by_one: impl Fn(Range<u32>)) -> bool {
        self.fill_spare(&mut self.central.lock(), |bytes| budget.charge(bytes), &one_by_one)
    }

    fn fill_spare(
        &self,
        central: &mut Central,
        charge: impl Fn(u64) -> bool,
        one_by_one: &impl Fn(Range<u32>),
    ) -> bool {
        while central.hollow.len() < central.spare {
            if central.next > self.capacity {
                // what there is has to do
                if central.hollow() >= central.spare || !self.hollow_out(central, one_by_one) {
                    return true;
                }
            } else if !self.deal_hollow(central, &charge, one_by_one) {
                return false;
            }
        }
        true
    }

    fn deal_hollow(
        &self,
        central: &mut Central,
        charge: impl Fn(u64) -> bool,
        one_by_one: &impl Fn(Range<u32>),
    ) -> bool {
        let dealt = self.deal(central, |count| charge(count * self.unit.beside));
        one_by_one(dealt.clone());
        self.set_hollow(dealt.clone());
        // neighbours of those that are left stay so
        central.hollow.splice(0..0, dealt.clone().rev());
        !dealt.is_empty()
    }

    /// A granule that is free and has no memory, as numbers of it.
    fn hollow_out(&self, central: &mut Central, one_by_one: &impl Fn(Range<u32>)) -> bool {
        let Some(first) = central.returned.pop() else { return false };
        let numbers = first..first + self.unit.granule;
        one_by_one(numbers.clone());
        self.set_hollow(numbers.clone());
        central.hollow.splice(0..0, numbers.rev());
        true
    }

    /// Up to `count` free numbers without memory, ascending and neighbours as far as possible, now the caller's: new ones or, when
    /// `again`, such as were used before. Nothing is charged for memory that he takes to them; see [`Pool::lend`].
    pub(crate) fn take_hollow(
        &self,
        count: usize,
        again: bool,
        budget: &Budget,
        one_by_one: impl Fn(Range<u32>),
    ) -> Vec<u32> {
        let mut central = self.central.lock();
        let mut taken = Vec::with_capacity(count);
        let move_some = |from: &mut Vec<u32>, taken: &mut Vec<u32>| {
            let most = from.len().saturating_sub(count - taken.len());
            taken.extend(from.drain(most..));
        };
        while again && taken.len() < count && central.sort_some() {
            move_some(&mut central.sorted, &mut taken);
        }
        while taken.len() < count {
            let wanted = count - taken.len();
            while central.hollow.len() < wanted
                && (self.deal_hollow(&mut central, |bytes| budget.charge(bytes), &one_by_one)
                    || self.hollow_out(&mut central, &one_by_one))
            {}
            if !central.hollow.is_empty() {
                move_some(&mut central.hollow, &mut taken);
            } else if central.sort_some() {
                move_some(&mut central.sorted, &mut taken);
            } else {
                break;
            }
        }
        drop(central);
        taken.sort_unstable();
        taken
    }

    fn cached(&self) -> usize {
        self.caches.iter().map(|cache| cache.0.lock().len()).sum()
    }

    /// Free numbers whose memory is ours.
    pub(crate) fn kept(&self) -> usize {
        self.cached() + self.central.lock().kept.len()
    }

    /// Takes a number back. True when so many are free that [`Pool::purge`] is due.
    #[must_use]
    pub(crate) fn put(&self, number: u32) -> bool {
        let mut cache = self.caches[slot()].0.lock();
        cache.push(number);
        if cache.len() < 2 * BATCH {
            return false;
        }
        let mut central = self.central.lock();
        central.kept.extend(cache.drain(..BATCH));
        central.kept.len() > central.purge_above
    }

    /// Takes a number back that has no memory, perhaps no more.
    pub(crate) fn put_hollow(&self, number: u32) {
        self.set_hollow(number..number + 1);
        self.central.lock().strewn.push(number);
    }

    /// Gives memory of free numbers back to the machine, all but `keep` of them, as far as whole granules are free.
    /// `give_back` is called with runs of numbers nobody else can reach.
    pub(crate) fn purge(&self, keep: usize, budget: &Budget, give_back: impl Fn(Range<u32>)) {
        let _alone = self.purging.lock();
        if keep == 0 {
            self.empty_caches();
        }
        let granule = self.unit.granule;
        // with whether its memory is ours
        let mut free: Vec<(u32, bool)> = {
            let mut central = self.central.lock();
            let spare = central.kept.len().saturating_sub(keep);
            // a granule of which few are kept and the others have no memory is none worth a search: see `cut`
            if spare == 0 || spare < granule as usize {
                return;
            }
            // one by one the oldest go; larger granules are only found among all
            let some = if granule == 1 { spare } else { central.kept.len() };
            let kept = central.kept.drain(..some).map(|number| (number, true)).collect::<Vec<_>>();
            let mut strewn = Vec::new();
            if granule > 1 && !central.strewn.is_empty() {
                let mut is_kept = vec![false; (self.capacity / granule) as usize + 1];
                kept.iter().for_each(|(number, _)| is_kept[(number / granule) as usize] = true);
                strewn.extend(central.strewn.extract_if(.., |number| is_kept[(*number / granule) as usize]));
            }
            kept.into_iter().chain(strewn.into_iter().map(|number| (number, false))).collect()
        };
        free.sort_unstable();
        let (mut whole, mut rest, mut strewn, mut credit) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for group in free.chunk_by(|a, b| a.0 / granule == b.0 / granule) {
            let ours = group.iter().filter(|(_, ours)| *ours);
            if group.len() == granule as usize {
                whole.push(group[0].0);
                credit += ours.count() as u64;
            } else {
                rest.extend(ours.map(|(number, _)| *number));
                strewn.extend(group.iter().filter(|(_, ours)| !ours).map(|(number, _)| *number));
            }
        }
        for run in whole.chunk_by(|a, b| a + granule == *b) {
            let run = run[0]..run[run.len() - 1] + granule;
            give_back(run.clone());
            self.set_lent(run, false);
        }
        budget.credit(credit * self.unit.bytes);
        let mut central = self.central.lock();
        central.returned.append(&mut whole);
        central.strewn.append(&mut strewn);
        rest.reverse();
        central.kept.append(&mut rest);
        // a quarter more before the next search, so that fruitless ones stay rare
        central.purge_above = self.unit.keep.max(central.kept.len() / 4 * 5);
    }

    /// Gives the memory of some free numbers back, as [`Pool::purge`] does.
    pub(crate) fn purge_some(&self, some: usize, budget: &Budget, give_back: impl Fn(Range<u32>)) {
        let kept = || self.central.lock().kept.len();
        if kept() < some {
            self.empty_caches();
        }
        // with nothing to keep it would look in the caches again
        self.purge(kept().saturating_sub(some).max(1), budget, give_back);
    }

    fn empty_caches(&self) {
        for cache in &self.caches {
            let mut cache = cache.0.lock();
            self.central.lock().kept.append(&mut cache);
        }
    }

    /// Gives memory of free numbers back to the machine, also out of granules that are in use otherwise: those with the most
    /// free ones first, until no more than `keep` stay or `most` (or a granule more) went back. How many did. `give_back` is
    /// called with runs of numbers nobody else can reach, and must be able to give back parts of a granule.
    pub(crate) fn cut(&self, keep: usize, most: usize, budget: &Budget, give_back: impl Fn(Range<u32>)) -> usize {
        // who finds nothing free meanwhile waits here, and then finds what this credits
        let _alone = self.purging.lock();
        let granule = self.unit.granule;
        // a copy, so that nobody else waits while it is counted
        let kept = {
            let central = self.central.lock();
            if central.kept.len() <= keep {
                return 0;
            }
            central.kept.clone()
        };
        let wanted = (kept.len() - keep).min(most);
        let mut free = vec![0u32; (self.capacity / granule) as usize + 1];
        kept.iter().for_each(|number| free[(number / granule) as usize] += 1);
        let mut order: Vec<usize> = (0..free.len()).filter(|&granule| free[granule] > 0).collect();
        order.sort_unstable_by_key(|&granule| std::cmp::Reverse(free[granule]));
        let mut chosen = vec![false; free.len()];
        let mut sum = 0;
        for granule in order {
            if sum >= wanted {
                break;
            }
            chosen[granule] = true;
            sum += free[granule] as usize;
        }
        // whoever took some of them meanwhile has them
        let mut cut: Vec<u32> = {
            let mut central = self.central.lock();
            central.kept.extract_if(.., |number| chosen[(*number / granule) as usize]).collect()
        };
        cut.sort_unstable();
        let (mut whole, mut strewn) = (Vec::new(), Vec::new());
        for group in cut.chunk_by(|a, b| a / granule == b / granule) {
            for run in group.chunk_by(|a, b| a + 1 == *b) {
                give_back(run[0]..run[run.len() - 1] + 1);
            }
            if group.len() == granule as usize {
                self.set_lent(group[0]..group[0] + granule, false);
                whole.push(group[0]);
            } else {
                strewn.extend_from_slice(group);
            }
        }
        budget.credit(cut.len() as u64 * self.unit.bytes);
        let mut central = self.central.lock();
        central.returned.append(&mut whole);
        central.strewn.append(&mut strewn);
        cut.len()
    }

    /// Numbers that are taken from the machine together.
    pub(crate) const fn granule(&self) -> u32 {
        self.unit.granule
    }

    /// More free numbers than this are too many.
    pub(crate) const fn keep(&self) -> usize {
        self.unit.keep
    }

    pub(crate) fn stats(&self) -> PoolStats {
        let cached = self.cached();
        let central = self.central.lock();
        let kept = (cached + central.kept.len()) as u64;
        let returned = central.returned.len() as u64 * u64::from(self.unit.granule);
        let hollow = central.hollow();
        let resident = u64::from(central.next - 1).saturating_sub(returned + hollow as u64);
        PoolStats { used: resident.saturating_sub(kept), kept, resident, next: central.next }
    }

    /// Every free number below `PoolStats::next`. For the audit, with the world stopped.
    pub(crate) fn free_numbers(&self) -> Vec<u32> {
        let mut free = Vec::new();
        for cache in &self.caches {
            free.extend_from_slice(&cache.0.lock());
        }
        let central = self.central.lock();
        free.extend_from_slice(&central.kept);
        free.extend_from_slice(&central.hollow);
        free.extend_from_slice(&central.strewn);
        free.extend_from_slice(&central.sorted);
        free.extend(central.returned.iter().flat_map(|&first| first..first + self.unit.granule));
        free
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::RefCell,
        collections::{BTreeSet, HashSet},
    };

    use proptest::prelude::*;

    use super::*;

    fn pool(granule: u32, keep: usize) -> Pool {
        let lent = Words::reserve(Pool::words(1000, granule), None).unwrap();
        Pool::new(1000, Unit { bytes: 100, beside: 10, granule, keep }, lent)
    }

    /// Every number that was dealt is held or free, nothing that is held goes back, and the budget knows what is ours.
    fn check(pool: &Pool, budget: &Budget, held: &BTreeSet<u32>, away: usize) {
        let stats = pool.stats();
        assert_eq!(stats.used, held.len() as u64);
        assert_eq!(budget.charged(), (stats.resident - away as u64) * 100 + u64::from(stats.next - 1) * 10);
        let free: Vec<u32> = pool.free_numbers();
        let all: BTreeSet<u32> = free.iter().chain(held).copied().collect();
        assert_eq!(all.len(), free.len() + held.len(), "free twice, or free and held");
        assert!(all.into_iter().eq(1..stats.next));
    }

    proptest! {
        #[test]
        fn any_use_of_a_pool_equals_a_set(
            granule in prop::sample::select(vec![1u32, 16]),
            keep in 0..100usize,
            limit in 0..1200u64,
            steps in prop::collection::vec((0..10u8, any::<u16>()), 1..200),
        ) {
            let (pool, budget) = (pool(granule, keep), Budget::new(limit * 110));
            let mut held = BTreeSet::new();
            // those of the held ones that nobody was charged for, as frames on the disk
            let mut away = BTreeSet::new();
            pool.set_spare(usize::from(limit % 3 == 0) * 20, &budget, |_| {});
            for (step, n) in steps {
                let give_back = |held: &BTreeSet<u32>, run| {
                    assert!(held.range(run).next().is_none(), "what is held went back");
                };
                let purge = |keep, held: &BTreeSet<u32>| pool.purge(keep, &budget, |run| give_back(held, run));
                match step {
                    0..4 => for _ in 0..n % 100 {
                        let Some(number) = pool.take(&budget) else { break };
                        prop_assert!((1..=1000).contains(&number) && held.insert(number));
                    },
                    4..7 => for _ in 0..n % 100 {
                        let Some(number) = held.iter().nth(usize::from(n) % held.len().max(1)).copied() else { break };
                        held.remove(&number);
                        if away.remove(&number) {
                            pool.put_hollow(number);
                        } else if pool.put(number) {
                            purge(pool.keep() / 2, &held);
                        }
                    },
                    7 => {
                        let taken = pool.take_hollow(usize::from(n) % 70, n % 3 == 0, &budget, |_| {});
                        prop_assert!(taken.is_sorted() && taken.iter().all(|&number| held.insert(number)));
                        away.extend(taken);
                        // perhaps what one that is held pays for is missing
                        let paying = held.iter().find(|number| !away.contains(number)).copied();
                        if !pool.has_spare(&budget, |_| {}) && let Some(number) = paying {
                            held.remove(&number);
                            budget.credit(100);
                            pool.put_hollow(number);
                        }
                    },
                    8 if n % 2 == 0 => purge(usize::from(n) % 50, &held),
                    8 => pool.purge_some(usize::from(n) % 50, &budget, |run| give_back(&held, run)),
                    _ => {
                        let (before, keep) = (pool.stats(), usize::from(n) % 50);
                        let most = usize::from(n / 50 % 50);
                        let cut = pool.cut(keep, most, &budget, |run| give_back(&held, run));
                        prop_assert!(cut <= most + granule as usize);
                        prop_assert_eq!(before.kept - pool.stats().kept, cut as u64);
                    }
                }
                prop_assert!(budget.charged() <= budget.limit().max(320));
                check(&pool, &budget, &held, away.len());
            }
            // whoever comes after finds the same numbers held, and nothing lost
            let Pool { unit, capacity, lent, .. } = pool;
            let (pool, budget) = (Pool::new(capacity, unit, lent), Budget::new(0));
            prop_assert_eq!(pool.adopt(|number| held.contains(&number), |number| away.contains(&number), &budget), 0);
            budget.credit(away.len() as u64 * 100);
            check(&pool, &budget, &held, away.len());
        }
    }

    #[test]
    fn every_number_is_dealt_once_and_in_order() {
        let (pool, budget) = (pool(1, 10_000), Budget::new(u64::MAX));
        let dealt: Vec<u32> = std::iter::from_fn(|| pool.take(&budget)).collect();
        assert_eq!(dealt, (1..=1000).collect::<Vec<_>>());
        assert_eq!(budget.charged(), 1000 * 110);
    }

    #[test]
    fn the_budget_is_never_exceeded_and_used_to_the_last_granule() {
        let (pool, budget) = (pool(1, 10_000), Budget::new(77 * 110 + 5));
        assert_eq!(std::iter::from_fn(|| pool.take(&budget)).count(), 77);
        assert!(budget.charged() <= budget.limit());
    }

    #[test]
    fn freed_numbers_are_dealt_before_new_ones() {
        let (pool, budget) = (pool(1, 10_000), Budget::new(u64::MAX));
        let first: HashSet<u32> = (0..500).map(|_| pool.take(&budget).unwrap()).collect();
        let next = pool.stats().next;
        for &number in &first {
            assert!(!pool.put(number));
        }
        for _ in 0..500 {
            pool.take(&budget).unwrap();
        }
        assert_eq!(pool.stats().next, next);
    }

    #[test]
    fn a_purge_returns_whole_granules_only_and_credits_them() {
        let (pool, budget) = (pool(16, 100), Budget::new(u64::MAX));
        let all: Vec<u32> = (0..512).map(|_| pool.take(&budget).unwrap()).collect();
        let before = budget.charged();
        let mut due = false;
        for &number in all.iter().filter(|&&number| number != 40) {
            due |= pool.put(number);
        }
        assert!(due);
        let returned = RefCell::new(HashSet::new());
        pool.purge(0, &budget, |run| returned.borrow_mut().extend(run));
        let returned = returned.into_inner();
        assert!(!returned.contains(&40) && !returned.contains(&33) && returned.contains(&48));
        assert_eq!(before - budget.charged(), returned.len() as u64 * 100);
        assert_eq!(pool.stats().used, 1);
        // and all of them come again
        let again: HashSet<u32> = (0..511).map(|_| pool.take(&budget).unwrap()).collect();
        assert!(!again.contains(&40));
        assert_eq!(again.len(), 511);
    }

    #[test]
    fn a_cut_returns_the_free_ones_among_used_ones_and_a_granule_of_them_is_whole_again() {
        let (pool, budget) = (pool(16, 100), Budget::new(u64::MAX));
        let all: Vec<u32> = (0..511).map(|_| pool.take(&budget).unwrap()).collect();
        let stays = |number: &u32| number % 16 == 3 || *number < 256 && number.is_multiple_of(2);
        let (stay, go): (Vec<u32>, Vec<u32>) = all.into_iter().partition(stays);
        for &number in &go {
            let _ = pool.put(number);
        }
        // what waits in caches is out of reach of a cut
        pool.purge(0, &budget, |_| panic!("no granule is free"));
        let before = budget.charged();
        assert_eq!(pool.stats().kept, go.len() as u64);
        let returned = RefCell::new(Vec::new());
        let first = pool.cut(0, 16, &budget, |run| returned.borrow_mut().extend(run));
        assert!((16..32).contains(&first) && returned.borrow().len() == first);
        assert!(returned.borrow().iter().all(|number| *number >= 256), "the emptiest go first");
        let second = pool.cut(100, usize::MAX, &budget, |run| returned.borrow_mut().extend(run));
        assert!((84..=100).contains(&pool.stats().kept) && first + second + pool.stats().kept as usize == go.len());
        assert_eq!(before - budget.charged(), (first + second) as u64 * 100);
        let returned = returned.into_inner();
        assert!(returned.iter().all(|number| go.contains(number)) && returned.len() == first + second);
        // nobody uses them any more: as whole as ever
        for &number in &stay {
            let _ = pool.put(number);
        }
        pool.purge(0, &budget, |_| {});
        assert_eq!((pool.stats().used, pool.stats().kept), (0, pool.stats().resident));
        let hollow = pool.central.lock().strewn.len() as u64;
        assert_eq!(hollow + pool.stats().kept, 15, "all but the granule that 0 belongs to");
    }

    #[test]
    fn numbers_without_memory_are_neighbours_while_there_are_new_ones() {
        for granule in [1, 16] {
            let (pool, budget) = (pool(granule, 64), Budget::new(700 * 110));
            pool.set_spare(64, &budget, |_| {});
            while pool.take(&budget).is_some() {}
            while budget.charge(1) {}
            let neighbours = |taken: &[u32]| taken.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count();
            let first = pool.take_hollow(64, false, &budget, |_| {});
            assert_eq!((first.len(), neighbours(&first)), (64, 63), "{granule}");
            // every other one comes back: new ones are dealt before it, as long as they can be paid
            first.iter().step_by(2).for_each(|number| pool.put_hollow(*number));
            assert!(!pool.has_spare(&budget, |_| {}));
            budget.credit(1000);
            assert!(pool.has_spare(&budget, |_| {}));
            let second = pool.take_hollow(64, false, &budget, |_| {});
            assert!(neighbours(&second) >= 62 && second[0] > first[63], "{granule} {second:?}");
            // then all that is left
            let third = pool.take_hollow(1000, true, &budget, |_| {});
            assert!(first.iter().step_by(2).all(|number| third.contains(number)));
        }
    }

    #[test]
    fn what_a_pool_leaves_is_adopted() {
        for granule in [1, 16] {
            let (pool, budget) = (pool(granule, 64), Budget::new(u64::MAX));
            let taken: Vec<u32> = (0..700).map(|_| pool.take(&budget).unwrap()).collect();
            for &number in taken.iter().filter(|&&number| number % 40 > 3) {
                if pool.put(number) {
                    pool.purge(pool.keep() / 2, &budget, |_| {});
                }
            }
            pool.purge(0, &budget, |_| {});
            let Pool { unit, capacity, lent, .. } = pool;
            let (charged, budget) = (budget.charged(), Budget::new(1000));
            let pool = Pool::new(capacity, unit, lent);
            let used = |number: u32| taken.contains(&number) && number % 40 <= 3;
            assert_eq!(pool.adopt(used, |_| false, &budget), 0);
            assert_eq!(budget.charged(), charged, "over the limit, but true");
            let free: HashSet<u32> = pool.free_numbers().into_iter().collect();
            let dealt = pool.stats().next;
            assert!((1..dealt).all(|number| free.contains(&number) != used(number)));
            assert!(pool.stats().resident < u64::from(dealt - 1) || granule == 16);
            assert_eq!(pool.stats().used as usize, taken.iter().filter(|&&number| used(number)).count());
        }
    }

    #[test]
    fn free_and_used_numbers_add_up() {
        let (pool, budget) = (pool(1, 64), Budget::new(u64::MAX));
        let taken: Vec<u32> = (0..300).map(|_| pool.take(&budget).unwrap()).collect();
        for &number in &taken[100..] {
            if pool.put(number) {
                pool.purge(pool.keep() / 2, &budget, |_| {});
            }
        }
        let free: HashSet<u32> = pool.free_numbers().into_iter().collect();
        let stats = pool.stats();
        assert_eq!(stats.used, 100);
        assert_eq!(free.len() as u64 + stats.used, u64::from(stats.next - 1));
        assert!(taken[..100].iter().all(|number| !free.contains(number)));
    }
}
