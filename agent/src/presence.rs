//! Who else is on the bus: is a controller there, and does somebody else claim to be this host? Pure: `(now, event)`
//! in, findings out.

use std::collections::BTreeMap;

use muster_common::{HostId, Incarnation};
use muster_idl::v1::{ControllerState, Heartbeat};

/// How often a warning that still holds is repeated.
const REPEAT_US: u64 = 60_000_000;
/// A claim to our host id counts when it is heard this often within [`CLAIM_WINDOW_US`]: a predecessor's last words
/// (one or two, from a writer's history) are welcome, a live twin goes on talking.
const CLAIMS: u32 = 3;
const CLAIM_WINDOW_US: u64 = 10_000_000;

/// What is worth saying.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// No controller was heard for this long.
    NoController { silent_us: u64 },
    /// One is heard again, or for the first time.
    ControllerBack { controller: String, name: String },
    /// Another agent run claims our host id and is alive.
    Duplicate { incarnation: String, participant: String },
}

/// What is known of one controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenController {
    pub name: String,
    pub epoch: u64,
    pub stream_endpoint: String,
    pub heard_us: u64,
}

#[derive(Debug)]
struct Claim {
    first_us: u64,
    heard: u32,
    counter: u64,
    said_us: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Presence {
    host: String,
    incarnation: String,
    silence_us: u64,
    started_us: u64,
    controllers: BTreeMap<String, SeenController>,
    warned_us: Option<u64>,
    present: bool,
    claims: BTreeMap<String, Claim>,
}

impl Presence {
    pub fn new(host: HostId, incarnation: Incarnation, silence_ms: u64, now_us: u64) -> Self {
        Self {
            host: host.to_string(),
            incarnation: incarnation.to_string(),
            silence_us: silence_ms * 1000,
            started_us: now_us,
            controllers: BTreeMap::new(),
            warned_us: None,
            present: false,
            claims: BTreeMap::new(),
        }
    }

    /// A controller spoke. `now_us` is this host's time: the controller's clock is not trusted here.
    pub fn controller(&mut self, now_us: u64, state: &ControllerState) -> Option<Finding> {
        let seen = SeenController {
            name: state.name.clone(),
            epoch: state.epoch,
            stream_endpoint: state.stream_endpoint.clone(),
            heard_us: now_us,
        };
        self.controllers.insert(state.controller.clone(), seen);
        if std::mem::replace(&mut self.present, true) {
            return None;
        }
        self.warned_us = None;
        Some(Finding::ControllerBack { controller: state.controller.clone(), name: state.name.clone() })
    }

    /// An agent's heartbeat was heard, maybe our own.
    pub fn heartbeat(&mut self, now_us: u64, beat: &Heartbeat) -> Option<Finding> {
        if beat.host != self.host || beat.incarnation == self.incarnation {
            return None;
        }
        self.claims.retain(|_, c| now_us.saturating_sub(c.first_us) <= CLAIM_WINDOW_US || c.said_us.is_some());
        if self.claims.len() > 64 {
            // somebody makes them up: what is known already is bad enough
            return None;
        }
        let claim = self.claims.entry(beat.incarnation.clone()).or_insert(Claim {
            first_us: now_us,
            heard: 0,
            counter: 0,
            said_us: None,
        });
        // only a counter that grows is life; the same sample again is an echo
        if claim.heard > 0 && beat.counter <= claim.counter {
            return None;
        }
        claim.counter = beat.counter;
        claim.heard += 1;
        let quiet = claim.said_us.is_none_or(|said| now_us.saturating_sub(said) >= REPEAT_US);
        if claim.heard < CLAIMS || !quiet {
            return None;
        }
        claim.said_us = Some(now_us);
        Some(Finding::Duplicate { incarnation: beat.incarnation.clone(), participant: beat.participant.clone() })
    }

