//! What the demo shows, step by step, through the command line only.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::fleet::{Fleet, HOSTS, Place};
use super::process::wait_for;
use super::world::{CELL, address, namespace};
use crate::guest;
use crate::run::Context;
use crate::setup;

/// The guests' memory. 256 MiB boots Debian with room; QEMU takes about as much again.
const GUEST_MEMORY: &str = "256MiB";
const DATA_SIZE: &str = "128MiB";
/// Six guests on two cores under emulation take half a minute; a loaded machine three times that.
const GUEST_LIMIT: Duration = Duration::from_secs(150);

/// One line for each QEMU process (`qemu`) and each file on a disk or block device it can read. What lies in `a` is on a
/// tmpfs: sockets, boot files. The mode of the link tells how a file is open: a console's log only for writing.
const OPEN_FILES: &str = r#"
for p in /proc/[0-9]*; do
  case $(readlink $p/exe) in */qemu-system-*) ;; *) continue ;; esac
  echo qemu
  for f in $p/fd/*; do
    t=$(readlink $f) || continue
    case $(stat -c %A $f) in l-*) continue ;; esac
    case $t in
      /run/muster/a/*|/dev/null|/dev/kvm|/dev/vhost-net|/dev/net/tun|/dev/urandom|/dev/random|/memfd:*|/dev/shm/*) ;;
      /*) echo "$t" ;;
    esac
  done
done
"#;

struct Story<'a> {
    context: &'a Context,
    fleet: &'a Fleet<'a>,
    start: Instant,
}

/// Tells it. `real`: the Debian images are there; else only the tiny guest is.
pub fn tell(context: &Context, fleet: &Fleet<'_>, real: bool) -> Result<()> {
    let story = Story { context, fleet, start: Instant::now() };
    story.heading("1", "A controller and three hosts");
    story.machines()?;
    let observer = story.start_observer()?;
    story.heading("2", "Images: into the controller's repository, from there into the hosts' memory");
    story.import(real)?;
    story.heading("3", "The source files go; from now on no host reads a file or a block device for a guest");
    story.forget_sources()?;
    story.heading("4", "Templates, and two desktops on each host, in groups school/lab1 and school/lab2");
    story.desktops(real)?;
    story.heading("5", "One command for the whole school");
    story.power_on(real)?;
    if real {
        story.heading("6", "Files, backup, loss, restore, reset");
        story.files()?;
    }
    story.heading("7", "Telemetry, and the end of the lesson");
    story.telemetry(observer.as_deref())?;
    story.shutdown(real)?;
    if let Some(log) = &observer {
        story.observed(log)?;
    }
    Ok(())
}

impl Story<'_> {
    fn heading(&self, number: &str, text: &str) {
        println!("\n── {number}. {text} ── at {:.0} s", self.start.elapsed().as_secs_f64());
    }

    fn machines(&self) -> Result<()> {
        self.context.step("fleet", || self.fleet.create())?;
        match &self.fleet.place {
            Place::World(_) => {
                println!("  each machine has its own network and mount namespace and sees only its own folders:");
                for node in std::iter::once(&"control").chain(HOSTS) {
                    println!("    {node:8} {:12} netns {}", address(node), namespace(node));
                }
                println!("  the bridge between them passes RTPS of cell {CELL} and the stream endpoints, nothing else");
            }
            Place::Loopback(_) => println!("  as processes on 127.0.0.1, cell {CELL}"),
        }
        self.fleet.show(&["status"])?;
        self.fleet.show(&["host", "ls"])
    }

    /// Another vendor's DDS, on a machine of its own on the same bridge, reads the same topics.
    fn start_observer(&self) -> Result<Option<PathBuf>> {
        let script = self.context.root.join("xtask/demo/observer.py");
        let log = self.fleet.dir().join("observer.log");
        let Place::World(world) = &self.fleet.place else { return Ok(None) };
        world.start_on_network(
            "observer",
            &setup::python_path(self.context),
            &[&script.display().to_string(), &CELL.to_string(), address("observer")],
            &log,
        )?;
        let ready =
            wait_for(Duration::from_secs(15), || fs::read_to_string(&log).is_ok_and(|text| text.contains("reading")));
        ensure!(ready, "the Cyclone DDS observer did not start; its output: {}", log.display());
        println!("\n  a Cyclone DDS program in Python, at {}, reads along from now on", address("observer"));
        Ok(Some(log))
    }

    fn import(&self, real: bool) -> Result<()> {
        let sources = self.fleet.dir().join("import");
        fs::create_dir_all(&sources)?;
        let built = guest::dir(self.context);
        let (images, prefix): (&[&str], &str) =
            if real { (&["debian", "debian-office"], "") } else { (&["tiny"], "tiny-") };
        let kernel = copy(self.context, &built.join("vmlinuz"), &sources)?;
        let initrd = copy(self.context, &built.join(format!("{prefix}initramfs")), &sources)?;
        let cmdline = fs::read_to_string(built.join(format!("{prefix}cmdline")))?;
        for image in images {
            let file = copy(self.context, &built.join(format!("{image}.raw")), &sources)?;
            self.fleet.show(&[
                "image",
                "import",
                &file,
                "--kernel",
                &kernel,
                "--initrd",
                &initrd,
                "--cmdline",
                cmdline.trim(),
            ])?;
        }
        for image in images {
            self.fleet.show(&[&["image", "pull", image], HOSTS].concat())?;
        }
        // the stores' own words come once a second
        wait_for(Duration::from_secs(5), || {
            let stores = self.fleet.list(&["store", "ls"]).unwrap_or_default();
            stores.iter().all(|store| store["images"].as_array().is_some_and(|held| held.len() == images.len()))
        });
        self.fleet.show(&["store", "ls"])
    }

    fn forget_sources(&self) -> Result<()> {
        let sources = self.fleet.dir().join("import");
        fs::remove_dir_all(&sources).with_context(|| format!("remove {}", sources.display()))?;
        println!("  removed {}", sources.display());
        if matches!(self.fleet.place, Place::World(_)) {
            self.context.command("sync").run()?;
            match fs::write("/proc/sys/vm/drop_caches", "3\n") {
                Ok(()) => println!("  page cache dropped"),
                Err(error) => println!("  page cache not dropped: {error}"),
            }
        }
        println!("  reads of a file or block device for a guest so far: {}", self.guest_reads()?);
        Ok(())
    }

    fn guest_reads(&self) -> Result<u64> {
        let stores = self.fleet.list(&["store", "ls"])?;
        Ok(stores.iter().filter_map(|store| store["guest_file_reads"].as_u64()).sum())
    }

    fn desktops(&self, real: bool) -> Result<()> {
        let (first, second) = if real { ("debian", "debian-office") } else { ("tiny", "tiny") };
        for (template, image) in [("desktop", first), ("office", second)] {
            self.fleet.show(&[
                "template",
                "create",
                template,
                "--image",
                image,
                "--memory",
                GUEST_MEMORY,
                "--data",
                DATA_SIZE,
            ])?;
        }
        for (template, group) in [("desktop", "lab1"), ("office", "lab2")] {
            let name = format!("{group}-{{n}}");
            let path = format!("school/{group}");
            self.fleet.show(&[
                "vm",
                "create",
                "--template",
                template,
                "--per-host",
                "1",
                "--name",
                &name,
                "--group",
                &path,
            ])?;
        }
        self.fleet.show(&["group", "ls"])?;
        self.fleet.show(&["store", "ls"])
    }

    fn power_on(&self, real: bool) -> Result<()> {
        let start = Instant::now();
        self.fleet.show(&["vm", "power-on", "school"])?;
        if real {
            self.wait_for_guests("school", 6, start)?;
        }
        self.fleet.show(&["vm", "ls", "school"])?;
        if real {
            let picture = self.context.target.join("xtask/desktop.png");
            // the guest agent is up a moment before the screen has its banner
            std::thread::sleep(Duration::from_secs(2));
            self.fleet.show(&["vm", "screenshot", "lab1-01", "--to", &picture.display().to_string()])?;
        }
        let reads = self.guest_reads()?;
        println!("\n  reads of a file or block device for a guest through all the boots: {reads}");
        self.open_files()?;
        ensure!(reads == 0, "the hosts read {reads} times from a file or block device to serve guests");
        Ok(())
    }

    /// The kernel's word, beside the agents' own: what the virtual machines have open.
    fn open_files(&self) -> Result<()> {
        let Place::World(world) = &self.fleet.place else { return Ok(()) };
        let mut machines = 0;
        let mut files = Vec::new();
        for host in HOSTS {
            let text = world.read_in(host, OPEN_FILES)?;
            let (qemu, others): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| *line == "qemu");
            machines += qemu.len();
            files.extend(others.into_iter().map(str::to_owned));
        }
        println!("  files on a disk or block devices that the {machines} QEMU processes can read: {}", files.len());
        ensure!(files.is_empty(), "QEMU has open: {}", files.join(" "));
        Ok(())
    }

    /// Waits until the guest agent of every member answers; prints when the first and the last did.
    fn wait_for_guests(&self, target: &str, count: usize, start: Instant) -> Result<()> {
        let mut first = None;
        let mut up = 0;
        let all = wait_for(GUEST_LIMIT, || {
            let vms = self.fleet.list(&["vm", "ls", target]).unwrap_or_default();
            let now = vms.iter().filter(|vm| vm["guest_up"] == Value::Bool(true)).count();
            if now > up {
                up = now;
                first.get_or_insert_with(|| start.elapsed());
                println!("  {up} of {count} guests up after {:.1} s", start.elapsed().as_secs_f64());
            }
            now >= count
        });
        if !all {
            self.fleet.show(&["vm", "ls", target])?;
            bail!("only {up} of {count} guest agents of {target} answered within {} s", GUEST_LIMIT.as_secs());
        }
        Ok(())
    }

    fn files(&self) -> Result<()> {
        let on_system = self.write_file("lab1-01", "/root/system.txt", "on the system disk\n")?;
        let on_data = self.write_file("lab1-01", "/home/desktop/personal.txt", "on the personal volume\n")?;
        self.fleet.show(&["vm", "exec", "lab1-01", "--", "sync"])?;
        self.fleet.show(&["vm", "backup", "school"])?;

        println!("\n  one desktop loses its volumes:");
        self.fleet.show(&["vm", "power-off", "lab1-01"])?;
        self.fleet.show(&["vm", "destroy-volumes", "lab1-01", "--yes"])?;
        self.fleet.show(&["volume", "ls", "lab1-01"])?;
        self.fleet.show(&["vm", "restore", "lab1-01"])?;
        let start = Instant::now();
        self.fleet.show(&["vm", "power-on", "lab1-01"])?;
        self.wait_for_guests("lab1-01", 1, start)?;
        self.expect_file("lab1-01", &on_system, true)?;
        self.expect_file("lab1-01", &on_data, true)?;

        println!("\n  the next lesson: system disks as in the template, personal files stay:");
        let start = Instant::now();
        self.fleet.show(&["vm", "reset-session", "school/lab1"])?;
        self.wait_for_guests("school/lab1", 3, start)?;
        self.expect_file("lab1-01", &on_system, false)?;
        self.expect_file("lab1-01", &on_data, true)
    }

    fn write_file(&self, vm: &str, path: &str, text: &str) -> Result<String> {
        let local = self.fleet.dir().join("note.txt");
        fs::write(&local, text)?;
        self.fleet.show(&["vm", "write-file", vm, "--path", path, "--from", &local.display().to_string()])?;
        Ok(path.to_owned())
    }

    /// Shows whether a file is in a guest, and ends the demo when it is not as it has to be.
    fn expect_file(&self, vm: &str, path: &str, there: bool) -> Result<()> {
        let args = ["vm", "exec", vm, "--", "cat", path];
        println!("\n$ muster {}", super::shell_words(&args));
        let done = self.fleet.muster(&args).outcome()?;
        print!("{}", done.stdout);
        ensure!(done.success == there, "{path} {} in {vm}", if there { "is missing" } else { "is still" });
        println!("  {path}: {}", if there { "there" } else { "gone, as it has to be" });
        Ok(())
    }

    fn telemetry(&self, observer: Option<&Path>) -> Result<()> {
        self.fleet.show(&["top", "--once"])?;
        if let Some(log) = observer {
            println!("\nthe same, as Cyclone DDS read it from the topics just now:");
            let text = fs::read_to_string(log)?;
            let lines: Vec<&str> =
                text.lines().filter(|line| line.starts_with("host ") || line.starts_with("vm ")).collect();
            for line in &lines[lines.len().saturating_sub(9)..] {
                println!("  {line}");
            }
        }
        Ok(())
    }

    fn shutdown(&self, real: bool) -> Result<()> {
        // a guest without agent and without acpid in time would be refused by policy `fail`
        let policy: &[&str] = if real { &[] } else { &["--policy", "power-off"] };
        self.fleet.show(&[&["vm", "shutdown", "school"], policy].concat())
    }

    /// The independent reader's count of commands, and the firewall's of packets.
    fn observed(&self, log: &Path) -> Result<()> {
        let commands = self.fleet.list(&["command", "ls", "--limit", "200"])?.len();
        let seen = || -> Vec<String> {
            let text = fs::read_to_string(log).unwrap_or_default();
            text.lines().filter(|line| line.starts_with("command ")).map(str::to_owned).collect()
        };
        wait_for(Duration::from_secs(5), || seen().len() >= commands);
        let seen = seen();
        let power_on = seen.iter().filter(|line| line.contains("  power-on school ")).count();
        println!(
            "\n  {commands} commands were given; Cyclone DDS counted {} samples on the command topic,",
            seen.len()
        );
        println!("  {power_on} of them for `power-on school` with its six members");
        ensure!(seen.len() == commands, "each command has to be exactly one sample; see {}", log.display());
        ensure!(power_on == 1, "`power-on school` has to be exactly one sample; see {}", log.display());
        if let Place::World(world) = &self.fleet.place {
            for (name, packets, bytes) in world.firewall_counters()? {
                println!("  firewall {name}: {packets} packets, {bytes} bytes");
            }
        }
        Ok(())
    }
}

/// Copies a file with its holes, so that the import has a source that can be deleted.
fn copy(context: &Context, file: &Path, to: &Path) -> Result<String> {
    let target = to.join(file.file_name().context("a file has a name")?);
    context.command("cp").args(["--sparse=always", "--reflink=auto"]).arg(file).arg(&target).run()?;
    Ok(target.display().to_string())
}
