//! Judges a soak: it passes when every request is accounted for and the gateway's process has not grown.

use super::{Config, Evidence, Sample, Seen, SettingsUsed, Tally};
use crate::slope::{median, theil_sen};
use std::time::{Duration, UNIX_EPOCH};
use wire::ipc::ErrorCode;

/// Memory growth below this over the whole soak is noise: allocators keep memory, and tables double.
const NOISE_BYTES: f64 = 2.0 * 1024.0 * 1024.0;
const NOISE_SHARE: f64 = 0.02;
/// In a shorter soak, memory is still warming up, so only growth too large for a warm-up counts.
const SHORT_SECONDS: f64 = 60.0;
const NOISE_BYTES_SHORT: f64 = 32.0 * 1024.0 * 1024.0;
/// Descriptors that come and go independently of the load (a log file, a scrape of the metrics), and their tasks.
const NOISE_COUNT: u64 = 8;
/// The first part of the soak that is ignored: caches fill and pools reach their size.
const WARM_UP: f64 = 0.25;
/// A soak that reaches less than this share of the requested rate fails, because it did not test that load.
const RATE_SHARE: f64 = 0.9;

pub fn judge(config: &Config, seen: &Seen, tally: &Tally, took: Duration) -> Evidence {
    let seconds = took.as_secs_f64();
    let late_replies = late_replies(seen);
    let settled = settled(&seen.samples, seconds);
    let memory = Memory::of(&settled);

    let mut problems = Vec::new();
    if !seen.ended {
        problems.push("the soak has not ended".into());
    }
    problems.extend(requests(config, seen, tally, late_replies));
    problems.extend(rate(config, tally, seconds));
    problems.extend(memory.growth(seconds));
    problems.extend(counts(&settled));

    let began_ms = seen.began_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    Evidence {
        build: config.build.clone(),
        machine: seen.machine.clone(),
        began_ms: u64::try_from(began_ms).unwrap_or(u64::MAX),
        settings: SettingsUsed::from(config),
        pid: seen.pid,
        ended: seen.ended,
        seconds,
        sent: tally.sent,
        answered: tally.answered,
        errors: tally.errors.clone(),
        unanswered: tally.sent - tally.answered - tally.refused(),
        per_second: tally.sent as f64 / seconds,
        p50_us: tally.within_us(0.5),
        p99_us: tally.within_us(0.99),
        max_us: tally.within_us(1.0),
        samples: seen.samples.clone(),
        after: seen.after,
        late_replies,
        late_router: seen.late_router,
        rss_bytes_per_hour: memory.bytes_per_second * 3600.0,
        problems,
    }
}

/// Late replies that the gateway counted since the soak began.
fn late_replies(seen: &Seen) -> Option<u64> {
    let last = seen.samples.last().and_then(|sample| sample.figures);
    let figures = seen.after.or(last)?;
    let before = seen.before.map_or(0, |before| before.late_replies);
    Some(figures.late_replies.saturating_sub(before))
}

/// The samples after the warm-up.
fn settled(samples: &[Sample], seconds: f64) -> Vec<Sample> {
    let from = seconds * WARM_UP;
    samples.iter().copied().filter(|sample| sample.second >= from).collect()
}

/// Resident memory after the warm-up.
struct Memory {
    bytes_per_second: f64,
    typical_bytes: f64,
}

impl Memory {
    fn of(settled: &[Sample]) -> Self {
        let rss: Vec<(f64, f64)> = settled.iter().map(|s| (s.second, s.holds.rss_bytes as f64)).collect();
        let mut bytes: Vec<f64> = rss.iter().map(|(_, bytes)| *bytes).collect();
        Self {
            bytes_per_second: theil_sen(&rss).unwrap_or(0.0),
            typical_bytes: median(&mut bytes).unwrap_or(0.0),
        }
    }

