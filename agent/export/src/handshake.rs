//! The negotiation of one connection as a pure state machine (§ *Handshake*, § *Newstyle negotiation*,
//! § *Fixed newstyle negotiation*).
//!
//! ```text
//!            client flags            option*               GO / EXPORT_NAME answered
//!  Greeting ------------> Options ------------> (Options)  ------------------------> Transmission
//!                            |  ABORT, bad magic, too many, too long, old EXPORT_NAME of an unknown export
//!                            '--------------------------------------------------------------------------> closed
//! ```
//!
//! Where TLS is required ([`Security::Required`]) every option but `STARTTLS` and `ABORT` is refused until it has been
//! begun, and the negotiation then starts over: what was agreed in the clear does not count.
//!
//! The driver feeds bytes to [`Handshake::advance`] and does what the returned [`Event`] says; where the answer needs
//! the catalog (open, describe, list) the driver asks it and calls back with the result. Replies are appended to the
//! caller's buffer. No I/O, no clock: the time limit of the handshake is the driver's.

use crate::protocol::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, Fields, INIT_MAGIC, OPTION_HEADER_LEN, OPTION_MAGIC, OptionHeader,
    client_flag, handshake_flag, info, option, option_reply, push_option_reply,
};

/// Limits of one handshake. The defaults are far above what any known client does.
#[derive(Clone, Copy, Debug)]
pub struct HandshakeLimits {
    /// Options answered before the connection is closed (known clients send fewer than ten; `nbdinfo --list` sends a
    /// few per export).
    pub options: u32,
    /// Longest data of one option. The longest legal one is two strings of 4096 bytes and a few numbers; metadata
    /// queries may repeat.
    pub option_len: u32,
    /// Bytes of all options together: a slow stream of long ones is ended, too.
    pub total_len: u64,
    /// Bytes a list of exports may take; what does not fit is left out.
    pub list_len: usize,
}

impl Default for HandshakeLimits {
    fn default() -> Self {
        HandshakeLimits { options: 4096, option_len: 32 * 1024, total_len: 4 * 1024 * 1024, list_len: 1024 * 1024 }
    }
}

/// What a client is told about an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags without `SEND_DF`, which the handshake adds when structured replies are agreed.
    pub flags: u16,
    /// Smallest unit of offset and length.
    pub minimum_block: u32,
    /// Unit that performs best.
    pub preferred_block: u32,
    /// Longest payload.
    pub maximum_block: u32,
    /// Free text for people; may be empty.
    pub description: String,
}

/// What both sides agreed on besides the export.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Agreed {
    /// `NBD_OPT_STRUCTURED_REPLY` was accepted.
    pub structured: bool,
    /// `base:allocation` was chosen for the export that was opened.
    pub base_allocation: bool,
}

/// Whether this connection is to be encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Security {
    /// There is no TLS here.
    Plain,
    /// Nothing is said before TLS.
    Required,
    /// TLS is spoken.
    Encrypted,
}

/// What the driver has to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Not enough bytes for a decision: receive more.
    NeedMore,
    /// An option was handled; send the output and go on.
    Continue,
    /// Look the export up without opening it, then call [`Handshake::described`].
    Describe(String),
    /// Open the export, then call [`Handshake::opened`].
    Open(String),
    /// Get the list of exports, then call [`Handshake::listed`].
    List,
    /// Send the output, then do the handshake of TLS; then call [`Handshake::encrypted`]. Nothing may have been received
    /// behind the option.
    StartTls,
    /// Send the output and close. The text says why, for the log.
    Close(&'static str),
}

/// Why an export was not opened or described.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// No export of that name, or not one this client may see.
    Unknown,
    /// This client may not have it.
    Policy,
    /// The server or the export is shutting down.
    Shutdown,
}

