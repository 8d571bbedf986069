//! `cargo xtask demo`: a controller and three hosts on this machine run the main job.

mod fleet;
mod process;
mod story;
mod world;

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::guest::{self, Piece};
use crate::run::{Context, is_root};
use crate::setup;
use fleet::{Fleet, Place};

/// Written when the story was told to its end: a fleet without it is a half one.
const TOLD: &str = "story-told";

const WITHOUT_ROOT: &str = "\
Not root: the hosts run as processes on 127.0.0.1 with configured peers. They share network and files, there is no
multicast and no firewall between them, and Debian guest images cannot be built. As root all of it is real:
  sudo apt-get update && sudo apt-get install …     (cargo xtask setup prints the exact line)
  sudo cargo xtask demo                             (network and mount namespaces, bridge, nftables, debootstrap)
";

/// `build`: false takes the programs that `cargo build --release` left.
pub fn up(context: &Context, build: bool) -> Result<()> {
    let start = Instant::now();
    let root = is_root();
    let fleet = Fleet::new(context, root);
    if fleet.dir().join(TOLD).exists() && fleet.is_up() {
        println!("The fleet is up already; nothing was changed ({:.1} s).", start.elapsed().as_secs_f64());
        fleet.show(&["host", "ls"])?;
        fleet.show(&["vm", "ls"])?;
        print_hints(context, &fleet);
        return Ok(());
    }
    if !root {
        println!("{WITHOUT_ROOT}");
    }
    println!("Preparing (log: {})", context.target.join("xtask/demo.log").display());
    setup::for_demo(context)?;
    if build {
        context.step("build (some minutes the first time)", || {
            let programs = ["-p", "muster", "-p", "muster-controller", "-p", "muster-agent"];
            context.cargo().args(["build", "--locked", "--release"]).args(programs).run()?;
            Ok(String::new())
        })?;
    }
    let real = root || (guest::is_current(context, Piece::Debian)? && guest::is_current(context, Piece::Office)?);
    guest::build(context, if real { &Piece::ALL } else { &[Piece::Kernel, Piece::Tiny] })?;
    if fleet.exists() {
        context.step("remove what an earlier demo left", || fleet.destroy())?;
    }
    let started = Instant::now();
    story::tell(context, &fleet, real)
        .context("the demo stopped here; what is up stays for a look, and `cargo xtask demo down` removes it")?;
    std::fs::write(fleet.dir().join(TOLD), "")?;
    println!(
        "\nThe demo took {:.0} s, {:.0} s with preparation. The fleet stays up.",
        started.elapsed().as_secs_f64(),
        start.elapsed().as_secs_f64()
    );
    print_hints(context, &fleet);
    Ok(())
}

pub fn down(context: &Context) -> Result<()> {
    let fleet = Fleet::new(context, is_root());
    if !fleet.exists() {
        println!("No demo is up.");
        return Ok(());
    }
    context.step("end the demo", || fleet.destroy())
}

pub fn status(context: &Context) -> Result<()> {
    let fleet = Fleet::new(context, is_root());
    if !fleet.exists() {
        println!("No demo is up.");
        return Ok(());
    }
    println!("{}", if fleet.is_up() { "The fleet is up." } else { "The fleet is not whole: `cargo xtask demo down`." });
    if let Place::World(world) = &fleet.place {
        for (name, packets, bytes) in world.firewall_counters()? {
            println!("  firewall {name}: {packets} packets, {bytes} bytes");
        }
    }
    Ok(())
}

fn print_hints(context: &Context, fleet: &Fleet<'_>) {
    let picture = context.target.join("xtask/desktop.png");
    println!("\nGo on with it:");
    println!("  export MUSTER_CONNECT={} PATH={}:$PATH", fleet.socket().display(), fleet.dir().join("bin").display());
    println!("  muster vm power-on school/lab1; muster top; muster vm console lab1-01   (leave with Ctrl-])");
    if picture.exists() {
        println!("  the screen of a desktop: {}", shown(context, &picture));
    }
    println!("  cargo xtask demo status; cargo xtask demo down");
}

fn shown(context: &Context, path: &Path) -> String {
    path.strip_prefix(&context.root).unwrap_or(path).display().to_string()
}

/// Words as a reader would type them.
fn shell_words(words: &[&str]) -> String {
    let quoted = |word: &&str| {
        if word.is_empty() || word.contains(|c: char| c.is_whitespace() || "'\"$&;|<>(){}*?".contains(c)) {
            format!("'{}'", word.replace('\'', r"'\''"))
        } else {
            (*word).to_owned()
        }
    };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}
