//! `cargo xtask demo`: a controller and three hosts on this machine run the main job.

mod world;

use anyhow::{Result, bail};

use crate::run::{Context, is_root};
use world::World;

pub fn up(context: &Context) -> Result<()> {
    if !is_root() {
        bail!("not yet");
    }
    let world = World::new(context);
    context.step("machines", || {
        world.create(&[])?;
        Ok(String::new())
    })
}

pub fn down(context: &Context) -> Result<()> {
    let world = World::new(context);
    context.step("end the demo", || world.destroy())
}

pub fn status(context: &Context) -> Result<()> {
    let world = World::new(context);
    println!("up: {}", world.is_up());
    for (name, packets, bytes) in world.firewall_counters()? {
        println!("{name} {packets} {bytes}");
    }
    Ok(())
}
