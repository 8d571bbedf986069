//! A descriptor that one side writes to and the other waits for: a queue's kick, call and error.
//!
//! A frontend may hand over any descriptor. A pipe or a socket that nobody empties would hold the thread that writes to
//! it, and a terminal or a file has effects of its own: only an eventfd is taken, and made one that does not wait.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::ReadWriteFlags;

/// What the kernel calls an eventfd. The name of a file begins with a slash.
const EVENTFD: &str = "anon_inode:[eventfd]";

/// A frontend's descriptor was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EventError {
    /// It is something else.
    #[error("the {what} descriptor is no eventfd but {kind:?}")]
    Kind {
        /// What it was handed over as.
        what: &'static str,
        /// What the kernel calls it.
        kind: String,
    },
    /// The kernel does not say what it is, or does not let it be changed.
    #[error("take the {what} descriptor")]
    Take {
        /// What it was handed over as.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An eventfd, shared with the frontend. Neither call waits.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    /// Takes a descriptor of the frontend's. `what`: what it is to be, for the error.
    pub(crate) fn take(file: File, what: &'static str) -> Result<Event, EventError> {
        let failed = |source| EventError::Take { what, source };
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(failed)?;
        if kind.as_os_str() != EVENTFD {
            return Err(EventError::Kind { what, kind: kind.display().to_string() });
        }
        // The flag belongs to what the descriptor stands for, so the frontend's has it from now on, too. QEMU's had it
        // before.
        rustix::io::ioctl_fionbio(&file, true).map_err(|error| failed(error.into()))?;
        Ok(Event(file.into()))
    }

    /// Tells who waits for it. When it cannot take one more, they have not looked since the last times, and will.
    pub(crate) fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Forgets what was told.
    pub(crate) fn clear(&self) {
        // not waiting is said once more: for reads, unlike for writes, the frontend cannot take that back
        let mut count = [0; 8];
        let mut buffers = [io::IoSliceMut::new(&mut count)];
        let _ = rustix::io::preadv2(&self.0, &mut buffers, u64::MAX, ReadWriteFlags::NOWAIT);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

    use super::*;

    /// An eventfd that waits, as a frontend may have made it: its own descriptor, and ours.
    fn shared() -> (OwnedFd, Event) {
        let theirs = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let ours = Event::take(File::from(theirs.try_clone().unwrap()), "call").unwrap();
        (theirs, ours)
    }

    fn is_readable(fd: &OwnedFd) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    #[test]
    fn only_an_eventfd_is_taken() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let named = tempfile::Builder::new().prefix("anon_inode:[eventfd]").tempfile().unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        let memory = rustix::fs::memfd_create(EVENTFD, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let others: [(OwnedFd, &str); 6] = [
            (reader.into(), "pipe:"),
            (writer.into(), "pipe:"),
            (socket.into(), "socket:"),
            (named.into_file().into(), "/"),
            (epoll, "anon_inode:[eventpoll]"),
            (memory, "/memfd:"),
        ];
        for (fd, expected) in others {
            match Event::take(fd.into(), "call") {
                Err(EventError::Kind { what: "call", kind }) => assert!(kind.starts_with(expected), "{kind}"),
                other => panic!("{expected}: {other:?}"),
            }
        }
        let (theirs, ours) = shared();
        ours.signal();
        assert!(is_readable(&theirs));
        ours.clear();
        assert!(!is_readable(&theirs));
    }

    #[test]
    fn one_that_is_full_holds_nobody() {
        let (theirs, ours) = shared();
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        ours.signal();
        let mut count = [0; 8];
        rustix::io::read(&theirs, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), u64::MAX - 1, "what was told before is there still");
    }

    #[test]
    fn clearing_waits_for_nothing_whatever_the_frontend_says() {
        let (theirs, ours) = shared();
        rustix::io::ioctl_fionbio(&theirs, false).unwrap();
        // nothing to read: this test would not end
        ours.clear();
        ours.signal();
        assert!(is_readable(&theirs));
        ours.clear();
        assert!(!is_readable(&theirs));
    }
}
