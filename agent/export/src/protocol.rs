//! The numbers and byte layouts of the NBD protocol, and nothing else.
//!
//! Source: the NBD specification, `doc/proto.md` of NetworkBlockDevice/nbd; section names of it are cited as *§ name*.
//! Everything on the wire is big endian. No I/O, no allocation beyond the caller's buffer.
//!
//! Request (§ *Request message*, without extended headers), 28 bytes:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `0x25609513` |
//! | 4 | 2 | command flags |
//! | 6 | 2 | command type |
//! | 8 | 8 | cookie (called handle in older texts) |
//! | 16 | 8 | offset |
//! | 24 | 4 | length |
//!
//! Simple reply (§ *Simple reply message*), 16 bytes: magic `0x67446698`, error (4), cookie (8).
//!
//! Structured reply chunk (§ *Structured reply chunk message*), 20 bytes and a payload: magic `0x668e33ef`, flags (2),
//! type (2), cookie (8), payload length (4).

use std::fmt;

/// `NBDMAGIC`, the first eight bytes a server sends.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, second magic of the newstyle greeting and of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Length of a request header.
pub const REQUEST_LEN: usize = 28;
/// Length of a simple reply.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of the header of a structured reply chunk.
pub const CHUNK_HEADER_LEN: usize = 20;
/// Length of the header of an option request.
pub const OPTION_HEADER_LEN: usize = 16;
/// Longest string the specification allows (§ *Values*, strings): 4096 bytes.
pub const MAX_STRING: usize = 4096;

/// Handshake flags of the server (§ *Handshake flags*).
pub mod handshake_flag {
    /// Fixed newstyle: unknown options are answered, not punished by a close.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zero bytes after `NBD_OPT_EXPORT_NAME` may be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Flags of the client (§ *Client flags*).
pub mod client_flag {
    /// The client speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u32 = 1 << 0;
    /// The client wants no 124 zero bytes.
    pub const NO_ZEROES: u32 = 1 << 1;
}

/// Option types (§ *Option types*).
pub mod option {
    /// Choose an export the old way: the reply has no room for an error.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Ask about an export.
    pub const INFO: u32 = 6;
    /// Choose an export and begin transmission.
    pub const GO: u32 = 7;
    /// Ask for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Option reply types (§ *Option reply types*).
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error reply.
    pub const FLAG_ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = FLAG_ERROR | 1;
    /// Forbidden by policy.
    pub const ERR_POLICY: u32 = FLAG_ERROR | 2;
    /// Malformed or out of order.
    pub const ERR_INVALID: u32 = FLAG_ERROR | 3;
    /// TLS must be begun first.
    pub const ERR_TLS_REQD: u32 = FLAG_ERROR | 5;
    /// The export is not known.
    pub const ERR_UNKNOWN: u32 = FLAG_ERROR | 6;
    /// The server is shutting down.
    pub const ERR_SHUTDOWN: u32 = FLAG_ERROR | 7;
    /// The client must ask for block sizes first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = FLAG_ERROR | 8;
    /// Request or reply would be too large.
    pub const ERR_TOO_BIG: u32 = FLAG_ERROR | 9;
}

/// Information types of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags (§ *Transmission flags*).
pub mod transmission_flag {
    /// Must be set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `NBD_CMD_FLUSH` works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `NBD_CMD_FLAG_FUA` works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Treat as a rotational medium.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// `NBD_CMD_TRIM` works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `NBD_CMD_WRITE_ZEROES` works.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `NBD_CMD_FLAG_DF` works.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers the writes completed on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `NBD_CMD_CACHE` works.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `NBD_CMD_FLAG_FAST_ZERO` works.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Command types (§ *Request types*).
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the payload follows the header.
    pub const WRITE: u16 = 1;
    /// The client goes away; no reply.
    pub const DISC: u16 = 2;
    /// Make completed writes durable.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Write zeroes without a payload.
    pub const WRITE_ZEROES: u16 = 6;
    /// Report metadata contexts.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags (§ *Command flags*).
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// `WRITE_ZEROES` must not make a hole.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Do not fragment the read reply.
    pub const DF: u16 = 1 << 2;
    /// `BLOCK_STATUS` wants a single extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// `WRITE_ZEROES` only if that is fast.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Structured reply chunk types (§ *Structured reply types*).
pub mod chunk {
    /// Last chunk of the reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// No payload.
    pub const NONE: u16 = 0;
    /// Offset (8) and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset (8) and hole length (4).
    pub const OFFSET_HOLE: u16 = 2;
    /// Context id (4) and extents of length (4) and flags (4).
    pub const BLOCK_STATUS: u16 = 5;
    /// Error (4), message length (2), message.
    pub const ERROR: u16 = (1 << 15) | 1;
    /// Like `ERROR`, and the offset (8) at which it happened.
    pub const ERROR_OFFSET: u16 = (1 << 15) | 2;
}

/// The metadata context of § *base:allocation*.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The id this server gives to [`BASE_ALLOCATION`]; any number would do.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// Extent flags of `base:allocation`.
pub mod allocation {
    /// The extent takes no room.
    pub const HOLE: u32 = 1 << 0;
    /// The extent reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Error values of replies (§ *Error values*); Linux numbers by definition of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted: a write to a read-only export.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Cannot allocate memory.
    NoMem = 12,
    /// Invalid argument.
    Invalid = 22,
    /// No space left on device, or a write past the end.
    NoSpace = 28,
    /// Value too large: a `DF` read that cannot be sent in one piece.
    Overflow = 75,
    /// Operation not supported: a `FAST_ZERO` that would be slow.
    NotSupported = 95,
    /// The server is in the process of being shut down.
    Shutdown = 108,
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Errno::Perm => "EPERM",
            Errno::Io => "EIO",
            Errno::NoMem => "ENOMEM",
            Errno::Invalid => "EINVAL",
            Errno::NoSpace => "ENOSPC",
            Errno::Overflow => "EOVERFLOW",
            Errno::NotSupported => "ENOTSUP",
            Errno::Shutdown => "ESHUTDOWN",
        })
    }
}

