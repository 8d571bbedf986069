//! What threads do to each other: index, frames, pools, maps, marks and spilling under schedules that shuttle chooses, at
//! each lock and each atomic operation one (random ones, and ones with few changes of thread at the worst moments).
//!
//! ```text
//! cargo test -p muster-store --features shuttle --lib schedules
//! MUSTER_SCHEDULES=100000 …        more of them
//! MUSTER_SCHEDULE=… …              the one that failed, as it was printed; with the name of the test
//! ```
//!
//! After each scenario the audit counts everything again. The arena is another one (`arena.rs`): it notices when a frame is
//! filled or given back while somebody reads it. Atomics are in one order for all threads here; what needs less than that
//! is argued where it stands.
#![allow(clippy::unwrap_used, reason = "tests")]

pub(crate) mod sync;

use std::sync::Arc;

use muster_common::ByteLen;
use shuttle::{
    Config, Runner,
    scheduler::{PctScheduler, RandomScheduler},
    thread,
};

use crate::{
    PageKind, SpillConfig, WhenFull,
    account::{Account, Limits},
    arena::BLOCK,
    audit::Recount,
    frames::{Domain, Engine, Frames, STICKY_FRAME},
    map::{Map, Nodes, Refused},
    marks::Mark,
    memory::Memory,
    pool::{Budget, Pool, Unit},
    spill::Spill,
    sync::{
        RwLock, World,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
};

/// Blocks of a leaf: the next ones are in another stripe.
const LEAF: u64 = 64;
const SIZE: u64 = 4 * LEAF * BLOCK as u64;

fn explore(scenario: fn()) {
    let schedules = std::env::var("MUSTER_SCHEDULES").map_or(1_500, |n| n.parse().unwrap());
    let mut config = Config::new();
    // blocks lie on the stack
    config.stack_size = 256 << 10;
    if let Ok(schedule) = std::env::var("MUSTER_SCHEDULE") {
        return shuttle::replay(scenario, &schedule);
    }
    Runner::new(RandomScheduler::new(schedules), config.clone()).run(scenario);
    Runner::new(PctScheduler::new(3, schedules), config).run(scenario);
}

/// A block that no other number has. 0 is all zero.
fn block(n: u8) -> [u8; BLOCK] {
    let mut block = [n; BLOCK];
    if n > 0 {
        block[0] = 0xb1;
    }
    block
}

/// The number of a block.
///
/// # Panics
/// When it is none.
fn number(block_of: &[u8; BLOCK]) -> u8 {
    let n = block_of[BLOCK - 1];
    assert!(*block_of == block(n), "torn: {:?}", &block_of[..4]);
    n
}

/// An engine for so many frames, without the store around it.
fn engine(frames: u32, budget: u64) -> Engine {
    let engine = Engine {
        budget: Budget::new(budget),
        frames: Frames::reserve(frames, PageKind::Small, &Memory::Private).unwrap(),
        nodes: Nodes::reserve(40, &Memory::Private).unwrap(),
        world: World::default(),
        pages: PageKind::Small,
        spill: None,
        domains: RwLock::new(Vec::new()),
        sticky: STICKY_FRAME,
    };
    engine.domains.write().push(Arc::new(Domain::new(0, &[1; 32], [0; 16])));
    engine
}

fn map_with(engine: &Engine, limits: Limits) -> Arc<Map> {
    let domain = Arc::clone(&engine.domains.read()[0]);
    Arc::new(Map::new(SIZE, engine.empty_trees(SIZE).unwrap(), domain, Account::new(limits, SIZE)))
}

fn map(engine: &Engine) -> Arc<Map> {
    map_with(engine, Limits::default())
}

fn copy_of(engine: &Engine, map: &Map) -> Result<Arc<Map>, Refused> {
    let trees = engine.fork(map, SIZE)?;
    Ok(Arc::new(Map::new(SIZE, trees, Arc::clone(&map.domain), Account::NONE)))
}

fn write(engine: &Engine, map: &Map, at: u64, n: u8) -> Result<(), Refused> {
    engine.write(map, at * BLOCK as u64, &block(n))
}

fn read(engine: &Engine, map: &Map, at: u64) -> Result<u8, Refused> {
    let mut found = [0xee; BLOCK];
    engine.read(map, at * BLOCK as u64, &mut found)?;
    Ok(number(&found))
}

fn clear(engine: &Engine, map: &Map, at: u64) -> Result<(), Refused> {
    engine.clear(map, at * BLOCK as u64, BLOCK as u64)
}

/// Frames that somebody refers to.
fn used(engine: &Engine) -> usize {
    (1..engine.frames.pool.stats().next).filter(|&frame| engine.frames.count(frame) > 0).count()
}

/// Everything counted again, and no block listed twice.
fn audit(engine: &Engine, maps: &[&Arc<Map>]) {
    let mut recount = Recount::new(engine);
    maps.iter().for_each(|map| recount.add(map));
    recount.compare();
    assert!(recount.faults.is_empty(), "{:?}", recount.faults);
    let mut blocks = Vec::new();
    engine.frames.index.for_each(|_, frame| {
        if engine.frames.marks.get(frame) == Mark::Here {
            blocks.push(engine.frames.blocks.with(frame, |block| *block));
        }
    });
    let listed = blocks.len();
    blocks.sort_unstable();
    blocks.dedup();
    assert_eq!(listed, blocks.len(), "a block is listed twice");
    assert!(engine.budget.charged() <= engine.budget.limit());
}

/// Lets go of the maps; then nothing is used any more.
fn close_all(engine: &Engine, maps: &[&Arc<Map>]) {
    maps.iter().for_each(|map| engine.close(map));
    audit(engine, maps);
    assert_eq!(used(engine), 0);
}

#[test]
fn the_same_block_written_by_several_is_stored_once() {
    explore(|| {
        let engine = engine(8, u64::MAX);
        let maps = [map(&engine), map(&engine), map(&engine)];
        thread::scope(|scope| {
            for (n, map) in maps.iter().enumerate() {
                let engine = &engine;
                scope.spawn(move || {
                    write(engine, map, n as u64, 1).unwrap();
                    assert_eq!(read(engine, map, n as u64), Ok(1));
                });
            }
        });
        assert_eq!(used(&engine), 1);
        let all = maps.each_ref();
        audit(&engine, &all);
        close_all(&engine, &all);
    });
}

#[test]
fn a_block_is_found_or_stored_anew_while_its_last_reference_goes() {
    explore(|| {
        let engine = engine(8, u64::MAX);
        let [a, b, c] = [map(&engine), map(&engine), map(&engine)];
        write(&engine, &a, 0, 1).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| write(&engine, &a, 0, 2).unwrap());
            scope.spawn(|| {
                write(&engine, &b, 0, 1).unwrap();
                assert_eq!(read(&engine, &b, 0), Ok(1));
            });
            scope.spawn(|| {
                write(&engine, &c, 0, 1).unwrap();
                clear(&engine, &c, 0).unwrap();
                write(&engine, &c, 1, 2).unwrap();
            });
        });
        assert_eq!((read(&engine, &a, 0), read(&engine, &b, 0)), (Ok(2), Ok(1)));
        assert_eq!((read(&engine, &c, 0), read(&engine, &c, 1)), (Ok(0), Ok(2)));
        assert_eq!(used(&engine), 2);
        audit(&engine, &[&a, &b, &c]);
        close_all(&engine, &[&a, &b, &c]);
    });
}

