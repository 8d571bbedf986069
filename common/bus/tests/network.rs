//! DDS between two hosts (network namespaces): multicast, peers without multicast, outages. For root.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    time::{Duration, Instant},
};

use muster_bus::{
    Bus, BusConfig,
    testing::{Namespaces, free_domain, wait_until},
};
use muster_idl::{
    samples,
    v1::{GroupCommand, VirtualSystem},
};

const LIMIT: Duration = Duration::from_secs(30);

fn config(cell: u16, host: usize, multicast: bool) -> BusConfig {
    BusConfig { cell, interface: Some(Namespaces::ADDRESSES[host].into()), peers: vec![], multicast }
}

/// Each publishes, each hears the other.
fn talk(a: &Bus, b: &Bus) {
    let states = a.publisher::<VirtualSystem>().unwrap();
    states.publish(&samples::virtual_system()).unwrap();
    let mut seen = b.subscriber::<VirtualSystem>(16).unwrap();
    let commands = b.publisher::<GroupCommand>().unwrap();
    let mut inbox = a.subscriber::<GroupCommand>(16).unwrap();
    let started = Instant::now();
    wait_until("they match", LIMIT, || inbox.matched() == 1 && commands.matched() == 1);
    eprintln!("matched after {:?}", started.elapsed());
    commands.publish(&samples::group_command()).unwrap();
    assert_eq!(inbox.recv_timeout(LIMIT).unwrap().value().unwrap(), samples::group_command());
    assert_eq!(seen.recv_timeout(LIMIT).unwrap().value().unwrap(), samples::virtual_system());
}

#[test]
fn hosts_find_each_other_by_multicast() {
    let Some(hosts) = Namespaces::make() else { return };
    let domain = free_domain();
    let a = hosts.inside(0, || Bus::dds(&config(domain.cell(), 0, true)).unwrap());
    let b = hosts.inside(1, || Bus::dds(&config(domain.cell(), 1, true)).unwrap());
    talk(&a, &b);
}

/// Multicast is for discovery: user data goes to the readers only, so the group's user port has no listener.
#[test]
fn nobody_listens_for_user_data_by_multicast() {
    let Some(hosts) = Namespaces::make() else { return };
    let domain = free_domain();
    let _bus = hosts.inside(0, || Bus::dds(&config(domain.cell(), 0, true)).unwrap());
    let ports: Vec<u16> = hosts.inside(0, || {
        let table = fs::read_to_string("/proc/thread-self/net/udp").unwrap();
        table
            .lines()
            .skip(1)
            .filter_map(|line| u16::from_str_radix(line.split_whitespace().nth(1)?.split(':').nth(1)?, 16).ok())
            .collect()
    });
    let base = 7400 + 250 * domain.cell();
    assert!(ports.contains(&base), "discovery: {ports:?}");
    assert!(!ports.contains(&(base + 1)), "user data: {ports:?}");
}

/// One side naming the other is enough, whichever comes first.
#[test]
fn hosts_find_configured_peers_without_multicast() {
    for first_knows in [true, false] {
        let Some(hosts) = Namespaces::make() else { return };
        hosts.drop_multicast();
        let domain = free_domain();
        let mut configs = [config(domain.cell(), 0, false), config(domain.cell(), 1, false)];
        let (who, whom) = if first_knows { (0, 1) } else { (1, 0) };
        configs[who].peers = vec![Namespaces::ADDRESSES[whom].into()];
        let a = hosts.inside(0, || Bus::dds(&configs[0]).unwrap());
        let b = hosts.inside(1, || Bus::dds(&configs[1]).unwrap());
        talk(&a, &b);
        assert!(b.diagnosis().contains("1 other participants seen"), "{}", b.diagnosis());
    }
}

#[test]
fn without_multicast_and_peers_nobody_is_seen_and_the_diagnosis_says_where_was_looked() {
    let Some(hosts) = Namespaces::make() else { return };
    hosts.drop_multicast();
    let domain = free_domain();
    let a = hosts.inside(0, || Bus::dds(&config(domain.cell(), 0, true)).unwrap());
    let _b = hosts.inside(1, || Bus::dds(&config(domain.cell(), 1, true)).unwrap());
    let text = a.diagnosis();
    let port = 7400 + 250 * domain.cell();
    for part in [
        format!("cell {} (DDS domain id)", domain.cell()),
        "interface 10.77.0.1".into(),
        format!("multicast 239.255.0.1:{port}"),
        "no peers configured".into(),
        format!("listening at UDP ports {} and {}", port + 10, port + 11),
        "0 other participants seen".into(),
    ] {
        assert!(text.contains(&part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn an_outage_of_seconds_loses_nothing_reliable() {
    let Some(hosts) = Namespaces::make() else { return };
    let domain = free_domain();
    let a = hosts.inside(0, || Bus::dds(&config(domain.cell(), 0, true)).unwrap());
    let b = hosts.inside(1, || Bus::dds(&config(domain.cell(), 1, true)).unwrap());
    let commands = a.publisher::<GroupCommand>().unwrap();
    let mut inbox = b.subscriber::<GroupCommand>(16).unwrap();
    wait_until("they match", LIMIT, || inbox.matched() == 1 && commands.matched() == 1);
    hosts.cable(false);
    for i in 0..100 {
        commands.publish(&GroupCommand { issued_at_us: i, ..samples::group_command() }).unwrap();
    }
    assert!(inbox.recv_timeout(Duration::from_secs(3)).is_none(), "the cable is out");
    hosts.cable(true);
    for i in 0..100 {
        assert_eq!(inbox.recv_timeout(LIMIT).unwrap().value().unwrap().issued_at_us, i);
    }
    assert_eq!(inbox.missed(), 0);
}

/// The fault of RustDDS that the watchdog is for: participants that lost each other by time-out (50 s) never match
/// again. Takes a minute: their lease is fixed at 50 s.
#[test]
fn after_an_outage_longer_than_the_lease_hosts_match_again() {
    let Some(hosts) = Namespaces::make() else { return };
    let domain = free_domain();
    let a = hosts.inside(0, || Bus::dds(&config(domain.cell(), 0, true)).unwrap());
    let b = hosts.inside(1, || Bus::dds(&config(domain.cell(), 1, true)).unwrap());
    let commands = a.publisher::<GroupCommand>().unwrap();
    let mut inbox = b.subscriber::<GroupCommand>(16).unwrap();
    wait_until("they match", LIMIT, || inbox.matched() == 1 && commands.matched() == 1);
    let before = [a.participant_guid(), b.participant_guid()];
    hosts.cable(false);
    wait_until("both have lost each other", Duration::from_secs(90), || {
        inbox.matched() == 0 && commands.matched() == 0
    });
    hosts.cable(true);
    let plugged = Instant::now();
    wait_until("they match again", Duration::from_secs(60), || inbox.matched() == 1 && commands.matched() == 1);
    eprintln!("matched {:?} after the cable was back", plugged.elapsed());
    assert_ne!([a.participant_guid(), b.participant_guid()], before, "the watchdog has rebuilt one of them");
    commands.publish(&samples::group_command()).unwrap();
    assert_eq!(inbox.recv_timeout(LIMIT).unwrap().value().unwrap(), samples::group_command());
}
