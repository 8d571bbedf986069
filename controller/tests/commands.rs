//! Commands over the in-memory bus, through the REST interface on the unix socket.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fake;

use std::collections::BTreeMap;

use fake::{Fleet, Mood, client, command, ended, start_controller, wait_for};
use muster_api::{CommandEvent, CommandState, HostState, Outcome, Verb, VmStanding, VmState};
use muster_common::ErrorCode;

const TOPIC: &str = "muster_v1_group_command";

fn outcomes(command: &muster_api::Command) -> BTreeMap<String, Outcome> {
    command.members.iter().map(|m| (m.name.clone(), m.verdict.as_ref().unwrap().outcome)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_published_sample_reaches_every_member_of_a_group() {
    let fleet = Fleet::start(3).await;
    fleet.template().await;
    let created = fleet.desktops().await;
    assert_eq!(created.vms.len(), 6);
    wait_for("the VMs to stand", async || {
        let vms = fleet.client.all_vms(&["school".into()]).await.unwrap();
        vms.len() == 6 && vms.iter().all(|vm| vm.standing == VmStanding::Present && vm.state == VmState::Off)
    })
    .await;

    let before = fleet.network.published(TOPIC);
    let given = fleet.client.create_command(&command(Verb::PowerOn, &["school"], 20), None).await.unwrap();
    assert_eq!(given.members.len(), 6);
    let mut events = fleet.client.command_events(&given.summary.id.to_string()).await.unwrap();
    let (mut seen, mut ended) = (BTreeMap::new(), None);
    while let Some(event) = events.next().await.unwrap() {
        match event {
            CommandEvent::Command { command } => {
                seen.extend(command.members.iter().filter_map(|m| Some((m.vm, m.verdict.clone()?.outcome))));
            }
            CommandEvent::Verdict { member } => {
                seen.insert(member.vm, member.verdict.unwrap().outcome);
            }
            CommandEvent::Progress { .. } => {}
            CommandEvent::Ended { summary } => ended = Some(summary),
        }
    }
    let ended = ended.expect("the stream says that it ended");
    assert_eq!((ended.state, ended.members_answered), (CommandState::Ended, 6));
    assert_eq!(ended.outcomes, BTreeMap::from([(Outcome::Done, 6)]));
    assert_eq!(seen.len(), 6);
    assert!(seen.values().all(|o| *o == Outcome::Done));
    assert_eq!(fleet.network.published(TOPIC) - before, 1, "one sample");
    let vms = fleet.client.all_vms(&["school/lab1".into()]).await.unwrap();
    assert!(vms.iter().all(|vm| vm.state == VmState::Running), "{vms:?}");
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_and_a_silent_one_are_told_apart_by_the_deadline() {
    let mut fleet = Fleet::start(3).await;
    fleet.agents[0].set_mood(Mood::Mute);
    fleet.agents[1].set_mood(Mood::Mute);
    let given = fleet.client.create_command(&command(Verb::Drain, &["*"], 4), None).await.unwrap();
    fleet.agents[0].kill();
    let command = ended(&fleet.client, &given.summary.id.to_string()).await;
    let expected = [("host1", Outcome::Offline), ("host2", Outcome::Unknown), ("host3", Outcome::Done)];
    assert_eq!(outcomes(&command), expected.map(|(n, o)| (n.to_string(), o)).into());
    let late_by = command.summary.ended_at_us - command.summary.not_after_us;
    assert!(late_by < 2_000_000, "it ended {late_by} us after its deadline");
    let host = fleet.client.host("host1").await.unwrap();
    assert_eq!(host.state, HostState::Offline);
    let status = fleet.client.status().await.unwrap();
    assert!(status.alarms.iter().any(|alarm| alarm.kind == "host-offline"));
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_word_that_comes_late_replaces_the_controllers() {
    let fleet = Fleet::start(1).await;
    fleet.agents[0].set_mood(Mood::Mute);
    let given = fleet.client.create_command(&command(Verb::Drain, &["host1"], 1), None).await.unwrap();
    let id = given.summary.id.to_string();
    assert_eq!(ended(&fleet.client, &id).await.members[0].verdict.as_ref().unwrap().outcome, Outcome::Unknown);
    // it had been done, and only the word was missing
    let fleet_bus = fleet.network.join("h1 again");
    let verdict = muster_idl::v1::Verdict {
        command: id.clone(),
        host: fleet.agents[0].host.to_string(),
        vm: String::new(),
        incarnation: String::new(),
        outcome: muster_idl::v1::Outcome::Done,
        code: "ok".into(),
        message: String::new(),
        enabled_state: 0,
        guest_up: false,
        result: String::new(),
        received_at_us: 0,
        started_at_us: 0,
        ended_at_us: 0,
    };
    fleet_bus.publisher().unwrap().publish(&verdict).unwrap();
    wait_for("the late word", async || {
        let verdict = fleet.client.command(&id).await.unwrap().members[0].verdict.clone().unwrap();
        verdict.outcome == Outcome::Done && verdict.late
    })
    .await;
    fleet.controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_died_during_a_command_shows_the_verdicts_when_it_is_back() {
    let fleet = Fleet::start(2).await;
    fleet.agents[0].set_mood(Mood::Reluctant);
    fleet.agents[1].set_mood(Mood::Reluctant);
    let given = fleet.client.create_command(&command(Verb::Drain, &["*"], 3), None).await.unwrap();
    let id = given.summary.id.to_string();
    wait_for("the agents to have done it", async || fleet.agents.iter().all(|a| a.has_recorded(&id))).await;
    let Fleet { network, agents, controller, client: old, dir } = fleet;
    // no shutdown: what is not durable now is lost
    drop((old, controller));
    let controller = wait_for_start(&network, dir.path()).await;
    let client = client(&controller);
    let command = ended(&client, &id).await;
    assert!(outcomes(&command).values().all(|o| *o == Outcome::Done), "{command:?}");
    assert!(agents.iter().all(|agent| agent.executed() == 1), "nothing was done twice");
    assert_eq!(client.status().await.unwrap().epoch, 2);
    controller.shutdown().await;
}

/// The lock of the one that was dropped goes with its last thread.
async fn wait_for_start(network: &muster_bus::twin::Network, dir: &std::path::Path) -> muster_controller::Controller {
    let mut started = None;
    wait_for("the state directory to be free", async || {
        let buses = vec![network.join("controller again")];
        let clock = std::sync::Arc::new(muster_common::SystemClock);
        started = muster_controller::Controller::start_with(fake::config(dir), clock, buses).await.ok();
        started.is_some()
    })
    .await;
    started.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_with_the_same_key_gives_one_command() {
    let fleet = Fleet::start(1).await;
    let order = command(Verb::Ping, &["host1"], 5);
    let first = fleet.client.create_command(&order, Some("key-1")).await.unwrap();
    let again = fleet.client.create_command(&order, Some("key-1")).await.unwrap();
    assert_eq!(first, again);
    let other = fleet.client.create_command(&command(Verb::Drain, &["host1"], 5), Some("key-1")).await;
    assert_eq!(other.unwrap_err().code(), ErrorCode::InvalidArgument);
    // also over a restart
    let Fleet { network, agents, controller, dir, .. } = fleet;
    controller.shutdown().await;
    let controller = start_controller(&network, dir.path()).await;
    let after = client(&controller).create_command(&order, Some("key-1")).await.unwrap();
    assert_eq!(first, after);
    assert_eq!(client(&controller).commands(&Default::default()).await.unwrap().items.len(), 1);
    drop(agents);
    controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_members_are_asked_again_by_a_retry() {
    let fleet = Fleet::start(2).await;
    fleet.agents[1].set_mood(Mood::Refuses);
    let given = fleet.client.create_command(&command(Verb::Drain, &["*"], 5), None).await.unwrap();
    let first = ended(&fleet.client, &given.summary.id.to_string()).await;
    assert_eq!(first.summary.outcomes, BTreeMap::from([(Outcome::Done, 1), (Outcome::Refused, 1)]));
    fleet.agents[1].set_mood(Mood::Obeys);
    let mut retry = command(Verb::Drain, &[], 5);
    retry.retry_of = Some(first.summary.id);
    let again = fleet.client.create_command(&retry, None).await.unwrap();
    assert_eq!(again.members.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["host2"]);
    let again = ended(&fleet.client, &again.summary.id.to_string()).await;
    assert_eq!(again.summary.outcomes, BTreeMap::from([(Outcome::Done, 1)]));
    fleet.controller.shutdown().await;
}