#[test]
fn a_frame_that_is_dealt_again_at_once_is_never_read_as_what_it_was() {
    explore(|| {
        // so few that each is used again by the next write
        let engine = engine(4, u64::MAX);
        let [a, b] = [map(&engine), map(&engine)];
        write(&engine, &a, 0, 1).unwrap();
        let full = |result| assert!(matches!(result, Ok(()) | Err(Refused::Full)));
        thread::scope(|scope| {
            scope.spawn(|| [2, 1, 3, 1].into_iter().for_each(|n| full(write(&engine, &a, 0, n))));
            scope.spawn(|| [1, 2, 1].into_iter().for_each(|n| full(write(&engine, &b, 0, n))));
            scope.spawn(|| {
                for _ in 0..3 {
                    assert!(matches!(read(&engine, &a, 0), Ok(1..=3)));
                    assert!(matches!(read(&engine, &b, 0), Ok(0..=2)));
                }
            });
        });
        audit(&engine, &[&a, &b]);
        close_all(&engine, &[&a, &b]);
    });
}

#[test]
fn a_copy_is_the_disk_before_or_after_each_block_of_an_overwrite_and_stays() {
    explore(|| {
        let engine = engine(16, u64::MAX);
        let a = map(&engine);
        let places = [0, 1, LEAF];
        for (n, at) in (1..).zip(places) {
            write(&engine, &a, at, n).unwrap();
        }
        let copy = thread::scope(|scope| {
            let copier = scope.spawn(|| {
                let copy = copy_of(&engine, &a).unwrap();
                let look = || places.map(|at| read(&engine, &copy, at).unwrap());
                let first = look();
                assert_eq!(first, look(), "a copy changes");
                assert!([1, 4].contains(&first[0]) && [2, 5].contains(&first[1]) && [3, 0].contains(&first[2]));
                copy
            });
            scope.spawn(|| {
                write(&engine, &a, 0, 4).unwrap();
                write(&engine, &a, 1, 5).unwrap();
            });
            scope.spawn(|| clear(&engine, &a, LEAF).unwrap());
            copier.join().unwrap()
        });
        assert_eq!(places.map(|at| read(&engine, &a, at).unwrap()), [4, 5, 0]);
        audit(&engine, &[&a, &copy]);
        close_all(&engine, &[&copy, &a]);
    });
}