    /// Time passes.
    pub fn tick(&mut self, now_us: u64) -> Option<Finding> {
        let last = self.controllers.values().map(|c| c.heard_us).max().unwrap_or(self.started_us);
        let silent_us = now_us.saturating_sub(last);
        if silent_us < self.silence_us {
            return None;
        }
        self.present = false;
        if self.warned_us.is_some_and(|warned| now_us.saturating_sub(warned) < REPEAT_US) {
            return None;
        }
        self.warned_us = Some(now_us);
        Some(Finding::NoController { silent_us })
    }

    /// Where to fetch bulk bytes for a command of `controller`; another one's endpoint when that one never spoke
    /// (commands of a third party's DDS).
    pub fn stream_endpoint(&self, controller: &str) -> Option<String> {
        self.controllers
            .get(controller)
            .or_else(|| self.controllers.values().max_by_key(|c| c.heard_us))
            .map(|c| c.stream_endpoint.clone())
            .filter(|endpoint| !endpoint.is_empty())
    }

    pub fn controllers(&self) -> &BTreeMap<String, SeenController> {
        &self.controllers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;

    fn presence() -> Presence {
        Presence::new(HostId::random(), Incarnation::random(), 5000, 0)
    }

    fn state(name: &str) -> ControllerState {
        ControllerState {
            controller: name.into(),
            incarnation: String::new(),
            name: name.into(),
            epoch: 1,
            group_epoch: 0,
            stream_endpoint: format!("http://{name}"),
            lab: true,
            sent_at_us: 0,
            awaiting: vec![],
        }
    }

    fn beat(p: &Presence, incarnation: &str, counter: u64) -> Heartbeat {
        Heartbeat {
            host: p.host.clone(),
            incarnation: incarnation.into(),
            boot: String::new(),
            participant: "p".into(),
            counter,
            sent_at_us: 0,
            draining: false,
        }
    }

    #[test]
    fn five_silent_seconds_are_a_warning_and_then_one_a_minute() {
        let mut p = presence();
        assert_eq!(p.tick(4 * S), None);
        assert_eq!(p.tick(5 * S), Some(Finding::NoController { silent_us: 5 * S }));
        assert_eq!(p.tick(6 * S), None);
        assert!(p.tick(65 * S).is_some());
        assert!(matches!(p.controller(66 * S, &state("c")), Some(Finding::ControllerBack { .. })));
        assert_eq!(p.controller(67 * S, &state("c")), None);
        assert_eq!(p.tick(71 * S), None);
        assert!(p.tick(72 * S).is_some());
        assert!(p.controller(73 * S, &state("c")).is_some());
    }

    #[test]
    fn a_live_twin_is_an_alarm_and_a_predecessors_last_words_are_not() {
        let mut p = presence();
        let own = p.incarnation.clone();
        for counter in 0..10 {
            assert_eq!(p.heartbeat(counter * S, &beat(&p, &own, counter)), None);
        }
        assert_eq!(p.heartbeat(S, &beat(&p, "old", 900)), None);
        assert_eq!(p.heartbeat(S, &beat(&p, "old", 900)), None);
        assert_eq!(p.heartbeat(2 * S, &beat(&p, "old", 900)), None);
        assert_eq!(p.heartbeat(20 * S, &beat(&p, "twin", 1)), None);
        assert_eq!(p.heartbeat(21 * S, &beat(&p, "twin", 2)), None);
        assert!(matches!(p.heartbeat(22 * S, &beat(&p, "twin", 3)), Some(Finding::Duplicate { .. })));
        assert_eq!(p.heartbeat(23 * S, &beat(&p, "twin", 4)), None);
        assert!(p.heartbeat(83 * S, &beat(&p, "twin", 64)).is_some());
    }

    #[test]
    fn bulk_bytes_come_from_the_commands_controller_and_else_from_the_last_one_heard() {
        let mut p = presence();
        assert_eq!(p.stream_endpoint("a"), None);
        p.controller(S, &state("a"));
        p.controller(2 * S, &state("b"));
        assert_eq!(p.stream_endpoint("a").unwrap(), "http://a");
        assert_eq!(p.stream_endpoint("cyclone").unwrap(), "http://b");
    }
}
