//! How much an export may do a second: two token buckets, one counts requests and one bytes.
//!
//! A bucket fills at its rate and holds [`Limits::burst`] worth of it. A request is admitted while a bucket is not
//! empty and may take it below empty, so one request larger than the bucket passes too and those behind it wait longer.
//! Off, it costs one load.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// What an export may do. The default is everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Requests a second, of every kind but flush.
    pub requests_per_second: Option<NonZeroU64>,
    /// Bytes read and written a second. Trimmed and zeroed ones do not count.
    pub bytes_per_second: Option<NonZeroU64>,
    /// What was not used may be used later, up to what this time is worth.
    pub burst: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        // A tenth of a second: a desktop that was idle opens a program at full speed, and no second is twice as busy.
        Limits { requests_per_second: None, bytes_per_second: None, burst: Duration::from_millis(100) }
    }
}

impl Limits {
    fn are_off(&self) -> bool {
        self.requests_per_second.is_none() && self.bytes_per_second.is_none()
    }
}

/// The buckets of one export. Times are nanoseconds since `start`.
#[derive(Debug)]
pub(crate) struct Throttle {
    on: AtomicBool,
    start: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    limits: Limits,
    /// When each bucket is full, if nothing more is taken. Requests, bytes.
    full_at: [u64; 2],
}

impl Default for Throttle {
    fn default() -> Throttle {
        Throttle { on: AtomicBool::new(false), start: Instant::now(), state: Mutex::default(), changed: Condvar::new() }
    }
}

impl State {
    /// Takes what a request costs, or says how long to wait. Decides without a clock: `now` comes from the caller.
    fn admit(&mut self, now: u64, bytes: u64) -> Result<(), u64> {
        let burst = duration_ns(self.limits.burst);
        let rates = [(self.limits.requests_per_second, 1), (self.limits.bytes_per_second, bytes)];
        let wait = rates
            .iter()
            .zip(self.full_at)
            .filter(|((rate, amount), _)| rate.is_some() && *amount > 0)
            .map(|(_, full_at)| full_at.saturating_sub(now.saturating_add(burst)))
            .max();
        if let Some(wait @ 1..) = wait {
            return Err(wait);
        }
        for ((rate, amount), full_at) in rates.into_iter().zip(&mut self.full_at) {
            if let Some(rate) = rate {
                let cost = u128::from(amount) * 1_000_000_000 / u128::from(rate.get());
                *full_at = (*full_at).max(now).saturating_add(u64::try_from(cost).unwrap_or(u64::MAX));
            }
        }
        Ok(())
    }
}

impl Throttle {
    /// From now on these limits hold, also for who waits already.
    pub(crate) fn set(&self, limits: Limits) {
        let mut state = self.state.lock();
        *state = State { limits, full_at: [duration_ns(self.start.elapsed()); 2] };
        self.on.store(!limits.are_off(), Ordering::Release);
        self.changed.notify_all();
    }

    pub(crate) fn limits(&self) -> Limits {
        self.state.lock().limits
    }

    /// Admits a request of that many bytes, or says how long to wait before asking again.
    #[inline]
    pub(crate) fn admit(&self, now: Instant, bytes: u64) -> Result<(), Duration> {
        if !self.on.load(Ordering::Acquire) {
            return Ok(());
        }
        let now = duration_ns(now.saturating_duration_since(self.start));
        self.state.lock().admit(now, bytes).map_err(Duration::from_nanos)
    }

    /// The same for who does not know what time it is: off, nobody looks at a clock.
    #[inline]
    pub(crate) fn admit_now(&self, bytes: u64) -> bool {
        !self.on.load(Ordering::Acquire) || self.admit(Instant::now(), bytes).is_ok()
    }

    /// Waits until a request of that many bytes is admitted; `give_up` is asked at least ten times a second.
    pub(crate) fn wait(&self, bytes: u64, give_up: impl Fn() -> bool) {
        if !self.on.load(Ordering::Acquire) {
            return;
        }
        let mut state = self.state.lock();
        while !give_up() {
            let now = duration_ns(self.start.elapsed());
            let Err(wait) = state.admit(now, bytes) else { break };
            let wait = Duration::from_nanos(wait).min(Duration::from_millis(100));
            self.changed.wait_for(&mut state, wait);
        }
    }
}

fn duration_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn state(requests: u64, bytes: u64, burst: Duration) -> State {
        let limits =
            Limits { requests_per_second: NonZeroU64::new(requests), bytes_per_second: NonZeroU64::new(bytes), burst };
        State { limits, full_at: [0; 2] }
    }

    /// Requests admitted in `[from, to)` by a client that always asks again when it may.
    fn admitted(state: &mut State, from: u64, to: u64, bytes: u64) -> u64 {
        let (mut now, mut count) = (from, 0);
        while now < to {
            match state.admit(now, bytes) {
                Ok(()) => count += 1,
                Err(wait) => now += wait,
            }
        }
        count
    }

    #[test]
    fn a_greedy_client_gets_the_rate_and_at_first_the_burst() {
        let mut state = state(1000, 0, Duration::from_millis(100));
        let first = admitted(&mut state, 0, SECOND, 4096);
        assert!((1095..=1105).contains(&first), "{first}");
        let second = admitted(&mut state, SECOND, 2 * SECOND, 4096);
        assert!((995..=1005).contains(&second), "{second}");
        // idle time is worth no more than the burst
        let third = admitted(&mut state, 10 * SECOND, 11 * SECOND, 4096);
        assert!((1095..=1105).contains(&third), "{third}");
    }

    #[test]
    fn the_tighter_of_the_two_limits_holds() {
        let mut state = state(1_000_000, 4096 * 500, Duration::ZERO);
        let count = admitted(&mut state, 0, SECOND, 4096);
        assert!((498..=502).contains(&count), "{count}");
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_those_behind_it_wait() {
        let mut state = state(0, 1 << 20, Duration::from_millis(10));
        assert_eq!(state.admit(0, 4 << 20), Ok(()));
        let wait = state.admit(0, 1).unwrap_err();
        assert_eq!(wait, 4 * SECOND - 10_000_000);
        assert_eq!(state.admit(wait, 1), Ok(()));
        assert_eq!(state.admit(0, 0), Ok(()), "what moves no bytes does not wait for bytes");
    }

    #[test]
    fn lifting_the_limits_lets_a_waiting_request_go() {
        let throttle = std::sync::Arc::new(Throttle::default());
        let one_a_year = NonZeroU64::new(1);
        throttle.set(Limits { bytes_per_second: one_a_year, ..Limits::default() });
        assert_eq!(throttle.admit(Instant::now(), 1 << 40), Ok(()));
        assert!(throttle.admit(Instant::now(), 1).is_err());
        let waiting = std::thread::spawn({
            let throttle = std::sync::Arc::clone(&throttle);
            move || throttle.wait(1, || false)
        });
        throttle.set(Limits::default());
        waiting.join().expect("it comes back");
        throttle.wait(1 << 40, || false);
        assert!(throttle.admit_now(1 << 40), "nothing to wait for");
    }
}
