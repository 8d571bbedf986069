//! The guest agent's protocol (QMP over the agent channel, through libvirt).
//!
//! What the guest answers is untrusted: it is parsed strictly, sizes are limited, and it never becomes part of a host
//! command.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::base64;
use crate::error::{HypervisorError, HypervisorErrorKind, Result};
use crate::state::{ExecRequest, ExecResult};

/// Sends one command and gives its `return` value; the duration is how long to wait for the answer.
pub(super) type Command<'a> = &'a dyn Fn(&Value, Duration) -> Result<Value>;

/// libvirt takes 10 MiB an answer; the agent itself works in small buffers. Small enough that a slow guest answers
/// each in time, large enough that a megabyte takes 16 calls.
const FILE_CHUNK: usize = 64 * 1024;
/// How long one step of a conversation may take: a loaded host under translation needs seconds for a fork.
const STEP: Duration = Duration::from_secs(20);
/// Ceiling of what `guest-exec` returns; the agent itself cuts at 16 MiB.
const OUTPUT_LIMIT: usize = 16 * 1024 * 1024;

fn malformed(what: &str) -> HypervisorError {
    HypervisorError::new(HypervisorErrorKind::GuestFailed, format!("guest agent: malformed answer to {what}"))
}

/// The `return` member of an answer's text.
pub(super) fn parse_answer(text: &str) -> Result<Value> {
    let mut answer: Value = serde_json::from_str(text)
        .map_err(|e| HypervisorError::with_source(HypervisorErrorKind::GuestFailed, "parse guest agent answer", e))?;
    answer.get_mut("return").map(Value::take).ok_or_else(|| malformed("a command"))
}

fn output(status: &Value, key: &str) -> Result<Vec<u8>> {
    let Some(text) = status.get(key) else {
        return Ok(Vec::new());
    };
    let text = text.as_str().ok_or_else(|| malformed("guest-exec-status"))?;
    if text.len() / 4 * 3 > OUTPUT_LIMIT {
        return Err(malformed("guest-exec-status"));
    }
    base64::decode(text).ok_or_else(|| malformed("guest-exec-status"))
}

fn number(status: &Value, key: &str) -> Option<i32> {
    status.get(key).and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok())
}

