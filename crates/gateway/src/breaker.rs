//! The circuit breaker in front of the router: a state machine that takes the time as an argument.
//!
//! The breaker opens after several consecutive failures, or when the failure rate of recent calls is too high. It stays
//! open for a while, longer each time a probe fails. Half open, it lets a few probes through; enough successful probes
//! close it.

use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    /// Failures in a row that open the breaker.
    pub consecutive_failures: u32,
    /// Share of failed calls (0 to 1) within [`Config::window`] that opens the breaker, once the window has
    /// `min_calls`.
    pub failure_rate: f64,
    pub min_calls: u32,
    pub window: Duration,
    /// How long the breaker stays open at first; doubled after each failed probe, up to `open_for_max`.
    pub open_for: Duration,
    pub open_for_max: Duration,
    /// Half open: how many probes may be in flight at once, and how many must succeed to close the breaker.
    pub probes: u32,
    pub successes: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            failure_rate: 0.5,
            min_calls: 20,
            window: Duration::from_secs(10),
            open_for: Duration::from_millis(500),
            open_for_max: Duration::from_secs(10),
            probes: 3,
            successes: 2,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Closed,
    Open,
    HalfOpen,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The router answered, even if it rejected the request.
    Answered,
    /// No answer in time, or the router reported that it cannot work.
    Failed,
    /// No router subscribes to the subject. The bus reports it at once, and every later call would fail too.
    NoResponders,
    /// No evidence either way: the router shed load, the bus was disconnected, or the caller was cancelled.
    Neutral,
}

/// Permission for one call, whose outcome must be reported to [`Breaker::settle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Outcomes of calls that began in an earlier state are ignored.
    generation: u64,
}

#[derive(Debug)]
pub struct Breaker {
    config: Config,
    phase: Phase,
    generation: u64,
    /// How long the breaker stays open the next time.
    open_for: Duration,
}

#[derive(Debug)]
enum Phase {
    Closed { in_a_row: u32, window: Window },
    Open { until: Instant },
    HalfOpen { probing: u32, succeeded: u32 },
}

impl Breaker {
    pub fn new(config: Config) -> Self {
        let phase = Phase::Closed { in_a_row: 0, window: Window::new(config.window) };
        Self { config, phase, generation: 0, open_for: config.open_for }
    }

    pub fn state(&self) -> State {
        match self.phase {
            Phase::Closed { .. } => State::Closed,
            Phase::Open { .. } => State::Open,
            Phase::HalfOpen { .. } => State::HalfOpen,
        }
    }

    /// The state as a call would find it at `now`. Only [`Breaker::pass`] turns an open breaker half open.
    pub fn state_at(&self, now: Instant) -> State {
        match self.phase {
            Phase::Open { until } if now >= until => State::HalfOpen,
            _ => self.state(),
        }
    }

    /// How long an open breaker will refuse calls; zero unless it is open.
    pub fn time_until_half_open(&self, now: Instant) -> Duration {
        match self.phase {
            Phase::Open { until } => until.saturating_duration_since(now),
            _ => Duration::ZERO,
        }
    }

    /// Replaces the settings for later calls. The current window keeps its length until the breaker next closes.
    pub fn configure(&mut self, config: Config) {
        self.config = config;
        self.open_for = config.open_for;
    }

    /// Permits a call. The error is how long to wait before trying again.
    pub fn pass(&mut self, now: Instant) -> Result<Pass, Duration> {
        if let Phase::Open { until } = self.phase {
            if now < until {
                return Err(until - now);
            }
            self.enter(Phase::HalfOpen { probing: 0, succeeded: 0 });
        }
        if let Phase::HalfOpen { probing, .. } = &mut self.phase {
            if *probing >= self.config.probes {
                return Err(self.config.open_for);
            }
            *probing += 1;
        }
        Ok(Pass { generation: self.generation })
    }

    pub fn settle(&mut self, pass: Pass, outcome: Outcome, now: Instant) {
        if pass.generation != self.generation {
            return;
        }

        let config = self.config;
        match (&mut self.phase, outcome) {
            // Unreachable: every call that was in flight when the breaker opened has an earlier generation.
            (Phase::Open { .. }, _) => {}

            (Phase::Closed { .. }, Outcome::Neutral) => {}
            (Phase::Closed { in_a_row, window }, Outcome::Answered) => {
                *in_a_row = 0;
                window.count(false, now);
            }
            (Phase::Closed { in_a_row, window }, Outcome::Failed) => {
                *in_a_row += 1;
                window.count(true, now);
                let (calls, failed) = window.sum(now);
                let often = calls >= config.min_calls && f64::from(failed) >= config.failure_rate * f64::from(calls);
                if *in_a_row >= config.consecutive_failures || often {
                    self.open(now);
                }
            }
            // Every other call would fail too, so the breaker does not wait for more failures.
            (Phase::Closed { .. }, Outcome::NoResponders) => self.open(now),

            // Another call may take the probe's slot.
            (Phase::HalfOpen { probing, .. }, Outcome::Neutral) => *probing -= 1,
            (Phase::HalfOpen { probing, succeeded }, Outcome::Answered) => {
                *probing -= 1;
                *succeeded += 1;
                if *succeeded >= config.successes {
                    self.open_for = config.open_for;
                    self.enter(Phase::Closed { in_a_row: 0, window: Window::new(config.window) });
                }
            }
            // One failed probe reopens the breaker.
            (Phase::HalfOpen { .. }, Outcome::Failed | Outcome::NoResponders) => self.open(now),
        }
    }