impl Refusal {
    fn reply(self) -> (u32, &'static [u8]) {
        match self {
            Refusal::Unknown => (option_reply::ERR_UNKNOWN, b"no such export"),
            Refusal::Policy => (option_reply::ERR_POLICY, b"not permitted"),
            Refusal::Shutdown => (option_reply::ERR_SHUTDOWN, b"shutting down"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Greeting,
    Options,
    /// A callback is owed for this option.
    Waiting(u32),
    Closed,
}

/// The state of one negotiation. See the module for the diagram.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    limits: HandshakeLimits,
    security: Security,
    options_seen: u32,
    bytes_seen: u64,
    no_zeroes: bool,
    structured: bool,
    /// Name for which `base:allocation` was chosen; a GO for another name drops it (§ *Metadata querying*).
    context_for: Option<String>,
    /// Name and information requests of the INFO or GO being answered.
    pending: Pending,
}

#[derive(Debug, Default)]
struct Pending {
    name: String,
    want_name: bool,
    want_description: bool,
    want_block_size: bool,
}

impl Handshake {
    /// Begins a negotiation: the greeting goes to `out`.
    pub fn new(limits: HandshakeLimits, security: Security, out: &mut Vec<u8>) -> Handshake {
        out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
        Handshake {
            state: State::Greeting,
            limits,
            security,
            options_seen: 0,
            bytes_seen: 0,
            no_zeroes: false,
            structured: false,
            context_for: None,
            pending: Pending::default(),
        }
    }

    /// Consumes at most one message from the front of `input`. Returns the number of bytes used and what to do.
    pub fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Event) {
        match self.state {
            State::Greeting => self.client_flags(input),
            State::Options => self.next_option(input, out),
            // The driver owes a callback; asking again without it would loop.
            State::Waiting(_) | State::Closed => (0, self.close("out of order")),
        }
    }

    fn close(&mut self, why: &'static str) -> Event {
        self.state = State::Closed;
        Event::Close(why)
    }

    fn client_flags(&mut self, input: &[u8]) -> (usize, Event) {
        let Some(bytes) = input.first_chunk::<4>() else { return (0, Event::NeedMore) };
        let flags = u32::from_be_bytes(*bytes);
        if flags & !(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES) != 0 {
            return (4, self.close("unknown client flags"));
        }
        self.no_zeroes = flags & client_flag::NO_ZEROES != 0;
        self.state = State::Options;
        (4, Event::Continue)
    }

    fn next_option(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Event) {
        let header = match OptionHeader::parse(input) {
            Ok(Some(header)) => header,
            Ok(None) => return (0, Event::NeedMore),
            Err(_) => return (0, self.close("bad option magic")),
        };
        if header.length > self.limits.option_len {
            push_option_reply(out, header.option, option_reply::ERR_TOO_BIG, b"option data too long");
            return (OPTION_HEADER_LEN, self.close("option data too long"));
        }
        let total = OPTION_HEADER_LEN + header.length as usize;
        let Some(data) = input.get(OPTION_HEADER_LEN..total) else { return (0, Event::NeedMore) };
        self.options_seen += 1;
        self.bytes_seen += total as u64;
        if self.options_seen > self.limits.options || self.bytes_seen > self.limits.total_len {
            push_option_reply(out, header.option, option_reply::ERR_POLICY, b"too many options");
            return (total, self.close("too many options"));
        }
        (total, self.handle(header.option, data, out))
    }

    fn handle(&mut self, number: u32, data: &[u8], out: &mut Vec<u8>) -> Event {
        match number {
            // The old option has no error reply.
            option::EXPORT_NAME if self.security == Security::Required => {
                self.close("NBD_OPT_EXPORT_NAME where TLS is required")
            }
            _ if self.security == Security::Required && !matches!(number, option::STARTTLS | option::ABORT) => {
                push_option_reply(out, number, option_reply::ERR_TLS_REQD, b"begin TLS first");
                Event::Continue
            }
            option::STARTTLS if self.security != Security::Plain => {
                if self.security == Security::Encrypted {
                    return invalid(out, number, b"TLS is spoken already");
                }
                if !data.is_empty() {
                    return invalid(out, number, b"this option takes no data");
                }
                push_option_reply(out, number, option_reply::ACK, &[]);
                self.state = State::Waiting(number);
                Event::StartTls
            }
            option::EXPORT_NAME => match std::str::from_utf8(data) {
                Ok(name) if name.len() <= crate::protocol::MAX_STRING => {
                    self.pending = Pending { name: name.to_owned(), ..Pending::default() };
                    self.state = State::Waiting(number);
                    Event::Open(name.to_owned())
                }
                // The old option has no error reply (§ NBD_OPT_EXPORT_NAME): close.
                _ => self.close("export name is not UTF-8 or too long"),
            },
            option::ABORT => {
                push_option_reply(out, number, option_reply::ACK, &[]);
                self.close("aborted by the client")
            }
            option::LIST if data.is_empty() => {
                self.state = State::Waiting(number);
                Event::List
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                push_option_reply(out, number, option_reply::ACK, &[]);
                Event::Continue
            }
            option::LIST | option::STRUCTURED_REPLY => invalid(out, number, b"this option takes no data"),
            option::INFO | option::GO => self.info_or_go(number, data, out),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(number, data, out),
            _ => {
                push_option_reply(out, number, option_reply::ERR_UNSUP, b"option not supported");
                Event::Continue
            }
        }
    }

    fn info_or_go(&mut self, number: u32, data: &[u8], out: &mut Vec<u8>) -> Event {
        let Some(pending) = parse_info(data) else { return invalid(out, number, b"malformed request") };
        let name = pending.name.clone();
        self.pending = pending;
        self.state = State::Waiting(number);
        if number == option::GO { Event::Open(name) } else { Event::Describe(name) }
    }

    /// § NBD_OPT_LIST_META_CONTEXT, § NBD_OPT_SET_META_CONTEXT. The one context is `base:allocation`, which every
    /// export has, so the answer does not need the catalog; a GO of an unknown export fails by itself.
    fn meta_context(&mut self, number: u32, data: &[u8], out: &mut Vec<u8>) -> Event {
        if number == option::SET_META_CONTEXT {
            // Whatever comes of it, an earlier choice is void.
            self.context_for = None;
        }
        if !self.structured {
            return invalid(out, number, b"structured replies were not negotiated");
        }
        let Some((name, queries)) = parse_meta_context(data) else {
            return invalid(out, number, b"malformed request");
        };
        let listing = number == option::LIST_META_CONTEXT;
        let wanted = if queries.is_empty() {
            listing
        } else {
            queries.iter().any(|query| *query == BASE_ALLOCATION || (listing && *query == "base:"))
        };
        if wanted {
            // In a list the id has no meaning and is 0.
            let id = if listing { 0 } else { BASE_ALLOCATION_ID };
            let mut reply = id.to_be_bytes().to_vec();
            reply.extend_from_slice(BASE_ALLOCATION.as_bytes());
            push_option_reply(out, number, option_reply::META_CONTEXT, &reply);
            if !listing {
                self.context_for = Some(name.to_owned());
            }
        }
        push_option_reply(out, number, option_reply::ACK, &[]);
        Event::Continue
    }

    /// The answer to [`Event::StartTls`], once TLS is spoken: the options begin anew.
    pub fn encrypted(&mut self) {
        debug_assert_eq!(self.state, State::Waiting(option::STARTTLS));
        self.state = State::Options;
        self.security = Security::Encrypted;
        self.structured = false;
        self.context_for = None;
        self.pending = Pending::default();
    }

    /// The answer to [`Event::Describe`].
    pub fn described(&mut self, result: Result<Offer, Refusal>, out: &mut Vec<u8>) -> Event {
        self.state = State::Options;
        match result {
            Ok(offer) => {
                self.push_info(option::INFO, &offer, out);
                push_option_reply(out, option::INFO, option_reply::ACK, &[]);
            }
            Err(refusal) => {
                let (kind, text) = refusal.reply();
                push_option_reply(out, option::INFO, kind, text);
            }
        }
        Event::Continue
    }

    /// The answer to [`Event::Open`]. `Ok` means transmission begins once the output is sent; `Err` holds what to do
    /// instead.
    pub fn opened(&mut self, result: Result<Offer, Refusal>, out: &mut Vec<u8>) -> Result<Agreed, Event> {
        let State::Waiting(number) = self.state else { return Err(self.close("out of order")) };
        self.state = State::Options;
        let old_style = number == option::EXPORT_NAME;
        let offer = match result {
            Ok(offer) => offer,
            Err(_) if old_style => return Err(self.close("unknown export asked for by NBD_OPT_EXPORT_NAME")),
            Err(refusal) => {
                let (kind, text) = refusal.reply();
                push_option_reply(out, number, kind, text);
                return Err(Event::Continue);
            }
        };
        if old_style {
            out.extend_from_slice(&offer.size.to_be_bytes());
            out.extend_from_slice(&self.flags(&offer).to_be_bytes());
            if !self.no_zeroes {
                out.extend_from_slice(&[0; 124]);
            }
        } else {
            self.push_info(number, &offer, out);
            push_option_reply(out, number, option_reply::ACK, &[]);
        }
        self.state = State::Closed;
        let base_allocation = self.context_for.as_deref() == Some(self.pending.name.as_str());
        Ok(Agreed { structured: self.structured, base_allocation })
    }

    /// The answer to [`Event::List`]: the names this client may see, or `None` when listing is forbidden.
    pub fn listed<'n>(&mut self, names: Option<impl Iterator<Item = &'n str>>, out: &mut Vec<u8>) -> Event {
        self.state = State::Options;
        let Some(names) = names else {
            push_option_reply(out, option::LIST, option_reply::ERR_POLICY, b"listing is not permitted");
            return Event::Continue;
        };
        let start = out.len();
        for name in names {
            if out.len() - start > self.limits.list_len {
                break;
            }
            let mut reply = (name.len() as u32).to_be_bytes().to_vec();
            reply.extend_from_slice(name.as_bytes());
            push_option_reply(out, option::LIST, option_reply::SERVER, &reply);
        }
        push_option_reply(out, option::LIST, option_reply::ACK, &[]);
        Event::Continue
    }

