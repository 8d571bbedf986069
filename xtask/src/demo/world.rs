//! The machines of the demo: each a set of Linux namespaces with a process that holds them.
//!
//! ```text
//!   control 10.77.0.1    host1 .11    host2 .12    host3 .13    observer .99      network, mount, PID, UTS, IPC each
//!        \_________________\____________|____________/____________/
//!                       bridge, in a network namespace of its own: no way out to the real network
//!                       firewall on it: RTPS and the stream endpoints pass, everything else is counted and dropped
//! ```
//!
//! A holder is the first process of a PID namespace: when it is killed the kernel ends everything in there, agents and
//! virtual machines included, and with the last process go the mounts. So `down` needs no list of what was started.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::process::{ProcessId, wait_for};
use crate::run::Context;

/// The DDS domain of the demo. Not 0: somebody's own DDS programs may be there on a shared machine.
pub const CELL: u16 = 10;
/// First and last UDP port of that domain (RTPS 2.5, 9.6.2.3): 7400 + 250 × domain, and the 250 that follow.
pub const RTPS_PORTS: (u16, u16) = (7400 + 250 * CELL, 7400 + 250 * CELL + 249);
pub const CONTROLLER_STREAM_PORT: u16 = 7701;
pub const AGENT_STREAM_PORT: u16 = 7800;

/// Written first, removed last: a folder without it is not ours to delete.
const MARKER: &str = ".muster-demo";

/// Name and address of each machine on the bridge.
pub const NODES: &[(&str, &str)] = &[
    ("control", "10.77.0.1"),
    ("host1", "10.77.0.11"),
    ("host2", "10.77.0.12"),
    ("host3", "10.77.0.13"),
    ("observer", "10.77.0.99"),
];

/// How nsenter joins all of a machine. The root of a mount namespace is not ours when we are in a chroot ourselves.
const INSIDE: &[&str] = &["--root", "--wd=/", "--mount", "--uts", "--ipc", "--net", "--pid", "--"];

/// What runs as process 1 of a machine: makes it see only its own folders, then waits and buries orphans.
const HOLDER: &str = r#"# a machine of the demo: NAME DEMO CHECKOUT TARGET
set -e
name=$1 demo=$2 checkout=$3 target=$4
mount -t proc proc /proc
hostname "$name"
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/muster/bin /run/muster/state /run/muster/ctl
mount --bind "$demo/$name/state" /run/muster/state
mount --bind "$demo/$name/ctl" /run/muster/ctl
mount --bind "$demo/bin" /run/muster/bin
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=1777 shm /dev/shm
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$name" >/run/muster/hosts
mount --bind /run/muster/hosts /etc/hosts
cd /
# the images, the other machines' folders and the sources are out of sight from here on
for hidden in "$demo" "$checkout" "$target"; do
  if [ -d "$hidden" ]; then mount -t tmpfs -o ro,size=4k hidden "$hidden"; fi
done
echo ready >/run/muster/ctl/ready
trap : TERM INT HUP
while :; do sleep 3600 & wait; done
"#;

pub struct World<'a> {
    context: &'a Context,
    pub dir: PathBuf,
}

impl<'a> World<'a> {
    pub fn new(context: &'a Context) -> World<'a> {
        let dir =
            std::env::var_os("MUSTER_DEMO_DIR").map_or_else(|| PathBuf::from("/var/lib/muster-demo"), PathBuf::from);
        World { context, dir }
    }

    /// A machine's folder, as seen from outside.
    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.dir.join(node)
    }

    pub fn exists(&self) -> bool {
        self.dir.join(MARKER).exists() || !self.namespaces().unwrap_or_default().is_empty()
    }

    /// Makes the folders, the network and the machines.
    pub fn create(&self, executables: &[PathBuf]) -> Result<()> {
        for (node, _) in NODES {
            for part in ["state", "ctl", "log"] {
                let dir = self.node_dir(node).join(part);
                fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
            }
        }
        fs::write(self.dir.join(MARKER), "made by `cargo xtask demo`, removed by `cargo xtask demo down`\n")?;
        let bin = self.dir.join("bin");
        fs::create_dir_all(&bin)?;
        for executable in executables {
            let name = executable.file_name().context("an executable has a name")?;
            fs::copy(executable, bin.join(name)).with_context(|| format!("copy {}", executable.display()))?;
        }
        self.create_network()?;
        // once: the machines read it as they start
        let script = self.dir.join("holder.sh");
        fs::write(&script, HOLDER).with_context(|| format!("write {}", script.display()))?;
        for (node, _) in NODES {
            self.hold(node)?;
        }
        for (node, _) in NODES {
            let ready = self.node_dir(node).join("ctl/ready");
            if !wait_for(Duration::from_secs(10), || ready.exists()) {
                bail!("machine {node} did not come up: see {}", self.node_dir(node).join("log/holder.log").display());
            }
        }
        Ok(())
    }