    fn open(&mut self, now: Instant) {
        let until = now + self.open_for;
        self.open_for = (self.open_for * 2).min(self.config.open_for_max);
        self.enter(Phase::Open { until });
    }

    fn enter(&mut self, phase: Phase) {
        self.generation += 1;
        self.phase = phase;
    }
}

const BUCKETS: usize = 10;

/// Calls and failures in a sliding window, which advances in steps of a tenth of its length.
#[derive(Debug)]
struct Window {
    step: Duration,
    began: Option<Instant>,
    /// The number of the newest step. A step's calls and failures are in the bucket with index number modulo
    /// [`BUCKETS`].
    newest: u64,
    buckets: [(u32, u32); BUCKETS],
}

impl Window {
    fn new(length: Duration) -> Self {
        let step = (length / BUCKETS as u32).max(Duration::from_millis(1));
        Self { step, began: None, newest: 0, buckets: [(0, 0); BUCKETS] }
    }

    fn count(&mut self, failed: bool, now: Instant) {
        self.advance(now);
        let (calls, failures) = &mut self.buckets[self.newest as usize % BUCKETS];
        *calls += 1;
        *failures += u32::from(failed);
    }

    fn sum(&mut self, now: Instant) -> (u32, u32) {
        self.advance(now);
        self.buckets
            .iter()
            .fold((0, 0), |(calls, failed), bucket| (calls + bucket.0, failed + bucket.1))
    }

