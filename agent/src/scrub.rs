//! Looks for damage in the store's memory, a little all the time, and has it mended. And gives memory back to the machine
//! that is free in parts of huge pages, at most [`GIVEN_BACK`] times 4 MiB each turn.
//!
//! Thread `agent-scrub`, of the lowest priority, until `stop`. Four times a second it hashes as many blocks as the rate
//! allows; what was not used for a second is not made up for. A block that is not what was stored is marked by the store
//! (whoever reads it gets an error, no wrong bytes) and looked for by [`repair`](crate::repair). One that nobody has is
//! looked for again, after 10 s and ever more rarely, for as long as somebody refers to it.
//!
//! Each finding is told once: event `block-repaired` or `block-damaged`. With very many that nobody has, only how many more
//! there are is told, when that has changed.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use muster_common::{ByteLen, VolumeId};
use muster_idl::v1::Severity;
use muster_store::{Damage, Place, Store};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    host::Host,
    inventory::Entry,
    repair::{Search, Source},
    voice::About,
};

const BLOCK: u64 = 4096;
const TURN: Duration = Duration::from_millis(250);
const GIVEN_BACK: u32 = 16;
/// Blocks hashed between two looks at `stop`: about a millisecond.
const PIECE: u64 = 256;
/// No two passes begin within this time: looking through the counts of a store that is empty costs, too.
const PASS: Duration = Duration::from_secs(2);
/// How long a pass may take when nobody says otherwise.
const DAY: u64 = 86_400;
/// Below this a day's pass is sooner over, and nobody notices it.
const SLOWEST: u64 = 256 << 10;
/// 2.6 TiB a day. Less than 1 % of a core: it hashes above 10 GiB/s.
const FASTEST: u64 = 32 << 20;
/// The rate follows what is in the store this often.
const RATED_FOR: Duration = Duration::from_secs(60);
const FIRST_RETRY: Duration = Duration::from_secs(10);
const LONGEST_RETRY: Duration = Duration::from_secs(600);
/// Damaged blocks that are known one by one and looked for again. With more, the machine's memory is the trouble: the others
/// are looked for when a pass comes by, and only counted.
const MOST_KNOWN: usize = 1000;
/// Places that an event names.
const NAMED: usize = 3;

/// What was looked at since the start.
#[derive(Debug, Default)]
pub struct Counters {
    blocks: AtomicU64,
    passes: AtomicU64,
    /// When the last pass ended; 0: none has.
    last_pass_us: AtomicU64,
    damaged: AtomicU64,
    repaired: AtomicU64,
    /// Damaged, told, and not repaired when they were looked for last.
    known: Mutex<Vec<Damage>>,
}

/// For `muster-agent status` and the topic of the store's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Blocks hashed.
    pub blocks: u64,
    /// Times the whole store was looked through.
    pub passes: u64,
    /// When the last time ended, in microseconds since 1970; 0: none has.
    pub last_pass_at_us: u64,
    /// Blocks found damaged.
    pub damaged: u64,
    /// Those of them that were repaired.
    pub repaired: u64,
}

impl Counters {
    pub fn counts(&self) -> Counts {
        Counts {
            blocks: self.blocks.load(Relaxed),
            passes: self.passes.load(Relaxed),
            last_pass_at_us: self.last_pass_us.load(Relaxed),
            damaged: self.damaged.load(Relaxed),
            repaired: self.repaired.load(Relaxed),
        }
    }

    /// Where in these volumes reading is an I/O error now, as far as the scrub knows: volume and byte offset.
    pub fn unreadable(&self, store: &Store, volumes: &[VolumeId]) -> Vec<(VolumeId, u64)> {
        let known = self.known.lock();
        let places = known.iter().filter(|damage| store.is_still_damaged(damage)).flat_map(|damage| &damage.places);
        let in_them = places.filter_map(|place| match place {
            Place::Volume(volume, offset) => volumes.contains(volume).then_some((*volume, *offset)),
            Place::Image(..) | Place::Snapshot(..) => None,
        });
        in_them.collect()
    }
}

/// Bytes a second: as configured, or so that all of what is there is looked at once a day.
fn rate(configured: Option<ByteLen>, there: ByteLen) -> u64 {
    configured.map_or_else(|| (there.bytes() / DAY).clamp(SLOWEST, FASTEST), ByteLen::bytes)
}

/// How many blocks may be hashed now. Decides without a clock.
#[derive(Debug, Default)]
struct Pace {
    /// Nanoseconds times bytes a second that have not made a block yet.
    rest: u128,
}

