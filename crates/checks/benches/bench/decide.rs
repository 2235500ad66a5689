//! Measures a decision in-process, with a policy that has weights, a condition and a sticky key.

use crate::Result;
use crate::report::{Figure, Report};
use router::policy::{Compiled, Stop, World};
use std::hint::black_box;
use std::time::{Duration, Instant};
use wire::router::DecideRequest;

const POLICY: &str = r#"{
    "version": "1",
    "providers": [{"name": "a", "weight": 60}, {"name": "b", "weight": 30}, {"name": "c", "weight": 10}],
    "rules": [{"when": "task.type == 'chat' && metadata.tier == 'gold'", "to": "a"}],
    "sticky": {"enabled": true, "session_key": "session"}
}"#;
const REQUEST: &str = r#"{"version": "1", "request_id": "r", "tenant_id": "default",
    "task": {"type": "summarize", "payload": {"text": "hello"}}, "metadata": {"tier": "silver", "session": "s-17"}}"#;
const ROUND: Duration = Duration::from_secs(3);

struct AllAvailable;

impl World for AllAvailable {
    fn is_available(&self, _provider: &str) -> bool {
        true
    }

    fn latency_ms(&self, _provider: &str) -> Option<f64> {
        None
    }

    fn rule_failed(&self, rule: usize, why: &Stop) {
        panic!("rule {rule} of the benchmark's policy does not evaluate: {why:?}");
    }
}

pub fn run(report: &mut Report) -> Result {
    let policy = serde_json::from_str(POLICY)?;
    let policy = Compiled::new("bench", &policy).map_err(|e| format!("{}: {}", e.field, e.what))?;
    let request: DecideRequest = serde_json::from_str(REQUEST)?;

    let mut times = hdrhistogram::Histogram::<u64>::new(3)?;
    let began = Instant::now();
    while began.elapsed() < ROUND {
        let start = Instant::now();
        black_box(
            policy
                .decide(black_box(&request), &AllAvailable)
                .map_err(|e| e.to_string())?,
        );
        times.record(u64::try_from(start.elapsed().as_nanos())?)?;
    }

    let p50 = times.value_at_quantile(0.5) as f64 / 1000.0;
    report.row("decide in the process, p50", Figure::Micros(p50), None, "≤ 5 µs");
    let rate = times.len() as f64 / began.elapsed().as_secs_f64();
    report.row("decide in the process, one core", Figure::PerSecond(rate), None, "≥ 150,000/s");
    Ok(())
}
