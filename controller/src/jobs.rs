//! Long work in the controller: what is running, how far it is, what came of it. In memory: a restart ends it, and what an
//! interrupted import left in the repository goes with the next prune.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use muster_api::{Job, JobState};
use muster_common::{Clock, ErrorCode};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::refusal::Refusal;

/// Jobs that have ended are shown so many.
const KEPT: usize = 200;

/// All jobs of this run. Cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    jobs: Arc<Mutex<BTreeMap<String, watch::Sender<Job>>>>,
    clock: Arc<dyn Clock>,
}

/// The worker's end of a job. Dropped without an end, the job has failed.
pub struct Work {
    sender: watch::Sender<Job>,
    clock: Arc<dyn Clock>,
    /// Told by each progress whether the work is still wanted.
    alive: Weak<Mutex<BTreeMap<String, watch::Sender<Job>>>>,
}

impl Jobs {
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { jobs: Arc::default(), clock }
    }

    pub fn begin(&self, kind: &str, subject: &str) -> (Job, Work) {
        let job = Job {
            // ids sort by time of beginning
            id: uuid::Uuid::now_v7().to_string(),
            kind: kind.to_string(),
            subject: subject.to_string(),
            state: JobState::Running,
            phase: "starting".to_string(),
            done: 0,
            total: 0,
            result: None,
            problem: None,
            started_at_us: self.clock.now_us(),
            ended_at_us: 0,
            version: 1,
        };
        let (sender, _) = watch::channel(job.clone());
        let mut jobs = self.jobs.lock();
        jobs.insert(job.id.clone(), sender.clone());
        while jobs.len() > KEPT {
            let ended = jobs.iter().find(|(_, s)| s.borrow().state != JobState::Running).map(|(id, _)| id.clone());
            match ended {
                Some(id) => jobs.remove(&id),
                None => break,
            };
        }
        let work = Work { sender, clock: self.clock.clone(), alive: Arc::downgrade(&self.jobs) };
        (job, work)
    }

    pub fn all(&self) -> Vec<Job> {
        self.jobs.lock().values().map(|sender| sender.borrow().clone()).collect()
    }

    /// A job, to look at and to follow.
    pub fn follow(&self, id: &str) -> Result<watch::Receiver<Job>, Refusal> {
        self.jobs
            .lock()
            .get(id)
            .map(watch::Sender::subscribe)
            .ok_or_else(|| Refusal::new(ErrorCode::NotFound, format!("no job {id}")))
    }
}

impl Work {
    pub fn progress(&self, phase: &str, done: u64, total: u64) {
        self.sender.send_modify(|job| {
            job.phase = phase.to_string();
            job.done = done;
            job.total = total;
            job.version += 1;
        });
    }

    /// False when the controller is going down.
    pub fn is_wanted(&self) -> bool {
        self.alive.strong_count() > 0
    }

    pub fn end(self, result: Result<serde_json::Value, Refusal>) {
        let now_us = self.clock.now_us();
        self.sender.send_modify(|job| {
            job.ended_at_us = now_us;
            job.version += 1;
            match result {
                Ok(value) => {
                    job.state = JobState::Done;
                    job.phase = "done".to_string();
                    job.result = Some(value);
                }
                Err(refusal) => {
                    job.state = JobState::Failed;
                    job.problem = Some(refusal.into_problem());
                }
            }
        });
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let now_us = self.clock.now_us();
        self.sender.send_if_modified(|job| {
            if job.state != JobState::Running {
                return false;
            }
            let lost = Refusal::new(ErrorCode::Internal, format!("{} ended without a result", job.kind));
            job.state = JobState::Failed;
            job.problem = Some(lost.into_problem());
            job.ended_at_us = now_us;
            job.version += 1;
            true
        });
    }
}