impl Pace {
    fn due(&mut self, elapsed: Duration, rate: u64) -> u64 {
        const A_BLOCK: u128 = BLOCK as u128 * 1_000_000_000;
        self.rest += elapsed.min(Duration::from_secs(1)).as_nanos() * u128::from(rate);
        let blocks = self.rest / A_BLOCK;
        self.rest %= A_BLOCK;
        u64::try_from(blocks).unwrap_or(u64::MAX)
    }
}

/// When to look again for the blocks that nobody had.
#[derive(Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

impl Retry {
    fn begin(&mut self, now: Instant) {
        *self = Self { at: now + FIRST_RETRY, pause: FIRST_RETRY };
    }

    fn is_due(&mut self, now: Instant) -> bool {
        if now < self.at {
            return false;
        }
        self.pause = (self.pause * 2).min(LONGEST_RETRY);
        self.at = now + self.pause;
        true
    }
}

/// Damaged blocks that nobody has, beyond the known ones. Each pass finds them anew; which they are is not kept.
#[derive(Debug, Default)]
struct Beyond {
    /// As many were told of and counted.
    told: u64,
    /// Found by the pass so far.
    found: u64,
}

impl Beyond {
    /// More were found. Returns what is to be told: at once when there were none before, for a pass can take a day.
    fn add(&mut self, blocks: u64) -> Option<Change> {
        self.found += blocks;
        if self.told == 0 { self.change() } else { None }
    }

    /// As many have become known or were repaired. Returns how many of them were not counted before.
    fn leave(&mut self, blocks: u64) -> u64 {
        let counted = blocks.min(self.told);
        self.told -= counted;
        blocks - counted
    }

    /// Returns what is to be told.
    fn pass_is_over(&mut self) -> Option<Change> {
        let change = self.change();
        self.found = 0;
        change
    }

    fn change(&mut self) -> Option<Change> {
        let from = std::mem::replace(&mut self.told, self.found);
        (from != self.found).then_some(Change { from, to: self.found })
    }
}

/// There are other numbers of such blocks than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    from: u64,
    to: u64,
}

/// The thread.
pub fn run(host: &Host, runtime: &Handle, stop: &CancellationToken) {
    // on Linux this is the thread's, not the process's
    if let Err(e) = rustix::process::nice(19) {
        tracing::debug!(err = %e, "the scrub keeps its priority");
    }
    let now = Instant::now();
    let mut scrub = Scrub {
        host,
        runtime,
        stop,
        from: 0,
        pace: Pace::default(),
        rate: (0, None),
        next_pass: now,
        beyond: Beyond::default(),
        retry: Retry { at: now, pause: FIRST_RETRY },
    };
    let mut last = now;
    while !stop.is_cancelled() {
        std::thread::park_timeout(TURN);
        let now = Instant::now();
        scrub.turn(now, now - last);
        scrub.look_again(now);
        give_back(&host.volumes.store, stop);
        last = now;
    }
}

fn give_back(store: &Store, stop: &CancellationToken) {
    for _ in 0..GIVEN_BACK {
        if stop.is_cancelled() || store.give_back() == ByteLen::ZERO {
            break;
        }
    }
}

struct Scrub<'a> {
    host: &'a Host,
    runtime: &'a Handle,
    stop: &'a CancellationToken,
    /// The next frame; 0: a new pass.
    from: u32,
    pace: Pace,
    /// Bytes a second, and until when.
    rate: (u64, Option<Instant>),
    next_pass: Instant,
    beyond: Beyond,
    retry: Retry,
}

