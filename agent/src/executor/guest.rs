//! Through the guest agent.

use std::time::Duration;

use muster_common::ErrorCode;
use muster_idl::arguments::ExecResult;
use muster_virt::{ExecRequest, HypervisorErrorKind, Lane};
use tokio::time::Instant;

use super::{Done, Failure, Work};
use crate::arguments;

/// What of a program's output travels.
const OUTPUT_LIMIT: usize = 64 << 10;
/// How long an order waits for an agent that is there and slow: as long as for any later step of what it does. A guest that
/// works its disk under translation, on a loaded machine, is silent for seconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between an ask that failed before its time and the next.
const ASK_AGAIN: Duration = Duration::from_millis(250);

impl Work {
    async fn need_guest(&self) -> Result<muster_common::VmId, Failure> {
        let vm = self.entry()?.record.vm;
        let usual = self.host.config.timeouts.guest_agent();
        let until = Instant::now() + PATIENCE.min(self.left());
        loop {
            // of a channel that nobody opened no answer will come
            let there = self.entry()?.agent_connected == Some(true);
            let left = until.saturating_duration_since(Instant::now());
            let patience = if there { left.max(usual) } else { usual };
            if self.guest_answers_within(vm, patience).await {
                self.host.inventory.update(vm, |e| e.guest_up = true);
                return Ok(vm);
            }
            if !there || Instant::now() >= until {
                return Err(Failure::refused(
                    ErrorCode::GuestAgent,
                    "the guest agent does not answer: is qemu-guest-agent installed and running in the guest?",
                ));
            }
            // libvirt gives up after 5 s where somebody else's question was not answered before
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    pub(super) async fn exec(&self) -> Result<Done, Failure> {
        let argv = arguments::argv(&self.order)?;
        let vm = self.need_guest().await?;
        let timeout = self.left();
        let request = ExecRequest { timeout, ..ExecRequest::new(argv) };
        let call =
            self.host.machines.call_within(Lane::Vm(vm), "guest exec", timeout, move |h| h.guest_exec(vm, &request));
        let result = match call.await {
            Err(e) if e.kind() == HypervisorErrorKind::GuestFailed => {
                return Err(Failure { code: ErrorCode::NotFound, ..Failure::from(e) });
            }
            other => other?,
        };
        let cut = result.truncated || result.stdout.len() > OUTPUT_LIMIT || result.stderr.len() > OUTPUT_LIMIT;
        let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(OUTPUT_LIMIT)]).into_owned();
        let reply = ExecResult {
            // a shell's number for a signal
            exit_status: result.exit.or(result.signal.map(|s| 128 + s)).unwrap_or(-1),
            stdout: text(&result.stdout),
            stderr: text(&result.stderr),
        };
        let message = match (reply.exit_status, cut) {
            (0, false) => String::new(),
            (0, true) => "the output was cut".into(),
            (status, _) => format!("the program ended with status {status}"),
        };
        Ok(Done { message, result: json(&reply)? })
    }

    pub(super) async fn file_write(&self) -> Result<Done, Failure> {
        let path = arguments::guest_path(&self.order)?;
        let content = arguments::content(&self.order)?;
        let vm = self.need_guest().await?;
        let time = self.left();
        let call = move |h: &dyn muster_virt::Hypervisor| h.guest_write_file(vm, &path, &content);
        self.host.machines.call_within(Lane::Vm(vm), "guest file write", time, call).await?;
        Ok(Done::default())
    }
}

pub(super) fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|e| Failure::failed(ErrorCode::Internal, format!("write the result: {e}")))
}
