//! `beamline soak`: puts a running part under load for a long time.

use crate::cli;
use crate::config::parse_duration;
use anyhow::{Context, Result, anyhow, bail, ensure};
use checks::soak::{Config, Evidence};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Length of each task's text, in bytes.
const PAYLOAD: usize = 256;
/// Interval between writes of the evidence while the soak runs.
const WRITE_EVERY: Duration = Duration::from_secs(30);

pub async fn gateway(args: cli::SoakGateway) -> Result<()> {
    let deadline = args.deadline.as_deref().map(parse_duration).transpose();
    ensure!(args.rate.is_none_or(|rate| rate.is_finite() && rate > 0.0), "--rate must be more than 0");
    ensure!(args.clients > 0 && args.in_flight > 0, "--clients and --in-flight must be more than 0");
    let commit = option_env!("BEAMLINE_COMMIT").unwrap_or("unknown commit");
    let config = Config {
        duration: parse_duration(&args.duration).map_err(|what| anyhow!("--for {what}"))?,
        deadline: deadline.map_err(|what| anyhow!("--deadline {what}"))?,
        socket: super::submit::socket(args.socket)?,
        metrics: args.metrics,
        requests: args.requests,
        per_second: args.rate,
        clients: args.clients,
        in_flight: args.in_flight,
        late_router: args.late_router,
        task_type: args.task_type,
        payload: PAYLOAD,
        build: format!("{} ({commit})", env!("CARGO_PKG_VERSION")),
    };

    let file = args.evidence.as_deref();
    let mut written = Instant::now();
    let so_far = |seen: &Evidence| {
        if let Some(file) = file
            && written.elapsed() >= WRITE_EVERY
        {
            written = Instant::now();
            if let Err(error) = write(file, seen) {
                eprintln!("beamline: {error:#}");
            }
        }
    };

    let stop = CancellationToken::new();
    let (mut ended, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let soak = checks::soak::gateway(&config, stop.clone(), so_far);
    tokio::pin!(soak);
    let seen = loop {
        tokio::select! {
            seen = &mut soak => break seen?,
            // An interrupted soak is judged by its evidence so far.
            _ = ended.recv() => stop.cancel(),
            _ = interrupted.recv() => stop.cancel(),
        }
    };

    if let Some(file) = file {
        write(file, &seen)?;
    }
    print(&seen);
    if seen.problems.is_empty() {
        println!("passed");
        return Ok(());
    }
    bail!("failed: {}", seen.problems.join("; "))
}

/// Replaces the file atomically, so that a reader sees either the old or the new evidence.
fn write(file: &Path, seen: &Evidence) -> Result<()> {
    let failed = || format!("cannot write {}", file.display());
    let beside = file.with_extension("part");
    std::fs::write(&beside, serde_json::to_vec_pretty(seen)?).with_context(failed)?;
    std::fs::rename(&beside, file).with_context(failed)
}

fn print(seen: &Evidence) {
    println!(
        "{} requests in {:.0} s, {:.0}/s, p50 {} µs, p99 {} µs, longest {} µs",
        seen.sent, seen.seconds, seen.per_second, seen.p50_us, seen.p99_us, seen.max_us
    );

    let refused: u64 = seen.errors.values().sum();
    println!("{} answered, {refused} refused {:?}, {} lost", seen.answered, seen.errors, seen.unanswered);

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

    if let (Some(after), Some(late)) = (seen.after, seen.late_replies) {
        println!("afterwards: {} in flight, {} tasks; {late} replies were late", after.in_flight, after.tasks);
    }
    if let Some(given) = seen.late_router {
        println!("{given} requests reached the late router; the deadlines of the others passed before they were sent");
    }
}