    fn advance(&mut self, now: Instant) {
        let began = *self.began.get_or_insert(now);
        let number = (now.saturating_duration_since(began).as_nanos() / self.step.as_nanos()) as u64;
        // However many steps have passed, each bucket is cleared at most once.
        let passed = number.saturating_sub(self.newest).min(BUCKETS as u64);
        for step in 0..passed {
            self.buckets[(number - step) as usize % BUCKETS] = (0, 0);
        }
        self.newest = self.newest.max(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn breaker() -> (Breaker, Instant) {
        (Breaker::new(Config::default()), Instant::now())
    }

    fn call(breaker: &mut Breaker, outcome: Outcome, now: Instant) {
        let pass = breaker.pass(now).expect("the breaker permits the call");
        breaker.settle(pass, outcome, now);
    }

    #[test]
    fn failures_in_a_row_open_the_breaker_and_probes_close_it() {
        let (mut breaker, now) = breaker();

        for _ in 0..4 {
            call(&mut breaker, Outcome::Failed, now);
        }
        call(&mut breaker, Outcome::Answered, now);

        for _ in 0..4 {
            call(&mut breaker, Outcome::Failed, now);
            assert_eq!(breaker.state(), State::Closed);
        }
        call(&mut breaker, Outcome::Failed, now);
        assert_eq!(breaker.state(), State::Open);
        assert_eq!(breaker.pass(now), Err(Duration::from_millis(500)));

        let later = now + Duration::from_millis(500);
        call(&mut breaker, Outcome::Answered, later);
        assert_eq!(breaker.state(), State::HalfOpen);
        call(&mut breaker, Outcome::Answered, later);
        assert_eq!(breaker.state(), State::Closed);
    }

    #[test]
    fn open_breaker_reports_half_open_after_its_open_time() {
        let (mut breaker, now) = breaker();
        call(&mut breaker, Outcome::NoResponders, now);
        assert_eq!(breaker.state_at(now + Duration::from_millis(499)), State::Open);
        assert_eq!(breaker.state_at(now + Duration::from_millis(500)), State::HalfOpen);
    }

    #[test]
    fn new_settings_apply_to_the_next_call() {
        let (mut breaker, now) = breaker();
        call(&mut breaker, Outcome::Failed, now);
        breaker.configure(Config { consecutive_failures: 2, ..Config::default() });
        call(&mut breaker, Outcome::Failed, now);
        assert_eq!(breaker.state(), State::Open);
    }

    #[test]
    fn no_responders_opens_the_breaker_at_once() {
        let (mut breaker, now) = breaker();
        call(&mut breaker, Outcome::NoResponders, now);
        assert_eq!(breaker.state(), State::Open);
    }

    #[test]
    fn failure_rate_opens_the_breaker_once_there_are_enough_calls() {
        let (mut breaker, start) = breaker();
        for n in 0..19u32 {
            let outcome = if n % 2 == 0 { Outcome::Failed } else { Outcome::Answered };
            call(&mut breaker, outcome, start + Duration::from_millis(100) * n);
            assert_eq!(breaker.state(), State::Closed, "call {n}");
        }
        call(&mut breaker, Outcome::Failed, start + Duration::from_millis(1900));
        assert_eq!(breaker.state(), State::Open);
    }

    #[test]
    fn failures_outside_the_window_do_not_count() {
        let (mut breaker, start) = breaker();
        for round in 0..10u32 {
            for n in 0..16 {
                let outcome = if n % 2 == 0 { Outcome::Failed } else { Outcome::Answered };
                call(&mut breaker, outcome, start + Duration::from_secs(11) * round);
            }
        }
        assert_eq!(breaker.state(), State::Closed);
    }

    #[test]
    fn load_shed_by_the_router_does_not_use_up_probes() {
        let (mut breaker, now) = breaker();
        call(&mut breaker, Outcome::NoResponders, now);
        let later = now + Duration::from_secs(1);
        for _ in 0..100 {
            call(&mut breaker, Outcome::Neutral, later);
        }
        assert_eq!(breaker.state(), State::HalfOpen);
    }

    #[test]
    fn probes_are_bounded_and_each_failed_probe_doubles_the_wait() {
        let (mut breaker, mut now) = breaker();
        call(&mut breaker, Outcome::NoResponders, now);
        for wait in [1000, 2000, 4000, 8000, 10_000, 10_000] {
            now += breaker.pass(now).unwrap_err();
            let probes: Vec<Pass> = (0..3).map(|_| breaker.pass(now).unwrap()).collect();
            assert!(breaker.pass(now).is_err(), "a fourth probe is not permitted");
            breaker.settle(probes[0], Outcome::Failed, now);
            // The remaining probes belong to an earlier generation, so their outcomes are ignored.
            breaker.settle(probes[1], Outcome::Answered, now);
            breaker.settle(probes[2], Outcome::Answered, now);
            assert_eq!(breaker.pass(now), Err(Duration::from_millis(wait)));
        }
    }

    /// A reference model of the breaker that remembers every call.
    struct Model {
        calls: Vec<(Instant, bool)>,
        in_a_row: u32,
    }

    proptest! {
        /// A closed breaker opens exactly when the failure rate over all remembered calls requires it.
        #[test]
        fn closed_breaker_opens_exactly_when_the_reference_model_does(
            steps in prop::collection::vec((0..1500u64, 0..10u8), 1..300),
        ) {
            let config = Config { consecutive_failures: 1000, ..Config::default() };
            let start = Instant::now();
            let (mut breaker, mut now) = (Breaker::new(config), start);
            let mut model = Model { calls: Vec::new(), in_a_row: 0 };
            for (ms, kind) in steps {
                now += Duration::from_millis(ms);
                let failed = kind < 4;
                call(&mut breaker, if failed { Outcome::Failed } else { Outcome::Answered }, now);
                model.calls.push((now, failed));
                model.in_a_row = if failed { model.in_a_row + 1 } else { 0 };

                // Steps are tenths of the window, counted from the first call.
                let began = model.calls[0].0;
                let step = |at: Instant| (at - began).as_millis() / 1000;
                let recent = model.calls.iter().filter(|(at, _)| step(*at) + 10 > step(now));
                let recent: Vec<bool> = recent.map(|(_, failed)| *failed).collect();
                let failures = recent.iter().filter(|failed| **failed).count();
                let opens = failed && recent.len() >= 20 && failures * 2 >= recent.len();

                prop_assert_eq!(breaker.state() == State::Open, opens);
                if opens {
                    return Ok(());
                }
            }
        }

        /// Probes stay bounded, and the breaker never stays open longer than its maximum.
        #[test]
        fn bounds_hold_for_any_sequence_of_calls(steps in prop::collection::vec((0..3000u64, 0..6u8), 1..400)) {
            let mut breaker = Breaker::new(Config::default());
            let mut now = Instant::now();
            let mut passes = Vec::new();
            for (ms, action) in steps {
                now += Duration::from_millis(ms);
                match action {
                    0 | 1 => match breaker.pass(now) {
                        Ok(pass) => passes.push(pass),
                        Err(wait) => prop_assert!(wait <= Config::default().open_for_max),
                    },
                    action => if let Some(pass) = passes.pop() {
                        let outcomes = [Outcome::Answered, Outcome::Failed, Outcome::NoResponders, Outcome::Neutral];
                        let outcome = outcomes[usize::from(action) - 2];
                        breaker.settle(pass, outcome, now);
                    },
                }

                if let Phase::HalfOpen { probing, succeeded } = breaker.phase {
                    prop_assert!(probing <= 3 && succeeded < 2);
                }
            }
        }
    }
}
