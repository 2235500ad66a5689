//! One circuit breaker as a state machine. Sans-IO: time is an argument.
//!
//! A closed breaker trips after too many failures in a row, or when their share of the last calls is too high. It stays
//! open for the timeout, then becomes half open: a few calls, the probes, hold a place each. Enough successful probes
//! close the breaker; one failed probe trips it again.
//!
//! The generation counts the trips. A call remembers the generation at which it was let through, which tells the
//! outcome of a probe from that of a call from before the trip. Within a generation a breaker only moves from open
//! through half open to closed, so of two routers' views the one with the greater (generation, state) is newer.

use std::collections::{HashMap, VecDeque};
use wire::policy::CircuitBreaker;

/// The number of latest outcomes that the failure rate covers, unless `min_calls` is larger.
const WINDOW: usize = 50;

/// In the order of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    Open,
    HalfOpen,
    Closed,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::HalfOpen => "half_open",
            Self::Closed => "closed",
        }
    }
}

/// What the end of a call means for the breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Success,
    Failure,
    /// The outcome says nothing about the provider; the call only returns its place.
    Neutral,
}

/// A breaker as other routers see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    pub generation: u64,
    pub state: State,
    /// How long an open breaker stays open.
    pub open_ms: u64,
    /// Failures of a closed breaker among its last `calls` calls.
    pub failures: u64,
    pub calls: u64,
}

#[derive(Debug, Default)]
pub struct Breaker {
    phase: Phase,
    generation: u64,
}

#[derive(Debug)]
enum Phase {
    Closed {
        in_a_row: u32,
        /// Newest last; `true` is a failure.
        window: VecDeque<bool>,
    },
    Open {
        until_ms: u64,
    },
    HalfOpen {
        /// The holders of places, and when each place expires.
        places: HashMap<String, u64>,
        successes: u32,
    },
}

impl Default for Phase {
    fn default() -> Self {
        Self::Closed { in_a_row: 0, window: VecDeque::new() }
    }
}

impl Breaker {
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Closed { .. } => State::Closed,
            Phase::Open { .. } => State::Open,
            Phase::HalfOpen { .. } => State::HalfOpen,
        }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether [`Breaker::enter`] would let a call through.
    pub fn lets_through(&self, rules: &CircuitBreaker, now_ms: u64) -> bool {
        match &self.phase {
            Phase::Closed { .. } => true,
            Phase::Open { until_ms } => now_ms >= *until_ms,
            Phase::HalfOpen { places, .. } => {
                let held = places.values().filter(|due_ms| now_ms < **due_ms).count();
                held < rules.half_open_max_calls as usize
            }
        }
    }

    /// Lets a call through if it may. In a half-open breaker the call then holds a place until it leaves, ends or
    /// expires.
    pub fn enter(&mut self, holder: &str, rules: &CircuitBreaker, now_ms: u64) -> bool {
        if !self.lets_through(rules, now_ms) {
            return false;
        }

        if let Phase::Open { .. } = self.phase {
            self.phase = Phase::HalfOpen { places: HashMap::new(), successes: 0 };
        }
        if let Phase::HalfOpen { places, .. } = &mut self.phase {
            places.retain(|_, due_ms| now_ms < *due_ms);
            places.insert(holder.into(), u64::MAX);
        }
        true
    }

    /// Lets the holder's place expire at `due_ms`.
    pub fn keep(&mut self, holder: &str, due_ms: u64) {
        if let Phase::HalfOpen { places, .. } = &mut self.phase
            && let Some(due) = places.get_mut(holder)
        {
            *due = due_ms;
        }
    }

    /// Returns the holder's place, if it has one.
    pub fn leave(&mut self, holder: &str) {
        if let Phase::HalfOpen { places, .. } = &mut self.phase {
            places.remove(holder);
        }
    }

    /// A call that was let through at `generation` has ended.
    pub fn ended(&mut self, holder: &str, generation: u64, outcome: Outcome, rules: &CircuitBreaker, now_ms: u64) {
        self.leave(holder);
        let failed = match outcome {
            Outcome::Success => false,
            Outcome::Failure => true,
            Outcome::Neutral => return,
        };

        // The generation of an open breaker lets only probes through, so another router has half opened it.
        if matches!(self.phase, Phase::Open { .. }) && generation == self.generation {
            self.phase = Phase::HalfOpen { places: HashMap::new(), successes: 0 };
        }

        match &mut self.phase {
            Phase::Closed { in_a_row, window } if generation >= self.generation => {
                *in_a_row = if failed { *in_a_row + 1 } else { 0 };
                window.push_back(failed);
                while window.len() > WINDOW.max(rules.min_calls as usize) {
                    window.pop_front();
                }
                if *in_a_row >= rules.failure_threshold || too_often(window, rules) {
                    self.trip(rules, now_ms);
                }
            }
            Phase::HalfOpen { .. } if generation == self.generation && failed => self.trip(rules, now_ms),
            Phase::HalfOpen { successes, .. } if generation == self.generation => {
                *successes += 1;
                if *successes >= rules.success_threshold {
                    self.phase = Phase::default();
                }
            }
            // A call from before the trip, or of a generation that this router does not know yet.
            _ => {}
        }
    }

    pub fn view(&self, now_ms: u64) -> View {
        let (open_ms, failures, calls) = match &self.phase {
            Phase::Closed { window, .. } => (0, window.iter().filter(|failed| **failed).count(), window.len()),
            Phase::Open { until_ms } => (until_ms.saturating_sub(now_ms), 0, 0),
            Phase::HalfOpen { .. } => (0, 0, 0),
        };

        View {
            generation: self.generation,
            state: self.state(),
            open_ms,
            failures: failures as u64,
            calls: calls as u64,
        }
    }

    /// Adopts another router's view if it is newer.
    pub fn adopt(&mut self, theirs: &View, rules: &CircuitBreaker, now_ms: u64) {
        if (theirs.generation, theirs.state) <= (self.generation, self.state()) {
            return;
        }

        self.generation = theirs.generation;
        self.phase = match theirs.state {
            State::Open => Phase::Open { until_ms: now_ms + theirs.open_ms.min(rules.timeout_ms) },
            State::HalfOpen => Phase::HalfOpen { places: HashMap::new(), successes: 0 },
            State::Closed => Phase::default(),
        };
    }

    fn trip(&mut self, rules: &CircuitBreaker, now_ms: u64) {
        self.generation = self.generation.saturating_add(1);
        self.phase = Phase::Open { until_ms: now_ms + rules.timeout_ms };
    }
}

