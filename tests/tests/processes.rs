//! Real processes over real RTPS: kill -9 in the middle of a group command, and commands of another vendor. A command
//! ends, every member has one verdict, nobody is said to have succeeded who did not.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use muster_tests::{Fleet, fleet::LIMIT, outcomes, wait_for};
use serde_json::Value;

/// A simulated guest takes 7 to 10 s to shut down: time to kill somebody meanwhile.
const SLOW: &str = "sim:///?seed=7&speed=0.35";

fn running_fleet(hosts: usize) -> Fleet {
    let fleet = Fleet::start(hosts, SLOW);
    fleet.furnish(2);
    let on = fleet.json(&["vm", "power-on", "school"]);
    assert_eq!(outcomes(&on), [("done".to_string(), 2 * hosts as u64)], "{on:#}");
    // a guest that is still booting has no agent to ask, and may answer the power button late
    wait_for("all guests up", LIMIT, || {
        let list = fleet.json(&["vm", "ls", "school"]);
        list.as_array()?.iter().all(|vm| vm["guest_up"] == true).then_some(())
    });
    fleet
}

/// Orders a slow shutdown and comes back once every host has begun it.
fn begin_shutdown(fleet: &Fleet, timeout: &str) -> String {
    let command = fleet.json(&["vm", "shutdown", "school", "--timeout", timeout, "--no-wait"]);
    let id = command["id"].as_str().unwrap().to_string();
    wait_for("every VM shutting down", LIMIT, || {
        let list = fleet.json(&["vm", "ls", "school"]);
        list.as_array()?.iter().all(|vm| vm["state"] == "shutting-down").then_some(())
    });
    id
}

fn of_host<'a>(command: &'a Value, host: &'a str) -> impl Iterator<Item = &'a Value> {
    command["members"].as_array().unwrap().iter().filter(move |m| m["host_name"] == host)
}

#[test]
fn a_killed_agent_costs_its_own_members_only_and_the_command_ends() {
    let mut fleet = running_fleet(3);
    let id = begin_shutdown(&fleet, "20");
    fleet.kill_host(1);
    let output = fleet.muster(&["command", "watch", &id]);
    assert_eq!(output.status.code(), Some(1), "some members failed: {}", String::from_utf8_lossy(&output.stderr));
    let command = fleet.json(&["command", "show", &id]);
    assert_eq!(command["state"], "ended");
    let (ended, not_after) = (command["ended_at_us"].as_u64().unwrap(), command["not_after_us"].as_u64().unwrap());
    assert!(ended <= not_after + 10_000_000, "ended {} s after its deadline", (ended - not_after) / 1_000_000);
    for member in of_host(&command, "host2") {
        let outcome = member["verdict"]["outcome"].as_str().unwrap();
        assert!(["offline", "unknown"].contains(&outcome), "{member:#}");
    }
    for member in of_host(&command, "host1").chain(of_host(&command, "host3")) {
        assert_eq!(member["verdict"]["outcome"], "done", "{member:#}");
    }

    // a command given while it is away names it too, and says offline
    let ping = fleet.json(&["host", "ping", "host2", "--timeout", "3"]);
    assert_eq!(outcomes(&ping), [("offline".to_string(), 1)], "{ping:#}");

    // its successor is welcome
    fleet.start_host(1);
    fleet.wait_online(3);
    let ping = fleet.json(&["host", "ping", "host1", "host2", "host3"]);
    assert_eq!(outcomes(&ping), [("done".to_string(), 3)], "{ping:#}");
}

#[test]
fn a_killed_controller_has_the_verdicts_when_it_comes_back() {
    let mut fleet = running_fleet(2);
    let id = begin_shutdown(&fleet, "60");
    fleet.kill_controller();
    fleet.start_controller();
    let output = fleet.muster(&["command", "watch", &id]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let command = fleet.json(&["command", "show", &id]);
    assert_eq!(outcomes(&command), [("done".to_string(), 4)], "{command:#}");
    // and once more: what is stored is stored
    fleet.kill_controller();
    fleet.start_controller();
    assert_eq!(fleet.json(&["command", "show", &id])["members"], command["members"]);
}

#[test]
fn a_command_of_another_vendor_is_obeyed_like_ours() {
    let fleet = running_fleet(2);
    let venv = muster_tests::source_root().join("target/venv/bin/python");
    let python = if venv.exists() { venv } else { "python3".into() };
    let output = std::process::Command::new(python)
        .arg(muster_tests::source_root().join("examples/python/command.py"))
        .args(["--cell", &fleet.cell().to_string(), "--interface", "127.0.0.1", "--peer", "127.0.0.1"])
        .args(["pause", "host1-desk01", "host2-desk02"])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    // read back through our own controller, which learns of it as everybody does
    wait_for("two VMs paused", LIMIT, || {
        let list = fleet.json(&["vm", "ls", "school"]);
        let mut paused: Vec<&str> =
            list.as_array()?.iter().filter(|vm| vm["state"] == "paused").filter_map(|vm| vm["name"].as_str()).collect();
        paused.sort_unstable();
        (paused == ["host1-desk01", "host2-desk02"]).then_some(())
    });
}

#[test]
fn an_imported_image_reads_back_over_nbd_as_it_was() {
    let Some(nbdcopy) = muster_tests::tool("nbdcopy", "libnbd-bin") else { return };
    let fleet = Fleet::start(1, SLOW);
    fleet.furnish(1);
    let vm = fleet.json(&["vm", "show", "host1-desk01"]);
    let system = vm["disks"].as_array().unwrap().iter().find(|d| d["role"] == "system").unwrap();
    let name = format!("{}.{}", system["volume"].as_str().unwrap(), system["generation"]);
    let copy = fleet.dir().join("copy.raw");
    let uri = format!("nbd+unix:///{name}?socket={}", fleet.dir().join("h1/r/nbd.sock").display());
    let output = std::process::Command::new(nbdcopy).arg(uri).arg(&copy).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (source, copy) = (std::fs::read(fleet.dir().join("small.raw")).unwrap(), std::fs::read(copy).unwrap());
    assert!(source == copy, "the volume differs from the image it was cloned from");
    let store = fleet.json(&["store", "show", "host1"]);
    assert_eq!(store["guest_file_reads"], 0, "{store:#}");
}
