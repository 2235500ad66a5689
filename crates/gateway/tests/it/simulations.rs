//! Random simulations of the session. A failing one is shrunk and printed; it becomes a case here.

use crate::simulation::{Step, What, play};
use proptest::prelude::*;

fn what() -> impl Strategy<Value = What> {
    let size = prop_oneof![4 => Just(0), 1 => 15_000..90_000_u32];
    prop_oneof![
        2 => Just(What::Ping),
        1 => Just(What::Capabilities),
        1 => Just(What::Unfit),
        8 => (any::<bool>(), size).prop_map(|(stream, size)| What::Submit { stream, size }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let size = || prop_oneof![3 => Just(0), 1 => 5_000..50_000_u32, 1 => Just(280_000_u32)];
    prop_oneof![
        12 => (prop::option::of(0..6_u8), what()).prop_map(|(v2, what)| Step::Ask { v2, what }),
        8 => prop_oneof![0..40_u16, Just(u16::MAX)].prop_map(Step::Arrive),
        4 => prop_oneof![0..400_u32, Just(100_000), Just(u32::MAX)].prop_map(Step::Read),
        4 => (any::<u8>(), size()).prop_map(|(request, size)| Step::Piece { request, size }),
        6 => (any::<u8>(), size()).prop_map(|(request, size)| Step::Finish { request, size }),
        1 => any::<bool>().prop_map(Step::Occupy),
        2 => (0..1_500_u16).prop_map(Step::Wait),
    ]
}

/// Random steps, with the steps that happen at most once inserted at random positions or not at all.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = || prop::option::weighted(0.4, any::<prop::sample::Index>());
    (prop::collection::vec(step(), 0..80), at(), at(), at()).prop_map(|(mut steps, drain, end, broken)| {
        for (step, at) in [(Step::Drain, drain), (Step::EndOfFile, end), (Step::Break, broken)] {
            if let Some(at) = at {
                steps.insert(at.index(steps.len() + 1), step);
            }
        }
        steps
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// v1 replies are sent in order, no request is answered twice, every started request is answered unless its client
    /// stops reading, nothing leaks, and the session always ends.
    #[test]
    fn session_answers_each_request_once_and_always_ends(steps in steps()) {
        play(&steps);
    }
}
