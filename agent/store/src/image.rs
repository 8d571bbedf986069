//! Images, and how they are brought in.

use std::sync::Arc;

use muster_block::BlockError;
use muster_common::{ByteLen, Digest};

use crate::StoreError;

/// An immutable disk, read-only as a [`muster_block::BlockDevice`].
pub struct Image {}

#[allow(clippy::unimplemented, missing_docs)]
impl Image {
    pub fn digest(&self) -> Digest {
        unimplemented!()
    }
    pub fn name(&self) -> &str {
        unimplemented!()
    }
    pub fn size(&self) -> ByteLen {
        unimplemented!()
    }
}

/// An image being brought in. Dropping it gives its memory back.
pub struct ImageBuilder {}

#[allow(clippy::unimplemented, unused_variables, missing_docs)]
impl ImageBuilder {
    /// Any order, any threads at once; what is never written is zero.
    pub fn write_chunk(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        unimplemented!()
    }
    /// The image becomes visible to everybody.
    pub fn finish(self) -> Result<Arc<Image>, StoreError> {
        unimplemented!()
    }
}
