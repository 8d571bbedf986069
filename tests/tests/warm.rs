//! kill -9 of an agent that serves a real guest which writes, again and again, and upgrades: the guest sees no error, and
//! what it wrote is there. Real processes over real RTPS; the store lies on a tmpfs, as on a host.
//!
//! Needs QEMU, libvirt and the images of `cargo xtask guest`. Without them it fails and names what is missing, unless
//! `MUSTER_ALLOW_SKIP=1`.
//!
//! How long a guest on NBD disks stands still is mostly up to QEMU: its thread that connects again tries when a request
//! fails, and 1, 3, 7, 15, 31 s after that (`nbd/client-connection.c`: it sleeps 1 s and twice as long each time, up to
//! 16 s). Measured with agents that were away for 0, 2, 4 and 8 s: the last resume came 1.1, 3.3, 7.7 and 15.4 s after the
//! kill. The agent used to find out by trying less and less often: of a connection after 15 s it knew after 20.4.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use muster_tests::{Agents, Fleet, Network, fleet::LIMIT, outcomes, source_root, tool, wait_for};
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Says at its top what it does.
const WRITER: &str = "agent/tests/support/writer.sh";
/// Under translation, on a machine where everything else runs too.
const PATIENCE: Duration = Duration::from_secs(150);
const VM: &str = "desk1";

fn guest_images() -> Option<PathBuf> {
    tool("qemu-system-x86_64", "qemu-system-x86")?;
    let directory = source_root().join("target/guest");
    if directory.join("debian.raw").is_file() {
        return Some(directory);
    }
    let hint = "the guest images are missing: run cargo xtask guest";
    assert!(std::env::var_os("MUSTER_ALLOW_SKIP").is_some(), "{hint}");
    eprintln!("skipped: {hint}");
    None
}

struct Warm {
    fleet: Fleet,
}

impl Warm {
    /// A host with a guest that writes.
    fn begin(transport: &'static str) -> Option<Self> {
        let images = guest_images()?;
        let agents = Agents { hypervisor: String::new(), survive: true, transport, budget: "768MiB" };
        let fleet = Fleet::start_with(Network::Loopback, 1, agents);
        let path = |name: &str| images.join(name).display().to_string();
        let cmdline = std::fs::read_to_string(images.join("cmdline")).unwrap();
        let cmdline = format!("{} muster.name={{name}}", cmdline.trim());
        let boot = ["--kernel", &path("vmlinuz"), "--initrd", &path("initramfs"), "--cmdline", &cmdline];
        fleet.json(&[&["image", "import", &path("debian.raw"), "--name", "debian"][..], &boot[..]].concat());
        fleet.json(&["template", "create", "desk", "--image", "debian", "--memory", "256MiB", "--data", "64MiB"]);
        let warm = Self { fleet };
        warm.done(&["vm", "create", "--template", "desk", "--name", VM]);
        warm.done(&["vm", "power-on", VM]);
        wait_for("the guest to be up", PATIENCE, || {
            (warm.fleet.json(&["vm", "show", VM])["guest_up"] == true).then_some(())
        });
        let writer = source_root().join(WRITER).display().to_string();
        warm.done(&["vm", "write-file", VM, "--path", "/run/writer", "--from", &writer]);
        // whoever asks twice starts it once
        warm.shell("mkdir /run/begun 2>/dev/null && setsid sh /run/writer >/dev/null 2>&1 </dev/null & true");
        warm.wrote(3);
        Some(warm)
    }

    fn done(&self, args: &[&str]) {
        let command = self.fleet.json(args);
        assert_eq!(outcomes(&command), [("done".to_string(), 1)], "{command:#}");
    }

    /// What a script prints in the guest; `None` when the guest cannot be asked at the moment, or it is not known whether it
    /// was.
    fn ask(&self, script: &str) -> Option<String> {
        // an agent that has just started may have missed the question: it is soon asked again
        let args = ["--output", "json", "vm", "exec", VM, "--timeout", "5", "--", "/bin/sh", "-c", script];
        let output = self.fleet.muster(&args);
        let command: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let verdict = &command["members"][0]["verdict"];
        (verdict["outcome"] == "done").then(|| {
            assert_eq!(verdict["result"]["exit_status"], 0, "{script}: {verdict:#}");
            verdict["result"]["stdout"].as_str().unwrap().to_string()
        })
    }

