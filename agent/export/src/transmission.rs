//! What one request means: from bytes to a [`Verdict`], without I/O (§ *Transmission phase*, § *Request types*,
//! § *Error values*).
//!
//! [`next`] looks at the front of the receive buffer and says whether to wait for more bytes, execute a command, refuse
//! it (and how much payload to throw away), say good-bye, or give the connection up.

use crate::handshake::Agreed;
use crate::protocol::{Errno, REQUEST_LEN, RequestHeader, command, command_flag};

/// Payload of a refused write that is read and thrown away; above it the connection is closed instead. Four times the
/// longest request we offer: a client with another idea of the limit gets its error, a hostile one gets no free sink.
pub const MAX_DISCARD: u32 = 128 * 1024 * 1024;

/// What the rules of this connection are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// Size of the export.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Offsets and lengths must be multiples of this; a power of two.
    pub minimum_block: u32,
    /// Longest payload of a read or write.
    pub max_request: u32,
    /// What the handshake agreed on.
    pub agreed: Agreed,
}

/// What a command does. Payload and range are in [`Command`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Read; `whole` forbids fragments (`DF`).
    Read {
        /// The reply must be one chunk.
        whole: bool,
    },
    /// Write the payload that follows the header.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// Make completed writes durable.
    Flush,
    /// Discard the range.
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// Prefetch the range.
    Cache,
    /// Zero the range.
    WriteZeroes {
        /// Durable before the reply.
        fua: bool,
        /// The range stays allocated.
        no_hole: bool,
        /// Only if it is fast.
        fast: bool,
    },
    /// Report what is allocated.
    BlockStatus {
        /// A single extent, not longer than asked.
        one: bool,
    },
}

/// A request that passed every check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Command {
    /// The client's name for the request.
    pub cookie: u64,
    /// What to do.
    pub action: Action,
    /// Where; `offset + length` is within the export.
    pub offset: u64,
    /// How much.
    pub length: u32,
}

/// What to do with the front of the receive buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Fewer than [`REQUEST_LEN`] bytes: receive more.
    NeedMore,
    /// Execute. The header is [`REQUEST_LEN`] bytes; a write's payload follows it.
    Execute(Command),
    /// Answer with an error, and throw `discard` bytes of payload away first.
    Refuse {
        /// The client's name for the request.
        cookie: u64,
        /// The error.
        errno: Errno,
        /// Why, for the client's log.
        why: &'static str,
        /// Payload that follows the header.
        discard: u32,
    },
    /// The client says good-bye.
    Disconnect,
    /// The stream cannot be trusted any more: close.
    Violation(&'static str),
}

/// Decides about the request at the front of `input`.
pub fn next(input: &[u8], rules: &Rules) -> Verdict {
    let header = match RequestHeader::parse(input) {
        Ok(Some(header)) => header,
        Ok(None) => return Verdict::NeedMore,
        Err(_) => return Verdict::Violation("bad request magic"),
    };
    let payload = if header.command == command::WRITE { header.length } else { 0 };
    if payload > MAX_DISCARD {
        return Verdict::Violation("write longer than anything offered");
    }
    if header.command == command::DISC {
        return Verdict::Disconnect;
    }
    match check(&header, rules) {
        Ok(action) => {
            Verdict::Execute(Command { cookie: header.cookie, action, offset: header.offset, length: header.length })
        }
        Err((errno, why)) => Verdict::Refuse { cookie: header.cookie, errno, why, discard: payload },
    }
}

