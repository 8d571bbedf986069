//! The program itself: over real RTPS on loopback, killed and started again, stopped in order, refusing to start.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fake;

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use fake::{FakeAgent, Mood, command, ended, wait_for};
use muster_api::{Client, Endpoint, HostState, Outcome, Verb};
use muster_bus::testing::free_domain;

/// Does not outlive the test.
struct Program(Child);
impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster-controller"));
    command.stdin(Stdio::null());
    command
}

fn write_config(dir: &Path, cell: u16, more: &str) -> PathBuf {
    let path = dir.join("controller.toml");
    let text = format!(
        "{more}\nstate_dir = {:?}\nstream.listen = '127.0.0.1:0'\n\
         timing.offline_after_ms = 2000\ntiming.verdict_grace_ms = 300\n\
         bus = {{ cells = [{cell}], interface = '127.0.0.1', multicast = false }}\n",
        dir.join("state")
    );
    std::fs::write(&path, text).unwrap();
    path
}

fn start(config: &Path) -> Program {
    Program(program().arg("--config").arg(config).spawn().unwrap())
}

async fn answering(dir: &Path) -> Client {
    let client = Client::connect(Endpoint::Unix(dir.join("state/controller.sock"))).unwrap();
    wait_for("the controller to answer", async || client.status().await.is_ok()).await;
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_during_a_command_it_shows_the_verdicts_when_started_again() {
    let domain = free_domain();
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path(), domain.cell(), "lab = true");
    let mut first = start(&config);
    let client = answering(dir.path()).await;
    let agents = [1, 2].map(|n| FakeAgent::start(&domain.bus().unwrap(), &format!("host{n}")));
    wait_for("both hosts to be online", async || {
        let hosts = client.all_hosts().await.unwrap();
        hosts.iter().filter(|h| h.state == HostState::Online && !h.accelerator.is_empty()).count() == 2
    })
    .await;
    agents.iter().for_each(|agent| agent.set_mood(Mood::Reluctant));
    let given = client.create_command(&command(Verb::Drain, &["*"], 20), None).await.unwrap();
    let id = given.summary.id.to_string();
    wait_for("the agents to have done it", async || agents.iter().all(|a| a.has_recorded(&id))).await;
    // SIGKILL
    first.0.kill().unwrap();
    first.0.wait().unwrap();

    let mut second = start(&config);
    let client = answering(dir.path()).await;
    let command = ended(&client, &id).await;
    for member in &command.members {
        assert_eq!(member.verdict.as_ref().unwrap().outcome, Outcome::Done, "{member:?}");
    }
    assert!(agents.iter().all(|agent| agent.executed() == 1), "nothing was done twice");
    assert_eq!(client.status().await.unwrap().epoch, 2);

    // a stop in order
    let pid = rustix::process::Pid::from_raw(second.0.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(second.0.wait().unwrap().success());
    assert!(!dir.path().join("state/controller.sock").exists());
}

fn refused(config: &Path, arguments: &[&str]) -> String {
    let Output { status, stderr, .. } = program().arg("--config").arg(config).args(arguments).output().unwrap();
    assert_eq!(status.code(), Some(2));
    String::from_utf8(stderr).unwrap()
}

#[test]
fn it_refuses_to_start_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let config = write_config(dir.path(), 99, "lab = false");
    assert!(refused(&config, &[]).contains("set lab = true"));
    let config = write_config(dir.path(), 99, "lab = true\nlabb = true");
    assert!(refused(&config, &[]).contains("labb"));
    let config = write_config(dir.path(), 99, "lab = true");
    let wrong = refused(&config, &["--set", "bus.interface=192.0.2.1"]);
    assert!(wrong.contains("192.0.2.1") && wrong.contains("127.0.0.1"), "{wrong}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let text = refused(&config, &["--set", &format!("stream.listen=127.0.0.1:{port}")]);
    assert!(text.contains(&format!("127.0.0.1:{port}: ")) && text.contains("Set stream.listen"), "{text}");
    // not even by mistake
    let letter = dir.path().join("letter");
    std::fs::write(&letter, "dear").unwrap();
    let text = refused(&config, &["--set", &format!("api.socket={}", letter.display())]);
    assert!(text.contains("no socket"), "{text}");
    assert_eq!(std::fs::read(&letter).unwrap(), b"dear");
    let Output { status, stdout, .. } = program().arg("--config").arg(&config).arg("--check").output().unwrap();
    assert!(status.success());
    assert!(String::from_utf8(stdout).unwrap().contains("cells = [99]"));
}