#[test]
fn two_that_change_what_they_share_each_get_their_own() {
    explore(|| {
        let engine = engine(16, u64::MAX);
        let a = map(&engine);
        write(&engine, &a, 0, 1).unwrap();
        write(&engine, &a, 1, 2).unwrap();
        let b = copy_of(&engine, &a).unwrap();
        let c = copy_of(&engine, &b).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| write(&engine, &a, 0, 3).unwrap());
            scope.spawn(|| write(&engine, &b, 1, 4).unwrap());
            scope.spawn(|| engine.close(&c));
        });
        assert_eq!([0, 1].map(|at| read(&engine, &a, at)), [Ok(3), Ok(2)]);
        assert_eq!([0, 1].map(|at| read(&engine, &b, at)), [Ok(1), Ok(4)]);
        assert_eq!(read(&engine, &c, 0), Err(Refused::Closed));
        audit(&engine, &[&a, &b, &c]);
        close_all(&engine, &[&a, &b]);
    });
}

#[test]
fn a_count_at_the_top_sticks_and_the_block_stays_whole() {
    explore(|| {
        let engine = Engine { sticky: 3, ..engine(8, u64::MAX) };
        let maps = [map(&engine), map(&engine), map(&engine)];
        thread::scope(|scope| {
            for map in &maps {
                let engine = &engine;
                scope.spawn(move || {
                    write(engine, map, 0, 1).unwrap();
                    write(engine, map, 1, 1).unwrap();
                    clear(engine, map, 0).unwrap();
                    assert_eq!(read(engine, map, 1), Ok(1));
                });
            }
        });
        let all = maps.each_ref();
        audit(&engine, &all);
        let stuck = engine.frames.count(1) == 3;
        maps.iter().for_each(|map| engine.close(map));
        audit(&engine, &[]);
        assert_eq!(used(&engine), usize::from(stuck));
        let last = map(&engine);
        write(&engine, &last, 0, 1).unwrap();
        assert_eq!((read(&engine, &last, 0), used(&engine)), (Ok(1), 1));
    });
}

