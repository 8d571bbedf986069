//! A server on a temporary socket, real clients, and a client that can misbehave.
#![allow(dead_code, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_block::BlockDevice;
use muster_export::protocol::{
    BASE_ALLOCATION, CHUNK_HEADER_LEN, OPTION_MAGIC, RequestHeader, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
    option, option_reply,
};
use muster_export::{NbdConfig, NbdServer, Registry};

/// The name every test export has: what the agent uses, volume and generation.
pub const NAME: &str = "0f4c9c2e-6f1f-4a5e-9d59-6b6f3a3f7d11.1";

/// A client program, or `None` when it is missing and `MUSTER_ALLOW_SKIP=1` allows that.
pub fn tool(program: &str, package: &str) -> Option<Command> {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()));
    if found {
        return Some(Command::new(program));
    }
    if std::env::var_os("MUSTER_ALLOW_SKIP").is_some_and(|value| value == "1") {
        eprintln!("SKIPPED: {program} is missing (apt install {package})");
        return None;
    }
    panic!("{program} is missing: apt install {package} (or set MUSTER_ALLOW_SKIP=1)");
}

/// Runs to the end; the exit status must be success.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().expect("the program was found above");
    assert!(
        output.status.success(),
        "{command:?} failed: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A server with one export on a socket in a temporary directory.
pub struct Served {
    pub directory: tempfile::TempDir,
    pub socket: PathBuf,
    pub registry: Arc<Registry>,
    pub server: Option<NbdServer>,
}

impl Served {
    pub fn new(device: Arc<dyn BlockDevice>) -> Served {
        Served::with(device, |_| {})
    }

    pub fn with(device: Arc<dyn BlockDevice>, change: impl FnOnce(&mut NbdConfig)) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd.sock");
        let registry = Arc::new(Registry::new());
        registry.add(NAME, device).unwrap();
        let mut config = NbdConfig::unix(&socket);
        change(&mut config);
        let server = NbdServer::start(config, registry.clone()).unwrap();
        Served { directory, socket, registry, server: Some(server) }
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///{NAME}?socket={}", self.socket.display())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Client { stream, structured: false, cookie: 0 }
    }

    /// A connected client in the transmission phase.
    pub fn client(&self, structured: bool) -> Client {
        let mut client = self.connect();
        client.handshake(NAME, structured);
        client
    }
}

/// Waits for a condition; the answer to "never assert after a sleep".
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// One reply: what the chunks of it said.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub errno: u32,
    /// (offset, bytes) of data chunks; a simple reply's data has offset `u64::MAX`.
    pub data: Vec<(u64, Vec<u8>)>,
    /// (offset, length)
    pub holes: Vec<(u64, u32)>,
    /// (length, flags) of a block status.
    pub extents: Vec<(u32, u32)>,
    pub chunks: usize,
    pub error_offset: Option<u64>,
}

impl Reply {
    /// The bytes of a read of `length` at `offset`, which every chunk must lie in.
    pub fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        assert_eq!(self.errno, 0);
        let mut out = vec![0xee; length];
        let mut covered = 0;
        for (at, data) in &self.data {
            let start = if *at == u64::MAX { 0 } else { (at - offset) as usize };
            out[start..start + data.len()].copy_from_slice(data);
            covered += data.len();
        }
        for (at, len) in &self.holes {
            let start = (at - offset) as usize;
            out[start..start + *len as usize].fill(0);
            covered += *len as usize;
        }
        assert_eq!(covered, length);
        out
    }
}

/// A plain client that sends what it is told to.
pub struct Client {
    pub stream: UnixStream,
    structured: bool,
    pub cookie: u64,
}

pub fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// Client flags and the options up to GO.
pub fn handshake_bytes(name: &str, structured: bool) -> Vec<u8> {
    let mut out = 3u32.to_be_bytes().to_vec();
    if structured {
        out.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
        let query = [string(name), 1u32.to_be_bytes().to_vec(), string(BASE_ALLOCATION)].concat();
        out.extend(option_bytes(option::SET_META_CONTEXT, &query));
    }
    out.extend(option_bytes(option::GO, &[string(name), vec![0, 1, 0, 3]].concat()));
    out
}

