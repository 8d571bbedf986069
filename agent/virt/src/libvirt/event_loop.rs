//! libvirt's default event loop on one thread for the life of the process.

use std::sync::OnceLock;
use std::thread;

use crossbeam_channel::after;

use crate::error::{HypervisorError, HypervisorErrorKind, Result};

static STARTED: OnceLock<Result<(), String>> = OnceLock::new();

/// Must come before the first connection: drivers register their handles with the loop that exists then. libvirt can
/// neither register twice nor unregister, hence once a process, and the thread ends with it.
pub(super) fn start() -> Result<()> {
    let started = STARTED.get_or_init(|| {
        // without this libvirt writes every error to stderr, also those that are answers ("no such domain")
        virt::error::clear_error_callback();
        virt::event::event_register_default_impl().map_err(|e| e.to_string())?;
        thread::Builder::new().name("libvirt-event".into()).spawn(run).map_err(|e| e.to_string()).map(drop)
    });
    started.clone().map_err(|text| {
        HypervisorError::new(HypervisorErrorKind::Connection, format!("start libvirt's event loop: {text}"))
    })
}

fn run() {
    loop {
        if let Err(e) = virt::event::event_run_default_impl() {
            tracing::error!(err = %e, "libvirt event loop iteration failed");
            // do not spin on a lasting error; only the timer can end this
            let _ = after(std::time::Duration::from_millis(100)).recv();
        }
    }
}