#[test]
fn a_disk_that_is_deleted_refuses_and_leaves_nothing() {
    explore(|| {
        let engine = engine(16, u64::MAX);
        let [a, b] = [map(&engine), map(&engine)];
        write(&engine, &a, 0, 1).unwrap();
        write(&engine, &b, 0, 1).unwrap();
        let copy = thread::scope(|scope| {
            scope.spawn(|| engine.close(&a));
            scope.spawn(|| {
                for (at, n) in [(0, 2), (1, 1)] {
                    assert!(matches!(write(&engine, &a, at, n), Ok(()) | Err(Refused::Closed)));
                }
            });
            scope.spawn(|| assert!(matches!(read(&engine, &a, 0), Ok(1 | 2) | Err(Refused::Closed))));
            scope.spawn(|| copy_of(&engine, &a)).join().unwrap()
        });
        audit(&engine, &[&a, &b].into_iter().chain(copy.as_ref().ok()).collect::<Vec<_>>());
        if let Ok(copy) = &copy {
            assert!(matches!(read(&engine, copy, 0), Ok(1 | 2)));
            engine.close(copy);
        }
        assert_eq!(read(&engine, &b, 0), Ok(1));
        close_all(&engine, &[&b]);
    });
}

#[test]
fn contents_are_exchanged_at_one_instant() {
    explore(|| {
        let engine = engine(16, u64::MAX);
        let [a, other] = [map(&engine), map(&engine)];
        for at in [0, LEAF] {
            write(&engine, &a, at, 1).unwrap();
            write(&engine, &other, at, 2).unwrap();
        }
        let copy = thread::scope(|scope| {
            scope.spawn(|| {
                let trees = engine.fork(&other, SIZE).unwrap();
                engine.install(&a, trees, |_| {}).unwrap();
            });
            scope.spawn(|| write(&engine, &other, 0, 3).unwrap());
            scope.spawn(|| copy_of(&engine, &a).unwrap()).join().unwrap()
        });
        let seen = [0, LEAF].map(|at| read(&engine, &copy, at).unwrap());
        assert!([[1, 1], [2, 2], [3, 2]].contains(&seen), "{seen:?}");
        audit(&engine, &[&a, &other, &copy]);
        close_all(&engine, &[&a, &other, &copy]);
    });
}

#[test]
fn parts_of_one_block_written_by_several_are_all_there() {
    explore(|| {
        let engine = engine(8, u64::MAX);
        let a = map(&engine);
        let b = copy_of(&engine, &a).unwrap();
        thread::scope(|scope| {
            for part in 0..3usize {
                let (engine, a) = (&engine, &a);
                scope.spawn(move || engine.write(a, part as u64 * 512, &[part as u8 + 1; 512]).unwrap());
            }
        });
        let mut found = [0; 1536];
        engine.read(&a, 0, &mut found).unwrap();
        assert!((0..1536).all(|at| usize::from(found[at]) == at / 512 + 1));
        audit(&engine, &[&a, &b]);
        close_all(&engine, &[&a, &b]);
    });
}

#[test]
fn the_budget_holds_and_a_refused_write_changes_nothing() {
    explore(|| {
        let (engine, maps) = {
            let engine = engine(16, 1 << 16);
            let maps = [map(&engine), map(&engine), map(&engine)];
            // room for about three blocks more, leaves and index included
            maps.iter().for_each(|map| write(&engine, map, 0, 9).unwrap());
            let spare = engine.budget.limit() - engine.budget.charged() - 2 * 4104;
            assert!(engine.budget.charge(spare));
            (engine, maps)
        };
        thread::scope(|scope| {
            for (n, map) in (1..).zip(&maps) {
                let engine = &engine;
                scope.spawn(move || {
                    for at in 0..2 {
                        let (n, before) = (n * 2 + at as u8, read(engine, map, at).unwrap());
                        match write(engine, map, at, n) {
                            Ok(()) => assert_eq!(read(engine, map, at), Ok(n)),
                            Err(refused) => {
                                assert_eq!((refused, read(engine, map, at)), (Refused::Full, Ok(before)));
                            }
                        }
                    }
                    clear(engine, map, 0).unwrap();
                });
            }
        });
        let all = maps.each_ref();
        audit(&engine, &all);
        close_all(&engine, &all);
    });
}

