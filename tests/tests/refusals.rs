//! Bad input, as an operator gives it: each is refused with words that say what was attempted, on what and what to do,
//! with the exit status that scripts rely on, and nothing is lost. Real processes, one fleet for most.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use muster_agent::Config as AgentConfig;
use muster_tests::{Fleet, fleet::LIMIT, outcomes, program, tool, wait_for};
use serde_json::Value;

const ALL_DONE: i32 = 0;
const SOME_FAILED: i32 = 1;
const COULD_NOT_RUN: i32 = 2;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `muster`: it could not run, printed nothing, and its error has all these words.
#[track_caller]
fn refused(fleet: &Fleet, args: &[&str], words: &[&str]) {
    for output in [&["--output", "table"], &["--output", "json"]] {
        let run = fleet.muster(&[output, args].concat());
        let error = text(&run.stderr);
        assert_eq!(run.status.code(), Some(COULD_NOT_RUN), "muster {}: {error}", args.join(" "));
        assert!(run.stdout.is_empty(), "muster {}: {}", args.join(" "), text(&run.stdout));
        for word in words {
            assert!(error.contains(word), "muster {}: {error:?} does not say {word:?}", args.join(" "));
        }
    }
}

/// Runs a command whose only member does not obey: exit status 1, and the verdict's outcome, code and a part of its words.
#[track_caller]
fn not_done(fleet: &Fleet, args: &[&str], outcome: &str, code: &str, words: &str) {
    let run = fleet.muster(&[&["--output", "json"], args].concat());
    assert_eq!(run.status.code(), Some(SOME_FAILED), "muster {}: {}", args.join(" "), text(&run.stderr));
    let command: Value = serde_json::from_slice(&run.stdout).expect("JSON and nothing else");
    let verdict = &command["members"][0]["verdict"];
    assert_eq!(verdict["outcome"], outcome, "muster {}: {verdict}", args.join(" "));
    assert_eq!(verdict["code"], code, "muster {}: {verdict}", args.join(" "));
    let message = verdict["message"].as_str().unwrap();
    assert!(message.contains(words), "muster {}: {message:?} does not say {words:?}", args.join(" "));
}

/// Runs what has to work, as a table and as JSON; gives the JSON.
#[track_caller]
fn fine(fleet: &Fleet, args: &[&str]) -> Value {
    let run = fleet.muster(&[&["--output", "json"], args].concat());
    assert_eq!(run.status.code(), Some(ALL_DONE), "muster {}: {}", args.join(" "), text(&run.stderr));
    serde_json::from_slice(&run.stdout)
        .unwrap_or_else(|e| panic!("muster {}: {e}: {}", args.join(" "), text(&run.stdout)))
}

