//! Looking for damage in memory, and mending it.
//!
//! Memory without error correction flips bits, and with it sometimes. [`Store::scrub`] hashes some frames again and
//! compares with the tag they were stored under; whoever calls it decides how fast (there is no thread here). A damaged
//! frame is marked: from then on whoever reads it gets an error instead of wrong bytes, until somebody who has the block
//! (the image repository, a backup, another host) brings it. What he brings is believed when it has the frame's tag.

use muster_common::{Digest, SnapshotId, VolumeId};

use crate::{Store, arena::BLOCK, disk::Disk, frames::Engine, marks::Mark};

/// Of one damaged frame: where its block is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Byte offset in an image.
    Image(Digest, u64),
    /// Byte offset in a volume.
    Volume(VolumeId, u64),
    /// Byte offset in a kept snapshot.
    Snapshot(SnapshotId, u64),
}

/// A frame whose bytes are not what was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    frame: u32,
    /// Every place that shares it (the first 1000). Empty when only what is not on the books does.
    pub places: Vec<Place>,
    /// Somebody had the block, and it is whole again.
    pub repaired: bool,
}

impl Damage {
    /// Tells damaged frames apart; one may be given away and used for something else later.
    pub fn frame(&self) -> u32 {
        self.frame
    }
}

/// Asks somebody for the block that belongs at these places.
pub type Bring<'a> = dyn FnMut(&[Place]) -> Option<Box<[u8; BLOCK]>> + 'a;

/// What one call looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStep {
    /// Where the next call goes on; 0 after the last frame.
    pub next: u32,
    /// Blocks hashed.
    pub blocks: u64,
    pub damage: Vec<Damage>,
}

impl Store {
    /// Looks at frames from `from` on (0: from the start) until `blocks` were hashed or the last one is reached. For each
    /// damaged one, `bring` is asked for the block that belongs at one of its places, with no lock held. Frames found damaged
    /// before are tried again.
    pub fn scrub(&self, from: u32, blocks: u64, bring: &mut Bring<'_>) -> ScrubStep {
        let frames = &self.engine().frames;
        let last = frames.pool.stats().next;
        let mut step = ScrubStep { next: from.max(1), ..ScrubStep::default() };
        while step.next < last && step.blocks < blocks {
            let frame = step.next;
            step.next += 1;
            if frames.count(frame) == 0 {
                continue;
            }
            step.blocks += 1;
            if self.engine().is_damaged(frame) {
                let places = self.places_of(frame);
                let repaired = bring(&places).is_some_and(|block| self.mend(frame, &block));
                step.damage.push(Damage { frame, places, repaired });
            }
        }
        if step.next >= last {
            step.next = 0;
        }
        step
    }

    /// Puts the block into a frame that was found damaged, when it is the one that was stored there. For those who look for it
    /// in several places; see also [`Store::scrub`].
    pub fn repair(&self, damage: &Damage, block: &[u8; BLOCK]) -> bool {
        self.mend(damage.frame, block)
    }

    /// Whether it still is: not repaired, and somebody refers to it.
    pub fn is_still_damaged(&self, damage: &Damage) -> bool {
        let frames = &self.engine().frames;
        frames.count(damage.frame) > 0 && frames.marks.get(damage.frame).is_damaged()
    }

    /// Puts the block into a damaged frame when it is the one.
    fn mend(&self, frame: u32, block: &[u8; BLOCK]) -> bool {
        let engine = self.engine();
        let frames = &engine.frames;
        let tag = frames.tag(frame);
        let _shard = frames.index.shard(tag);
        let mark = frames.marks.get(frame);
        let still = frames.count(frame) > 0 && frames.tag(frame) == tag && mark.is_damaged();
        if !still || !engine.is_of(frame, block) {
            return false;
        }
        if mark == Mark::Gone {
            // it needs memory again: another time, when there is none
            if !engine.charge(BLOCK as u64) {
                return false;
            }
            frames.pool.lend(frame);
        }
        frames.blocks.fill(frame, block);
        frames.marks.set(frame, Mark::Here);
        true
    }

    fn places_of(&self, frame: u32) -> Vec<Place> {
        let mut places = Vec::new();
        let mut look = |disk: &Disk, place: &dyn Fn(u64) -> Place| {
            // one that was deleted meanwhile is no place
            let _ = self.engine().for_each_block(&disk.map, |block, at| {
                if at == frame && places.len() < 1000 {
                    places.push(place(block * BLOCK as u64));
                }
            });
        };
        for image in self.images() {
            if let Some(found) = self.image(&image.digest) {
                look(&found.disk, &|offset| Place::Image(image.digest, offset));
            }
        }
        for volume in self.volumes() {
            look(&volume.disk, &|offset| Place::Volume(volume.id(), offset));
        }
        for info in self.snapshots() {
            if let Some(found) = self.snapshot(info.id) {
                look(&found.disk, &|offset| Place::Snapshot(info.id, offset));
            }
        }
        places
    }
}

