use std::sync::Arc;

use muster_common::{ByteLen, Digest};
use parking_lot::Mutex;

use crate::{
    error::RepositoryError,
    manifest::Manifest,
    repository::Repository,
    source::{ReadAt, SourceError, Span},
};

/// Reads an image out of a repository, from any thread. Every chunk is verified when it is read from the storage.
pub struct Reader {
    repository: Repository,
    manifest: Arc<Manifest>,
    /// The chunk read last: small sequential reads need each chunk once.
    last: Mutex<Option<(Digest, Arc<Vec<u8>>)>>,
}

impl Reader {
    pub(crate) fn new(repository: Repository, manifest: Arc<Manifest>) -> Self {
        Self { repository, manifest, last: Mutex::default() }
    }

    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    fn chunk(&self, digest: &Digest, len: usize) -> Result<Arc<Vec<u8>>, RepositoryError> {
        if let Some((last, bytes)) = &*self.last.lock()
            && last == digest
        {
            return Ok(bytes.clone());
        }
        let bytes = Arc::new(self.repository.read_chunk(digest)?);
        // the name fits its bytes; a manifest that uses it at a place of another length is wrong
        if bytes.len() != len {
            return Err(RepositoryError::Damaged { what: "manifest that names chunk", digest: *digest });
        }
        *self.last.lock() = Some((*digest, bytes.clone()));
        Ok(bytes)
    }
}

impl ReadAt for Reader {
    fn size(&self) -> ByteLen {
        self.manifest.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let size = self.manifest.size().0;
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(SourceError::OutOfRange { offset, len, size });
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = (at % crate::CHUNK_SIZE as u64) as usize;
            let part = (crate::CHUNK_SIZE - within).min(buf.len() - done);
            let target = &mut buf[done..done + part];
            match self.manifest.chunk_at(at) {
                None => target.fill(0),
                Some(chunk) => {
                    let bytes = self
                        .chunk(&chunk.digest, chunk.len)
                        .map_err(|source| SourceError::Read { offset: at, source: Box::new(source) })?;
                    target.copy_from_slice(&bytes[within..within + part]);
                }
            }
            done += part;
        }
        Ok(())
    }

    fn spans(&self, offset: u64, len: u64, out: &mut Vec<Span>) -> Result<(), SourceError> {
        let size = self.manifest.size().0;
        let stop = offset.saturating_add(len).min(size);
        let mut at = offset;
        while at < stop {
            let (data, end) = self.manifest.span_at(at);
            let end = end.min(stop);
            out.push(Span { len: end - at, zero: !data });
            at = end;
        }
        Ok(())
    }
}
