//! A small NBD client over a unix socket, the same for every server that is measured: one request at a time, simple
//! replies, no thread. What a server does not offer is said or done otherwise: see [`Client::begin`].

use std::{
    io::{Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use muster_export::protocol::{
    INIT_MAGIC, OPTION_MAGIC, REQUEST_LEN, REQUEST_MAGIC, SIMPLE_REPLY_LEN, SIMPLE_REPLY_MAGIC, client_flag, command,
    command_flag, option, transmission_flag,
};
use muster_export::trace::{Kind, Record};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{RecvFlags, recv},
};

/// A server that does not answer for so long is an error, not a slow server.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Client {
    stream: UnixStream,
    pub size: u64,
    flags: u16,
    cookie: u64,
    /// The reply, and the data of a read behind it.
    reply: Vec<u8>,
    /// How long the reply is to be, and how much of it has come.
    expected: usize,
    come: usize,
}

impl Client {
    /// Connects as soon as somebody listens.
    pub fn connect(socket: &Path, export: &str, longest: usize, wait: Duration) -> Result<Client> {
        let deadline = Instant::now() + wait;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Client::negotiate(stream, export, longest).context("negotiate"),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("connect to {}", socket.display()));
                }
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn negotiate(mut stream: UnixStream, export: &str, longest: usize) -> Result<Client> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(greeting[..8] == INIT_MAGIC.to_be_bytes() && greeting[8..16] == OPTION_MAGIC.to_be_bytes());
        let mut hello = (client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES).to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(option::EXPORT_NAME.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello)?;
        let mut size = [0; 8];
        let mut flags = [0; 2];
        stream.read_exact(&mut size)?;
        stream.read_exact(&mut flags)?;
        let (size, flags) = (u64::from_be_bytes(size), u16::from_be_bytes(flags));
        let reply = vec![0; SIMPLE_REPLY_LEN + longest];
        Ok(Client { stream, size, flags, cookie: 0, reply, expected: 0, come: 0 })
    }

    /// Sends a request, `data` with a write. Where the server has no zeroing, zeroes are written; where it has no trim or
    /// flush, nothing is sent and `false` returned.
    pub fn begin(&mut self, record: &Record, data: &[u8]) -> Result<bool> {
        let has = |flag| self.flags & flag != 0;
        let order = match record.kind {
            Kind::Read => command::READ,
            Kind::Write => command::WRITE,
            Kind::Flush if has(transmission_flag::SEND_FLUSH) => command::FLUSH,
            Kind::Trim if has(transmission_flag::SEND_TRIM) => command::TRIM,
            Kind::WriteZeroes if has(transmission_flag::SEND_WRITE_ZEROES) => command::WRITE_ZEROES,
            Kind::WriteZeroes => command::WRITE,
            Kind::Flush | Kind::Trim => return Ok(false),
        };
        let fua = record.fua && has(transmission_flag::SEND_FUA);
        let len = u32::try_from(record.len)?;
        self.cookie += 1;
        let mut header = [0; REQUEST_LEN];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&(if fua { command_flag::FUA } else { 0 }).to_be_bytes());
        header[6..8].copy_from_slice(&order.to_be_bytes());
        header[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        header[16..24].copy_from_slice(&record.offset.to_be_bytes());
        header[24..28].copy_from_slice(&len.to_be_bytes());
        self.stream.write_all(&header)?;
        if order == command::WRITE && record.kind == Kind::WriteZeroes {
            self.stream.write_all(&vec![0; len as usize])?;
        } else if order == command::WRITE {
            self.stream.write_all(data)?;
        }
        let data = if order == command::READ { len as usize } else { 0 };
        (self.expected, self.come) = (SIMPLE_REPLY_LEN + data, 0);
        Ok(true)
    }

    /// Takes what has come of the reply; `true` when it is whole.
    pub fn advance(&mut self) -> Result<bool> {
        let room = &mut self.reply[self.come..self.expected];
        match recv(&self.stream, room, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => bail!("the server hung up"),
            Ok((_, count)) => self.come += count,
            Err(rustix::io::Errno::AGAIN) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        if self.come < self.expected {
            return Ok(false);
        }
        let (head, cookie) = (&self.reply[..8], &self.reply[8..SIMPLE_REPLY_LEN]);
        ensure!(head[..4] == SIMPLE_REPLY_MAGIC.to_be_bytes() && cookie == self.cookie.to_be_bytes(), "not the reply");
        ensure!(head[4..] == [0; 4], "request {}: error {:?}", self.cookie, &head[4..]);
        Ok(true)
    }
}

impl Client {
    /// One request, to its answer: what was read.
    #[allow(dead_code, reason = "each bench uses its part")]
    pub fn ask(&mut self, kind: Kind, offset: u64, len: usize, data: &[u8]) -> Result<&[u8]> {
        let record = Record { at: Duration::ZERO, kind, fua: false, offset, len: len as u64 };
        if !self.begin(&record, data)? {
            return Ok(&[]);
        }
        while !self.advance()? {
            let mut answer = [PollFd::new(&self.stream, PollFlags::IN)];
            let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
            ensure!(poll(&mut answer, Some(&limit))? > 0, "no answer for {PATIENCE:?}");
        }
        Ok(&self.reply[SIMPLE_REPLY_LEN..self.expected])
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut header = [0; REQUEST_LEN];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[6..8].copy_from_slice(&command::DISC.to_be_bytes());
        // the server may be gone already
        let _ = self.stream.write_all(&header);
    }
}