    fn growth(&self, seconds: f64) -> Option<String> {
        let grown = self.bytes_per_second * (seconds - seconds * WARM_UP);
        let noise = if seconds < SHORT_SECONDS {
            NOISE_BYTES_SHORT
        } else {
            NOISE_BYTES.max(self.typical_bytes * NOISE_SHARE)
        };
        (grown > noise).then(|| format!("resident memory grew by {grown:.0} bytes after the warm-up"))
    }
}

/// Checks that the soak reached the requested rate. A soak of one second is too short for that.
fn rate(config: &Config, tally: &Tally, seconds: f64) -> Option<String> {
    let asked = config.per_second?;
    let reached = tally.sent as f64 / seconds;
    (seconds > 1.0 && reached < asked * RATE_SHARE).then(|| {
        format!("sent {reached:.0} requests a second instead of {asked:.0}: the gateway or this machine is too slow")
    })
}

/// Checks that every request got an answer or an error, and that none stays in flight.
fn requests(config: &Config, seen: &Seen, tally: &Tally, late_replies: Option<u64>) -> Vec<String> {
    let mut problems = Vec::new();
    let accounted = tally.answered + tally.refused();
    if tally.sent == 0 {
        problems.push("no request was sent".into());
    }
    if accounted != tally.sent {
        let lost = tally.sent - accounted;
        problems.push(format!("{lost} of {} requests got neither an answer nor an error", tally.sent));
    }

    if tally.answered == 0 && config.deadline.is_none() {
        problems.push("no request was answered; is a router running?".into());
    }

    let timed_out = tally.errors.get(&(ErrorCode::Timeout as u16)).copied().unwrap_or(0);
    if config.late_router.is_some() && timed_out == 0 {
        problems.push("no request timed out, although the late router answers after the deadline".into());
    }
    if seen.late_router == Some(0) {
        problems.push("no request reached the late router".into());
    }

    // More late replies than this are fine: the bus itself answers requests that overflow the late router's
    // subscription, and the gateway has other requests on it.
    if let (Some(given), Some(late)) = (seen.late_router, late_replies)
        && late + tally.answered < given
    {
        problems.push(format!("the late router gave {given} replies, but the gateway counted only {late} late ones"));
    }

    if let (Some(before), Some(after)) = (seen.before, seen.after)
        && after.in_flight > before.in_flight
    {
        problems.push(format!("{} requests are still in flight after the last answer", after.in_flight));
    }
    problems
}

