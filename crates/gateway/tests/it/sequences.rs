//! Random sequences, each played against a real gateway. A failing sequence is shrunk and printed; it becomes a case
//! here.

use crate::script::Fate;
use crate::sequence::{Action, End, Kind, Sequence, Unfit, What, World};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};
use std::panic::AssertUnwindSafe;
use tokio::runtime::Runtime;

const CASES: u32 = 200;
const CASES_WITH_DRAIN: u32 = 40;

fn what() -> impl Strategy<Value = What> {
    use Kind::{Cancel, Decision, Query, Result, Stream, Subscribe};
    let kind = prop::sample::select(vec![Decision, Result, Stream, Query, Cancel, Subscribe]);
    let fate = prop::sample::select(Fate::ALL.to_vec());
    let size = prop_oneof![8 => Just(0), 1 => 15_000..17_000_u16, 1 => 60_000..u16::MAX];
    let unfit = prop::sample::select(vec![Unfit::Type, Unfit::ServerType, Unfit::Json, Unfit::Field, Unfit::Flags]);
    prop_oneof![
        2 => Just(What::Ping),
        1 => Just(What::Capabilities),
        10 => (kind, fate, 0..4_u8, size)
            .prop_map(|(kind, fate, chunks, size)| What::Task { kind, fate, chunks, size }),
        2 => unfit.prop_map(What::Unfit),
    ]
}

fn sequence(drains: bool) -> impl Strategy<Value = Sequence> {
    let action = prop_oneof![
        12 => (prop::option::of(0..12_u8), what()).prop_map(|(v2, what)| Action::Ask { v2, what }),
        4 => (0..9_u8).prop_map(|cut| Action::Write { cut }),
        2 => (1..4_u8).prop_map(|replies| Action::Release { replies }),
    ];
    let end = prop_oneof![
        4 => Just(End::HalfClose),
        1 => Just(End::Cut),
        2 => Just(End::Close),
        2 => prop::sample::select(vec![1, 3, 4]).prop_map(End::Violation),
    ];

    let actions = prop::collection::vec(action, 0..30);
    (actions, end, any::<bool>(), any::<prop::sample::Index>()).prop_map(move |(mut actions, end, reads_late, at)| {
        if drains {
            let at = at.index(actions.len() + 1);
            actions.splice(at..at, [Action::Write { cut: 0 }, Action::Drain]);
        }
        Sequence { actions, end, reads_late }
    })
}

/// Turns a panic into a failure that proptest can shrink.
fn caught(play: impl FnOnce()) -> Result<(), TestCaseError> {
    std::panic::catch_unwind(AssertUnwindSafe(play)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        TestCaseError::fail(
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()))
                .unwrap_or_default(),
        )
    })
}

fn check(cases: u32, strategy: impl Strategy<Value = Sequence>, play: impl Fn(Sequence)) {
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_time: 60_000,
        ..ProptestConfig::default()
    };
    if let Err(failed) = TestRunner::new(config).run(&strategy, |sequence| caught(|| play(sequence))) {
        panic!("{failed}");
    }
}

#[test]
fn each_request_has_one_answer_and_nothing_is_left_in_flight() {
    let runtime = Runtime::new().unwrap();
    let world = std::cell::RefCell::new(runtime.block_on(World::start()));
    check(CASES, sequence(false), |sequence| runtime.block_on(world.borrow_mut().play(&sequence)));

    let world = world.into_inner();
    runtime.block_on(world.settle());
    runtime.block_on(world.end());
}

#[test]
fn admitted_requests_are_answered_while_the_gateway_drains() {
    let runtime = Runtime::new().unwrap();
    check(CASES_WITH_DRAIN, sequence(true), |sequence| {
        runtime.block_on(async {
            let mut world = World::start().await;
            world.play(&sequence).await;
            world.end().await;
        });
    });
}
