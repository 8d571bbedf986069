//! Finds the block that belongs into a damaged frame, and has the store put it there.
//!
//! Asked in this order: the image repository of a controller, for the images that have the block and for those that the
//! volumes which have it were made from; then the backups in this host's own backup directory, the newest first. What is
//! found is right when the store says so: chunks are verified by their digests, and the block by the tag of the frame.

use std::fmt;

use muster_common::{Chain, Digest, VolumeId};
use muster_store::{Damage, Place};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{host::Host, images::PullError};

const BLOCK: usize = 4096;
/// Images asked for one block: they are all likely to have it, or none.
const MOST_IMAGES: usize = 8;
/// Volumes whose backups are looked through for one block, and contents tried of each.
const MOST_VOLUMES: usize = 8;
const MOST_VERSIONS: usize = 8;

/// Who had the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Repository,
    Backup,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Repository => "the image repository",
            Self::Backup => "a backup",
        })
    }
}

/// One round of looking: a controller that could not be reached is not asked again in it. Blocks its thread; not for one of
/// the runtime's.
pub struct Search<'a> {
    host: &'a Host,
    runtime: &'a Handle,
    stop: &'a CancellationToken,
    repository: Option<String>,
}

impl<'a> Search<'a> {
    pub fn new(host: &'a Host, runtime: &'a Handle, stop: &'a CancellationToken) -> Self {
        // images are everybody's: any controller will do, the one heard last
        Self { host, runtime, stop, repository: host.source_for("") }
    }

    /// Repairs the frame; `None` when nobody has the block or `stop` came.
    pub fn repair(&mut self, damage: &Damage) -> Option<Source> {
        let host = self.host;
        let store = &host.volumes.store;
        let fits = |bytes: Vec<u8>| whole(bytes).is_some_and(|block| store.repair(damage, &block));
        for (digest, offset) in self.images(&damage.places) {
            if self.ask_repository(digest, offset).is_some_and(fits) {
                return Some(Source::Repository);
            }
        }
        for (volume, offset) in self.volumes(&damage.places) {
            if self.ask_backups(volume, offset).into_iter().any(fits) {
                return Some(Source::Backup);
            }
        }
        None
    }

    /// Where in images the block is, or was before somebody wrote over it.
    fn images(&self, places: &[Place]) -> Vec<(Digest, u64)> {
        let store = &self.host.volumes.store;
        let base = |(volume, offset): (VolumeId, u64)| Some((store.volume(volume)?.base()?, offset));
        let own = places.iter().filter_map(|place| match place {
            Place::Image(digest, offset) => Some((*digest, *offset)),
            Place::Volume(..) | Place::Snapshot(..) => None,
        });
        first_of(own.chain(self.of_volumes(places).filter_map(base)), MOST_IMAGES)
    }

    fn volumes(&self, places: &[Place]) -> Vec<(VolumeId, u64)> {
        first_of(self.of_volumes(places), MOST_VOLUMES)
    }

    fn of_volumes<'p>(&self, places: &'p [Place]) -> impl Iterator<Item = (VolumeId, u64)> + use<'p> {
        let kept = self.host.volumes.store.snapshots();
        places.iter().filter_map(move |place| match place {
            Place::Image(..) => None,
            Place::Volume(volume, offset) => Some((*volume, *offset)),
            Place::Snapshot(id, offset) => kept.iter().find(|kept| kept.id == *id).map(|kept| (kept.volume, *offset)),
        })
    }

    fn ask_repository(&mut self, digest: Digest, offset: u64) -> Option<Vec<u8>> {
        let source = self.repository.clone()?;
        let answer = self.runtime.block_on(async {
            tokio::select! {
                () = self.stop.cancelled() => Ok(None),
                answer = self.host.images.block(Some(source), digest, offset, BLOCK) => answer,
            }
        });
        match answer {
            Ok(block) => block,
            Err(e) => {
                tracing::warn!(image = %digest.short(), offset, err = %Chain(&e), "a damaged block was not fetched again");
                if matches!(e, PullError::Http { .. }) {
                    self.repository = None;
                }
                None
            }
        }
    }

    fn ask_backups(&self, volume: VolumeId, offset: u64) -> Vec<Vec<u8>> {
        let Ok(backups) = &self.host.backups else { return Vec::new() };
        if self.stop.is_cancelled() {
            return Vec::new();
        }
        backups.versions_of(volume, offset, BLOCK, MOST_VERSIONS).unwrap_or_else(|e| {
            tracing::warn!(vol = %volume, offset, err = %Chain(&e), "backups were not looked through for a damaged block");
            Vec::new()
        })
    }
}

/// The first few, each once.
fn first_of<T: PartialEq>(all: impl Iterator<Item = T>, most: usize) -> Vec<T> {
    let mut found = Vec::new();
    for one in all {
        if found.len() == most {
            break;
        }
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

/// The last block of an image whose size is no multiple of it is zeroes to its end.
fn whole(mut bytes: Vec<u8>) -> Option<Box<[u8; BLOCK]>> {
    bytes.resize(BLOCK, 0);
    bytes.into_boxed_slice().try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_an_image_is_filled_up_with_zeroes() {
        let block = whole(vec![7; 512]).unwrap();
        assert!(block[..512] == [7; 512] && block[512..] == [0; BLOCK - 512]);
    }

    #[test]
    fn each_place_is_asked_once_and_only_a_few_are() {
        assert_eq!(first_of([1, 1, 2, 1, 3, 4].into_iter(), 3), [1, 2, 3]);
    }
}
