//! Keeps VMs going whose disks are in trouble that passes, until `stop`:
//!
//! ```text
//!                    a write finds no memory left
//!   running --------------------------------------------> paused for space: event volume-full
//!      ^  \                                                  |
//!      |   \ a disk's server went away (NBD only)            | memory is there again: event volume-space-back
//!      |    v                                                v
//!      +--- paused by an I/O error <------ again ------- resumed
//!                 resumed as soon as its volumes are there, again and again until it stays;
//!                 what is in vain ever more rarely, and said once: event volume-unreadable
//! ```
//!
//! With vhost-user the export holds a write that finds no memory and says so: the VM is paused here, so that everybody sees
//! why it stands still. Over NBD the write fails with "no space" and QEMU pauses the VM by itself. A server that went away
//! (the agent was restarted) only stalls a vhost-user guest; over NBD the VM is paused by the failed request, and goes on
//! with that request when it is resumed. A resume before QEMU has connected again pauses at once, and QEMU takes its time:
//! a thread of its own tries when the first request fails, and then 1, 3, 7, 15, 31 s later and every 16 s (it doubles its
//! sleep up to that; nothing can wake it). What QEMU waited for shows here as a session more, and the VM is resumed then.
//!
//! Over NBD a damaged block that nobody has pauses the guest that reads it, too, and each resume has it read again. When that
//! block is whole again, the VM is resumed at once.
//!
//! A VM that a command paused is never resumed here, nor one whose volumes are lost. What to do is decided by [`decide`],
//! without I/O. Locks: none of its own.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::future::join_all;
use muster_common::{ByteLen, Chain, VmId, VolumeId};
use muster_idl::v1::Severity;
use muster_virt::{DomainState, HypervisorErrorKind, Lane, StateReason};
use tokio_util::sync::CancellationToken;

use crate::{
    host::Host,
    inventory::{Entry, is_lost},
    records::{DiskRecord, PausedBy},
    voice::About,
};

/// Exports are asked this often whether they wait; the hypervisor's events wake the loop earlier.
const LOOK: Duration = Duration::from_millis(250);
/// This much has to be free before a VM that found nothing is let on: with less its next write-back, a few MiB of page
/// cache, would stop it again at once.
pub const ROOM: ByteLen = ByteLen::mib(8);
/// A resumed VM counts as running after this long; until then another error means "not yet".
const SETTLED_US: u64 = 1_000_000;
const FIRST_PAUSE_US: u64 = 20_000;
/// Of a VM that waited for memory.
const LONGEST_PAUSE_US: u64 = 10_000_000;
/// Of one whose disk answers with errors: that a disk connects and that a block is repaired is seen, so this is only for what
/// nobody tells us of.
const LONGEST_PAUSE_OF_ERRORS_US: u64 = 300_000_000;
/// Resumes in vain until it is said: 0.6 s when a damaged block is known, else 82 s, in which a disk's server comes back.
const TOLD_OF_DAMAGE_AFTER: u32 = 5;
const TOLD_OF_ERRORS_AFTER: u32 = 12;
/// Damaged places that an event names.
const NAMED: usize = 3;

/// What is so of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub state: DomainState,
    pub reason: StateReason,
    pub paused_by: Option<PausedBy>,
    /// All its volumes are there.
    pub volumes: bool,
    /// One of its exports holds a write for want of memory.
    pub waiting: bool,
    /// The last I/O error was "no space".
    pub no_space: bool,
    /// There is [`ROOM`] for its disks: those that wait, or all when none is known to.
    pub room: bool,
    /// Connections to its disks.
    pub sessions: usize,
    /// Blocks of its disks that cannot be read; counted while an I/O error has it paused.
    pub damaged: usize,
}

/// What was tried of one VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tried {
    /// When it was resumed last, and how often since it last ran for a while.
    resumed_us: u64,
    times: u32,
    /// Connections to its disks at that time.
    sessions: usize,
    /// The most blocks that could not be read since then.
    damaged: usize,
    /// That it is in vain was told.
    told: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Leave,
    /// Say that it is full, and pause it if it runs.
    Hold,
    /// It runs, or may run, though it is marked as paused for space: take the mark away and say so.
    Release,
    Resume,
    /// Say that resuming it is in vain, and why.
    Tell,
}