/// A request header as it came, nothing checked but its magic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: u16,
    /// Command type.
    pub command: u16,
    /// Chosen by the client, given back in the reply.
    pub cookie: u64,
    /// Byte offset.
    pub offset: u64,
    /// Byte length.
    pub length: u32,
}

/// The bytes are not a request: the stream is out of step and cannot be trusted any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadMagic;

impl RequestHeader {
    /// Reads a header from the front of `input`; `Ok(None)` when fewer than [`REQUEST_LEN`] bytes are there.
    pub fn parse(input: &[u8]) -> Result<Option<RequestHeader>, BadMagic> {
        let Some(bytes) = input.first_chunk::<REQUEST_LEN>() else { return Ok(None) };
        if u32_at(bytes, 0) != REQUEST_MAGIC {
            return Err(BadMagic);
        }
        Ok(Some(RequestHeader {
            flags: u16_at(bytes, 4),
            command: u16_at(bytes, 6),
            cookie: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            length: u32_at(bytes, 24),
        }))
    }

    /// The bytes of this header: what a client sends.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut out = [0; REQUEST_LEN];
        out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.length.to_be_bytes());
        out
    }
}

/// The bytes of a simple reply; `errno` 0 is success.
pub fn simple_reply(cookie: u64, errno: u32) -> [u8; SIMPLE_REPLY_LEN] {
    let mut out = [0; SIMPLE_REPLY_LEN];
    out[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&errno.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// The bytes of the header of a structured reply chunk.
pub fn chunk_header(cookie: u64, done: bool, kind: u16, payload_len: u32) -> [u8; CHUNK_HEADER_LEN] {
    let flags = if done { chunk::FLAG_DONE } else { 0 };
    let mut out = [0; CHUNK_HEADER_LEN];
    out[0..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..20].copy_from_slice(&payload_len.to_be_bytes());
    out
}

/// Appends an option reply. `data` longer than 4 GiB cannot occur: the callers' strings are bounded.
pub fn push_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// Header of an option as it came: number and length of the data that follow; the magic was right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionHeader {
    /// Option type.
    pub option: u32,
    /// Length of the data.
    pub length: u32,
}

impl OptionHeader {
    /// Reads a header from the front of `input`; `Ok(None)` when fewer than [`OPTION_HEADER_LEN`] bytes are there.
    pub fn parse(input: &[u8]) -> Result<Option<OptionHeader>, BadMagic> {
        let Some(bytes) = input.first_chunk::<OPTION_HEADER_LEN>() else { return Ok(None) };
        if u64_at(bytes, 0) != OPTION_MAGIC {
            return Err(BadMagic);
        }
        Ok(Some(OptionHeader { option: u32_at(bytes, 8), length: u32_at(bytes, 12) }))
    }
}

/// A reader over option data that cannot run past the end.
#[derive(Debug)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// Reads from the front of `data`.
    pub fn new(data: &'a [u8]) -> Fields<'a> {
        Fields(data)
    }
    /// The next two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        let (head, tail) = self.0.split_first_chunk::<2>()?;
        self.0 = tail;
        Some(u16::from_be_bytes(*head))
    }
    /// The next four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        let (head, tail) = self.0.split_first_chunk::<4>()?;
        self.0 = tail;
        Some(u32::from_be_bytes(*head))
    }
    /// A length of four bytes and that many bytes of UTF-8, at most [`MAX_STRING`].
    pub fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        if len > MAX_STRING || len > self.0.len() {
            return None;
        }
        let (head, tail) = self.0.split_at(len);
        self.0 = tail;
        std::str::from_utf8(head).ok()
    }
    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    (u64::from(u32_at(bytes, at)) << 32) | u64::from(u32_at(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn magics_are_the_ascii_of_the_specification() {
        assert_eq!(&INIT_MAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&OPTION_MAGIC.to_be_bytes(), b"IHAVEOPT");
    }

    #[test]
    fn replies_have_their_golden_bytes() {
        assert_eq!(
            simple_reply(0x0102_0304_0506_0708, Errno::Io as u32),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 1, 2, 3, 4, 5, 6, 7, 8]
        );
        assert_eq!(
            chunk_header(0x0102_0304_0506_0708, true, chunk::OFFSET_DATA, 0x1008),
            [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0x10, 8]
        );
        let mut out = Vec::new();
        push_option_reply(&mut out, option::GO, option_reply::ERR_UNKNOWN, b"no");
        assert_eq!(out, [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 7, 0x80, 0, 0, 6, 0, 0, 0, 2, b'n', b'o']);
    }

    #[test]
    fn a_string_longer_than_the_data_is_refused() {
        assert_eq!(Fields::new(&[0, 0, 0, 5, b'a']).string(), None);
        assert_eq!(Fields::new(&[0xff, 0xff, 0xff, 0xff, b'a']).string(), None);
        assert_eq!(Fields::new(&[0, 0, 0, 1, b'a']).string(), Some("a"));
        assert_eq!(Fields::new(&[0, 0, 0, 1, 0xff]).string(), None, "not UTF-8");
    }

    proptest! {
        #[test]
        fn any_request_header_goes_round_trip(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let header = RequestHeader { flags, command, cookie, offset, length };
            prop_assert_eq!(RequestHeader::parse(&header.encode()), Ok(Some(header)));
            prop_assert_eq!(RequestHeader::parse(&header.encode()[..REQUEST_LEN - 1]), Ok(None));
        }
    }
}
