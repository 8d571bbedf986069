//! Work that outlives the order it belongs to: an order that is given up is dropped where it stands, and what must not be
//! left half done (the undo of a create, the thaw of a guest) goes on here, until it has ended or the agent stops.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use muster_common::VmId;
use parking_lot::Mutex;
use tokio::task::JoinSet;

/// What was tried in vain is tried again after this long, then after twice as long, and so on.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// A hypervisor or guest that is away for hours is asked twice a minute.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What is at work on a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Care {
    /// Making it, or taking away what was made.
    Build,
    /// Freezing its file systems, or thawing them again.
    Freeze,
}

/// The tasks; joined by [`Aftercare::finish`].
#[derive(Default)]
pub struct Aftercare {
    tasks: Mutex<JoinSet<()>>,
    held: Arc<Mutex<BTreeSet<(VmId, Care)>>>,
}

/// Nobody else does the same to the VM until this is dropped.
pub struct Held {
    held: Arc<Mutex<BTreeSet<(VmId, Care)>>>,
    what: (VmId, Care),
}

impl Drop for Held {
    fn drop(&mut self) {
        self.held.lock().remove(&self.what);
    }
}

impl Aftercare {
    /// `None`: an earlier order's work on it has not ended.
    pub fn hold(&self, vm: VmId, care: Care) -> Option<Held> {
        let what = (vm, care);
        self.held.lock().insert(what).then(|| Held { held: Arc::clone(&self.held), what })
    }

    /// Runs it beside the order.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        while let Some(ended) = tasks.try_join_next() {
            complain(ended);
        }
        tasks.spawn(work);
    }

    /// Waits for all of it, for as long as `grace`; what has not ended by then is cut off.
    pub async fn finish(&self, grace: Duration) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        let until = tokio::time::Instant::now() + grace;
        while let Ok(Some(ended)) = tokio::time::timeout_at(until, tasks.join_next()).await {
            complain(ended);
        }
        if !tasks.is_empty() {
            tracing::warn!(tasks = tasks.len(), "stopping with work of ended orders undone");
        }
        tasks.shutdown().await;
    }
}

fn complain(ended: Result<(), tokio::task::JoinError>) {
    if let Err(e) = ended
        && e.is_panic()
    {
        tracing::error!(err = %e, "work of an ended order panicked");
    }
}

/// Pauses between attempts, each twice as long as the one before, up to a limit.
pub struct Pauses(Duration);

impl Pauses {
    pub fn new() -> Self {
        Self(FIRST_PAUSE)
    }

    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST_PAUSE);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stay_bounded() {
        let mut pauses = Pauses::new();
        let all: Vec<Duration> = (0..20).map(|_| pauses.next()).collect();
        assert_eq!((all[0], all[1], all[19]), (FIRST_PAUSE, FIRST_PAUSE * 2, LONGEST_PAUSE));
    }

    #[tokio::test]
    async fn what_runs_is_joined_and_what_hangs_is_cut_off() {
        let care = Aftercare::default();
        let (sender, mut receiver) = tokio::sync::oneshot::channel();
        care.spawn(async move {
            tokio::task::yield_now().await;
            let _ = sender.send(());
        });
        care.finish(Duration::from_secs(5)).await;
        receiver.try_recv().unwrap();

        let vm = VmId::random();
        let held = care.hold(vm, Care::Build).unwrap();
        assert!(care.hold(vm, Care::Build).is_none());
        care.spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        care.finish(Duration::ZERO).await;
        assert!(care.hold(vm, Care::Build).is_some());
    }
}