/// What to do now. Notes in `tried` what it orders.
pub fn decide(now_us: u64, seen: &Seen, tried: &mut Tried) -> Step {
    if !seen.volumes || seen.paused_by == Some(PausedBy::Command) {
        return Step::Leave;
    }
    let held = seen.paused_by == Some(PausedBy::Space);
    match seen.state {
        DomainState::Running if seen.waiting && !seen.room => Step::Hold,
        DomainState::Running => {
            if tried.times > 0 && now_us.saturating_sub(tried.resumed_us) >= SETTLED_US {
                *tried = Tried::default();
            }
            // once it has run for a while: a request that waited may find the memory taken by another
            if held && tried.times == 0 && !seen.waiting { Step::Release } else { Step::Leave }
        }
        DomainState::Paused => {
            let by_disk = seen.reason == StateReason::IoError;
            if by_disk && seen.no_space && !seen.room {
                return if held { Step::Leave } else { Step::Hold };
            }
            let ours = by_disk || held && seen.reason == StateReason::User;
            let full = held && !seen.room;
            let errors = by_disk && !held && !seen.no_space;
            let longest = if errors { LONGEST_PAUSE_OF_ERRORS_US } else { LONGEST_PAUSE_US };
            let pause = FIRST_PAUSE_US.saturating_mul(1 << tried.times.min(20)).min(longest);
            let connected = seen.sessions > tried.sessions;
            let repaired = seen.damaged < tried.damaged;
            tried.damaged = tried.damaged.max(seen.damaged);
            let due = tried.times == 0 || connected || repaired || now_us.saturating_sub(tried.resumed_us) >= pause;
            if !ours || full {
                return Step::Leave;
            }
            let told_after = if seen.damaged > 0 { TOLD_OF_DAMAGE_AFTER } else { TOLD_OF_ERRORS_AFTER };
            if errors && !repaired && !tried.told && tried.times >= told_after {
                tried.told = true;
                return Step::Tell;
            }
            if !due {
                return Step::Leave;
            }
            // what was in vain before a repair says nothing of what comes after it
            let times = if repaired { 1 } else { tried.times.saturating_add(1) };
            *tried = Tried {
                resumed_us: now_us,
                times,
                sessions: seen.sessions,
                damaged: seen.damaged,
                told: tried.told && !repaired,
            };
            Step::Resume
        }
        // it went off: whatever it waited for is over
        DomainState::Off | DomainState::Crashed if held => Step::Release,
        _ => {
            *tried = Tried::default();
            Step::Leave
        }
    }
}

/// The loop.
pub async fn watch(host: Arc<Host>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut tried: BTreeMap<VmId, Tried> = BTreeMap::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
            () = host.inventory.changed.notified() => {}
        }
        let entries = host.inventory.all();
        tried.retain(|vm, _| entries.iter().any(|e| e.record.vm == *vm));
        let now = host.now_us();
        let steps = entries.iter().map(|entry| {
            let seen = see(&host, entry);
            (entry, decide(now, &seen, tried.entry(entry.record.vm).or_default()))
        });
        let work: Vec<_> =
            steps.filter(|(_, step)| *step != Step::Leave).map(|(e, step)| carry_out(&host, e, step)).collect();
        // one VM whose monitor hangs holds the others up for as long as its call may take, no longer
        join_all(work).await;
    }
}

/// The disks that hold a write for want of room; where nobody says which (NBD, or just attached again) all of its own.
fn in_want<'a>(host: &Host, entry: &'a Entry) -> (bool, Vec<&'a DiskRecord>) {
    let waiting: Vec<_> = entry.record.own_disks().filter(|disk| host.volumes.waits_for_space(disk)).collect();
    if waiting.is_empty() { (false, entry.record.own_disks().collect()) } else { (true, waiting) }
}

fn see(host: &Host, entry: &Entry) -> Seen {
    let (waiting, disks) = in_want(host, entry);
    Seen {
        state: entry.state,
        reason: entry.reason,
        paused_by: entry.record.paused_by,
        volumes: !is_lost(&entry.record, &host.volumes.store),
        waiting,
        no_space: entry.no_space,
        // one that is paused still waits, whatever has become free meanwhile
        room: disks
            .iter()
            .all(|disk| host.volumes.has_room(disk, ROOM, waiting && entry.state == DomainState::Running)),
        sessions: entry.record.own_disks().filter_map(|disk| host.volumes.exports.sessions(&disk.export_name())).sum(),
        damaged: if entry.state == DomainState::Paused && entry.reason == StateReason::IoError {
            unreadable(host, entry).len()
        } else {
            0
        },
    }
}

