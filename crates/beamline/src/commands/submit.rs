//! `beamline submit` and `beamline ping`: clients of the gateway.

use crate::cli;
use crate::config::{Layers, load, parse_duration};
use anyhow::{Context, Result, bail};
use client::{Client, StreamEvent};
use serde_json::{Map, Value};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;
use wire::ipc::{TaskSubmit, Wait};
use wire::json::JsonObject;

/// How long to wait past the deadline for the gateway to report that it was missed.
const GRACE: Duration = Duration::from_secs(2);

pub async fn ping(args: cli::Socket) -> Result<()> {
    Client::connect(&socket(args)?).await?.ping().await?;
    println!("pong");
    Ok(())
}

pub async fn submit(args: cli::Submit) -> Result<()> {
    let timeout = args.timeout.as_deref().map(parse_duration).transpose();
    let timeout = timeout.map_err(|what| anyhow::anyhow!("--timeout {what}"))?;
    let request = request(&args, timeout)?;
    let client = Client::connect(&socket(args.socket)?).await?;

    let answered = async {
        match args.wait {
            cli::Wait::Decision | cli::Wait::Result => {
                let answer = client.submit(&request).await?;
                writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&answer)?)?;
                failed_result(&answer)
            }
            cli::Wait::Stream => stream(&client, &request).await,
        }
    };

    // The gateway enforces the deadline too, and its error is more specific.
    let patience = timeout.map_or(Duration::MAX, |timeout| timeout + GRACE);
    let answered = tokio::time::timeout(patience, answered).await;
    answered.context("no answer within --timeout; the task may still run")?
}

fn request(args: &cli::Submit, timeout: Option<Duration>) -> Result<Value> {
    let submit = TaskSubmit {
        params: Some(JsonObject::of(&params(&args.params)?)),
        request_id: Some(uuid::Uuid::now_v7().to_string()),
        trace_id: Some(uuid::Uuid::new_v4().simple().to_string()),
        tenant_id: args.tenant.clone(),
        timeout_ms: timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
        wait: match args.wait {
            cli::Wait::Decision => Wait::Decision,
            cli::Wait::Result => Wait::Result,
            cli::Wait::Stream => Wait::Stream,
        },
        ..TaskSubmit::new(&args.task_type)
    };
    Ok(serde_json::to_value(submit)?)
}

/// Parses the task's parameters, which `-` reads from standard input.
fn params(argument: &str) -> Result<Map<String, Value>> {
    let mut text = argument.to_string();
    if text == "-" {
        text.clear();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("cannot read the parameters from standard input")?;
    }
    match serde_json::from_str(&text).with_context(|| format!("the parameters are not JSON: {text:.60}"))? {
        Value::Object(params) => Ok(params),
        _ => bail!("the parameters are JSON, but not an object; write them as {{\"prompt\": …}}"),
    }
}

/// Writes the output to stdout as it arrives. If the task fails, returns an error with the reason.
async fn stream(client: &Client, request: &Value) -> Result<()> {
    let mut events = client.stream(request).await?;
    let mut out = std::io::stdout();
    let mut streamed = false;
    while let Some(event) = events.next().await? {
        match event {
            StreamEvent::Data(data) => {
                match data.data.string() {
                    Some(text) => out.write_all(text.as_bytes())?,
                    None => writeln!(out, "{}", data.data.text())?,
                }
                out.flush()?;
                streamed = true;
            }

            StreamEvent::Complete(complete) => {
                let result = serde_json::to_value(&complete)?;
                match &result["result"]["output"] {
                    // A provider that does not stream returns its whole output in the result.
                    output if !streamed && !output.is_null() => writeln!(out, "{output:#}")?,
                    _ => writeln!(out)?,
                }
                return failed_result(&result);
            }
        }
    }
    bail!("the stream ended without a result")
}

/// Returns an error if the task failed, so that the command fails too.
fn failed_result(answer: &Value) -> Result<()> {
    let result = ["result", "exec_result"]
        .iter()
        .find_map(|name| answer.get(name))
        .unwrap_or(answer);
    match result["status"].as_str() {
        None | Some("success" | "completed" | "ok" | "accepted") => Ok(()),
        Some(status) => {
            let reason = result["error_message"]
                .as_str()
                .or(result["error_code"].as_str())
                .unwrap_or("the result gives no reason");
            bail!("the task ended with status {status}: {reason}")
        }
    }
}

pub fn socket(args: cli::Socket) -> Result<PathBuf> {
    let mut layers = Layers::from_process();
    layers.flags.extend(args.socket.map(|path| ("gateway.socket", path)));
    Ok(load(&layers)?.gateway.socket)
}