impl Engine {
    /// Hashes a frame; marks it when it is not what was stored. False for one that nobody refers to.
    pub(crate) fn is_damaged(&self, frame: u32) -> bool {
        let frames = &self.frames;
        let tag = frames.tag(frame);
        // its last reference is dropped, and its block renamed, only under this lock
        let _shard = frames.index.shard(tag);
        if frames.count(frame) == 0 || frames.tag(frame) != tag {
            return false;
        }
        match frames.marks.get(frame) {
            Mark::Damaged | Mark::Gone => true,
            // compared when it is fetched
            Mark::Away => false,
            Mark::Here => {
                let mut block = [0; BLOCK];
                frames.blocks.read(frame, 0, &mut block);
                if self.is_of(frame, &block) {
                    return false;
                }
                frames.marks.set(frame, Mark::Damaged);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use muster_block::{BlockDevice, BlockErrorKind, WriteFlags, conformance::Random};
    use muster_common::ByteLen;

    use super::*;
    use crate::{Pages, StoreConfig, VolumeSpec};

    fn block(seed: u64) -> Box<[u8; BLOCK]> {
        let mut block = Box::new([0; BLOCK]);
        Random(seed).fill(&mut *block);
        block
    }

    /// A store with an image of 300 blocks and a clone of it.
    fn store() -> (Store, Digest, VolumeId) {
        let store = Store::open(StoreConfig { pages: Pages::Small, ..StoreConfig::new(ByteLen::mib(64)) }).unwrap();
        let digest = Digest::from_bytes([1; 32]);
        let builder = store.image_builder(digest, "image", ByteLen::mib(4)).unwrap();
        for n in 0..300 {
            builder.write_chunk(n * 4096, &*block(n + 1)).unwrap();
        }
        builder.finish().unwrap();
        let volume = VolumeId::random();
        store.create_volume(VolumeSpec::clone_of(volume, digest)).unwrap();
        (store, digest, volume)
    }

    /// Flips a bit of the frame that holds this block of the image.
    fn damage(store: &Store, digest: &Digest, wanted: u64) {
        let image = store.image(digest).unwrap();
        let mut found = 0;
        store
            .engine()
            .for_each_block(&image.disk.map, |block, frame| {
                if block == wanted {
                    found = frame;
                }
            })
            .unwrap();
        store.engine().frames.flip_a_bit(found);
    }

    fn scrub_all(store: &Store, bring: &mut Bring<'_>) -> (u64, Vec<Damage>) {
        let (mut from, mut blocks, mut damage) = (0, 0, Vec::new());
        loop {
            let step = store.scrub(from, 17, bring);
            blocks += step.blocks;
            damage.extend(step.damage);
            if step.next == 0 {
                return (blocks, damage);
            }
            from = step.next;
        }
    }

    #[test]
    fn a_flipped_bit_is_found_and_repaired_from_whoever_has_the_block() {
        let (store, digest, volume) = store();
        assert_eq!(scrub_all(&store, &mut |_| panic!("nothing is damaged")), (300, vec![]));
        damage(&store, &digest, 123);
        // what is brought is not believed when it is another block
        let (_, found) = scrub_all(&store, &mut |_| Some(block(9)));
        assert!(found.len() == 1 && !found[0].repaired);
        assert_eq!(store.stats().damaged_blocks, 1);
        let mut buf = [0; BLOCK];
        let clone = store.volume(volume).unwrap();
        for device in [&*clone as &dyn BlockDevice, &*store.image(&digest).unwrap()] {
            assert_eq!(device.read_at(123 * 4096, &mut buf).unwrap_err().kind(), BlockErrorKind::Io);
            device.read_at(124 * 4096, &mut buf).unwrap();
            assert_eq!(buf, *block(125), "only that block");
        }
        let at = 123 * 4096;
        let (_, found) = scrub_all(&store, &mut |places| {
            assert_eq!(places, [Place::Image(digest, at), Place::Volume(volume, at)]);
            Some(block(124))
        });
        assert!(found.len() == 1 && found[0].repaired);
        clone.read_at(at, &mut buf).unwrap();
        assert_eq!(buf, *block(124));
        assert_eq!(scrub_all(&store, &mut |_| panic!("nothing is damaged")), (300, vec![]));
        assert!(store.audit().is_exact());
    }

    #[test]
    fn a_damaged_block_may_be_brought_later() {
        let (store, digest, volume) = store();
        damage(&store, &digest, 9);
        let found = scrub_all(&store, &mut |_| None).1.remove(0);
        assert!(store.is_still_damaged(&found));
        assert!(!store.repair(&found, &block(9)), "not the one");
        assert!(store.repair(&found, &block(10)));
        assert!(!store.is_still_damaged(&found) && !store.repair(&found, &block(10)));
        damage(&store, &digest, 9);
        let found = scrub_all(&store, &mut |_| None).1.remove(0);
        store.delete_volume(volume).unwrap();
        store.drop_image(&digest).unwrap();
        assert!(!store.is_still_damaged(&found), "nobody has it any more");
    }

    #[test]
    fn a_damaged_block_that_is_written_anew_is_whole_again_for_who_wrote_it() {
        let (store, digest, volume) = store();
        damage(&store, &digest, 7);
        scrub_all(&store, &mut |_| None);
        let clone = store.volume(volume).unwrap();
        clone.write_at(7 * 4096, &*block(8), WriteFlags::default()).unwrap();
        let mut buf = [0; BLOCK];
        clone.read_at(7 * 4096, &mut buf).unwrap();
        assert_eq!(buf, *block(8));
        assert_eq!(store.image(&digest).unwrap().read_at(7 * 4096, &mut buf).unwrap_err().kind(), BlockErrorKind::Io);
        let part = clone.write_at(6 * 4096 + 5, b"part", WriteFlags::default());
        assert!(part.is_ok(), "{part:?}");
        assert!(store.audit().is_exact(), "{:?}", store.audit().faults);
        store.delete_volume(volume).unwrap();
        drop(clone);
        store.drop_image(&digest).unwrap();
        assert_eq!((store.stats().damaged_blocks, store.stats().unique_blocks), (0, 0));
    }
}
