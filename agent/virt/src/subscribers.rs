//! Bounded fan-out of events.

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::Mutex;

use crate::state::HypervisorEvent;

/// Room for a burst: a thousand VMs starting at once give three events each.
pub(crate) const CAPACITY: usize = 4096;

struct Subscriber {
    sender: Sender<HypervisorEvent>,
    overflowed: bool,
}

/// Publishing never blocks. A subscriber that is full loses events and gets one `Overflow` when there is room again.
#[derive(Default)]
pub(crate) struct Subscribers {
    list: Mutex<Vec<Subscriber>>,
}

impl Subscribers {
    pub(crate) fn subscribe(&self) -> Receiver<HypervisorEvent> {
        self.subscribe_with(CAPACITY)
    }

    fn subscribe_with(&self, capacity: usize) -> Receiver<HypervisorEvent> {
        let (sender, receiver) = bounded(capacity);
        self.list.lock().push(Subscriber { sender, overflowed: false });
        receiver
    }

    pub(crate) fn publish(&self, event: &HypervisorEvent) {
        self.list.lock().retain_mut(|subscriber| {
            if subscriber.overflowed {
                match subscriber.sender.try_send(HypervisorEvent::Overflow) {
                    Ok(()) => subscriber.overflowed = false,
                    Err(TrySendError::Full(_)) => return true,
                    Err(TrySendError::Disconnected(_)) => return false,
                }
            }
            match subscriber.sender.try_send(event.clone()) {
                Ok(()) => true,
                Err(TrySendError::Full(_)) => {
                    subscriber.overflowed = true;
                    true
                }
                Err(TrySendError::Disconnected(_)) => false,
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_receiver_is_told_that_it_lost_events() {
        let subscribers = Subscribers::default();
        let receiver = subscribers.subscribe_with(2);
        for _ in 0..5 {
            subscribers.publish(&HypervisorEvent::ConnectionLost);
        }
        assert_eq!(receiver.try_iter().count(), 2);
        subscribers.publish(&HypervisorEvent::ConnectionLost);
        let seen: Vec<_> = receiver.try_iter().collect();
        assert_eq!(seen, [HypervisorEvent::Overflow, HypervisorEvent::ConnectionLost]);
        drop(receiver);
        subscribers.publish(&HypervisorEvent::ConnectionLost);
        assert!(subscribers.list.lock().is_empty());
    }
}
