//! Raw byte streams through the controller: serial console and VNC.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};

use super::Session;
use crate::Ended;

/// Ctrl-], as in telnet and virsh.
const ESCAPE: u8 = 0x1d;

/// Connects the terminal with a VM's serial console. Off a terminal: standard input to the console until its end,
/// the console to standard output until the VM closes it.
pub async fn console(session: &Session, vm: &str) -> anyhow::Result<Ended> {
    let stream = session.client.console(vm).await?;
    let (mut from_vm, mut to_vm) = tokio::io::split(stream);
    let _raw = if std::io::stdin().is_terminal() {
        eprintln!("connected to {vm}; leave with Ctrl-]");
        Some(RawTerminal::enter()?)
    } else {
        None
    };
    let mut input = tokio::io::stdin();
    let mut output = tokio::io::stdout();
    let (mut typed, mut shown) = ([0; 1024], vec![0; 16 << 10]);
    let mut input_open = true;
    loop {
        tokio::select! {
            n = input.read(&mut typed), if input_open => {
                let n = n.context("read the terminal")?;
                if n == 0 {
                    input_open = false;
                    continue;
                }
                if typed[..n].contains(&ESCAPE) {
                    break;
                }
                to_vm.write_all(&typed[..n]).await.context("write to the console")?;
            }
            n = from_vm.read(&mut shown) => {
                let n = n.context("read the console")?;
                if n == 0 {
                    break;
                }
                output.write_all(&shown[..n]).await.context("write to standard output")?;
                output.flush().await.context("write to standard output")?;
            }
        }
    }
    Ok(Ended::AllDone)
}

/// The terminal passes every key on until this is dropped.
struct RawTerminal {
    before: rustix::termios::Termios,
}

impl RawTerminal {
    fn enter() -> anyhow::Result<Self> {
        let before = rustix::termios::tcgetattr(std::io::stdin()).context("read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(std::io::stdin(), rustix::termios::OptionalActions::Now, &raw)
            .context("set the terminal")?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(std::io::stdin(), rustix::termios::OptionalActions::Now, &self.before);
        eprintln!();
    }
}

/// Offers a VM's screen on a unix socket. Each viewer that connects gets a stream of its own.
pub async fn vnc(session: &Session, vm: &str, listen: &Path) -> anyhow::Result<Ended> {
    if listen.exists() {
        bail!("{} exists: choose another path, or remove it when nobody listens there", listen.display());
    }
    // the VM must be there and have a screen before we promise one
    drop(session.client.vnc(vm).await?);
    let listener = tokio::net::UnixListener::bind(listen).with_context(|| format!("listen at {}", listen.display()))?;
    let _socket = Socket(listen.to_path_buf());
    eprintln!("VNC of {vm} at {}; end with Ctrl-C", listen.display());
    let mut viewers = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (mut viewer, _) = accepted.context("accept a viewer")?;
                let (client, vm) = (session.client.clone(), vm.to_string());
                viewers.spawn(async move {
                    let mut screen = client.vnc(&vm).await?;
                    copy_bidirectional(&mut viewer, &mut screen).await.context("pass the screen on")?;
                    anyhow::Ok(())
                });
            }
            Some(ended) = viewers.join_next() => {
                if let Ok(Err(error)) = ended {
                    eprintln!("muster: viewer: {error:#}");
                }
            }
            _ = tokio::signal::ctrl_c() => return Ok(Ended::AllDone),
        }
    }
}

struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
