//! The agent of this machine, through its control socket: one JSON line each way (`muster_agent::control` has the words;
//! `tests/tests/refusals.rs` holds the two together).

use std::path::Path;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use crate::{
    Ended,
    args::{AgentVerb, Output},
    output::{Table, print},
};

pub async fn run(verb: AgentVerb, output: Output) -> anyhow::Result<Ended> {
    let (socket, request) = match &verb {
        AgentVerb::Stop { socket, force } => (socket, json!({ "stop": { "force": force } })),
        AgentVerb::Status { socket } => (socket, json!({ "status": {} })),
    };
    let answer = ask(socket, &request).await?;
    if answer["ok"] != true {
        let what = if matches!(verb, AgentVerb::Stop { .. }) { "stop" } else { "ask" };
        bail!(
            "{what} the agent at {}: {}",
            socket.display(),
            answer["message"].as_str().unwrap_or("it refused without a reason")
        );
    }
    if let Some(remark) = answer["message"].as_str().filter(|remark| !remark.is_empty()) {
        eprintln!("{remark}");
    }
    let shown = match &verb {
        AgentVerb::Status { .. } => &answer["status"],
        AgentVerb::Stop { .. } => &answer,
    };
    print(output, shown, |answer| {
        if matches!(verb, AgentVerb::Stop { .. }) {
            return "the agent stops\n".to_string();
        }
        let mut table = Table::new(&["PROPERTY", "VALUE"]);
        for (name, value) in answer.as_object().into_iter().flatten() {
            table.row([name.clone(), value.as_str().map_or_else(|| value.to_string(), str::to_string)]);
        }
        table.render()
    })?;
    Ok(Ended::AllDone)
}

async fn ask(socket: &Path, request: &Value) -> anyhow::Result<Value> {
    let mut stream = tokio::net::UnixStream::connect(socket).await.with_context(|| {
        format!("reach the agent at {} (is muster-agent running? --socket says where)", socket.display())
    })?;
    stream.write_all(format!("{request}\n").as_bytes()).await.context("ask the agent")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await.context("read the agent's answer")?;
    if line.is_empty() {
        bail!("ask the agent at {}: it closed the connection without an answer; its log says why", socket.display());
    }
    serde_json::from_str(&line).context("read the agent's answer")
}