/// Reads the greeting and option replies up to the acknowledged GO.
pub fn read_handshake(input: &mut impl Read) {
    let mut greeting = [0; 18];
    input.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    loop {
        let (number, kind, data) = read_option_reply(input);
        assert_eq!(kind & option_reply::FLAG_ERROR, 0, "{}", String::from_utf8_lossy(&data));
        if (number, kind) == (option::GO, option_reply::ACK) {
            return;
        }
    }
}

pub fn read_option_reply(input: &mut impl Read) -> (u32, u32, Vec<u8>) {
    let mut header = [0; 20];
    input.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut data = vec![0; word(16) as usize];
    input.read_exact(&mut data).unwrap();
    (word(8), word(12), data)
}

/// One message from the server; `length` is what a simple reply to a read carries.
pub fn read_chunk(input: &mut impl Read, length: impl Fn(u64) -> usize, reply: &mut Reply) -> bool {
    let mut magic = [0; 4];
    input.read_exact(&mut magic).unwrap();
    reply.chunks += 1;
    match u32::from_be_bytes(magic) {
        SIMPLE_REPLY_MAGIC => {
            let mut rest = [0; 12];
            input.read_exact(&mut rest).unwrap();
            reply.errno = u32::from_be_bytes(rest[..4].try_into().unwrap());
            reply.cookie = u64::from_be_bytes(rest[4..].try_into().unwrap());
            if reply.errno == 0 && length(reply.cookie) > 0 {
                let mut data = vec![0; length(reply.cookie)];
                input.read_exact(&mut data).unwrap();
                reply.data.push((u64::MAX, data));
            }
            true
        }
        STRUCTURED_REPLY_MAGIC => {
            let mut rest = [0; CHUNK_HEADER_LEN - 4];
            input.read_exact(&mut rest).unwrap();
            let flags = u16::from_be_bytes([rest[0], rest[1]]);
            let kind = u16::from_be_bytes([rest[2], rest[3]]);
            reply.cookie = u64::from_be_bytes(rest[4..12].try_into().unwrap());
            let mut payload = vec![0; u32::from_be_bytes(rest[12..16].try_into().unwrap()) as usize];
            input.read_exact(&mut payload).unwrap();
            let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            let long = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().unwrap());
            match kind {
                chunk::NONE => assert!(payload.is_empty()),
                chunk::OFFSET_DATA => reply.data.push((long(0), payload[8..].to_vec())),
                chunk::OFFSET_HOLE => reply.holes.push((long(0), word(8))),
                chunk::BLOCK_STATUS => {
                    reply.extents.extend((4..payload.len()).step_by(8).map(|at| (word(at), word(at + 4))));
                }
                chunk::ERROR => reply.errno = word(0),
                chunk::ERROR_OFFSET => {
                    reply.errno = word(0);
                    reply.error_offset = Some(long(payload.len() - 8));
                }
                other => panic!("chunk type {other}"),
            }
            flags & chunk::FLAG_DONE != 0
        }
        other => panic!("reply magic {other:#x}"),
    }
}

impl Client {
    pub fn handshake(&mut self, name: &str, structured: bool) {
        self.stream.write_all(&handshake_bytes(name, structured)).unwrap();
        read_handshake(&mut self.stream);
        self.structured = structured;
    }

    pub fn send(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> u64 {
        self.cookie += 1;
        let header = RequestHeader { flags, command, cookie: self.cookie, offset, length };
        self.stream.write_all(&[&header.encode()[..], payload].concat()).unwrap();
        self.cookie
    }

    /// The next complete reply, when only one request is outstanding.
    pub fn reply(&mut self, length: usize) -> Reply {
        let mut reply = Reply::default();
        while !read_chunk(&mut self.stream, |_| length, &mut reply) {}
        reply
    }

    pub fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> Reply {
        let cookie = self.send(command, flags, offset, length, payload);
        let carries = if command == 0 { length as usize } else { 0 };
        let reply = self.reply(carries);
        assert_eq!(reply.cookie, cookie);
        reply
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 64]) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
