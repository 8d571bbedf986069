//! Is a vhost-user server there? Asked before a domain starts: with `reconnect` in its disk QEMU waits for a socket that is
//! not there without an end, and libvirt's call with it; a server that accepts and says nothing does the same.
//!
//! The question is the protocol's first one, "get features" (12 bytes: request, flags, size of what follows, each a
//! little-endian u32), on a connection of its own, which is closed after the answer. It changes nothing in the server.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::xml::vhost_user_sockets;
use crate::error::{HypervisorError, HypervisorErrorKind, Result};

/// A server has one connection at a time. One that is busy does not answer a second one.
const PATIENCE: Duration = Duration::from_secs(2);

const GET_FEATURES: u32 = 1;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const HEADER: usize = 12;

/// Refuses a domain whose vhost-user disks are not all served.
pub(super) fn check_servers(what: &str, domain_xml: &str) -> Result<()> {
    for socket in vhost_user_sockets(domain_xml) {
        ask(&socket, PATIENCE).map_err(|e| {
            let hint = match e.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => "nothing listens there",
                ErrorKind::WouldBlock | ErrorKind::TimedOut => "it does not answer: is another machine attached to it?",
                _ => "it is not a vhost-user server",
            };
            let text = format!("{what}: disk socket {}: {hint}", socket.display());
            HypervisorError::with_source(HypervisorErrorKind::DiskUnavailable, text, e)
        })?;
    }
    Ok(())
}

/// The features the server says it has.
fn ask(socket: &Path, patience: Duration) -> std::io::Result<u64> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let question: Vec<u8> = [GET_FEATURES, VERSION, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    stream.write_all(&question)?;
    let mut answer = [0; HEADER + 8];
    stream.read_exact(&mut answer)?;
    features_of(&answer).ok_or_else(|| std::io::Error::new(ErrorKind::InvalidData, "its answer is of another protocol"))
}

fn features_of(answer: &[u8; HEADER + 8]) -> Option<u64> {
    let word = |at: usize| Some(u32::from_le_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    let is_answer = word(0)? == GET_FEATURES && word(4)? & 0x3 == VERSION && word(4)? & REPLY != 0 && word(8)? == 8;
    is_answer.then(|| u64::from_le_bytes(answer[HEADER..].try_into().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn xml(socket: &Path) -> String {
        format!("<disk type='vhostuser' device='disk'><source type='unix' path='{}'/></disk>", socket.display())
    }

    /// Serves one connection with these bytes for an answer.
    fn server(socket: &Path, answer: Vec<u8>) -> thread::JoinHandle<()> {
        let listener = UnixListener::bind(socket).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut question = [0; HEADER];
            stream.read_exact(&mut question).unwrap();
            assert_eq!(question, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            stream.write_all(&answer).unwrap();
        })
    }

    #[test]
    fn a_server_that_answers_may_be_used_and_another_may_not() {
        let dir = tempfile::tempdir().unwrap();
        let good = dir.path().join("good");
        let answer = [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0x40, 0, 0, 0x70, 1, 0, 0, 0].to_vec();
        let thread = server(&good, answer);
        check_servers("start", &xml(&good)).unwrap();
        thread.join().unwrap();

        let nbd = dir.path().join("nbd");
        let thread = server(&nbd, b"NBDMAGICIHAVEOPT\0\x03\0\0".to_vec());
        let error = check_servers("start domain x", &xml(&nbd)).unwrap_err();
        thread.join().unwrap();
        assert_eq!(error.kind(), HypervisorErrorKind::DiskUnavailable);
        assert!(error.context().contains("not a vhost-user server"), "{}", error.context());
    }

    #[test]
    fn a_socket_that_is_missing_dead_or_silent_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (missing, dead) = (dir.path().join("missing"), dir.path().join("dead"));
        drop(UnixListener::bind(&dead).unwrap());
        for socket in [&missing, &dead] {
            let error = check_servers("start domain x", &xml(socket)).unwrap_err();
            assert!(error.context().contains("nothing listens"), "{}", error.context());
            assert!(error.context().contains(socket.to_str().unwrap()));
        }
        let silent = dir.path().join("silent");
        let _listener = UnixListener::bind(&silent).unwrap();
        let error = ask(&silent, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    }

    #[test]
    fn a_domain_without_such_disks_asks_nobody() {
        check_servers("start", "<disk type='network'><source protocol='nbd' name='/x'/></disk>").unwrap();
    }
}
