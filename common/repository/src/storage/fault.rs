//! A storage that breaks at a chosen step: the twin for crash tests.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::{MemoryStorage, Storage, StorageError};

/// How the step breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Power is lost before the step took effect; every later call fails.
    CrashBefore,
    /// Power is lost after the step took effect, but nobody was told; every later call fails.
    CrashAfter,
    /// Only this step fails (disk full, an I/O error); later ones work.
    FailOnce,
}

/// Counts the steps that change something (`put`, `delete`) and breaks at one of them. What is below, in
/// [`FaultStorage::surviving`], is what a restart finds.
pub struct FaultStorage {
    below: Arc<MemoryStorage>,
    steps: AtomicU64,
    at: u64,
    fault: Fault,
}

impl FaultStorage {
    /// Breaks at step `at` (the first is 0); `u64::MAX` never breaks and just counts.
    pub fn new(below: Arc<MemoryStorage>, at: u64, fault: Fault) -> Self {
        Self { below, steps: AtomicU64::new(0), at, fault }
    }

    /// How many changing steps were asked for.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::SeqCst)
    }

    /// True when the step to break at was reached.
    pub fn is_broken(&self) -> bool {
        self.steps() > self.at
    }

    /// What a restart finds.
    pub fn surviving(&self) -> Arc<MemoryStorage> {
        self.below.clone()
    }

    fn change(&self, act: impl Fn() -> Result<(), StorageError>) -> Result<(), StorageError> {
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        let injected = Err(StorageError::Injected { step });
        match self.fault {
            _ if step < self.at => act(),
            Fault::CrashAfter if step == self.at => {
                act()?;
                injected
            }
            Fault::FailOnce if step > self.at => act(),
            _ => injected,
        }
    }

    fn look<T>(&self, act: impl Fn() -> Result<T, StorageError>) -> Result<T, StorageError> {
        if self.is_broken() && self.fault != Fault::FailOnce {
            return Err(StorageError::Injected { step: self.steps() });
        }
        act()
    }
}

impl Storage for FaultStorage {
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), StorageError> {
        self.change(|| self.below.put(key, bytes))
    }
    fn get(&self, key: &str) -> Result<Vec<u8>, StorageError> {
        self.look(|| self.below.get(key))
    }
    fn get_range(&self, key: &str, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        self.look(|| self.below.get_range(key, offset, len))
    }
    fn len(&self, key: &str) -> Result<u64, StorageError> {
        self.look(|| self.below.len(key))
    }
    fn list(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        self.look(|| self.below.list(prefix))
    }
    fn delete(&self, key: &str) -> Result<(), StorageError> {
        self.change(|| self.below.delete(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_storage_that_never_breaks_conforms() {
        crate::storage::conformance::run(|| {
            Arc::new(FaultStorage::new(Arc::new(MemoryStorage::new()), u64::MAX, Fault::CrashBefore))
        });
    }

    #[test]
    fn a_crash_before_leaves_the_old_object_and_a_crash_after_the_new_one() {
        for (fault, survives) in [(Fault::CrashBefore, &b"old"[..]), (Fault::CrashAfter, b"new")] {
            let storage = FaultStorage::new(Arc::new(MemoryStorage::new()), 1, fault);
            storage.put("x", b"old").unwrap();
            storage.put("x", b"new").unwrap_err();
            storage.get("x").unwrap_err();
            assert_eq!(storage.surviving().get("x").unwrap(), survives);
        }
    }
}