/// Volume and byte offset of each block of its disks that cannot be read.
fn unreadable(host: &Host, entry: &Entry) -> Vec<(VolumeId, u64)> {
    let volumes: Vec<VolumeId> = entry.record.disks.iter().map(|disk| disk.volume).collect();
    host.scrub.unreadable(&host.volumes.store, &volumes)
}

async fn carry_out(host: &Arc<Host>, entry: &Entry, step: Step) {
    let (vm, name) = (entry.record.vm, &entry.record.name);
    let about = About { vm: vm.to_string(), ..About::default() };
    match step {
        Step::Leave => {}
        Step::Hold => {
            // first the mark: an agent that dies in between finds a VM that runs, and takes the mark away
            if !host.mark_paused(vm, Some(PausedBy::Space)).await {
                return;
            }
            let text = format!("{name}: {}", why(host, entry));
            tracing::warn!(vm = %vm, name, "no room left for its disk, the VM is paused until there is");
            host.voice.event(Severity::Error, "volume-full", text, about);
            if entry.state == DomainState::Running {
                match host.machines.call(Lane::Vm(vm), "pause", move |h| h.pause(vm)).await {
                    Ok(()) => {}
                    // a disk paused it in between
                    Err(e) if e.kind() == HypervisorErrorKind::InvalidState => {}
                    Err(e) => host.complain("a VM whose disk has no memory left was not paused", &e),
                }
            }
        }
        Step::Release => {
            if host.mark_paused(vm, None).await {
                host.voice.event(Severity::Info, "volume-space-back", format!("{name}: goes on"), about);
            }
        }
        Step::Tell => {
            let why = why_in_vain(entry, &unreadable(host, entry));
            tracing::warn!(vm = %vm, name, why, "a VM that a disk has paused is resumed in vain");
            host.voice.event(Severity::Error, "volume-unreadable", format!("{name}: {why}"), about);
        }
        Step::Resume => {
            // what it was paused for is answered by this; the next error says its own reason
            host.inventory.update(vm, |e| e.no_space = false);
            match host.machines.call(Lane::Vm(vm), "resume", move |h| h.resume(vm)).await {
                Ok(()) => {
                    tracing::info!(vm = %vm, name, "resumed, its disks are there");
                    // QEMU hears nothing of a disk's new size while it is paused
                    entry.record.disks.iter().for_each(|disk| _ = host.volumes.announce(disk));
                }
                // somebody was faster
                Err(e) if e.kind() == HypervisorErrorKind::InvalidState => {}
                Err(e) => tracing::warn!(vm = %vm, err = %Chain(&e), "a VM that a disk had paused was not resumed"),
            }
        }
    }
    if let Ok(Some(status)) = host.machines.status(vm).await
        && let Some(change) = host.inventory.observe(host.now_us(), &status)
    {
        crate::observer::tell(host, &change);
    }
}

/// Why it stands still although it was resumed, and what helps.
fn why_in_vain(entry: &Entry, unreadable: &[(VolumeId, u64)]) -> String {
    let target =
        |volume| entry.record.disks.iter().find(|disk| disk.volume == volume).map_or("", |disk| disk.target.as_str());
    let places =
        unreadable.iter().take(NAMED).map(|(volume, offset)| format!("disk {} at byte {offset}", target(*volume)));
    let mut places = places.collect::<Vec<_>>().join(", ");
    if places.is_empty() {
        return "a disk of it answers with I/O errors or is not connected: the VM stands still, and is resumed ever more \
                rarely (every 5 minutes in the end), and when the disk connects"
            .into();
    }
    if unreadable.len() > NAMED {
        places.push_str(&format!(" and {} more", unreadable.len() - NAMED));
    }
    format!(
        "it reads what is damaged in memory and could not be repaired yet: {places}. The VM stands still until it is repaired, \
         and then goes on at once. Restore a backup, or reset the session, to have it go on without"
    )
}

