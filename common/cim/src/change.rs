//! When a sample is worth publishing.

use std::collections::{BTreeMap, BTreeSet};

use muster_idl::{
    Topic,
    v1::{PhysicalHost, StoreState, VirtualSystem},
};

/// Equality that looks past the time of sampling.
pub trait Material: Topic {
    fn same(&self, other: &Self) -> bool;
}

impl Material for PhysicalHost {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

impl Material for VirtualSystem {
    fn same(&self, other: &Self) -> bool {
        *self == VirtualSystem { sampled_at_us: self.sampled_at_us, ..other.clone() }
    }
}

impl Material for StoreState {
    fn same(&self, other: &Self) -> bool {
        *self == StoreState { sampled_at_us: self.sampled_at_us, ..other.clone() }
    }
}

/// What was last published of each instance, and when: a sample is due when it changed, and again every `refresh`
/// (transient-local depth counts per writer, so a late joiner may lack quiet instances until then).
#[derive(Debug)]
pub struct Changes<T: Material> {
    refresh_us: u64,
    last: BTreeMap<T::Key, (u64, T)>,
}

impl<T: Material> Changes<T> {
    pub fn new(refresh: std::time::Duration) -> Self {
        Self { refresh_us: refresh.as_micros() as u64, last: BTreeMap::new() }
    }

    /// True when the sample should be published now; remembers it as published then.
    pub fn due(&mut self, now_us: u64, sample: &T) -> bool {
        match self.last.get_mut(&sample.key()) {
            Some((at_us, old)) if old.same(sample) && now_us.saturating_sub(*at_us) < self.refresh_us => false,
            Some(entry) => {
                *entry = (now_us, sample.clone());
                true
            }
            None => {
                self.last.insert(sample.key(), (now_us, sample.clone()));
                true
            }
        }
    }

    /// Instances that are no longer among the present ones: to be disposed. Forgets them.
    pub fn gone(&mut self, present: &BTreeSet<T::Key>) -> Vec<T::Key> {
        let gone: Vec<T::Key> = self.last.keys().filter(|key| !present.contains(key)).cloned().collect();
        for key in &gone {
            self.last.remove(key);
        }
        gone
    }

    /// Publishes everything again at the next round: a publish failed, or a reader came.
    pub fn forget(&mut self) {
        self.last.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn vm(name: &str, state: u16, sampled_at_us: u64) -> VirtualSystem {
        VirtualSystem {
            host: "h".into(),
            vm: name.into(),
            incarnation: String::new(),
            name: name.into(),
            enabled_state: state,
            requested_state: 12,
            health_state: 5,
            operational_status: vec![2],
            guest_up: false,
            virtual_processors: 1,
            memory_bytes: 1 << 28,
            disks: vec![],
            template: String::new(),
            remark: String::new(),
            changed_at_us: 0,
            sampled_at_us,
        }
    }

    #[test]
    fn a_sample_is_due_on_change_and_after_the_refresh_time() {
        let mut changes = Changes::new(Duration::from_secs(5));
        assert!(changes.due(0, &vm("a", 3, 0)));
        assert!(!changes.due(1_000_000, &vm("a", 3, 1_000_000)), "only the time of sampling differs");
        assert!(changes.due(2_000_000, &vm("a", 2, 2_000_000)));
        assert!(!changes.due(6_999_999, &vm("a", 2, 6_999_999)));
        assert!(changes.due(7_000_000, &vm("a", 2, 7_000_000)));
    }

    #[test]
    fn an_instance_that_went_away_is_told_once() {
        let mut changes = Changes::new(Duration::from_secs(5));
        let (a, b) = (vm("a", 3, 0), vm("b", 3, 0));
        assert!(changes.due(0, &a) && changes.due(0, &b));
        assert_eq!(changes.gone(&[a.key()].into()), vec![b.key()]);
        assert!(changes.gone(&[a.key()].into()).is_empty());
        assert!(changes.due(1, &b), "new again when it comes back");
    }
}