    fn shell(&self, script: &str) -> String {
        wait_for(script, PATIENCE, || self.ask(script))
    }

    /// Waits until it wrote so many more blocks.
    fn wrote(&self, more: u64) {
        let mut before = None;
        wait_for("the guest to write on", PATIENCE, || {
            let now: u64 = self.ask("cat /run/count 2>/dev/null || echo 0")?.trim().parse().unwrap();
            (now >= *before.get_or_insert(now) + more).then_some(())
        });
    }

    /// How often an agent has found the store as an earlier one left it.
    fn attached(&self) -> usize {
        self.fleet.hosts[0].log().matches("volumes and 1 images are as the earlier run left them").count()
    }

    /// Which run of the agent the controller commands.
    fn commanded(&self) -> serde_json::Value {
        self.fleet.json(&["host", "ls"])[0]["incarnation"].clone()
    }

    /// Starts the next agent, and waits until the guest goes on.
    fn go_on(&mut self, began: Instant, what: &str) {
        let (before, earlier) = (self.attached(), self.commanded());
        assert!(earlier.is_string(), "{earlier}");
        self.fleet.start_host(0);
        let log = || self.fleet.hosts[0].log();
        wait_for("the store to be attached", LIMIT, || (self.attached() == before + 1).then_some(()));
        let attached = began.elapsed();
        assert!(!log().contains("volumes were lost"));
        // before that it would be asked in vain, and seconds go by
        wait_for("its next run to be seen", LIMIT, || (self.commanded() != earlier).then_some(()));
        self.wrote(2);
        eprintln!("{what}: attached after {attached:.1?}, seen writing on after {:.1?}", began.elapsed());
    }

    /// Ends the writer; no write was lost and the kernel saw no error. Then all of it goes in order.
    fn end(mut self) {
        self.shell(": >/run/enough");
        wait_for("the writer to end", PATIENCE, || {
            (self.ask("test -e /run/ended && echo yes || echo no")?.trim() == "yes").then_some(())
        });
        let stall = self.shell("cat /run/stall");
        eprintln!("{} blocks, the slowest took {} cs", self.shell("cat /run/count").trim(), stall.trim());
        assert_eq!(self.shell("cat /run/bad 2>/dev/null; true"), "");
        let errors = "dmesg | grep -iE 'i/o error|blk_update|buffer i/o|ext4-fs error|remount' || true";
        assert_eq!(self.shell(errors), "");
        let store = self.fleet.json(&["store", "show", "host1"]);
        assert_eq!(store["guest_file_reads"], 0, "{store:#}");
        self.done(&["vm", "power-off", VM]);
        self.done(&["vm", "delete", VM, "--yes"]);
        self.fleet.stop_host(0, &[]);
        let host = &self.fleet.hosts[0];
        assert!(!host.run_dir().join("store").exists(), "an orderly stop gives the memory back");
        assert!(!host.shared_memory().unwrap().exists());
    }
}

/// Kills at random moments, then an upgrade.
fn goes_and_comes(transport: &'static str, kills: u32, seed: u64) {
    let Some(mut warm) = Warm::begin(transport) else { return };
    let mut random = StdRng::seed_from_u64(seed);
    for round in 1..=kills {
        // it writes all the time: any moment is one under load
        let pause = Duration::from_millis(random.random_range(0..1500));
        std::thread::sleep(pause);
        let began = Instant::now();
        warm.fleet.kill_host(0);
        warm.go_on(began, &format!("{transport}, kill {round}"));
    }
    let began = Instant::now();
    warm.fleet.stop_host(0, &["--keep"]);
    warm.go_on(began, &format!("{transport}, upgrade"));
    warm.end();
}

#[test]
fn a_guest_on_vhost_user_disks_writes_on_while_its_agent_is_killed_and_upgraded() {
    goes_and_comes("vhost-user", 5, 1);
}

#[test]
fn a_guest_on_nbd_disks_writes_on_while_its_agent_is_killed_and_upgraded() {
    goes_and_comes("nbd", 3, 2);
}