    fn create_network(&self) -> Result<()> {
        self.ip(&["netns", "add", &namespace("bridge")])?;
        for (node, _) in NODES {
            self.ip(&["netns", "add", &namespace(node)])?;
        }
        for name in std::iter::once("bridge").chain(NODES.iter().map(|(node, _)| *node)) {
            // IPv6 neighbour discovery would only be noise in the counters
            self.inside(
                &namespace(name),
                "for f in all default; do echo 1 >/proc/sys/net/ipv6/conf/$f/disable_ipv6; done",
            )?;
        }
        let bridge = namespace("bridge");
        // without snooping the bridge floods multicast, which is what a plain switch does
        self.ip(&["-n", &bridge, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0", "forward_delay", "0"])?;
        self.ip(&["-n", &bridge, "link", "set", "br0", "up"])?;
        for (node, address) in NODES {
            let port = format!("to-{node}");
            let inner = namespace(node);
            self.ip(&["-n", &bridge, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &inner])?;
            self.ip(&["-n", &bridge, "link", "set", &port, "master", "br0", "up"])?;
            self.ip(&["-n", &inner, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
            self.ip(&["-n", &inner, "link", "set", "lo", "up"])?;
            self.ip(&["-n", &inner, "link", "set", "eth0", "up"])?;
            self.ip(&["-n", &inner, "route", "add", "224.0.0.0/4", "dev", "eth0"])?;
        }
        let rules = firewall();
        let file = self.dir.join("firewall.nft");
        fs::write(&file, rules)?;
        self.context.command("ip").args(["netns", "exec", &bridge, "nft", "-f"]).arg(&file).run()
    }

    /// Packets and bytes by name of the firewall's counters.
    pub fn firewall_counters(&self) -> Result<Vec<(String, u64, u64)>> {
        let text = self
            .context
            .command("ip")
            .args(["netns", "exec", &namespace("bridge"), "nft", "-j", "list", "counters"])
            .read()?;
        let json: serde_json::Value = serde_json::from_str(&text).context("read nft's JSON")?;
        let number = |counter: &serde_json::Value, field: &str| counter[field].as_u64().unwrap_or(0);
        Ok(json["nftables"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.get("counter"))
            .map(|c| (c["name"].as_str().unwrap_or_default().to_owned(), number(c, "packets"), number(c, "bytes")))
            .collect())
    }

    fn hold(&self, node: &str) -> Result<()> {
        let flags = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--propagation", "slave"];
        let script = self.dir.join("holder.sh");
        let child = self
            .context
            .command("setsid")
            .args(["ip", "netns", "exec", &namespace(node), "unshare"])
            .args(flags)
            .arg("sh")
            .arg(&script)
            .arg(node)
            .arg(&self.dir)
            .arg(&self.context.root)
            .arg(&self.context.target)
            .start(&self.node_dir(node).join("log/holder.log"))?;
        // setsid, ip and unshare each become the next: this is the process that waits for the machine's process 1
        let id = child.id();
        fs::write(self.node_dir(node).join("pid"), ProcessId::of(id).context("the holder ended at once")?.to_string())?;
        Ok(())
    }

    /// Process 1 of a machine, as numbered outside.
    fn holder(&self, node: &str) -> Option<u32> {
        let outer = ProcessId::parse(&fs::read_to_string(self.node_dir(node).join("pid")).ok()?)?;
        if !outer.is_alive() {
            return None;
        }
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", outer.id)).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    pub fn is_up(&self) -> bool {
        NODES.iter().all(|(node, _)| self.holder(node).is_some())
    }

    /// What a shell script prints inside a machine.
    pub fn read_in(&self, node: &str, script: &str) -> Result<String> {
        let holder = self.holder(node).with_context(|| format!("machine {node} is not up"))?;
        self.context
            .command("nsenter")
            .arg("--target")
            .arg(holder.to_string())
            .args(INSIDE)
            .args(["sh", "-c", script])
            .read()
    }

    /// Starts a program inside a machine that goes on when we end.
    pub fn start_in(&self, node: &str, program: &str, args: &[&str]) -> Result<()> {
        let log =
            self.node_dir(node).join("log").join(format!("{}.log", program.rsplit('/').next().unwrap_or(program)));
        let holder = self.holder(node).with_context(|| format!("machine {node} is not up"))?;
        let command = self.context.command("setsid").args(["nsenter", "--target"]).arg(holder.to_string());
        command.args(INSIDE).arg(program).args(args).start(&log)?;
        Ok(())
    }

    /// Starts a program that is on a machine's network and ends with the machine, but sees the files of this one.
    pub fn start_on_network(&self, node: &str, program: &Path, args: &[&str], log: &Path) -> Result<()> {
        let holder = self.holder(node).with_context(|| format!("machine {node} is not up"))?;
        self.context
            .command("setsid")
            .args(["nsenter", "--target", &holder.to_string(), "--net", "--pid", "--"])
            .arg(program)
            .args(args)
            .start(log)?;
        Ok(())
    }

    /// Ends all of it. Works on halves too.
    pub fn destroy(&self) -> Result<String> {
        let mut ended = 0;
        for (node, _) in NODES {
            let file = self.node_dir(node).join("pid");
            let Some(outer) = fs::read_to_string(&file).ok().and_then(|text| ProcessId::parse(&text)) else { continue };
            if let Some(holder) = self.holder(node) {
                // process 1 of the PID namespace: the kernel ends the rest
                self.context.command("kill").args(["-KILL", &holder.to_string()]).run()?;
                ended += 1;
            }
            if !wait_for(Duration::from_secs(20), || !outer.is_alive()) {
                self.context.command("kill").args(["-KILL", &outer.id.to_string()]).run()?;
            }
            if !wait_for(Duration::from_secs(20), || !outer.is_alive()) {
                bail!("machine {node} (process {}) does not end", outer.id);
            }
        }
        let namespaces = self.namespaces()?;
        for name in &namespaces {
            self.ip(&["netns", "del", name])?;
        }
        if self.dir.join(MARKER).exists() {
            fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display()))?;
        }
        Ok(format!("{ended} machines and {} network namespaces ended", namespaces.len()))
    }

    /// Our network namespaces that exist.
    fn namespaces(&self) -> Result<Vec<String>> {
        let ours: Vec<String> =
            std::iter::once("bridge").chain(NODES.iter().map(|(node, _)| *node)).map(namespace).collect();
        let listed = self.context.command("ip").args(["netns", "list"]).read()?;
        let present = |name: &String| listed.lines().any(|line| line.split_whitespace().next() == Some(name));
        Ok(ours.into_iter().filter(present).collect())
    }

    fn ip(&self, args: &[&str]) -> Result<()> {
        self.context.command("ip").args(args).run()
    }

    fn inside(&self, namespace: &str, script: &str) -> Result<()> {
        self.context.command("ip").args(["netns", "exec", namespace, "sh", "-c", script]).run()
    }
}

/// The name of a machine's network namespace.
pub fn namespace(node: &str) -> String {
    format!("muster-{node}")
}

/// The address of a machine on the bridge.
pub fn address(node: &str) -> &'static str {
    NODES.iter().find(|(name, _)| *name == node).map_or("", |(_, address)| address)
}

fn firewall() -> String {
    let (first, last) = RTPS_PORTS;
    format!(
        "table bridge muster {{
  counter rtps {{ comment \"RTPS of cell {CELL}\" }}
  counter rtps_fragments {{ comment \"later fragments of large RTPS messages\" }}
  counter streams {{ comment \"image pull, console, backup transfer\" }}
  counter dropped {{ }}
  chain forward {{
    type filter hook forward priority 0; policy drop;
    ether type arp accept
    ip protocol igmp accept
    ip frag-off & 0x1fff != 0 meta l4proto udp counter name rtps_fragments accept
    udp dport {first}-{last} counter name rtps accept
    tcp dport {{ {CONTROLLER_STREAM_PORT}, {AGENT_STREAM_PORT} }} counter name streams accept
    tcp sport {{ {CONTROLLER_STREAM_PORT}, {AGENT_STREAM_PORT} }} counter name streams accept
    counter name dropped
  }}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_firewall_passes_the_ports_of_the_cell() {
        assert!(firewall().contains("udp dport 9900-10149 "));
    }
}