/// Why it stands still, and what helps.
fn why(host: &Host, entry: &Entry) -> String {
    let disks = in_want(host, entry).1;
    if let Some(disk) = disks.iter().find(|disk| host.volumes.quota_is_used_up(disk)) {
        let role = disk.role.as_str();
        return format!(
            "the quota of its {role} disk is used up: the VM stands still until it is raised (muster vm resize --disk \
             {role} --quota SIZE) or the session is reset"
        );
    }
    let budget = host.volumes.store.stats().budget;
    if disks.iter().any(|disk| host.volumes.spill_is_used_up(disk, ROOM)) {
        return format!(
            "its disk needs memory, and both the store's budget of {budget} and the spill file are used up: the VM stands \
             still until there is room. Drop images, reset sessions, delete VMs, or raise store.budget or store.spill.size"
        );
    }
    format!(
        "its disk needs memory and the store's budget of {budget} is used up: the VM stands still until there is some. Drop \
         images, reset sessions, delete VMs, or raise store.budget"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> Seen {
        Seen {
            state: DomainState::Running,
            reason: StateReason::None,
            paused_by: None,
            volumes: true,
            waiting: false,
            no_space: false,
            room: true,
            sessions: 0,
            damaged: 0,
        }
    }

    fn paused(reason: StateReason, paused_by: Option<PausedBy>) -> Seen {
        Seen { state: DomainState::Paused, reason, paused_by, ..running() }
    }

    fn once(seen: &Seen) -> Step {
        decide(1_000_000, seen, &mut Tried::default())
    }

    #[test]
    fn a_vm_paused_by_a_disk_that_is_back_is_resumed_again_and_again_each_time_later() {
        let seen = paused(StateReason::IoError, None);
        let mut tried = Tried::default();
        let mut at = Vec::new();
        let mut told = Vec::new();
        for ms in (0..3_600_000u64).step_by(10) {
            match decide(ms * 1000, &seen, &mut tried) {
                Step::Resume => at.push(ms),
                Step::Tell => told.push(ms),
                step => assert_eq!(step, Step::Leave),
            }
        }
        assert_eq!(&at[..5], [0, 40, 120, 280, 600]);
        let pauses: Vec<u64> = at.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(pauses.is_sorted() && pauses.ends_with(&[300_000; 5]), "it is never given up: {pauses:?}");
        assert_eq!(told, [at[11] + 10], "said once");
        // it stayed: the next trouble is answered at once again
        assert_eq!(decide(3_700_000_000, &running(), &mut tried), Step::Leave);
        assert_eq!(decide(3_700_000_001, &seen, &mut tried), Step::Resume);
    }

    #[test]
    fn a_vm_that_reads_a_damaged_block_is_said_soon_and_resumed_as_soon_as_the_block_is_whole() {
        let reads = |damaged| Seen { damaged, ..paused(StateReason::IoError, None) };
        let mut tried = Tried::default();
        let mut now = 0;
        let mut steps = |seconds: u64, seen: &Seen| -> Vec<(u64, Step)> {
            let until = now + seconds * 1_000_000;
            let mut steps = Vec::new();
            while now < until {
                now += 10_000;
                let step = decide(now, seen, &mut tried);
                if step != Step::Leave {
                    steps.push((now, step));
                }
            }
            steps
        };
        let of = |step: Step, steps: &[(u64, Step)]| steps.iter().filter(|(_, s)| *s == step).count();
        let first = steps(3600, &reads(2));
        assert_eq!(of(Step::Tell, &first), 1);
        assert_eq!(first[5].1, Step::Tell, "before it is tried a sixth time: {first:?}");
        assert!(of(Step::Resume, &first) < 30, "{first:?}");
        // one of them is repaired: it goes on to the next, which is said as well
        let second = steps(60, &reads(1));
        assert_eq!((second[0].1, of(Step::Tell, &second)), (Step::Resume, 1));
        assert_eq!(second[0].0, 3_600_010_000, "at once");
        // both are
        let third = steps(1, &reads(0));
        assert_eq!(third[0], (3_660_010_000, Step::Resume));
        // damage that shows only after the last try is noticed, too
        let mut tried = Tried::default();
        assert_eq!(decide(0, &reads(0), &mut tried), Step::Resume);
        assert_eq!(decide(1, &reads(1), &mut tried), Step::Leave);
        assert_eq!(decide(2, &reads(0), &mut tried), Step::Resume);
    }

    #[test]
    fn one_that_waited_for_memory_is_not_left_for_longer_than_before() {
        let held = Seen { no_space: true, ..paused(StateReason::IoError, Some(PausedBy::Space)) };
        let mut tried = Tried::default();
        let at: Vec<u64> = (0..100_000).filter(|ms| decide(ms * 1000, &held, &mut tried) == Step::Resume).collect();
        assert!(at.ends_with(&[at[at.len() - 2], at[at.len() - 2] + 10_000]), "{at:?}");
    }

    #[test]
    fn a_vm_is_resumed_as_soon_as_its_disk_has_connected_however_long_that_took() {
        let away = paused(StateReason::IoError, None);
        let mut tried = Tried::default();
        for ms in 0..14_000 {
            decide(ms * 1000, &away, &mut tried);
        }
        let back = Seen { sessions: 1, ..away };
        assert_eq!(decide(14_000_000, &back, &mut tried), Step::Resume);
        // its other disk is asked only now, and connects at once
        assert_eq!(decide(14_020_000, &back, &mut tried), Step::Leave);
        assert_eq!(decide(14_040_000, &Seen { sessions: 2, ..back }, &mut tried), Step::Resume);
        assert_eq!(decide(14_060_000, &Seen { sessions: 2, ..back }, &mut tried), Step::Leave);
    }

    #[test]
    fn a_vm_whose_write_waits_for_memory_is_held_until_there_is_some() {
        let waiting = Seen { waiting: true, room: false, ..running() };
        assert_eq!(once(&waiting), Step::Hold);
        let held = paused(StateReason::User, Some(PausedBy::Space));
        assert_eq!(once(&Seen { room: false, ..held }), Step::Leave);
        let mut tried = Tried::default();
        assert_eq!(decide(0, &held, &mut tried), Step::Resume);
        // it runs and has not settled, then it has
        let runs = Seen { paused_by: Some(PausedBy::Space), ..running() };
        assert_eq!(decide(1000, &runs, &mut tried), Step::Leave);
        assert_eq!(decide(2_000_000, &Seen { waiting: true, ..runs }, &mut tried), Step::Leave);
        assert_eq!(decide(2_000_001, &runs, &mut tried), Step::Release);
        // another one took the memory: held again, and not as often as the loop looks
        assert_eq!(decide(2_000_002, &Seen { waiting: true, room: false, ..runs }, &mut tried), Step::Hold);
    }

    #[test]
    fn over_nbd_the_disk_pauses_it_and_it_is_only_said() {
        let full = Seen { no_space: true, room: false, ..paused(StateReason::IoError, None) };
        assert_eq!(once(&full), Step::Hold);
        assert_eq!(once(&Seen { paused_by: Some(PausedBy::Space), ..full }), Step::Leave);
        assert_eq!(once(&Seen { paused_by: Some(PausedBy::Space), room: true, ..full }), Step::Resume);
        // the store is full, but that is not why this one stands still
        assert_eq!(once(&Seen { no_space: false, ..full }), Step::Resume);
    }

    #[test]
    fn what_a_command_paused_or_has_lost_its_volumes_is_left_alone() {
        for reason in [StateReason::User, StateReason::IoError] {
            assert_eq!(once(&paused(reason, Some(PausedBy::Command))), Step::Leave);
            assert_eq!(once(&Seen { volumes: false, ..paused(reason, Some(PausedBy::Space)) }), Step::Leave);
        }
        // not by us, not by a disk: by hand, past the agent
        assert_eq!(once(&paused(StateReason::User, None)), Step::Leave);
        assert_eq!(once(&paused(StateReason::Job, Some(PausedBy::Space))), Step::Leave);
    }

    #[test]
    fn a_mark_does_not_outlive_the_run_it_was_made_in() {
        let off = Seen { state: DomainState::Off, paused_by: Some(PausedBy::Space), ..running() };
        assert_eq!(once(&off), Step::Release);
        assert_eq!(once(&Seen { paused_by: None, ..off }), Step::Leave);
    }
}
