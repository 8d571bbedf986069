//! A small NBD client over a unix socket, the same for every server that is measured: one request at a time, simple
//! replies, no thread. What a server does not offer is answered here: see [`Client::request`].

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use muster_export::protocol::{
    INIT_MAGIC, OPTION_MAGIC, REQUEST_LEN, REQUEST_MAGIC, SIMPLE_REPLY_LEN, SIMPLE_REPLY_MAGIC, client_flag, command,
    command_flag, option, transmission_flag,
};
use muster_export::trace::Kind;

/// A server that does not answer for so long is an error, not a slow server.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Client {
    stream: UnixStream,
    pub size: u64,
    flags: u16,
    cookie: u64,
    zeroes: Vec<u8>,
}

impl Client {
    /// Connects as soon as somebody listens.
    pub fn connect(socket: &Path, export: &str, wait: Duration) -> Result<Client> {
        let deadline = Instant::now() + wait;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Client::negotiate(stream, export).context("negotiate"),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("connect to {}", socket.display()));
                }
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn negotiate(mut stream: UnixStream, export: &str) -> Result<Client> {
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
        Ok(Client { stream, size, flags, cookie: 0, zeroes: Vec::new() })
    }

    /// One request, to its answer. Read into `buffer`, written from it; the other kinds leave it alone. Where the server
    /// has no zeroing, zeroes are written; where it has no trim or flush, nothing is sent and `false` returned.
    pub fn request(&mut self, kind: Kind, fua: bool, offset: u64, buffer: &mut [u8]) -> Result<bool> {
        let has = |flag| self.flags & flag != 0;
        let order = match kind {
            Kind::Read => command::READ,
            Kind::Write => command::WRITE,
            Kind::Flush if has(transmission_flag::SEND_FLUSH) => command::FLUSH,
            Kind::Trim if has(transmission_flag::SEND_TRIM) => command::TRIM,
            Kind::WriteZeroes if has(transmission_flag::SEND_WRITE_ZEROES) => command::WRITE_ZEROES,
            Kind::WriteZeroes => command::WRITE,
            Kind::Flush | Kind::Trim => return Ok(false),
        };
        let fua = fua && has(transmission_flag::SEND_FUA);
        self.cookie += 1;
        let mut header = [0; REQUEST_LEN];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&(if fua { command_flag::FUA } else { 0 }).to_be_bytes());
        header[6..8].copy_from_slice(&order.to_be_bytes());
        header[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..28].copy_from_slice(&u32::try_from(buffer.len())?.to_be_bytes());
        self.stream.write_all(&header)?;
        if order == command::WRITE && kind == Kind::WriteZeroes {
            self.zeroes.resize(buffer.len(), 0);
            self.stream.write_all(&self.zeroes)?;
        } else if order == command::WRITE {
            self.stream.write_all(buffer)?;
        }
        let mut reply = [0; SIMPLE_REPLY_LEN];
        self.stream.read_exact(&mut reply)?;
        ensure!(reply[..4] == SIMPLE_REPLY_MAGIC.to_be_bytes() && reply[8..] == header[8..16], "not the reply");
        ensure!(reply[4..8] == [0; 4], "{kind:?} of {} bytes at {offset}: error {:?}", buffer.len(), &reply[4..8]);
        if kind == Kind::Read {
            self.stream.read_exact(buffer)?;
        }
        Ok(true)
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
