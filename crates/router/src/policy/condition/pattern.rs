//! Patterns of `matches()`, in time bounded by the steps charged. Each byte of a text is read once, by an automaton
//! whose states are built as texts need them. A text that needs too many states, which `(a|b)*a(a|b){30}` can cause,
//! has no result.

use super::meter::{Meter, Stop};
use parking_lot::Mutex;
use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::nfa::thompson;
use regex_automata::{Input, MatchErrorKind};
use std::error::Error;

/// Bytes of a compiled pattern. A class such as `\w` has about 100,000 in Unicode.
const SIZE_MAX: usize = 1024 * 1024;
/// Bytes of states that a pattern keeps from one text to the next.
const STATES_MAX: usize = 128 * 1024;
/// Bytes of text read, and bytes of states built, that count as one step.
const TEXT_STEP: usize = 16;
const STATES_STEP: usize = 16;

pub struct Pattern {
    automaton: DFA,
    cache: Mutex<Cache>,
}

impl Pattern {
    pub fn compile(pattern: &str) -> Result<Self, String> {
        let config = DFA::config()
            .cache_capacity(STATES_MAX)
            .skip_cache_capacity_check(true)
            // Give up when the cache is full, instead of starting over.
            .minimum_cache_clear_count(Some(0))
            .unicode_word_boundary(true);

        let limits = thompson::Config::new().nfa_size_limit(Some(SIZE_MAX));
        let automaton = DFA::builder()
            .configure(config)
            .thompson(limits)
            .build(pattern)
            .map_err(|error| {
                // The innermost cause says where the pattern does not parse, or that it is too large.
                let mut cause: &dyn Error = &error;
                while let Some(deeper) = cause.source() {
                    cause = deeper;
                }
                format!("the pattern {pattern:?} cannot be used: {cause}")
            })?;
        let cache = Mutex::new(automaton.create_cache());
        Ok(Self { automaton, cache })
    }

    pub fn is_match(&self, text: &str, meter: &mut Meter) -> Result<bool, Stop> {
        meter.charge(1 + (text.len() / TEXT_STEP) as u64)?;
        let mut cache = self.cache.lock();

        // Earlier texts may have filled the cache, so a second attempt starts with an empty one.
        for _ in 0..2 {
            let before = cache.memory_usage();
            let found = self
                .automaton
                .try_search_fwd(&mut cache, &Input::new(text).earliest(true));
            let built = cache.memory_usage().saturating_sub(before);
            let charged = meter.charge((built / STATES_STEP) as u64);
            match found.as_ref().map_err(|error| error.kind()) {
                Ok(found) => return charged.map(|()| found.is_some()),
                Err(MatchErrorKind::GaveUp { .. }) => cache.reset(&self.automaton),
                Err(_) => return Err(Stop::Failed("\\b in a pattern takes ASCII texts only; write (?-u:\\b)".into())),
            }
            charged?;
        }
        Err(Stop::Spent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Matches with a budget of steps.
    fn matches(pattern: &str, text: &str, steps: u64) -> Result<bool, Stop> {
        Pattern::compile(pattern)
            .unwrap_or_else(|e| panic!("{e}"))
            .is_match(text, &mut Meter { left: steps })
    }

    #[test]
    fn patterns_match() {
        for (pattern, text, expected) in [
            ("^r.*t$", "rust", true),
            ("us", "rust", true),
            ("^us", "rust", false),
            (r"\d{3}-\d{4}", "call 555-1234 now", true),
            (r"(?i)größe", "GRÖSSE oder GRÖßE", true),
            (r"^\w+@\w+\.(com|org)$", "ann@example.org", true),
            (r"(?i)\bword\b", "some Word here", true),
            (r"(?-u:\b)word(?-u:\b)", "é word é", true),
            ("", "", true),
        ] {
            assert_eq!(matches(pattern, text, 20_000), Ok(expected), "{pattern} {text}");
        }
        assert!(matches!(matches(r"\bword\b", "é word", 20_000), Err(Stop::Failed(_))));
        for bad in ["(", r"(?:\w{100}){1000}"] {
            let error = Pattern::compile(bad).err().unwrap();
            assert!(error.contains("cannot be used"), "{error}");
        }
    }

    #[test]
    fn text_that_needs_too_many_states_spends_all_steps() {
        let mut seed = 1_u64;
        let letters = std::iter::repeat_with(|| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            if seed >> 63 == 1 { 'a' } else { 'b' }
        });
        let text: String = letters.take(100_000).collect();
        let pattern = Pattern::compile("(a|b)*a(a|b){30}c").unwrap();
        let mut meter = Meter { left: u64::MAX };
        assert_eq!(pattern.is_match(&text, &mut meter), Err(Stop::Spent));
        let steps = u64::MAX - meter.left;
        let most = (text.len() / TEXT_STEP + 2 * STATES_MAX / STATES_STEP + 2) as u64;
        assert!(steps <= most, "{steps} of {most}");

        // The next text is not affected, and states that are built already cost nothing.
        let mut meter = Meter { left: 1000 };
        assert_eq!(pattern.is_match("ac", &mut meter), Ok(false));
        let first = meter.left;
        assert_eq!(pattern.is_match("ac", &mut meter), Ok(false));
        assert_eq!(first - meter.left, 1);
    }
}