impl Scrub<'_> {
    fn turn(&mut self, now: Instant, elapsed: Duration) {
        let store = &self.host.volumes.store;
        if self.rate.1.is_none_or(|until| now >= until) {
            self.rate = (rate(self.host.config.scrub.rate, store.stats().used_bytes), Some(now + RATED_FOR));
        }
        let mut due = self.pace.due(elapsed, self.rate.0);
        if self.from == 0 {
            if now < self.next_pass {
                return;
            }
            self.next_pass = now + PASS;
        }
        let counters = &self.host.scrub;
        while due > 0 && !self.stop.is_cancelled() {
            let step = store.scrub(self.from, due.min(PIECE), &mut |_| None);
            due = due.saturating_sub(step.blocks.max(1));
            self.from = step.next;
            counters.blocks.fetch_add(step.blocks, Relaxed);
            self.take_up(now, step.damage);
            if self.from == 0 {
                counters.last_pass_us.store(self.host.now_us(), Relaxed);
                let passes = counters.passes.fetch_add(1, Relaxed) + 1;
                tracing::debug!(passes, damaged = store.stats().damaged_blocks, "looked through the whole store");
                let change = self.beyond.pass_is_over();
                self.tell_beyond(change);
                return;
            }
        }
    }

    /// What a step found.
    fn take_up(&mut self, now: Instant, found: Vec<Damage>) {
        if found.is_empty() {
            return;
        }
        let new: Vec<Damage> = {
            let known = self.host.scrub.known.lock();
            found.into_iter().filter(|damage| known.iter().all(|old| old.frame() != damage.frame())).collect()
        };
        if new.is_empty() {
            return;
        }
        let found = new.len();
        let mut missing = self.look_for(new);
        let beyond = {
            let known = self.host.scrub.known.lock();
            missing.len().saturating_sub(MOST_KNOWN.saturating_sub(known.len()))
        };
        missing.truncate(missing.len() - beyond);
        let counted = self.beyond.leave((found - beyond) as u64);
        self.host.scrub.damaged.fetch_add(counted, Relaxed);
        if !missing.is_empty() {
            self.tell(&missing, None);
            let mut known = self.host.scrub.known.lock();
            if known.is_empty() {
                self.retry.begin(now);
            }
            known.append(&mut missing);
        }
        let change = self.beyond.add(beyond as u64);
        self.tell_beyond(change);
    }

    /// The ones nobody had, when it is time.
    fn look_again(&mut self, now: Instant) {
        if self.host.scrub.known.lock().is_empty() || !self.retry.is_due(now) {
            return;
        }
        let store = &self.host.volumes.store;
        // others may ask for them while they are looked for, which takes its time
        let mut known = self.host.scrub.known.lock().clone();
        known.retain(|damage| store.is_still_damaged(damage));
        let missing = self.look_for(known);
        *self.host.scrub.known.lock() = missing;
    }

    /// Looks for each, tells of those that were found, and returns the others.
    fn look_for(&self, damaged: Vec<Damage>) -> Vec<Damage> {
        let mut search = Search::new(self.host, self.runtime, self.stop);
        let (mut missing, mut repaired) = (Vec::new(), [(Source::Repository, vec![]), (Source::Backup, vec![])]);
        for damage in damaged {
            match search.repair(&damage) {
                None => missing.push(damage),
                Some(source) => repaired.iter_mut().filter(|(of, _)| *of == source).for_each(|(_, list)| {
                    list.push(damage.clone());
                }),
            }
        }
        for (source, list) in repaired.iter().filter(|(_, list)| !list.is_empty()) {
            self.host.scrub.repaired.fetch_add(list.len() as u64, Relaxed);
            self.tell(list, Some(*source));
        }
        missing
    }

    /// One event for all that were found together: a bad memory module is one trouble.
    fn tell(&self, damaged: &[Damage], repaired: Option<Source>) {
        let entries = self.host.inventory.all();
        let blocks = match damaged.len() {
            1 => "a block of 4 KiB".to_string(),
            n => format!("{n} blocks of 4 KiB"),
        };
        let places: Vec<Place> = damaged.iter().flat_map(|damage| damage.places.iter().copied()).collect();
        let places_text = self.places(&places, &entries);
        let about = About { vm: only_vm(&places, &entries), ..About::default() };
        let (severity, kind, text) = match repaired {
            Some(source) => {
                let text = format!(
                    "{blocks} changed in memory and was repaired from {source}: {places_text}. Should this happen again, \
                     test the machine's memory"
                );
                (Severity::Warning, "block-repaired", text)
            }
            None => {
                let text = format!(
                    "{blocks} changed in memory and neither the image repository nor a backup of this host has what was \
                     there: reading it is an I/O error until it is overwritten or found: {places_text}. Restore a backup, \
                     or reset the session"
                );
                (Severity::Error, "block-damaged", text)
            }
        };
        tracing::warn!(kind, blocks = damaged.len(), places = places_text, "the scrub found damage in memory");
        self.host.voice.event(severity, kind, text, about);
    }

    /// Only how many: their places would fill the log.
    fn tell_beyond(&self, change: Option<Change>) {
        let Some(Change { from, to }) = change else { return };
        self.host.scrub.damaged.fetch_add(to.saturating_sub(from), Relaxed);
        if to == 0 {
            tracing::info!("all damage in memory that nobody can repair is known by its places again");
            return;
        }
        tracing::warn!(kind = "block-damaged", blocks = to, "more damage in memory than is told by its places");
        let text = format!(
            "besides the {MOST_KNOWN} blocks told of before, {to} more of 4 KiB changed in memory and neither the image \
             repository nor a backup of this host has what was there. Test the machine's memory"
        );
        self.host.voice.event(Severity::Error, "block-damaged", text, About::default());
    }

    fn places(&self, places: &[Place], entries: &[Entry]) -> String {
        let store = &self.host.volumes.store;
        let of_volume = |id: VolumeId| match disk_of(entries, id) {
            Some((entry, target)) => format!("disk {target} of VM {:?}", entry.record.name),
            None => format!("volume {id}"),
        };
        let named = places.iter().take(NAMED).map(|place| match place {
            Place::Image(digest, offset) => {
                let name = store.image(digest).map(|image| image.name().to_string()).unwrap_or_default();
                format!("image {name:?} ({}) at byte {offset}", digest.short())
            }
            Place::Volume(id, offset) => format!("{} at byte {offset}", of_volume(*id)),
            Place::Snapshot(id, offset) => match store.snapshots().into_iter().find(|kept| kept.id == *id) {
                Some(kept) => format!("snapshot {:?} of {} at byte {offset}", kept.label, of_volume(kept.volume)),
                None => format!("snapshot {id} at byte {offset}"),
            },
        });
        let mut text = named.collect::<Vec<_>>().join(", ");
        if text.is_empty() {
            text = "of what is only being read or brought in".into();
        }
        match places.len().saturating_sub(NAMED) {
            0 => text,
            more => format!("{text}, and {more} more places"),
        }
    }
}