    fn flags(&self, offer: &Offer) -> u16 {
        use crate::protocol::transmission_flag::SEND_DF;
        offer.flags | if self.structured { SEND_DF } else { 0 }
    }

    fn push_info(&self, number: u32, offer: &Offer, out: &mut Vec<u8>) {
        let mut reply = info::EXPORT.to_be_bytes().to_vec();
        reply.extend_from_slice(&offer.size.to_be_bytes());
        reply.extend_from_slice(&self.flags(offer).to_be_bytes());
        push_option_reply(out, number, option_reply::INFO, &reply);
        if self.pending.want_name {
            let mut reply = info::NAME.to_be_bytes().to_vec();
            reply.extend_from_slice(self.pending.name.as_bytes());
            push_option_reply(out, number, option_reply::INFO, &reply);
        }
        if self.pending.want_description && !offer.description.is_empty() {
            let mut reply = info::DESCRIPTION.to_be_bytes().to_vec();
            reply.extend_from_slice(offer.description.as_bytes());
            push_option_reply(out, number, option_reply::INFO, &reply);
        }
        if self.pending.want_block_size {
            let mut reply = info::BLOCK_SIZE.to_be_bytes().to_vec();
            reply.extend_from_slice(&offer.minimum_block.to_be_bytes());
            reply.extend_from_slice(&offer.preferred_block.to_be_bytes());
            reply.extend_from_slice(&offer.maximum_block.to_be_bytes());
            push_option_reply(out, number, option_reply::INFO, &reply);
        }
    }
}