fn check(header: &RequestHeader, rules: &Rules) -> Result<Action, (Errno, &'static str)> {
    let flag = |bit: u16| header.flags & bit != 0;
    // FUA may be set on every command once it is offered (§ Command flags); elsewhere it has no effect.
    let allowed = command_flag::FUA
        | match header.command {
            command::READ => command_flag::DF,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS => command_flag::REQ_ONE,
            _ => 0,
        };
    if header.flags & !allowed != 0 {
        return Err((Errno::Invalid, "unknown command flags"));
    }
    let fua = flag(command_flag::FUA);
    let (action, past_end, writes) = match header.command {
        command::READ => {
            if flag(command_flag::DF) && !rules.agreed.structured {
                return Err((Errno::Invalid, "DF without structured replies"));
            }
            (Action::Read { whole: flag(command_flag::DF) }, Errno::Invalid, false)
        }
        command::WRITE => (Action::Write { fua }, Errno::NoSpace, true),
        command::FLUSH => {
            if header.offset != 0 || header.length != 0 {
                return Err((Errno::Invalid, "flush takes no range"));
            }
            return Ok(Action::Flush);
        }
        command::TRIM => (Action::Trim { fua }, Errno::Invalid, true),
        command::CACHE => (Action::Cache, Errno::Invalid, false),
        command::WRITE_ZEROES => (
            Action::WriteZeroes { fua, no_hole: flag(command_flag::NO_HOLE), fast: flag(command_flag::FAST_ZERO) },
            Errno::NoSpace,
            true,
        ),
        command::BLOCK_STATUS => {
            if !rules.agreed.base_allocation {
                return Err((Errno::Invalid, "no metadata context was negotiated"));
            }
            if header.length == 0 {
                return Err((Errno::Invalid, "block status of nothing"));
            }
            (Action::BlockStatus { one: flag(command_flag::REQ_ONE) }, Errno::Invalid, false)
        }
        _ => return Err((Errno::Invalid, "unknown command")),
    };
    if writes && rules.read_only {
        return Err((Errno::Perm, "export is read-only"));
    }
    let end = header.offset.checked_add(u64::from(header.length));
    if end.is_none_or(|end| end > rules.size) {
        return Err((past_end, "past the end of the export"));
    }
    if matches!(action, Action::Read { .. } | Action::Write { .. }) && header.length > rules.max_request {
        return Err((Errno::Invalid, "longer than the maximum block size"));
    }
    let mask = u64::from(rules.minimum_block.max(1)) - 1;
    if (header.offset | u64::from(header.length)) & mask != 0 {
        return Err((Errno::Invalid, "not a multiple of the minimum block size"));
    }
    Ok(action)
}