fn disk_of(entries: &[Entry], volume: VolumeId) -> Option<(&Entry, &str)> {
    entries.iter().find_map(|entry| {
        let disk = entry.record.disks.iter().find(|disk| disk.volume == volume)?;
        Some((entry, disk.target.as_str()))
    })
}

/// The VM whose disks have the block, when it is only one's; else empty: then it is the host's affair.
fn only_vm(places: &[Place], entries: &[Entry]) -> String {
    let mut vms = places.iter().filter_map(|place| match place {
        Place::Volume(id, _) => disk_of(entries, *id).map(|(entry, _)| entry.record.vm),
        Place::Image(..) | Place::Snapshot(..) => None,
    });
    match vms.next() {
        Some(first) if vms.all(|vm| vm == first) => first.to_string(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_lost_time_is_not_made_up_for() {
        let mut pace = Pace::default();
        let blocks: u64 = (0..1000).map(|_| pace.due(Duration::from_millis(10), 1_000_000)).sum();
        assert_eq!(blocks, 10_000_000 / 4096);
        assert_eq!(pace.due(Duration::from_secs(3600), 4096 * 100), 100);
        assert_eq!(Pace::default().due(Duration::from_secs(1), u64::MAX), u64::MAX / 4096);
    }

    #[test]
    fn unless_told_otherwise_everything_is_looked_at_once_a_day() {
        assert_eq!(rate(None, ByteLen::gib(64)), (64 << 30) / DAY);
        assert_eq!(rate(None, ByteLen::ZERO), SLOWEST);
        assert_eq!(rate(None, ByteLen::gib(1 << 20)), FASTEST);
        assert_eq!(rate(Some(ByteLen::mib(1)), ByteLen::gib(64)), 1 << 20);
    }

    #[test]
    fn damage_beyond_the_known_is_told_as_a_number_when_it_changes() {
        let change = |from, to| Some(Change { from, to });
        let mut beyond = Beyond::default();
        assert_eq!((beyond.add(0), beyond.pass_is_over()), (None, None));
        assert_eq!(beyond.add(24), change(0, 24), "a pass can take a day");
        assert_eq!((beyond.add(256), beyond.pass_is_over()), (None, change(24, 280)));
        for _ in 0..3 {
            assert_eq!((beyond.add(100), beyond.add(180), beyond.pass_is_over()), (None, None, None));
        }
        // overwritten
        assert_eq!((beyond.add(200), beyond.pass_is_over()), (None, change(280, 200)));
        // there was room among the known for 50, which were counted
        assert_eq!(beyond.leave(50), 0);
        assert_eq!((beyond.add(150), beyond.pass_is_over()), (None, None));
        // for the others and 10 new ones
        assert_eq!(beyond.leave(160), 10);
        assert_eq!((beyond.add(0), beyond.pass_is_over()), (None, None));
        assert_eq!(beyond.add(1), change(0, 1));
        assert_eq!((beyond.pass_is_over(), beyond.pass_is_over()), (None, change(1, 0)));
    }

    #[test]
    fn what_nobody_had_is_looked_for_again_ever_more_rarely() {
        let start = Instant::now();
        let mut retry = Retry { at: start, pause: FIRST_RETRY };
        retry.begin(start);
        let due: Vec<u64> = (0..7200).filter(|s| retry.is_due(start + Duration::from_secs(*s))).collect();
        assert_eq!(due[..7], [10, 30, 70, 150, 310, 630, 1230]);
        assert_eq!(due[7], 1830);
    }
}
