use std::collections::BTreeMap;

use parking_lot::RwLock;

use super::{Storage, StorageError, check_key};

/// Objects in memory: for tests, and the model the others are compared with.
#[derive(Default)]
pub struct MemoryStorage {
    objects: RwLock<BTreeMap<String, Vec<u8>>>,
}

impl MemoryStorage {
    pub fn new() -> Self {
        Self::default()
    }

    /// Flips bits of a stored object: `mask` is xored into the byte at `offset`. False when there is no such byte.
    pub fn damage(&self, key: &str, offset: usize, mask: u8) -> bool {
        match self.objects.write().get_mut(key).and_then(|o| o.get_mut(offset)) {
            Some(byte) => {
                *byte ^= mask;
                true
            }
            None => false,
        }
    }
}

impl Storage for MemoryStorage {
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), StorageError> {
        check_key(key)?;
        self.objects.write().insert(key.to_string(), bytes.to_vec());
        Ok(())
    }

    fn get(&self, key: &str) -> Result<Vec<u8>, StorageError> {
        check_key(key)?;
        self.objects.read().get(key).cloned().ok_or_else(|| StorageError::NotFound { key: key.to_string() })
    }

    fn get_range(&self, key: &str, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        check_key(key)?;
        let objects = self.objects.read();
        let object = objects.get(key).ok_or_else(|| StorageError::NotFound { key: key.to_string() })?;
        let range = usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(len)?));
        range.and_then(|r| object.get(r)).map(<[u8]>::to_vec).ok_or_else(|| StorageError::OutOfRange {
            key: key.to_string(),
            need: offset.saturating_add(len as u64),
            have: object.len() as u64,
        })
    }

    fn len(&self, key: &str) -> Result<u64, StorageError> {
        check_key(key)?;
        let objects = self.objects.read();
        objects.get(key).map(|o| o.len() as u64).ok_or_else(|| StorageError::NotFound { key: key.to_string() })
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        Ok(self.objects.read().keys().filter(|k| k.starts_with(prefix)).cloned().collect())
    }

    fn delete(&self, key: &str) -> Result<(), StorageError> {
        check_key(key)?;
        self.objects.write().remove(key);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn memory_storage_conforms() {
        crate::storage::conformance::run(|| Arc::new(MemoryStorage::new()));
    }
}