#[test]
fn a_number_is_in_one_hand_at_a_time_while_free_ones_go_back() {
    explore(|| {
        let unit = Unit { bytes: 100, beside: 10, granule: 2, keep: 2 };
        let lent = crate::arena::Words::reserve(Pool::words(24, 2), None).unwrap();
        let (pool, budget) = (Pool::new(24, unit, lent), Budget::new(12 * 110));
        let held: Vec<AtomicBool> = (0..=24).map(|_| AtomicBool::new(false)).collect();
        let (pool, budget, held) = (&pool, &budget, &held);
        let give_back = |run: std::ops::Range<u32>| {
            assert!(run.clone().all(|number| !held[number as usize].load(SeqCst)), "{run:?} is in use");
        };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(move || {
                    let mut mine = Vec::new();
                    for turn in 0..6 {
                        match pool.take(budget).filter(|_| turn < 5) {
                            Some(number) => {
                                assert!(!held[number as usize].swap(true, SeqCst), "{number} is dealt twice");
                                mine.push(number);
                            }
                            None => break,
                        }
                        assert!(budget.charged() <= budget.limit());
                    }
                    for number in mine {
                        held[number as usize].store(false, SeqCst);
                        if pool.put(number) {
                            pool.purge(pool.keep() / 2, budget, give_back);
                        }
                    }
                    pool.cut(1, 3, budget, give_back);
                });
            }
        });
        pool.purge(0, budget, give_back);
        let mut free = pool.free_numbers();
        free.sort_unstable();
        let next = pool.stats().next;
        assert!(free.iter().copied().eq((1..next).filter(|number| free.contains(number))), "{free:?}");
    });
}

#[test]
fn who_needs_a_number_gets_one_while_others_give_back_what_is_free() {
    explore(|| {
        let unit = Unit { bytes: 100, beside: 10, granule: 2, keep: 2 };
        let lent = crate::arena::Words::reserve(Pool::words(24, 2), None).unwrap();
        let (pool, budget) = (Pool::new(24, unit, lent), Budget::new(5 * 110));
        let all: Vec<u32> = std::iter::from_fn(|| pool.take(&budget)).collect();
        assert_eq!(all, [1, 2, 3, 4, 5]);
        let (pool, budget) = (&pool, &budget);
        // none of a whole granule
        [2, 5].into_iter().for_each(|number| assert!(!pool.put(number)));
        let reclaim = || {
            pool.purge(0, budget, |_| {});
            pool.cut(0, 2, budget, |_| {});
        };
        thread::scope(|scope| {
            scope.spawn(reclaim);
            for _ in 0..2 {
                scope.spawn(move || {
                    let number = pool.take(budget).or_else(|| {
                        reclaim();
                        pool.take(budget)
                    });
                    assert!(number.is_some(), "two are free for two");
                });
            }
        });
    });
}

/// An engine that spills, and a map of three blocks, 1 to 3, that may leave.
fn spilling() -> (tempfile::TempDir, Engine, Arc<Map>) {
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = SpillConfig { file: place.path().join("spilled"), limit: ByteLen::mib(1) };
    // less than what is spilled at a time, so that there is always reason to
    let mut engine = engine(160, 100 << 10);
    engine.spill = Some(Spill::open(&config, 160, false).unwrap());
    engine.expect_spilling();
    let a = map_with(&engine, Limits { when_full: WhenFull::Spill, ..Limits::default() });
    engine.spill.as_ref().unwrap().watch(&a);
    (0..3).for_each(|at| write(&engine, &a, at, at as u8 + 1).unwrap());
    (place, engine, a)
}

