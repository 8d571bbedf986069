//! Processes by number and start time, and waiting.

use std::fs;
use std::time::{Duration, Instant};

/// A process and when it started: a number alone may be somebody else's by now.
pub struct ProcessId {
    pub id: u32,
    started: u64,
}

impl ProcessId {
    pub fn of(id: u32) -> Option<ProcessId> {
        Some(ProcessId { id, started: start_time(id)? })
    }

    pub fn parse(text: &str) -> Option<ProcessId> {
        let (id, started) = text.trim().split_once(' ')?;
        Some(ProcessId { id: id.parse().ok()?, started: started.parse().ok()? })
    }

    pub fn is_alive(&self) -> bool {
        start_time(self.id) == Some(self.started)
    }
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.id, self.started)
    }
}

/// When a process started, in ticks since boot; None when it is gone or only waits to be buried.
fn start_time(id: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // the name may hold spaces and brackets: fields are counted after the last bracket
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if fields.first() == Some(&"Z") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// Waits until a condition holds; false when it did not in time.
pub fn wait_for(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_start() {
        let own = ProcessId::of(std::process::id()).expect("this process is alive");
        assert!(own.is_alive());
        let same = ProcessId::parse(&own.to_string()).expect("what was written can be read");
        assert!(same.is_alive());
        assert!(!ProcessId { id: own.id, started: own.started + 1 }.is_alive());
    }
}
