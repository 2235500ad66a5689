//! `beamline submit`, `beamline ping`: a program's side of the gateway.

use crate::cli;
use crate::config::{Layers, load, parse_duration};
use anyhow::{Context, Result, bail};
use client::{Client, StreamEvent};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

/// An answer about a deadline comes after it.
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
    // The gateway knows the deadline and says more about it than we could.
    let patience = timeout.map_or(Duration::MAX, |timeout| timeout + GRACE);
    let answered = tokio::time::timeout(patience, answered).await;
    answered.context("no answer within --timeout; the task may still run")?
}

fn request(args: &cli::Submit, timeout: Option<Duration>) -> Result<Value> {
    let mut text = args.params.clone();
    if text == "-" {
        text.clear();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("cannot read the parameters from standard input")?;
    }
    let params: Value =
        serde_json::from_str(&text).with_context(|| format!("the parameters are not JSON: {text:.60}"))?;
    if !params.is_object() {
        bail!("the parameters are JSON, but not an object; write them as {{\"prompt\": …}}");
    }
    let mut request = json!({
        "version": "1", "command": "task_submit", "request_id": uuid::Uuid::now_v7().to_string(),
        "trace_id": uuid::Uuid::new_v4().simple().to_string(),
        "task_type": args.task_type, "params": params,
        "wait": match args.wait {
            cli::Wait::Decision => "decision",
            cli::Wait::Result => "result",
            cli::Wait::Stream => "stream",
        },
    });
    if let Some(timeout) = timeout {
        request["timeout_ms"] = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).into();
    }
    if let Some(tenant) = &args.tenant {
        request["tenant_id"] = tenant.as_str().into();
    }
    Ok(request)
}

/// Output goes to stdout as it comes; how it ended, to stderr.
async fn stream(client: &Client, request: &Value) -> Result<()> {
    let mut events = client.stream(request).await?;
    let mut out = std::io::stdout();
    let mut streamed = false;
    while let Some(event) = events.next().await? {
        match event {
            StreamEvent::Data(data) => {
                match &data.data {
                    Value::String(text) => out.write_all(text.as_bytes())?,
                    other => writeln!(out, "{other}")?,
                }
                out.flush()?;
                streamed = true;
            }
            StreamEvent::Complete(complete) => {
                let result = serde_json::to_value(&complete)?;
                match &result["result"]["output"] {
                    // A provider need not stream: then all of its output is in the result.
                    output if !streamed && !output.is_null() => writeln!(out, "{output:#}")?,
                    _ => writeln!(out)?,
                }
                return failed_result(&result);
            }
        }
    }
    bail!("the stream ended without a result")
}

/// A task that failed makes the command fail too.
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
                .unwrap_or("no reason was given");
            bail!("the task ended with status {status}: {reason}")
        }
    }
}

pub fn socket(args: cli::Socket) -> Result<PathBuf> {
    let mut layers = Layers::from_process();
    layers.flags.extend(args.socket.map(|path| ("gateway.socket", path)));
    Ok(load(&layers)?.gateway.socket)
}
