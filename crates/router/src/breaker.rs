//! A circuit breaker a provider, fed by real results. Sans-IO: time is an argument.

use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use wire::policy::CircuitBreaker;
use wire::status::BreakerStatus;

/// Outcomes that the failure rate looks back on.
const WINDOW: usize = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Closed,
    Open {
        until_ms: u64,
    },
    /// `asked_ms`: when the newest probe was sent.
    HalfOpen {
        probes: u32,
        successes: u32,
        asked_ms: u64,
    },
}

#[derive(Debug)]
struct Breaker {
    phase: Phase,
    in_a_row: u32,
    /// Newest last; `true` is a failure.
    outcomes: VecDeque<bool>,
}

impl Breaker {
    fn new() -> Self {
        Self { phase: Phase::Closed, in_a_row: 0, outcomes: VecDeque::new() }
    }

    fn lets_through(&self, rules: &CircuitBreaker, now_ms: u64) -> bool {
        match self.phase {
            Phase::Closed => true,
            Phase::Open { until_ms } => now_ms >= until_ms,
            // Probes whose results never come (cancelled, a worker that died) must not keep a provider out for good.
            Phase::HalfOpen { probes, asked_ms, .. } => {
                probes < rules.half_open_max_calls || now_ms >= asked_ms.saturating_add(rules.timeout_ms)
            }
        }
    }

    fn assigned(&mut self, now_ms: u64) {
        match &mut self.phase {
            Phase::Open { until_ms } if now_ms >= *until_ms => {
                self.phase = Phase::HalfOpen { probes: 1, successes: 0, asked_ms: now_ms };
            }
            Phase::HalfOpen { probes, asked_ms, .. } => {
                *probes += 1;
                *asked_ms = now_ms;
            }
            _ => {}
        }
    }

    fn ended(&mut self, failed: bool, rules: &CircuitBreaker, now_ms: u64) {
        let open = Phase::Open { until_ms: now_ms + rules.timeout_ms };
        match &mut self.phase {
            Phase::HalfOpen { .. } if failed => self.trip(open),
            Phase::HalfOpen { probes, successes, .. } => {
                *probes = probes.saturating_sub(1);
                *successes += 1;
                if *successes >= rules.success_threshold {
                    *self = Self::new();
                }
            }
            // Answers to what was sent before it opened say nothing new.
            Phase::Open { .. } => {}
            Phase::Closed => {
                self.in_a_row = if failed { self.in_a_row + 1 } else { 0 };
                self.outcomes.push_back(failed);
                if self.outcomes.len() > WINDOW.max(rules.min_calls as usize) {
                    self.outcomes.pop_front();
                }
                let failures = self.outcomes.iter().filter(|failed| **failed).count() as f64;
                let enough = self.outcomes.len() >= rules.min_calls as usize;
                let rate = failures / self.outcomes.len() as f64;
                if self.in_a_row >= rules.failure_threshold || (enough && rate >= rules.error_rate_threshold) {
                    self.trip(open);
                }
            }
        }
    }

    fn trip(&mut self, open: Phase) {
        *self = Self { phase: open, in_a_row: 0, outcomes: VecDeque::new() };
    }
}

/// All providers' breakers. One that was never heard of is closed.
#[derive(Default)]
pub struct Breakers(Mutex<HashMap<String, Breaker>>);

impl Breakers {
    pub fn lets_through(&self, provider: &str, rules: &CircuitBreaker, now_ms: u64) -> bool {
        self.0.lock().get(provider).is_none_or(|breaker| breaker.lets_through(rules, now_ms))
    }

    pub fn assigned(&self, provider: &str, now_ms: u64) {
        if let Some(breaker) = self.0.lock().get_mut(provider) {
            breaker.assigned(now_ms);
        }
    }

    pub fn ended(&self, provider: &str, failed: bool, rules: &CircuitBreaker, now_ms: u64) {
        let mut breakers = self.0.lock();
        let breaker = breakers.entry(provider.into()).or_insert_with(Breaker::new);
        let before = name(breaker.phase);
        breaker.ended(failed, rules, now_ms);
        let after = name(breaker.phase);
        if before != after {
            tracing::warn!(provider, from = before, to = after, "circuit breaker");
        }
    }

    pub fn status(&self) -> Vec<BreakerStatus> {
        let breakers = self.0.lock();
        let mut all: Vec<_> = breakers
            .iter()
            .map(|(provider, breaker)| BreakerStatus {
                provider: provider.clone(),
                state: name(breaker.phase).into(),
                failures: breaker.outcomes.iter().filter(|failed| **failed).count() as u64,
                calls: breaker.outcomes.len() as u64,
            })
            .collect();
        all.sort_by(|a, b| a.provider.cmp(&b.provider));
        all
    }
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Closed => "closed",
        Phase::Open { .. } => "open",
        Phase::HalfOpen { .. } => "half_open",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_probes_and_closes() {
        let rules = CircuitBreaker { timeout_ms: 1000, ..CircuitBreaker::default() };
        let breakers = Breakers::default();
        for _ in 0..4 {
            breakers.ended("p", true, &rules, 0);
        }
        assert!(breakers.lets_through("p", &rules, 0), "four failures are under the threshold");
        breakers.ended("p", true, &rules, 0);
        assert!(!breakers.lets_through("p", &rules, 999));
        for n in 0..rules.half_open_max_calls {
            assert!(breakers.lets_through("p", &rules, 1000), "probe {n}");
            breakers.assigned("p", 1000);
        }
        assert!(!breakers.lets_through("p", &rules, 1999), "probes are bounded");
        assert!(breakers.lets_through("p", &rules, 2000), "their results never came: another one may try");
        breakers.ended("p", false, &rules, 1001);
        breakers.ended("p", false, &rules, 1001);
        assert_eq!(breakers.status()[0].state, "closed");
    }

    #[test]
    fn a_failing_probe_opens_it_again_and_a_rate_opens_it_too() {
        let rules = CircuitBreaker { timeout_ms: 1000, ..CircuitBreaker::default() };
        let breakers = Breakers::default();
        for n in 0..10 {
            breakers.ended("p", n % 2 == 1, &rules, 0);
        }
        assert!(!breakers.lets_through("p", &rules, 0), "half of ten calls failed");
        breakers.assigned("p", 1000);
        breakers.ended("p", true, &rules, 1000);
        assert!(!breakers.lets_through("p", &rules, 1999));
    }
}