/// Compares counts (descriptors, threads, tasks) at the end with those after the warm-up.
fn counts(settled: &[Sample]) -> Vec<String> {
    let mut problems = Vec::new();
    if settled.len() < 5 {
        let few = settled.len();
        problems.push(format!("only {few} samples after the warm-up: the process ended, or the soak is too short"));
    }

    let (Some(first), Some(last)) = (settled.first(), settled.last()) else {
        return problems;
    };
    let mut compare = |what: &str, first: u64, last: u64, most: u64| {
        if last > most {
            problems.push(format!("{what} grew from {first} to {last}"));
        }
    };

    let (a, b) = (first.holds, last.holds);
    compare("descriptors", a.descriptors, b.descriptors, a.descriptors + NOISE_COUNT);
    // The runtime starts threads for blocking work and ends idle ones.
    compare("threads", a.threads, b.threads, a.threads * 2 + 16);
    if let (Some(first), Some(last)) = (first.figures, last.figures) {
        compare("tasks", first.tasks, last.tasks, first.tasks + NOISE_COUNT);
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Holds;
    use crate::soak::figures::Figures;

    fn config() -> Config {
        Config {
            socket: "s".into(),
            metrics: None,
            duration: Duration::from_secs(100),
            requests: None,
            per_second: None,
            clients: 1,
            in_flight: 1,
            deadline: None,
            late_router: None,
            task_type: "echo".into(),
            payload: 256,
            build: String::new(),
        }
    }

    fn seen(rss: impl Fn(u64) -> u64, descriptors: impl Fn(u64) -> u64) -> Seen {
        let holds = |n| Holds { rss_bytes: rss(n), descriptors: descriptors(n), threads: 4 };
        let samples = (0..100).map(|n| Sample { second: n as f64, holds: holds(n), figures: Some(figures(9, 0)) });
        Seen {
            samples: samples.collect(),
            ended: true,
            ..Seen::new(1, Some(figures(9, 0)))
        }
    }

    fn figures(tasks: u64, in_flight: u64) -> Figures {
        Figures { tasks, in_flight, late_replies: 0 }
    }

    fn tally(sent: u64, answered: u64) -> Tally {
        let mut tally = Tally::default();
        (tally.sent, tally.answered, tally.errors) = (sent, answered, [(10, 5)].into());
        tally
    }

    fn verdict(config: &Config, seen: &Seen, tally: &Tally) -> Vec<String> {
        judge(config, seen, tally, Duration::from_secs(100)).problems
    }

    #[test]
    fn flat_soak_with_every_request_accounted_for_passes() {
        let flat = seen(|n| 50_000_000 + n % 7 * 4096, |n| 20 + n % 3);
        assert_eq!(verdict(&config(), &flat, &tally(105, 100)), Vec::<String>::new());
        // Growth during the warm-up is ignored.
        let warm = seen(|n| 50_000_000 + n.min(25) * 1_000_000, |_| 20);
        assert_eq!(verdict(&config(), &warm, &tally(105, 100)), Vec::<String>::new());
    }

    #[test]
    fn short_soak_tolerates_more_memory_growth() {
        let grows = |bytes_a_second: u64| {
            let seen = seen(|n| 40_000_000 + n * bytes_a_second / 25, |_| 20);
            judge(&config(), &seen, &tally(105, 100), Duration::from_secs(20)).problems
        };
        assert_eq!(grows(20_000_000), Vec::<String>::new());
        assert_eq!(grows(200_000_000).len(), 1);
    }

    #[test]
    fn verdict_names_what_was_lost_or_grew() {
        let flat = || seen(|_| 50_000_000, |_| 20);
        let with = |change: fn(&mut Seen)| {
            let mut seen = flat();
            change(&mut seen);
            seen
        };

        let paced = Config { per_second: Some(2.0), ..config() };
        let late = Config {
            late_router: Some("nats://x".into()),
            deadline: Some(Duration::ZERO),
            ..config()
        };
        for (config, seen, tally, expected) in [
            (config(), flat(), tally(106, 100), "1 of 106 requests"),
            (config(), flat(), tally(5, 0), "no request was answered"),
            (config(), flat(), Tally::default(), "no request was sent"),
            (config(), seen(|n| 50_000_000 + n * 100_000, |_| 20), tally(105, 100), "resident memory grew"),
            (config(), seen(|_| 50_000_000, |n| 20 + n), tally(105, 100), "descriptors grew"),
            (
                config(),
                with(|s| s.samples.drain(..98).for_each(drop)),
                tally(105, 100),
                "samples after the warm-up",
            ),
            (config(), with(|s| s.samples[99].figures = Some(figures(90, 0))), tally(105, 100), "tasks grew"),
            (config(), with(|s| s.after = Some(figures(9, 3))), tally(105, 100), "3 requests are still in flight"),
            (config(), with(|s| s.ended = false), tally(105, 100), "has not ended"),
            (paced, flat(), tally(105, 100), "1 requests a second instead of 2"),
            (late.clone(), flat(), tally(105, 100), "no request timed out"),
            (late.clone(), with(|s| s.late_router = Some(101)), tally(105, 100), "gave 101 replies"),
            (late, with(|s| s.late_router = Some(0)), tally(105, 100), "no request reached"),
        ] {
            let problems = verdict(&config, &seen, &tally);
            assert!(problems.iter().any(|problem| problem.contains(expected)), "{expected}: {problems:?}");
        }
    }
}
