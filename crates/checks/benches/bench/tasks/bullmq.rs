//! The peer on Redis: BullMQ, with a producer and two workers in processes of their own.

use super::ROUND;
use crate::Result;
use std::path::PathBuf;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

const WORKERS: usize = 2;

#[derive(serde::Deserialize)]
struct Figures {
    per_second: f64,
}

/// Jobs a second with this many in flight; `None` if BullMQ is not installed.
pub async fn measure(redis: u16, in_flight: usize) -> Result<Option<f64>> {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/bullmq"));
    if !dir.join("node_modules").exists() {
        println!("BullMQ is not installed, so it is not measured; make bench installs it");
        return Ok(None);
    }

    let node = |script: &str, arguments: &[String]| {
        let mut node = Command::new("node");
        node.arg(dir.join(script)).args(arguments);
        node.stdout(Stdio::piped()).kill_on_drop(true).spawn()
    };

    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        let concurrency = in_flight.div_ceil(WORKERS);
        let mut worker = node("worker.mjs", &[redis.to_string(), concurrency.to_string()])?;
        first_line(&mut worker).await?;
        workers.push(worker);
    }

    let seconds = ROUND.as_secs().to_string();
    let mut producer = node("producer.mjs", &[redis.to_string(), in_flight.to_string(), seconds])?;
    let figures: Figures = serde_json::from_str(&first_line(&mut producer).await?)?;

    producer.wait().await?;
    for mut worker in workers {
        worker.kill().await?;
    }
    Ok(Some(figures.per_second))
}

async fn first_line(child: &mut Child) -> Result<String> {
    let stdout = child.stdout.as_mut().ok_or("the process has no standard output")?;
    let line = BufReader::new(stdout).lines().next_line().await?;
    line.ok_or_else(|| "the process ended before it printed anything".into())
}
