//! What an export did, counted where it happens: libvirt cannot count every kind of disk, so the export does.
//!
//! Latency is the time from receiving a request's last needed byte (over vhost-user: from seeing it in its queue) to its
//! reply being ready, waiting behind earlier requests of the same connection or queue included, and waiting for a
//! limit or for space too; the time on the socket is not ours to see.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Buckets of a latency histogram. Bucket `i` counts latencies in `[2^i, 2^(i+1))` ns; the first also takes 0, the last
/// everything above 2^35 ns (34 s).
pub const BUCKETS: usize = 36;

/// What was asked for. The number is the index into [`Statistics`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Read.
    Read = 0,
    /// Write.
    Write = 1,
    /// Flush.
    Flush = 2,
    /// Trim.
    Trim = 3,
    /// Write zeroes.
    WriteZeroes = 4,
    /// Block status.
    BlockStatus = 5,
    /// Prefetch.
    Cache = 6,
}

impl Operation {
    /// Every operation, in the order of their numbers.
    pub const ALL: [Operation; 7] = [
        Operation::Read,
        Operation::Write,
        Operation::Flush,
        Operation::Trim,
        Operation::WriteZeroes,
        Operation::BlockStatus,
        Operation::Cache,
    ];
}

/// Counters of one export, shared by its sessions. Every counter is exact; a snapshot taken meanwhile may see one
/// counter of a request and not yet another.
#[derive(Debug, Default)]
pub struct Statistics {
    operations: [Counter; Operation::ALL.len()],
    in_flight: AtomicU64,
    throttled: AtomicU64,
    throttled_ns: AtomicU64,
}

#[derive(Debug, Default)]
struct Counter {
    bytes: AtomicU64,
    errors: AtomicU64,
    total_ns: AtomicU64,
    // The number of requests is the sum of the histogram: one atomic less per request.
    histogram: Histogram,
}

#[derive(Debug)]
struct Histogram([AtomicU64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Histogram(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// The bucket of a latency.
pub fn bucket(latency: Duration) -> usize {
    let ns = latency.as_nanos().min(u128::from(u64::MAX)) as u64;
    (63 - (ns | 1).leading_zeros() as usize).min(BUCKETS - 1)
}

impl Statistics {
    /// Counts one finished request.
    pub fn record(&self, operation: Operation, bytes: u64, latency: Duration, failed: bool) {
        let counter = &self.operations[operation as usize];
        if failed {
            counter.errors.fetch_add(1, Relaxed);
        } else if bytes > 0 {
            counter.bytes.fetch_add(bytes, Relaxed);
        }
        counter.total_ns.fetch_add(latency.as_nanos() as u64, Relaxed);
        counter.histogram.0[bucket(latency)].fetch_add(1, Relaxed);
    }

    /// Requests were received.
    pub fn began(&self, requests: u64) {
        self.in_flight.fetch_add(requests, Relaxed);
    }

    /// Requests that began were answered or given up.
    pub fn ended(&self, requests: u64) {
        self.in_flight.fetch_sub(requests, Relaxed);
    }

    /// A request has to wait for a limit.
    pub fn throttled(&self) {
        self.throttled.fetch_add(1, Relaxed);
    }

    /// Such a request has its turn, or was given up.
    pub fn was_throttled(&self, waited: Duration) {
        self.throttled_ns.fetch_add(waited.as_nanos() as u64, Relaxed);
    }

    /// The counters now.
    pub fn snapshot(&self) -> ExportStatistics {
        ExportStatistics {
            in_flight: self.in_flight.load(Relaxed),
            throttled: self.throttled.load(Relaxed),
            throttled_time: Duration::from_nanos(self.throttled_ns.load(Relaxed)),
            waiting_for_space: false,
            operations: std::array::from_fn(|index| {
                let counter = &self.operations[index];
                let histogram: [u64; BUCKETS] = std::array::from_fn(|bucket| counter.histogram.0[bucket].load(Relaxed));
                OperationStatistics {
                    requests: histogram.iter().sum(),
                    bytes: counter.bytes.load(Relaxed),
                    errors: counter.errors.load(Relaxed),
                    total: Duration::from_nanos(counter.total_ns.load(Relaxed)),
                    histogram,
                }
            }),
        }
    }
}

/// A snapshot of the counters of an export since it was added.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportStatistics {
    /// Requests received and not yet answered.
    pub in_flight: u64,
    /// Requests that had to wait for the export's limits.
    pub throttled: u64,
    /// How long they waited for them, all together.
    pub throttled_time: Duration,
    /// A write waits until the store has room for it; see [`Export::waiting_for_space`](crate::Export::waiting_for_space).
    pub waiting_for_space: bool,
    operations: [OperationStatistics; Operation::ALL.len()],
}

impl ExportStatistics {
    /// The counters of one kind of request.
    pub fn of(&self, operation: Operation) -> &OperationStatistics {
        &self.operations[operation as usize]
    }
}

/// The counters of one kind of request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OperationStatistics {
    /// Finished requests, failed ones included.
    pub requests: u64,
    /// Bytes of the successful ones.
    pub bytes: u64,
    /// Failed ones.
    pub errors: u64,
    /// Sum of the latencies.
    pub total: Duration,
    /// Latencies; see [`BUCKETS`].
    pub histogram: [u64; BUCKETS],
}

impl OperationStatistics {
    /// What came since an earlier snapshot of the same counters.
    #[must_use]
    pub fn since(&self, earlier: &OperationStatistics) -> OperationStatistics {
        OperationStatistics {
            requests: self.requests.saturating_sub(earlier.requests),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            errors: self.errors.saturating_sub(earlier.errors),
            total: self.total.saturating_sub(earlier.total),
            histogram: std::array::from_fn(|bucket| self.histogram[bucket].saturating_sub(earlier.histogram[bucket])),
        }
    }

    /// Upper bound of the bucket that holds the given fraction (0 to 1) of the requests; `None` without requests.
    pub fn quantile(&self, fraction: f64) -> Option<Duration> {
        let wanted = (self.requests as f64 * fraction.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.histogram.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Some(Duration::from_nanos(1 << (index + 1)));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_and_the_ends_take_the_rest() {
        for (ns, expected) in [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (1023, 9), (1024, 10), (u64::MAX, BUCKETS - 1)] {
            assert_eq!(bucket(Duration::from_nanos(ns)), expected, "{ns} ns");
        }
    }

    #[test]
    fn a_snapshot_holds_what_was_recorded() {
        let statistics = Statistics::default();
        for _ in 0..99 {
            statistics.record(Operation::Read, 4096, Duration::from_nanos(1000), false);
        }
        statistics.record(Operation::Read, 4096, Duration::from_micros(1000), true);
        let snapshot = statistics.snapshot();
        let reads = snapshot.of(Operation::Read);
        assert_eq!((reads.requests, reads.errors, reads.bytes), (100, 1, 99 * 4096));
        assert_eq!(reads.quantile(0.5), Some(Duration::from_nanos(1024)));
        assert_eq!(reads.quantile(1.0), Some(Duration::from_nanos(1 << 20)));
        assert_eq!(snapshot.of(Operation::Write).quantile(0.5), None);
        statistics.record(Operation::Read, 512, Duration::from_nanos(10), false);
        let later = statistics.snapshot().of(Operation::Read).since(reads);
        assert_eq!((later.requests, later.errors, later.bytes), (1, 0, 512));
        assert_eq!(later.quantile(1.0), Some(Duration::from_nanos(16)), "only what came since");
    }
}