/// Starts a program that has to refuse to start: status 2, in time, and the words.
#[track_caller]
fn will_not_start(command: &mut Command, words: &[&str]) {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let ended = Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > ended {
            child.kill().unwrap();
            panic!("{command:?} started: {}", text(&child.wait_with_output().unwrap().stdout));
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    let error = text(&stderr);
    assert_eq!(status.code(), Some(COULD_NOT_RUN), "{command:?}: {error}");
    for word in words {
        assert!(error.contains(word), "{command:?}: {error:?} does not say {word:?}");
    }
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}

/// An import keeps nothing of what it refused, so each of these leaves the list of images as it was.
fn images(fleet: &Fleet) {
    let dir = fleet.dir();
    let small = path(dir, "small.raw");
    refused(
        fleet,
        &["image", "import", &small, "--name", "small"],
        &["import ", "small", "exists already", "--new-revision"],
    );
    refused(fleet, &["image", "import", &small, "--name", "twin"], &["small.raw", "same content", "small@1"]);
    refused(fleet, &["image", "import", &path(dir, "nowhere.raw")], &["nowhere.raw", "No such file"]);
    refused(fleet, &["image", "import", &dir.display().to_string()], &["not a regular file"]);
    refused(fleet, &["image", "import", &small, "--name", "a b"], &["\"a b\"", "image name"]);
    refused(
        fleet,
        &["image", "import", &small, "--name", "n", "--format", "qcow2"],
        &["small.raw", "not a qcow2 image"],
    );
    refused(fleet, &["image", "show", "smal"], &["no image named \"smal\"", "did you mean small?"]);

    fs::write(dir.join("empty.raw"), b"").unwrap();
    refused(fleet, &["image", "import", &path(dir, "empty.raw")], &["empty.raw", "the image is empty"]);
    fs::write(dir.join("odd.raw"), vec![7; 4097]).unwrap();
    refused(fleet, &["image", "import", &path(dir, "odd.raw")], &["odd.raw", "multiple of 512", "truncated"]);
    // magic numbers of others
    let mut vmdk = vec![0; 4096];
    vmdk[..4].copy_from_slice(b"KDMV");
    fs::write(dir.join("other.img"), vmdk).unwrap();
    refused(fleet, &["image", "import", &path(dir, "other.img")], &["VMDK", "qemu-img convert"]);

    if let Some(qemu_img) = tool("qemu-img", "qemu-utils") {
        let make = |args: &[&str]| {
            let made = Command::new(&qemu_img).args(args).current_dir(dir).output().unwrap();
            assert!(made.status.success(), "qemu-img {args:?}: {}", text(&made.stderr));
        };
        make(&["convert", "-O", "qcow2", "small.raw", "whole.qcow2"]);
        make(&["create", "-q", "-f", "qcow2", "-b", "small.raw", "-F", "raw", "backed.qcow2"]);
        make(&["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "outside.qcow2", "4M"]);
        let whole = fs::read(dir.join("whole.qcow2")).unwrap();
        fs::write(dir.join("half.qcow2"), &whole[..whole.len() / 2]).unwrap();
        refused(fleet, &["image", "import", &path(dir, "backed.qcow2")], &["backing file", "qemu-img convert"]);
        refused(fleet, &["image", "import", &path(dir, "outside.qcow2")], &["external data file", "qemu-img convert"]);
        refused(fleet, &["image", "import", &path(dir, "half.qcow2")], &["half.qcow2", "truncated or corrupt"]);
        refused(fleet, &["image", "estimate", &path(dir, "half.qcow2")], &["estimate ", "truncated or corrupt"]);
    }
    assert_eq!(fine(fleet, &["image", "ls"]).as_array().unwrap().len(), 1, "nothing refused is kept");

    // larger than the memory of any host: imported, and refused where it would have to fit
    let mut unique = vec![0u8; 600 << 20];
    for (n, block) in unique.chunks_exact_mut(4096).enumerate() {
        block[..8].copy_from_slice(&(n as u64 + 1).to_le_bytes());
    }
    fs::write(dir.join("big.raw"), unique).unwrap();
    let big = fine(fleet, &["image", "import", &path(dir, "big.raw")]);
    assert!(big["resident_estimate_bytes"].as_u64().unwrap() >= 600 << 20, "{big:#}");
    refused(fleet, &["image", "pull", "big", "host1"], &["big@1", "600 MiB", "host1", "budget of 512 MiB"]);
    fine(fleet, &["image", "delete", "big"]);
    fs::remove_file(dir.join("big.raw")).unwrap();

    refused(fleet, &["image", "delete", "small"], &["small@1", "template desk"]);
    refused(fleet, &["template", "delete", "desk"], &["desk", "is used by"]);
    refused(fleet, &["template", "create", "desk", "--image", "small"], &["template \"desk\" exists already"]);
    refused(fleet, &["template", "create", "t", "--image", "small", "--data", "1000"], &["multiple of 4096"]);
    not_done(fleet, &["image", "drop", "small", "host1"], "refused", "in-use", "in use by");
}

fn names_and_groups(fleet: &Fleet) {
    refused(fleet, &["vm", "power-on", "host1-desk1"], &["no VM or group named", "did you mean host1-desk01"]);
    refused(fleet, &["vm", "power-on", "schol/lab1"], &["no VM or group", "did you mean school/lab1"]);
    refused(fleet, &["vm", "power-on", "host1-desk01", "nobody"], &["\"nobody\""]);
    refused(fleet, &["host", "drain", "hots1"], &["no host or group named \"hots1\"", "host1"]);
    refused(fleet, &["host", "show", "host9"], &["no host named \"host9\"", "host1"]);
    refused(fleet, &["vm", "create", "--template", "dusk"], &["no template named \"dusk\"", "did you mean desk?"]);
    refused(fleet, &["vm", "create", "--template", "desk", "--name", "host1-desk01"], &["exists already"]);
    refused(fleet, &["vm", "create", "--template", "desk", "--name", "../x"], &["\"../x\"", "VM name"]);
    refused(fleet, &["vm", "power-on", "host1-desk01", "--timeout", "0"], &["timeout of 0 s", "1 to 86400"]);
    refused(fleet, &["vm", "delete", "host1-desk01"], &["--yes"]);
    refused(fleet, &["command", "show", "zero"], &["\"zero\"", "UUID"]);
    let nobody = "01a00000-0000-7000-8000-000000000000";
    refused(fleet, &["command", "watch", nobody], &["no command", nobody]);

    let before = fine(fleet, &["group", "ls"]);
    refused(fleet, &["group", "create", "school/lab1"], &["group \"school/lab1\" exists already"]);
    refused(fleet, &["group", "create", "a//b"], &["\"a//b\"", "group name"]);
    refused(
        fleet,
        &["group", "add", "school/lab1", "--group", "school"],
        &["cannot be put into", "school > school/lab1"],
    );
    refused(fleet, &["group", "add", "school", "--group", "school"], &["cannot be put into"]);
    refused(fleet, &["group", "add", "scool", "--vm", "host1-desk01"], &["did you mean school"]);
    refused(fleet, &["group", "add", "school"], &["--host, --vm or --group"]);
    assert_eq!(fine(fleet, &["group", "ls"]), before, "a refusal changes nothing");
    assert_eq!(fine(fleet, &["group", "create", "short/lived"])["path"], "short/lived");
    assert_eq!(fine(fleet, &["group", "delete", "short"])["deleted"], "short");
}

fn wrong_state(fleet: &Fleet) {
    let vm = "host1-desk01";
    not_done(fleet, &["vm", "resume", vm], "refused", "invalid-state", "power it on instead");
    not_done(fleet, &["vm", "exec", vm, "--", "true"], "refused", "invalid-state", "it is off");
    refused(fleet, &["vm", "screenshot", vm, "--to", &path(fleet.dir(), "x.png")], &["is it running?"]);
    fine(fleet, &["vm", "power-on", vm]);
    // a guest that has not booted yet has no agent that answers
    not_done(fleet, &["vm", "exec", vm, "--", "true"], "refused", "guest-agent", "qemu-guest-agent");
    not_done(fleet, &["vm", "delete", vm, "--yes"], "refused", "invalid-state", "power it off first");
    not_done(fleet, &["vm", "restore", vm], "refused", "invalid-state", "power it off first");
    // a simulated guest takes seconds to shut down
    not_done(fleet, &["vm", "shutdown", vm, "--timeout", "1"], "failed", "timeout", "did not shut down in time");
    wait_for("the late shutdown", LIMIT, || {
        (fine(fleet, &["vm", "show", vm])["state"] == "off").then_some(()).or_else(|| {
            fleet.muster(&["vm", "power-off", vm]);
            None
        })
    });
    let table = fleet.muster(&["vm", "power-off", vm]);
    assert!(text(&table.stdout).contains("already"), "said again is no failure: {}", text(&table.stdout));

    // a console of a VM without one: the agent's words, not its JSON
    let vnc = fleet.muster(&["vm", "vnc", vm, "--listen", &path(fleet.dir(), "v.sock")]);
    assert_eq!(vnc.status.code(), Some(COULD_NOT_RUN));
    assert!(!text(&vnc.stderr).contains('{'), "{}", text(&vnc.stderr));

    let drained = fine(fleet, &["host", "drain", "host2"]);
    assert_eq!(outcomes(&drained), [("done".to_string(), 1)]);
    let create = ["vm", "create", "--template", "desk", "--name", "late", "--on", "host2"];
    let draining = |wanted: bool| {
        wait_for("the heartbeat that says so", LIMIT, || {
            (fine(fleet, &["host", "show", "host2"])["draining"] == wanted).then_some(())
        });
    };
    draining(true);
    refused(fleet, &create, &["host2 is draining"]);
    fine(fleet, &["host", "undrain", "host2"]);
    draining(false);
    let made = fleet.muster(&create);
    assert!(text(&made.stdout).contains("\ncreate: 1 done"), "{}", text(&made.stdout));
    fine(fleet, &["vm", "delete", "late", "--yes"]);
}

/// Volumes thrown away come back from a backup, and only from one.
fn nothing_lost(fleet: &Fleet) {
    let vm = "host1-desk02";
    not_done(fleet, &["vm", "restore", vm], "refused", "not-found", "no such backup");
    not_done(fleet, &["vm", "restore", vm, "--backup", "yesterday"], "refused", "invalid-argument", "latest");
    fine(fleet, &["vm", "snapshot", vm, "--name", "one"]);
    not_done(fleet, &["vm", "snapshot", vm, "--name", "one"], "refused", "already-exists", "\"one\"");
    fine(fleet, &["vm", "backup", vm]);
    fine(fleet, &["vm", "destroy-volumes", vm, "--yes"]);
    for verb in ["power-on", "backup"] {
        not_done(fleet, &["vm", verb, vm], "refused", "volume-lost", "restore it");
    }
    fine(fleet, &["vm", "restore", vm]);
    fine(fleet, &["vm", "power-on", vm]);
    wait_for("the guest", LIMIT, || (fine(fleet, &["vm", "show", vm])["guest_up"] == true).then_some(()));
    not_done(fleet, &["vm", "exec", vm, "--", "nonesuch"], "failed", "not-found", "run \"nonesuch\" in the guest");
    refused(fleet, &["vm", "write-file", vm, "--path", "etc/x", "--from", "/dev/null"], &["absolute path"]);
    fine(fleet, &["vm", "write-file", vm, "--path", "/etc/x", "--from", &path(fleet.dir(), "odd.raw")]);
    // one guest's output as it is, and nothing else on standard output
    let exec = fleet.muster(&["vm", "exec", vm, "--", "echo", "two  words"]);
    assert_eq!((text(&exec.stdout).as_str(), exec.status.code()), ("two  words\n", Some(ALL_DONE)));
}

/// Every view is valid JSON, and a reader that goes away is no error.
fn views(fleet: &Fleet) {
    let id = fine(fleet, &["command", "ls"])[0]["id"].as_str().unwrap().to_string();
    let views: [&[&str]; 16] = [
        &["status"],
        &["host", "ls"],
        &["host", "show", "host1"],
        &["vm", "ls"],
        &["vm", "ls", "school"],
        &["vm", "show", "host1-desk01"],
        &["group", "show", "school"],
        &["image", "show", "small"],
        &["image", "verify", "small"],
        &["template", "show", "desk"],
        &["volume", "ls"],
        &["backup", "ls"],
        &["store", "ls"],
        &["store", "show", "host1"],
        &["top", "--once"],
        &["command", "show", &id],
    ];
    for view in views {
        fine(fleet, view);
        let table = fleet.muster(view);
        assert!(table.status.success() && !table.stdout.is_empty(), "{view:?}: {}", text(&table.stderr));
    }
    for line in text(&fleet.muster(&["-o", "json", "events", "--limit", "5"]).stdout).lines() {
        // a list, or one object a line
        assert!(!line.trim().is_empty());
    }
    let head = format!(
        "{} --connect {} host ls | head -0; exit ${{PIPESTATUS[0]}}",
        program("muster").display(),
        fleet.socket().display()
    );
    let piped = Command::new("bash").args(["-c", &head]).output().unwrap();
    assert!(piped.status.success() && piped.stderr.is_empty(), "{}", text(&piped.stderr));
    for shell in ["bash", "zsh", "fish"] {
        assert!(text(&fleet.muster(&["completions", shell]).stdout).contains("power-on"), "{shell}");
    }
}

/// Programs that may not start, beside ones that run.
fn starts(fleet: &Fleet) {
    let dir = fleet.dir();
    let agent = || {
        let mut command = Command::new(program("muster-agent"));
        command.arg("--config").arg(dir.join("h1/agent.toml"));
        command
    };
    will_not_start(&mut agent(), &["h1/s", "another agent runs with it", "state_dir of its own"]);
    let elsewhere = |extra: &[&str]| {
        let mut command = agent();
        command.arg("--state-dir").arg(dir.join("x/s")).arg("--run-dir").arg(dir.join("x/r"));
        for pair in extra {
            command.args(["--set", pair]);
        }
        command
    };
    will_not_start(agent().arg("--state-dir").arg(dir.join("x/s")), &["h1/r/nbd.sock", "another server answers there"]);
    will_not_start(&mut elsewhere(&["interface=192.0.2.77"]), &["192.0.2.77", "no such address", "127.0.0.1"]);
    will_not_start(&mut elsewhere(&["interface=eth77"]), &["interface"]);
    will_not_start(&mut elsewhere(&["lab=false"]), &["lab = true"]);
    will_not_start(&mut elsewhere(&["cell=101"]), &["cell 101", "0 to 100"]);
    will_not_start(&mut elsewhere(&["budget=1GiB"]), &["budget"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    will_not_start(
        &mut elsewhere(&[&format!("stream.listen=127.0.0.1:{port}")]),
        &[&port.to_string(), "stream.listen"],
    );

    let controller = |extra: &[&str]| {
        let mut command = Command::new(program("muster-controller"));
        command.arg("--config").arg(dir.join("controller.toml"));
        for pair in extra {
            command.args(["--set", pair]);
        }
        command
    };
    will_not_start(&mut controller(&[]), &["state directory", "another controller runs with it"]);
    let state = format!("state_dir={}", dir.join("c2").display());
    let socket = format!("api.socket={}", dir.join("new/c2.sock").display());
    will_not_start(&mut controller(&[&state]), &["c.sock", "another program answers there"]);
    will_not_start(&mut controller(&[&state, &socket, "bus.interface=192.0.2.77"]), &["192.0.2.77", "127.0.0.1"]);
    let listen = format!("stream.listen=127.0.0.1:{port}");
    will_not_start(&mut controller(&[&state, &socket, &listen]), &[&port.to_string(), "Set stream.listen"]);
    assert_eq!(fine(fleet, &["host", "ls"]).as_array().unwrap().len(), 2, "those that run run on");

    let nowhere =
        Command::new(program("muster")).args(["--connect", "/nowhere/c.sock", "host", "ls"]).output().unwrap();
    assert_eq!(nowhere.status.code(), Some(COULD_NOT_RUN));
    let error = text(&nowhere.stderr);
    assert!(error.contains("/nowhere/c.sock") && error.contains("Is muster-controller running?"), "{error}");
    for wrong in [vec!["hosts", "ls"], vec!["host", "lss"], vec!["vm", "exec", "x"], vec![]] {
        assert_eq!(fleet.muster(&wrong).status.code(), Some(COULD_NOT_RUN), "{wrong:?}");
    }
}

/// `muster agent` speaks the agent's words, at the agent's door.
fn agent_of_this_machine(fleet: &Fleet) {
    let defaults = AgentConfig::load(None, [], &[("store.budget".into(), "1GiB".into())]).unwrap();
    let help = text(&fleet.muster(&["agent", "stop", "--help"]).stdout);
    assert!(help.contains(&defaults.control_socket().display().to_string()), "{help}");

    let socket = path(fleet.dir(), "h2/r/ctl.sock");
    let status = fine(fleet, &["agent", "status", "--socket", &socket]);
    assert_eq!((&status["name"], &status["lab"]), (&"host2".into(), &true.into()), "{status:#}");
    assert!(text(&fleet.muster(&["agent", "status", "--socket", &socket]).stdout).contains("host2"));
    refused(
        fleet,
        &["agent", "status", "--socket", "/nowhere/ctl.sock"],
        &["/nowhere/ctl.sock", "is muster-agent running?"],
    );
    assert_eq!(fine(fleet, &["agent", "stop", "--force", "--socket", &socket])["ok"], true);
    wait_for("host2 offline", LIMIT, || {
        let hosts = fine(fleet, &["host", "ls"]);
        hosts.as_array()?.iter().any(|h| h["name"] == "host2" && h["state"] == "offline").then_some(())
    });
    not_done(
        fleet,
        &["host", "ping", "host2", "--timeout", "1"],
        "offline",
        "host-offline",
        "no heartbeat from host host2",
    );
}

#[test]
fn bad_input_is_refused_with_clear_words_and_nothing_is_lost() {
    let fleet = Fleet::start(2, "sim:///?seed=3");
    fleet.furnish(2);
    let volumes = fine(&fleet, &["volume", "ls"]).as_array().unwrap().len();
    images(&fleet);
    names_and_groups(&fleet);
    wrong_state(&fleet);
    nothing_lost(&fleet);
    views(&fleet);
    starts(&fleet);
    assert_eq!(fine(&fleet, &["volume", "ls"]).as_array().unwrap().len(), volumes);
    agent_of_this_machine(&fleet);
}

#[test]
fn a_host_without_hypervisor_runs_and_says_so() {
    let fleet = Fleet::start(1, "none");
    let host = fine(&fleet, &["host", "show", "host1"]);
    assert_eq!(host["accelerator"], "none", "{host:#}");
    assert!(!host["hypervisor_remark"].as_str().unwrap().is_empty(), "{host:#}");
    let image: PathBuf = fleet.dir().join("small.raw");
    fs::write(&image, vec![5; 1 << 20]).unwrap();
    fine(&fleet, &["image", "import", &image.display().to_string()]);
    fine(&fleet, &["image", "pull", "small", "host1"]);
    fine(&fleet, &["template", "create", "desk", "--image", "small", "--memory", "64MiB"]);
    let create = ["vm", "create", "--template", "desk", "--name", "a"];
    refused(&fleet, &create, &["no host takes new VMs", "host1 has no hypervisor"]);
    assert!(fine(&fleet, &["volume", "ls"]).as_array().unwrap().is_empty());
}