/// Number of bytes the whole request takes in the stream: header and payload.
pub fn wire_len(command: &Command) -> u64 {
    let payload = if matches!(command.action, Action::Write { .. }) { u64::from(command.length) } else { 0 };
    REQUEST_LEN as u64 + payload
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 40;
    fn rules() -> Rules {
        Rules {
            size: SIZE,
            read_only: false,
            minimum_block: 1,
            max_request: 32 << 20,
            agreed: Agreed { structured: true, base_allocation: true },
        }
    }
    fn ask(flags: u16, command: u16, offset: u64, length: u32, rules: &Rules) -> Verdict {
        next(&RequestHeader { flags, command, cookie: 7, offset, length }.encode(), rules)
    }
    fn errno(verdict: Verdict) -> Option<Errno> {
        match verdict {
            Verdict::Refuse { errno, .. } => Some(errno),
            _ => None,
        }
    }

    #[test]
    fn past_the_end_is_enospc_for_writers_and_einval_for_the_rest() {
        let expect = |command| match command {
            command::WRITE | command::WRITE_ZEROES => Errno::NoSpace,
            _ => Errno::Invalid,
        };
        for command in
            [command::READ, command::WRITE, command::TRIM, command::CACHE, command::WRITE_ZEROES, command::BLOCK_STATUS]
        {
            for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX, u32::MAX >> 8)] {
                assert_eq!(errno(ask(0, command, offset, length, &rules())), Some(expect(command)), "{command}");
            }
            assert!(matches!(ask(0, command, SIZE - 1, 1, &rules()), Verdict::Execute(_)));
        }
    }

    #[test]
    fn read_only_refuses_writers_with_eperm_and_still_skips_the_payload() {
        let rules = Rules { read_only: true, ..rules() };
        assert!(matches!(
            ask(0, command::WRITE, 0, 4096, &rules),
            Verdict::Refuse { errno: Errno::Perm, discard: 4096, .. }
        ));
        assert_eq!(errno(ask(0, command::TRIM, 0, 4096, &rules)), Some(Errno::Perm));
        assert_eq!(errno(ask(0, command::WRITE_ZEROES, 0, 4096, &rules)), Some(Errno::Perm));
        assert!(matches!(ask(0, command::FLUSH, 0, 0, &rules), Verdict::Execute(_)));
        assert!(matches!(ask(0, command::READ, 0, 4096, &rules), Verdict::Execute(_)));
    }

    #[test]
    fn only_reads_and_writes_have_a_length_limit() {
        assert_eq!(errno(ask(0, command::READ, 0, (32 << 20) + 1, &rules())), Some(Errno::Invalid));
        assert_eq!(errno(ask(0, command::WRITE, 0, (32 << 20) + 1, &rules())), Some(Errno::Invalid));
        assert!(matches!(ask(0, command::TRIM, 0, u32::MAX, &rules()), Verdict::Execute(_)));
        assert!(matches!(ask(0, command::WRITE, 0, u32::MAX, &rules()), Verdict::Violation(_)));
    }

    #[test]
    fn flags_that_do_not_belong_to_the_command_are_einval() {
        assert_eq!(errno(ask(command_flag::NO_HOLE, command::WRITE, 0, 1, &rules())), Some(Errno::Invalid));
        assert_eq!(errno(ask(1 << 5, command::READ, 0, 1, &rules())), Some(Errno::Invalid));
        assert!(matches!(ask(command_flag::FUA, command::READ, 0, 1, &rules()), Verdict::Execute(_)));
        assert_eq!(errno(ask(0, 99, 0, 1, &rules())), Some(Errno::Invalid));
        let simple = Rules { agreed: Agreed::default(), ..rules() };
        assert_eq!(errno(ask(command_flag::DF, command::READ, 0, 1, &simple)), Some(Errno::Invalid));
        assert_eq!(errno(ask(0, command::BLOCK_STATUS, 0, 1, &simple)), Some(Errno::Invalid));
    }

    #[test]
    fn block_multiples_are_enforced() {
        let rules = Rules { minimum_block: 512, ..rules() };
        assert_eq!(errno(ask(0, command::READ, 1, 512, &rules)), Some(Errno::Invalid));
        assert_eq!(errno(ask(0, command::READ, 512, 511, &rules)), Some(Errno::Invalid));
        assert!(matches!(ask(0, command::READ, 512, 1024, &rules), Verdict::Execute(_)));
    }

    proptest! {
        /// What is executed is inside the export, whatever the bytes were.
        #[test]
        fn executed_commands_are_in_range(flags in 0u16..64, command in 0u16..10, offset in prop_oneof![any::<u64>(), 0..SIZE * 2], length: u32, block in 0u32..13, read_only: bool, structured: bool) {
            let rules = Rules { minimum_block: 1 << block, read_only, agreed: Agreed { structured, base_allocation: structured }, ..rules() };
            match ask(flags, command, offset, length, &rules) {
                Verdict::Execute(command) => {
                    prop_assert!(command.action == Action::Flush || command.offset + u64::from(command.length) <= SIZE);
                    prop_assert!(wire_len(&command) <= REQUEST_LEN as u64 + u64::from(rules.max_request));
                }
                Verdict::Refuse { discard, .. } => prop_assert!(discard <= MAX_DISCARD),
                Verdict::Disconnect => prop_assert_eq!(command, command::DISC),
                Verdict::Violation(_) => prop_assert_eq!(command, command::WRITE),
                Verdict::NeedMore => prop_assert!(false),
            }
        }

        #[test]
        fn arbitrary_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = next(&bytes, &rules());
        }
    }
}
