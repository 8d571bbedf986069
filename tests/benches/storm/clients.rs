//! The clients: one request at a time over NBD or over vhost-user-blk, for any server. All of a run are driven by one
//! thread that waits for whichever is answered ([`drive`]), so that none of them starves by the scheduler's choice.

use std::{
    collections::VecDeque,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use muster_export::trace::{Kind, Record};
use muster_tests::wait_for;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::{frontend, nbd};

const SECTOR: u64 = 512;
const BLOCK: usize = 4096;
/// A server that does not answer for so long is an error, not a slow server.
const PATIENCE_MS: i32 = 60_000;

/// Where a client connects.
#[derive(Clone, Debug)]
pub enum Place {
    Nbd { socket: PathBuf, export: String },
    VhostUser { socket: PathBuf },
}

/// A connected one. What it writes is noise, no block of it like any other's.
pub struct Client {
    noise: Vec<u8>,
    wire: Wire,
}

enum Wire {
    Nbd(nbd::Client),
    VhostUser { client: Box<frontend::Client>, flush_after: bool },
}

impl Client {
    /// For requests of at most `longest` bytes.
    pub fn connect(place: &Place, longest: usize, seed: u64, wait: Duration) -> Result<Client> {
        let mut noise = vec![0; longest];
        fill(&mut noise, seed);
        let wire = match place {
            Place::Nbd { socket, export } => Wire::Nbd(nbd::Client::connect(socket, export, longest, wait)?),
            Place::VhostUser { socket } => {
                wait_for("a vhost-user socket", wait, || Path::new(socket).exists().then_some(()));
                // one slot, of three descriptors
                let options = frontend::Options { queue_size: 4, slot_bytes: longest, ..Default::default() };
                let client = Box::new(frontend::Client::connect(socket, options));
                // a guest's memory is there, in a machine that has been running
                client.queues[0].lock().touch();
                Wire::VhostUser { client, flush_after: false }
            }
        };
        Ok(Client { noise, wire })
    }

    pub fn size(&self) -> u64 {
        match &self.wire {
            Wire::Nbd(client) => client.size,
            Wire::VhostUser { client, .. } => client.capacity(),
        }
    }

    /// Sends a request; `number` makes what it writes unlike all before. `false` when the server has no such request and
    /// none was sent.
    fn begin(&mut self, number: usize, record: &Record) -> Result<bool> {
        let len = record.len as usize;
        if record.kind == Kind::Write {
            stamp(&mut self.noise[..len], number as u32);
        }
        match &mut self.wire {
            Wire::Nbd(client) => {
                let data = if record.kind == Kind::Write { &self.noise[..len] } else { &[] };
                client.begin(record, data)
            }
            Wire::VhostUser { client, flush_after } => {
                let mut driver = client.queues[0].lock();
                let sector = record.offset / SECTOR;
                let slot = driver.slot().expect("one request at a time");
                match record.kind {
                    Kind::Read => driver.prepare(slot, frontend::READ, sector, len as u32),
                    Kind::Write => {
                        driver.put(driver.data(slot), &self.noise[..len]);
                        driver.prepare(slot, frontend::WRITE, sector, len as u32);
                    }
                    Kind::Flush => driver.prepare(slot, frontend::FLUSH, 0, 0),
                    Kind::Trim | Kind::WriteZeroes => {
                        let range = u128::from(sector) | u128::from(record.len / SECTOR) << 64;
                        driver.put(driver.data(slot), &range.to_le_bytes());
                        let kind = if record.kind == Kind::Trim { frontend::DISCARD } else { frontend::WRITE_ZEROES };
                        driver.prepare(slot, kind, 0, 16);
                    }
                }
                driver.want_call(true);
                driver.publish();
                // virtio-blk has no FUA: a guest flushes
                *flush_after = record.fua;
                Ok(true)
            }
        }
    }

    /// Takes what has come; `true` when that was the whole answer.
    fn advance(&mut self) -> Result<bool> {
        match &mut self.wire {
            Wire::Nbd(client) => client.advance(),
            Wire::VhostUser { client, flush_after } => {
                let mut driver = client.queues[0].lock();
                let _ = driver.call.read();
                let Some(done) = driver.take() else { return Ok(false) };
                ensure!(done.status == frontend::OK, "answered with status {}", done.status);
                if std::mem::take(flush_after) {
                    driver.prepare(done.slot, frontend::FLUSH, 0, 0);
                    let taken = driver.slot();
                    ensure!(taken == Some(done.slot), "the only slot");
                    driver.want_call(true);
                    driver.publish();
                    return Ok(false);
                }
                Ok(true)
            }
        }
    }

    fn register(&self, waiter: &Epoll, number: usize) -> Result<()> {
        let fd = match &self.wire {
            Wire::Nbd(client) => client.as_raw_fd(),
            Wire::VhostUser { client, .. } => client.queues[0].lock().call.as_raw_fd(),
        };
        Ok(waiter.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, number as u64))?)
    }
}

/// What came of one client's run.
pub struct Outcome {
    pub took: Duration,
    /// Nanoseconds of each request that was answered.
    pub latencies: Vec<u32>,
    /// How many requests were come to.
    pub reached: usize,
}

/// Has all the clients at once go through all the requests, each its next one when its last was answered; cut after
/// `limit`. The clients stay connected.
pub fn drive(clients: &mut [Client], requests: &[Record], limit: Duration) -> Result<Vec<Outcome>> {
    let waiter = Epoll::new()?;
    for (number, client) in clients.iter().enumerate() {
        client.register(&waiter, number)?;
    }
    let started = Instant::now();
    let mut outcomes: Vec<Outcome> = clients
        .iter()
        .map(|_| Outcome { took: Duration::ZERO, latencies: Vec::with_capacity(requests.len()), reached: 0 })
        .collect();
    let mut asked = vec![started; clients.len()];
    let mut ready: VecDeque<usize> = (0..clients.len()).collect();
    let mut running = clients.len();
    let mut events = [EpollEvent::default(); 64];
    while running > 0 {
        while let Some(n) = ready.pop_front() {
            let outcome = &mut outcomes[n];
            loop {
                let now = Instant::now();
                let next = requests.get(outcome.reached).filter(|_| now - started < limit);
                let Some(record) = next else {
                    outcome.took = now - started;
                    running -= 1;
                    break;
                };
                asked[n] = now;
                outcome.reached += 1;
                if clients[n].begin(outcome.reached, record)? {
                    break;
                }
            }
        }
        if running == 0 {
            break;
        }
        let count = waiter.wait(PATIENCE_MS, &mut events)?;
        ensure!(count > 0, "no answer for a minute");
        for event in &events[..count] {
            let n = event.data() as usize;
            if clients[n].advance()? {
                let took = asked[n].elapsed();
                outcomes[n].latencies.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
                ready.push_back(n);
            }
        }
    }
    Ok(outcomes)
}

/// No block is another's, of this client or of any.
fn stamp(data: &mut [u8], number: u32) {
    for block in data.chunks_mut(BLOCK) {
        let len = block.len().min(4);
        block[..len].copy_from_slice(&number.to_le_bytes()[..len]);
    }
}

/// Noise (xorshift).
fn fill(buffer: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in buffer.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
}
