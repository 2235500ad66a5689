//! `beamline soak`: a running part under load for a long time.

use crate::cli;
use crate::config::parse_duration;
use anyhow::{Context, Result, anyhow, bail};

/// Of each task's text.
const PAYLOAD: usize = 256;

pub async fn gateway(args: cli::SoakGateway) -> Result<()> {
    let deadline = args.deadline.as_deref().map(parse_duration).transpose();
    let config = checks::soak::Config {
        duration: parse_duration(&args.duration).map_err(|what| anyhow!("--for {what}"))?,
        deadline: deadline.map_err(|what| anyhow!("--deadline {what}"))?,
        socket: super::submit::socket(args.socket)?,
        clients: args.clients,
        in_flight: args.in_flight,
        task_type: args.task_type,
        payload: PAYLOAD,
    };
    let seen = checks::soak::gateway(&config).await?;
    if let Some(file) = &args.evidence {
        let text = serde_json::to_vec_pretty(&seen)?;
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    println!(
        "{} requests in {:.0} s, {:.0}/s, p50 {} µs, p99 {} µs",
        seen.sent, seen.seconds, seen.per_second, seen.p50_us, seen.p99_us
    );
    println!(
        "{} answered, {} refused {:?}, {} lost",
        seen.answered,
        seen.errors.values().sum::<u64>(),
        seen.errors,
        seen.unanswered
    );
    if let (Some(first), Some(last)) = (seen.samples.first(), seen.samples.last()) {
        let mib = |bytes: u64| bytes as f64 / 1048576.0;
        println!(
            "process {}: {:.1} to {:.1} MiB ({:+.2} MiB an hour after the warm-up), {} to {} descriptors",
            seen.pid,
            mib(first.holds.rss_bytes),
            mib(last.holds.rss_bytes),
            seen.rss_bytes_per_hour / 1048576.0,
            first.holds.descriptors,
            last.holds.descriptors
        );
    }
    if seen.problems.is_empty() {
        println!("passed");
        return Ok(());
    }
    bail!("failed: {}", seen.problems.join("; "))
}
