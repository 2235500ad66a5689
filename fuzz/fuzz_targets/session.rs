//! Fuzzes the sans-IO session of the gateway: v1 replies leave in order, no request is answered twice, nothing leaks, and
//! the session always ends. The steps are those of the gateway's property test; here coverage guides their generation.

#![no_main]

#[path = "../../crates/gateway/tests/it/simulation.rs"]
mod simulation;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use simulation::{Step, What, play};

/// Steps of one life; more only repeat what these reach.
const STEPS_MAX: usize = 128;

fuzz_target!(|input: &[u8]| {
    if let Ok(steps) = steps(&mut Unstructured::new(input)) {
        play(&steps);
    }
});

fn steps(u: &mut Unstructured<'_>) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    while !u.is_empty() && steps.len() < STEPS_MAX {
        steps.push(match u.int_in_range(0..=31)? {
            0..=9 => Step::Ask { v2: u.arbitrary::<Option<u8>>()?.map(|id| id % 6), what: what(u)? },
            10..=15 => Step::Arrive(u.arbitrary()?),
            16..=19 => Step::Read(u.int_in_range(0..=400_000)?),
            20..=22 => Step::Piece { request: u.arbitrary()?, size: size(u)? },
            23..=26 => Step::Finish { request: u.arbitrary()?, size: size(u)? },
            27 => Step::Occupy(u.arbitrary()?),
            28 => Step::Wait(u.int_in_range(0..=1_500)?),
            29 => Step::Drain,
            30 => Step::EndOfFile,
            _ => Step::Break,
        });
    }
    Ok(steps)
}

fn what(u: &mut Unstructured<'_>) -> Result<What> {
    Ok(match u.int_in_range(0..=9)? {
        0 => What::Ping,
        1 => What::Capabilities,
        2 => What::Unfit,
        _ => What::Submit { stream: u.arbitrary()?, size: size(u)? },
    })
}

/// Mostly none: large payloads are slow.
fn size(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 8)? { u.int_in_range(0..=280_000) } else { Ok(0) }
}