#[test]
fn blocks_go_to_the_disk_and_come_back_under_readers_and_writers() {
    explore(|| {
        let (_place, engine, a) = spilling();
        let b = map(&engine);
        thread::scope(|scope| {
            scope.spawn(|| {
                engine.make_room(false);
                engine.make_room(true);
                engine.tidy_spilled();
            });
            scope.spawn(|| {
                for at in [0, 1, 0, 1] {
                    assert_eq!(read(&engine, &a, at), Ok(at as u8 + 1));
                }
            });
            scope.spawn(|| {
                write(&engine, &a, 2, 5).unwrap();
                // found although it may be away
                write(&engine, &b, 0, 1).unwrap();
                assert_eq!(read(&engine, &b, 0), Ok(1));
            });
        });
        assert_eq!([0, 1, 2].map(|at| read(&engine, &a, at)), [Ok(1), Ok(2), Ok(5)]);
        audit(&engine, &[&a, &b]);
        close_all(&engine, &[&a, &b]);
        assert_eq!(engine.frames.marks.counts(), (0, 0));
    });
}

#[test]
fn a_copy_is_whole_whose_blocks_are_on_their_way_to_the_disk() {
    explore(|| {
        let (_place, engine, a) = spilling();
        let (mut copy, mut third) = (None, None);
        thread::scope(|scope| {
            scope.spawn(|| engine.make_room(true));
            scope.spawn(|| engine.make_room(true));
            let made = scope.spawn(|| {
                let copy = copy_of(&engine, &a).unwrap();
                assert!([Ok(1), Ok(3)].contains(&read(&engine, &copy, 0)));
                assert_eq!(read(&engine, &copy, 1), Ok(2));
                third = Some(read(&engine, &copy, 2).unwrap());
                copy
            });
            // before or after
            clear(&engine, &a, 2).unwrap();
            write(&engine, &a, 0, 3).unwrap();
            copy = Some(made.join().unwrap());
        });
        let copy = copy.unwrap();
        assert!(third == Some(3) || third == Some(0), "{third:?}");
        assert_eq!(read(&engine, &copy, 2).ok(), third);
        assert_eq!([0, 1].map(|at| read(&engine, &a, at)), [Ok(3), Ok(2)]);
        audit(&engine, &[&a, &copy]);
        close_all(&engine, &[&a, &copy]);
        assert_eq!(engine.frames.marks.counts(), (0, 0));
    });
}

#[test]
fn what_is_kept_for_a_reservation_suffices_for_writers_and_is_given_back() {
    explore(|| {
        let engine = engine(300, u64::MAX);
        let a = map_with(&engine, Limits { reservation: 4 * BLOCK as u64, ..Limits::default() });
        let b = map(&engine);
        let lack = a.account.lack(false);
        let frames = (0..lack.frames).map_while(|_| engine.take_frame()).collect::<Vec<_>>();
        assert_eq!(frames.len() as u64, lack.frames);
        let nodes = (0..6).map_while(|_| engine.take_free_node()).collect();
        a.account.fill(frames, nodes);
        thread::scope(|scope| {
            scope.spawn(|| [1, 2].into_iter().for_each(|n| write(&engine, &a, 0, n).unwrap()));
            scope.spawn(|| [1, 3].into_iter().for_each(|n| write(&engine, &a, LEAF, n).unwrap()));
            scope.spawn(|| {
                write(&engine, &b, 0, 1).unwrap();
                clear(&engine, &a, 1).unwrap();
            });
        });
        assert_eq!([0, LEAF].map(|at| read(&engine, &a, at)), [Ok(2), Ok(3)]);
        assert_eq!(a.account.lack(false).frames, 0);
        audit(&engine, &[&a, &b]);
    });
}

#[test]
fn nobody_is_inside_while_the_world_is_stopped() {
    explore(|| {
        let world = World::default();
        let inside = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..2 {
                        let _guard = world.enter();
                        inside.fetch_add(1, SeqCst);
                        inside.fetch_sub(1, SeqCst);
                    }
                });
            }
            scope.spawn(|| {
                let _stopped = world.stop();
                assert_eq!((inside.load(SeqCst), inside.load(SeqCst)), (0, 0));
            });
        });
    });
}