fn too_often(window: &VecDeque<bool>, rules: &CircuitBreaker) -> bool {
    let failures = window.iter().filter(|failed| **failed).count();
    window.len() >= rules.min_calls as usize && failures as f64 >= rules.error_rate_threshold * window.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RULES: CircuitBreaker = CircuitBreaker {
        failure_threshold: 3,
        error_rate_threshold: 0.5,
        min_calls: 10,
        timeout_ms: 1000,
        half_open_max_calls: 3,
        success_threshold: 2,
    };

    /// Ends a call that was let through just now.
    fn end(breaker: &mut Breaker, outcome: Outcome, now_ms: u64) {
        breaker.ended("a", breaker.generation(), outcome, &RULES, now_ms);
    }

    fn tripped() -> Breaker {
        let mut breaker = Breaker::default();
        (0..3).for_each(|_| end(&mut breaker, Outcome::Failure, 0));
        assert_eq!((breaker.state(), breaker.generation()), (State::Open, 1));
        breaker
    }

    #[test]
    fn breaker_opens_probes_and_closes() {
        let mut breaker = tripped();
        assert!(!breaker.enter("early", &RULES, 999));
        for holder in ["a", "b", "c"] {
            assert!(breaker.enter(holder, &RULES, 1000), "{holder}");
        }
        assert!(!breaker.enter("d", &RULES, 1999), "three places are taken");

        breaker.ended("a", 1, Outcome::Success, &RULES, 1001);
        assert_eq!(breaker.state(), State::HalfOpen, "one of two successes needed");
        breaker.ended("b", 1, Outcome::Success, &RULES, 1001);
        assert_eq!((breaker.state(), breaker.generation()), (State::Closed, 1));
    }

    #[test]
    fn failure_rate_trips_and_failed_probe_trips_again() {
        let mut breaker = Breaker::default();
        for n in 0..10 {
            end(&mut breaker, if n % 2 == 1 { Outcome::Failure } else { Outcome::Success }, 0);
        }
        assert_eq!(breaker.state(), State::Open, "half of ten calls failed");
        assert!(breaker.enter("a", &RULES, 1000));
        breaker.ended("a", 1, Outcome::Failure, &RULES, 1000);
        assert_eq!((breaker.state(), breaker.generation()), (State::Open, 2));
        assert!(!breaker.lets_through(&RULES, 1999));
    }

    #[test]
    fn place_is_returned_by_neutral_outcome_by_leaving_and_by_expiry() {
        let mut breaker = tripped();
        for holder in ["a", "b", "c"] {
            assert!(breaker.enter(holder, &RULES, 1000));
        }
        breaker.ended("a", 1, Outcome::Neutral, &RULES, 1001);
        assert!(breaker.enter("d", &RULES, 1001), "a neutral outcome returned the place");
        breaker.leave("b");
        assert!(breaker.enter("e", &RULES, 1001), "leaving returned the place");
        breaker.keep("c", 1500);
        assert!(!breaker.enter("f", &RULES, 1499));
        assert!(breaker.enter("f", &RULES, 1500), "the place has expired");
        assert!(!breaker.enter("g", &RULES, 9999), "a place without a deadline does not expire");
    }

    #[test]
    fn outcomes_from_before_the_trip_do_not_count_as_probes() {
        let mut breaker = tripped();
        assert!(breaker.enter("probe", &RULES, 1000));
        for _ in 0..10 {
            breaker.ended("late", 0, Outcome::Success, &RULES, 1001);
            breaker.ended("late", 0, Outcome::Failure, &RULES, 1001);
        }
        assert_eq!((breaker.state(), breaker.generation()), (State::HalfOpen, 1));

        let mut open = tripped();
        open.ended("late", 0, Outcome::Success, &RULES, 1);
        assert_eq!(open.state(), State::Open);
        open.ended("theirs", 1, Outcome::Success, &RULES, 1001);
        assert_eq!(open.state(), State::HalfOpen, "another router has half opened it");
    }

    #[test]
    fn newer_view_is_adopted_with_relative_times() {
        let mut late = Breaker::default();
        late.adopt(&tripped().view(400), &RULES, 50_000);
        assert!(!late.lets_through(&RULES, 50_599));
        assert!(late.lets_through(&RULES, 50_600));

        let view = |generation, state| View { generation, state, open_ms: 500, failures: 0, calls: 0 };
        for (theirs, expected) in [
            (view(0, State::Closed), State::Open),
            (view(1, State::Open), State::Open),
            (view(1, State::HalfOpen), State::HalfOpen),
            (view(1, State::Closed), State::Closed),
            (view(2, State::Open), State::Open),
        ] {
            let mut ours = tripped();
            ours.adopt(&theirs, &RULES, 0);
            assert_eq!(ours.state(), expected, "{theirs:?}");
            assert_eq!(ours.generation(), theirs.generation.max(1));
        }
    }

    /// A call that a test has in flight.
    #[derive(Debug, Clone)]
    struct Call {
        holder: String,
        generation: u64,
        due_ms: u64,
        /// It was let through by a half-open breaker.
        probe: bool,
    }

    /// A plain model of a half-open breaker: it counts the probes in flight.
    fn held(calls: &[Call], breaker: &Breaker, now_ms: u64) -> usize {
        let ours = |call: &&Call| call.probe && call.generation == breaker.generation() && now_ms < call.due_ms;
        calls.iter().filter(ours).count()
    }

    proptest! {
        /// In any order of events, a half-open breaker holds exactly the places of the probes in flight, never more
        /// than allowed. It closes after enough successful probes and trips at the first failed one.
        #[test]
        fn places_never_leak(steps in prop::collection::vec((0..400u64, 0..10u8, any::<prop::sample::Index>()), 1..400)) {
            let (mut breaker, mut now_ms) = (Breaker::default(), 0);
            let (mut calls, mut successes) = (Vec::<Call>::new(), 0);
            for (n, (ms, action, which)) in steps.into_iter().enumerate() {
                now_ms += ms;
                let before = (breaker.generation(), breaker.state());
                match action {
                    0..=3 => {
                        let holder = format!("c{n}");
                        let room = held(&calls, &breaker, now_ms) < 3;
                        let open = before.1 == State::Open;
                        let entered = breaker.enter(&holder, &RULES, now_ms);
                        match breaker.state() {
                            State::Closed => prop_assert!(entered),
                            State::Open => prop_assert!(!entered),
                            State::HalfOpen => prop_assert_eq!(entered, open || room),
                        }
                        if open && entered {
                            successes = 0;
                        }
                        if entered {
                            let due_ms = now_ms + 700;
                            breaker.keep(&holder, due_ms);
                            let probe = breaker.state() == State::HalfOpen;
                            calls.push(Call { holder, generation: breaker.generation(), due_ms, probe });
                        }
                    }
                    4 if !calls.is_empty() => breaker.leave(&calls.remove(which.index(calls.len())).holder),
                    4 => {}
                    action if !calls.is_empty() => {
                        let call = calls.remove(which.index(calls.len()));
                        let outcome = match action {
                            5 | 6 => Outcome::Success,
                            7 | 8 => Outcome::Failure,
                            _ => Outcome::Neutral,
                        };
                        breaker.ended(&call.holder, call.generation, outcome, &RULES, now_ms);
                        let current = call.generation == before.0;
                        if before.1 == State::HalfOpen && current {
                            successes += u32::from(outcome == Outcome::Success);
                            let expected = match outcome {
                                Outcome::Failure => (before.0 + 1, State::Open),
                                _ if successes >= 2 => (before.0, State::Closed),
                                _ => before,
                            };
                            prop_assert_eq!((breaker.generation(), breaker.state()), expected);
                        } else if !current {
                            prop_assert_eq!((breaker.generation(), breaker.state()), before, "an older call changes nothing");
                        }
                    }
                    _ => {}
                }
                if let Phase::HalfOpen { places, .. } = &breaker.phase {
                    let live = places.values().filter(|due_ms| now_ms < **due_ms).count();
                    prop_assert_eq!(live, held(&calls, &breaker, now_ms));
                    prop_assert!(places.len() <= 3);
                }
            }
        }
    }
}
