//! Fuzzes IPC sessions: whatever the client and the router do, each request gets exactly one answer, in order in v1 and
//! by id in v2. The sequences are those of the gateway's property test; here coverage guides their generation.

#![no_main]

#[path = "../../crates/gateway/tests/it/script.rs"]
mod script;
#[path = "../../crates/gateway/tests/it/sequence.rs"]
mod sequence;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use script::Fate;
use sequence::{Action, End, Kind, Sequence, Unfit, What, World};
use std::cell::RefCell;
use tokio::runtime::{Builder, Runtime};

/// Sequences that one gateway serves. Then it must have released everything, and a new one replaces it.
const SERVES: u32 = 1000;

struct Stage {
    runtime: Runtime,
    world: Option<World>,
    served: u32,
}

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new(Stage {
        runtime: Builder::new_current_thread().enable_all().build().expect("cannot build a runtime"),
        world: None,
        served: 0,
    });
}

fuzz_target!(|input: &[u8]| {
    let Ok((sequence, drains)) = sequence(&mut Unstructured::new(input)) else {
        return;
    };
    STAGE.with_borrow_mut(|stage| {
        let Stage { runtime, world, served } = stage;
        runtime.block_on(async {
            let mut one = match world.take() {
                Some(world) => world,
                None => World::start().await,
            };
            one.play(&sequence).await;

            *served += 1;
            if drains || *served % SERVES == 0 {
                if !drains {
                    one.settle().await;
                }
                one.end().await;
            } else {
                *world = Some(one);
            }
        });
    });
});

fn sequence(u: &mut Unstructured<'_>) -> Result<(Sequence, bool)> {
    let end = match u.int_in_range(0..=5)? {
        0 => End::Cut,
        1 => End::Close,
        2 => End::Violation(*u.choose(&[1, 3, 4])?),
        _ => End::HalfClose,
    };
    let (reads_late, drains) = (u.arbitrary()?, u.ratio(1, 32)?);

    let mut actions = Vec::new();
    while !u.is_empty() {
        actions.push(match u.int_in_range(0..=8)? {
            0 | 1 => Action::Write { cut: u.int_in_range(0..=40)? },
            2 => Action::Release { replies: u.int_in_range(1..=4)? },
            _ => Action::Ask { v2: u.arbitrary::<Option<u8>>()?.map(|id| id % 12), what: what(u)? },
        });
    }

    if drains {
        actions.push(Action::Drain);
    }
    Ok((Sequence { actions, end, reads_late }, drains))
}

fn what(u: &mut Unstructured<'_>) -> Result<What> {
    use Kind::{Cancel, Decision, Query, Result, Stream, Subscribe};
    use Unfit::{Field, Flags, Json, ServerType, Type};
    Ok(match u.int_in_range(0..=9)? {
        0 => What::Ping,
        1 => What::Capabilities,
        2 => What::Unfit(*u.choose(&[Type, ServerType, Json, Field, Flags])?),
        _ => {
            let kind = *u.choose(&[Decision, Result, Stream, Query, Cancel, Subscribe])?;
            let fate = *u.choose(&Fate::ALL)?;
            let size = if u.ratio(1, 8)? { u.arbitrary()? } else { 0 };
            What::Task { kind, fate, chunks: u.int_in_range(0..=4)?, size }
        }
    })
}
