use crate::run::Context;
use anyhow::{Result, bail};
pub fn up(_: &Context) -> Result<()> {
    bail!("not yet")
}
pub fn down(_: &Context) -> Result<()> {
    bail!("not yet")
}
pub fn status(_: &Context) -> Result<()> {
    bail!("not yet")
}