pub(super) fn exec(command: Command<'_>, request: &ExecRequest) -> Result<ExecResult> {
    let Some((path, arguments)) = request.argv.split_first() else {
        return Err(HypervisorError::new(HypervisorErrorKind::InvalidSpec, "run a program in the guest: empty argv"));
    };
    let deadline = Instant::now() + request.timeout;
    let mut start = json!({ "path": path, "arg": arguments, "capture-output": true });
    if !request.input.is_empty() {
        start["input-data"] = base64::encode(&request.input).into();
    }
    let started = command(&json!({ "execute": "guest-exec", "arguments": start }), STEP.min(request.timeout))?;
    let pid = started.get("pid").and_then(Value::as_i64).ok_or_else(|| malformed("guest-exec"))?;
    let mut pause = Duration::from_millis(10);
    loop {
        let query = json!({ "execute": "guest-exec-status", "arguments": { "pid": pid } });
        let status = command(&query, STEP)?;
        if status.get("exited").and_then(Value::as_bool).ok_or_else(|| malformed("guest-exec-status"))? {
            let cut = |key: &str| status.get(key).and_then(Value::as_bool).unwrap_or(false);
            return Ok(ExecResult {
                exit: number(&status, "exitcode"),
                signal: number(&status, "signal"),
                stdout: output(&status, "out-data")?,
                stderr: output(&status, "err-data")?,
                truncated: cut("out-truncated") || cut("err-truncated"),
            });
        }
        if Instant::now() >= deadline {
            return Err(HypervisorError::new(
                HypervisorErrorKind::Unknown,
                format!("run {path:?} in the guest: process {pid} still runs after {:?}", request.timeout),
            ));
        }
        // the protocol has no "tell me when": ask ever more rarely
        let wait = crossbeam_channel::after(pause.min(deadline.saturating_duration_since(Instant::now())));
        // only the timer can end this
        let _ = wait.recv();
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

/// Opens, runs `body` with the handle, closes also when it failed.
fn with_file<T>(command: Command<'_>, path: &str, mode: &str, body: impl FnOnce(i64) -> Result<T>) -> Result<T> {
    let open = json!({ "execute": "guest-file-open", "arguments": { "path": path, "mode": mode } });
    let handle = command(&open, STEP)?.as_i64().ok_or_else(|| malformed("guest-file-open"))?;
    let result = body(handle);
    let closed = command(&json!({ "execute": "guest-file-close", "arguments": { "handle": handle } }), STEP);
    let value = result?;
    // a full disk may show only here
    closed?;
    Ok(value)
}

pub(super) fn write_file(command: Command<'_>, path: &str, content: &[u8]) -> Result<()> {
    with_file(command, path, "w", |handle| {
        for chunk in content.chunks(FILE_CHUNK) {
            let mut rest = chunk;
            while !rest.is_empty() {
                let write = json!({
                    "execute": "guest-file-write",
                    "arguments": { "handle": handle, "buf-b64": base64::encode(rest) },
                });
                let answer = command(&write, STEP)?;
                let count = answer.get("count").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
                match count {
                    Some(count) if count > 0 && count <= rest.len() => rest = &rest[count..],
                    _ => return Err(malformed("guest-file-write")),
                }
            }
        }
        command(&json!({ "execute": "guest-file-flush", "arguments": { "handle": handle } }), STEP).map(drop)
    })
}

pub(super) fn read_file(command: Command<'_>, path: &str, limit: usize) -> Result<Vec<u8>> {
    with_file(command, path, "r", |handle| {
        let mut out = Vec::new();
        loop {
            let read = json!({ "execute": "guest-file-read", "arguments": { "handle": handle, "count": FILE_CHUNK } });
            let answer = command(&read, STEP)?;
            let text = answer.get("buf-b64").and_then(Value::as_str).ok_or_else(|| malformed("guest-file-read"))?;
            let bytes = base64::decode(text).ok_or_else(|| malformed("guest-file-read"))?;
            let end = answer.get("eof").and_then(Value::as_bool).ok_or_else(|| malformed("guest-file-read"))?;
            if out.len() + bytes.len() > limit {
                return Err(HypervisorError::new(
                    HypervisorErrorKind::GuestFailed,
                    format!("read {path:?} in the guest: longer than {limit} bytes"),
                ));
            }
            // an agent that sends nothing and never ends would keep us here
            let stuck = bytes.is_empty() && !end;
            out.extend_from_slice(&bytes);
            if end {
                return Ok(out);
            }
            if stuck {
                return Err(malformed("guest-file-read"));
            }
        }
    })
}

pub(super) fn count(command: Command<'_>, name: &str) -> Result<u32> {
    // freezing waits for the file systems to be written
    let answer = command(&json!({ "execute": name }), Duration::from_secs(60))?;
    answer.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| malformed(name))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    type Log = std::rc::Rc<RefCell<Vec<String>>>;

    fn scripted(answers: Vec<Value>) -> (impl Fn(&Value, Duration) -> Result<Value>, Log) {
        let log = std::rc::Rc::new(RefCell::new(Vec::new()));
        let seen = log.clone();
        let answers = RefCell::new(answers.into_iter());
        let command = move |request: &Value, _: Duration| {
            seen.borrow_mut().push(request["execute"].as_str().unwrap().to_owned());
            Ok(answers.borrow_mut().next().unwrap())
        };
        (command, log)
    }

    #[test]
    fn exec_asks_until_the_program_ended() {
        let (command, log) = scripted(vec![
            json!({ "pid": 7 }),
            json!({ "exited": false }),
            json!({ "exited": true, "exitcode": 3, "out-data": "aGk=", "err-truncated": true }),
        ]);
        let result = exec(&command, &ExecRequest::new(["/bin/x"])).unwrap();
        assert_eq!(
            result,
            ExecResult { exit: Some(3), signal: None, stdout: b"hi".to_vec(), stderr: vec![], truncated: true }
        );
        assert_eq!(*log.borrow(), ["guest-exec", "guest-exec-status", "guest-exec-status"]);
    }

    #[test]
    fn a_program_that_does_not_end_in_time_is_unknown() {
        let (command, _) = scripted(vec![json!({ "pid": 7 }), json!({ "exited": false })]);
        let request = ExecRequest { timeout: Duration::ZERO, ..ExecRequest::new(["/bin/x"]) };
        assert_eq!(exec(&command, &request).unwrap_err().kind(), HypervisorErrorKind::Unknown);
    }

    #[test]
    fn lies_of_the_guest_are_refused_and_the_file_is_closed() {
        let (command, log) = scripted(vec![json!(5), json!({ "count": 99 }), json!({})]);
        assert!(write_file(&command, "/f", b"abc").is_err());
        assert_eq!(*log.borrow(), ["guest-file-open", "guest-file-write", "guest-file-close"]);

        let (command, _) = scripted(vec![json!(5), json!({ "buf-b64": "", "count": 0, "eof": false }), json!({})]);
        assert!(read_file(&command, "/f", 10).is_err());

        let (command, _) = scripted(vec![json!(5), json!({ "buf-b64": "YWJj", "eof": true }), json!({})]);
        assert!(read_file(&command, "/f", 2).is_err());

        let (command, _) = scripted(vec![json!({ "pid": "x" })]);
        assert!(exec(&command, &ExecRequest::new(["/bin/x"])).is_err());
    }

    #[test]
    fn a_partial_write_is_continued() {
        let (command, log) =
            scripted(vec![json!(5), json!({ "count": 1 }), json!({ "count": 2 }), json!({}), json!({})]);
        write_file(&command, "/f", b"abc").unwrap();
        assert_eq!(log.borrow().len(), 5);
    }
}