fn invalid(out: &mut Vec<u8>, number: u32, text: &[u8]) -> Event {
    push_option_reply(out, number, option_reply::ERR_INVALID, text);
    Event::Continue
}

fn parse_info(data: &[u8]) -> Option<Pending> {
    let mut fields = Fields::new(data);
    let name = fields.string()?.to_owned();
    let mut pending = Pending { name, ..Pending::default() };
    for _ in 0..fields.u16()? {
        match fields.u16()? {
            info::NAME => pending.want_name = true,
            info::DESCRIPTION => pending.want_description = true,
            info::BLOCK_SIZE => pending.want_block_size = true,
            // Unknown requests are ignored (§ NBD_OPT_INFO).
            _ => {}
        }
    }
    fields.is_empty().then_some(pending)
}

fn parse_meta_context(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields::new(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    // `count` is not trusted for an allocation: the data run out first.
    for _ in 0..count {
        queries.push(fields.string()?);
    }
    fields.is_empty().then_some((name, queries))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{OPTION_REPLY_MAGIC, transmission_flag};
    use proptest::prelude::*;

    fn offer() -> Offer {
        Offer {
            size: 1 << 30,
            flags: transmission_flag::HAS_FLAGS | transmission_flag::SEND_FLUSH,
            minimum_block: 1,
            preferred_block: 4096,
            maximum_block: 32 << 20,
            description: "a volume".into(),
        }
    }

    fn opt(number: u32, data: &[u8]) -> Vec<u8> {
        let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        out
    }
    fn go_data(name: &str, requests: &[u16]) -> Vec<u8> {
        let mut out = (name.len() as u32).to_be_bytes().to_vec();
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&(requests.len() as u16).to_be_bytes());
        for request in requests {
            out.extend_from_slice(&request.to_be_bytes());
        }
        out
    }
    fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut out = (name.len() as u32).to_be_bytes().to_vec();
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&(queries.len() as u32).to_be_bytes());
        for query in queries {
            out.extend_from_slice(&(query.len() as u32).to_be_bytes());
            out.extend_from_slice(query.as_bytes());
        }
        out
    }
    /// (option, kind, data) of every reply in `out`.
    fn replies(mut out: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
        let mut found = Vec::new();
        while !out.is_empty() {
            assert_eq!(&out[..8], OPTION_REPLY_MAGIC.to_be_bytes());
            let word = |at: usize| u32::from_be_bytes(out[at..at + 4].try_into().unwrap());
            let len = word(16) as usize;
            found.push((word(8), word(12), out[20..20 + len].to_vec()));
            out = &out[20 + len..];
        }
        found
    }
    fn begun(flags: u32) -> Handshake {
        let mut greeting = Vec::new();
        let mut handshake = Handshake::new(HandshakeLimits::default(), Security::Plain, &mut greeting);
        assert_eq!(greeting, b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(handshake.advance(&flags.to_be_bytes(), &mut greeting), (4, Event::Continue));
        handshake
    }

    #[test]
    fn go_agrees_on_structured_replies_and_the_context_of_its_own_export() {
        let mut handshake = begun(3);
        let mut out = Vec::new();
        handshake.advance(&opt(option::STRUCTURED_REPLY, &[]), &mut out);
        handshake.advance(&opt(option::SET_META_CONTEXT, &meta_data("v.1", &["base:allocation", "x:y"])), &mut out);
        let (_, event) = handshake.advance(&opt(option::GO, &go_data("v.1", &[info::BLOCK_SIZE, 77])), &mut out);
        assert_eq!(event, Event::Open("v.1".into()));
        let agreed = handshake.opened(Ok(offer()), &mut out).unwrap();
        assert_eq!(agreed, Agreed { structured: true, base_allocation: true });
        let got = replies(&out);
        assert_eq!(got[0], (option::STRUCTURED_REPLY, option_reply::ACK, vec![]));
        assert_eq!(got[1].2, [&BASE_ALLOCATION_ID.to_be_bytes()[..], b"base:allocation"].concat());
        assert_eq!(got[3].1, option_reply::INFO);
        let flags = u16::from_be_bytes(got[3].2[10..12].try_into().unwrap());
        assert!(flags & transmission_flag::SEND_DF != 0);
        assert_eq!(got[4].2[..2], info::BLOCK_SIZE.to_be_bytes());
        assert_eq!(got[5], (option::GO, option_reply::ACK, vec![]));
    }

    #[test]
    fn a_context_chosen_for_another_export_is_dropped() {
        let mut handshake = begun(3);
        let mut out = Vec::new();
        handshake.advance(&opt(option::STRUCTURED_REPLY, &[]), &mut out);
        handshake.advance(&opt(option::SET_META_CONTEXT, &meta_data("a", &["base:allocation"])), &mut out);
        handshake.advance(&opt(option::GO, &go_data("b", &[])), &mut out);
        assert!(!handshake.opened(Ok(offer()), &mut out).unwrap().base_allocation);
    }

    #[test]
    fn a_context_without_structured_replies_is_invalid() {
        let mut handshake = begun(3);
        let mut out = Vec::new();
        handshake.advance(&opt(option::SET_META_CONTEXT, &meta_data("a", &["base:allocation"])), &mut out);
        assert_eq!(replies(&out)[0].1, option_reply::ERR_INVALID);
    }

    #[test]
    fn an_unknown_export_is_answered_and_the_negotiation_goes_on() {
        let mut handshake = begun(3);
        let mut out = Vec::new();
        handshake.advance(&opt(option::GO, &go_data("nope", &[])), &mut out);
        assert_eq!(handshake.opened(Err(Refusal::Unknown), &mut out), Err(Event::Continue));
        assert_eq!(replies(&out)[0].1, option_reply::ERR_UNKNOWN);
        out.clear();
        let (_, event) =
            handshake.advance(&opt(option::INFO, &go_data("v", &[info::NAME, info::DESCRIPTION])), &mut out);
        assert_eq!(event, Event::Describe("v".into()));
        assert_eq!(handshake.described(Ok(offer()), &mut out), Event::Continue);
        let got = replies(&out);
        assert_eq!(got[1].2, b"\0\x01v");
        assert_eq!(got[2].2, b"\0\x02a volume");
    }

    #[test]
    fn the_old_export_name_gets_its_zeroes_unless_declined_and_a_close_when_unknown() {
        for (flags, len) in [(1u32, 8 + 2 + 124), (3, 8 + 2)] {
            let mut handshake = begun(flags);
            let mut out = Vec::new();
            assert_eq!(handshake.advance(&opt(option::EXPORT_NAME, b"v"), &mut out).1, Event::Open("v".into()));
            assert_eq!(handshake.opened(Ok(offer()), &mut out), Ok(Agreed::default()));
            assert_eq!(out.len(), len);
        }
        let mut handshake = begun(3);
        let mut out = Vec::new();
        handshake.advance(&opt(option::EXPORT_NAME, b"v"), &mut out);
        assert!(matches!(handshake.opened(Err(Refusal::Unknown), &mut out), Err(Event::Close(_))));
        assert!(out.is_empty());
    }

    #[test]
    fn unknown_options_are_answered_unsupported() {
        let mut handshake = begun(3);
        let mut out = Vec::new();
        for number in [option::STARTTLS, 11, 4, 0, 999] {
            assert_eq!(handshake.advance(&opt(number, b"data"), &mut out).1, Event::Continue);
        }
        assert!(replies(&out).iter().all(|reply| reply.1 == option_reply::ERR_UNSUP));
    }

    #[test]
    fn where_tls_is_required_nothing_is_told_before_it_and_nothing_said_before_it_counts() {
        let mut out = Vec::new();
        let mut handshake = Handshake::new(HandshakeLimits::default(), Security::Required, &mut out);
        handshake.advance(&3u32.to_be_bytes(), &mut out);
        out.clear();
        for number in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, option::SET_META_CONTEXT, 99] {
            assert_eq!(handshake.advance(&opt(number, &go_data("v", &[])), &mut out).1, Event::Continue);
        }
        assert!(replies(&out).iter().all(|reply| reply.1 == option_reply::ERR_TLS_REQD));
        out.clear();
        assert_eq!(handshake.advance(&opt(option::STARTTLS, b"x"), &mut out).1, Event::Continue);
        assert_eq!(handshake.advance(&opt(option::STARTTLS, &[]), &mut out).1, Event::StartTls);
        let got = replies(&out);
        assert_eq!((got[0].1, got[1].1), (option_reply::ERR_INVALID, option_reply::ACK));
        handshake.encrypted();
        out.clear();
        handshake.advance(&opt(option::STARTTLS, &[]), &mut out);
        assert_eq!(replies(&out)[0].1, option_reply::ERR_INVALID, "twice");
        assert_eq!(handshake.advance(&opt(option::GO, &go_data("v", &[])), &mut out).1, Event::Open("v".into()));
        assert_eq!(handshake.opened(Ok(offer()), &mut out), Ok(Agreed::default()));

        let mut handshake = Handshake::new(HandshakeLimits::default(), Security::Required, &mut out);
        handshake.advance(&3u32.to_be_bytes(), &mut out);
        assert!(matches!(handshake.advance(&opt(option::EXPORT_NAME, b"v"), &mut out).1, Event::Close(_)));
    }

    #[test]
    fn list_names_what_it_is_given_or_refuses() {
        let mut handshake = begun(3);
        let mut out = Vec::new();
        assert_eq!(handshake.advance(&opt(option::LIST, &[]), &mut out).1, Event::List);
        handshake.listed(Some(["a", "bb"].into_iter()), &mut out);
        let got = replies(&out);
        assert_eq!(got[1].2, b"\0\0\0\x02bb");
        assert_eq!(got[2].1, option_reply::ACK);
        out.clear();
        handshake.advance(&opt(option::LIST, &[]), &mut out);
        handshake.listed(None::<std::iter::Empty<&str>>, &mut out);
        assert_eq!(replies(&out)[0].1, option_reply::ERR_POLICY);
        out.clear();
        handshake.advance(&opt(option::LIST, b"x"), &mut out);
        assert_eq!(replies(&out)[0].1, option_reply::ERR_INVALID);
    }

    #[test]
    fn limits_close_the_connection() {
        let mut out = Vec::new();
        let mut handshake = begun(3);
        let mut long = opt(77, &[]);
        long[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(matches!(handshake.advance(&long, &mut out).1, Event::Close(_)));
        assert_eq!(replies(&out)[0].1, option_reply::ERR_TOO_BIG);

        let mut handshake = begun(3);
        let mut closed_after = 0;
        loop {
            out.clear();
            match handshake.advance(&opt(77, &[]), &mut out).1 {
                Event::Close(_) => break,
                _ => closed_after += 1,
            }
        }
        assert_eq!(closed_after, HandshakeLimits::default().options);

        let mut greeting = Vec::new();
        let mut handshake = Handshake::new(HandshakeLimits::default(), Security::Plain, &mut greeting);
        assert!(matches!(handshake.advance(&8u32.to_be_bytes(), &mut out).1, Event::Close(_)));
        let mut handshake = begun(3);
        assert!(matches!(handshake.advance(b"GET / HTTP/1.1\r\n", &mut out).1, Event::Close(_)));
    }

    proptest! {
        /// Options with arbitrary contents never panic, never consume more than there is, and grow the output by a
        /// bounded amount.
        #[test]
        fn arbitrary_options_are_survived(options in prop::collection::vec((0u32..14, prop::collection::vec(any::<u8>(), 0..80)), 0..20)) {
            let mut handshake = begun(3);
            for (number, data) in options {
                let bytes = opt(number, &data);
                let mut out = Vec::new();
                let (used, event) = handshake.advance(&bytes, &mut out);
                prop_assert!(used <= bytes.len());
                match event {
                    Event::Open(_) => { let _ = handshake.opened(Err(Refusal::Policy), &mut out); }
                    Event::Describe(_) => { handshake.described(Ok(offer()), &mut out); }
                    Event::List => { handshake.listed(Some(["x"].into_iter()), &mut out); }
                    Event::Close(_) => break,
                    Event::StartTls => handshake.encrypted(),
                    Event::NeedMore | Event::Continue => {}
                }
                prop_assert!(out.len() < 1024);
            }
        }
    }
}
