//! Watches how full the streams and buckets are. New tasks are refused while accepted ones could lack room for their
//! results, usage or records; everything else is only measured and reported.

use crate::Router;
use bus::Fill;
use bus::clock::unix_ms;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::router::{ErrorBody, RouterCode};
use wire::subjects::{
    BUCKET_KEYS, BUCKET_POLICIES, BUCKET_TASKS, STREAM_ASSIGN, STREAM_DLQ, STREAM_RESULT, STREAM_UNREADABLE,
    STREAM_USAGE,
};

const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// When a refused client should try again.
const RETRY_AFTER_S: u64 = 5;
/// Shares of a store's size, in percent: where a level begins, and where it ends. They differ, so that a level does not
/// flap.
const NEAR: Bounds = Bounds { begins: 80, ends: 70 };
const FULL: Bounds = Bounds { begins: 90, ends: 80 };
/// Entries that a task has in the bucket of tasks at most: its record, and the note of its assignment, which only tasks
/// on the common subject have.
const ENTRIES_OF_TASK: u64 = 2;
/// What a message counts before any was seen, in bytes.
const BYTES_ASSUMED: u64 = 1024;

struct Bounds {
    begins: u64,
    ends: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    #[default]
    Low,
    Near,
    Full,
}

/// What a full store does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Limit {
    /// New tasks are refused.
    Refuses,
    /// New requests with an idempotency key are refused: forgetting an older key could run its task twice.
    RefusesKeys,
    /// The oldest of what it holds is evicted.
    Evicts,
}

/// How much of a limit is used, counting what accepted tasks will still need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Load {
    store: &'static str,
    limit: Limit,
    used: u64,
    max: u64,
}

/// The levels that [`run`] judges; everything else only reads them.
#[derive(Default)]
pub struct Stores {
    watched: Mutex<Watched>,
}

#[derive(Default)]
struct Watched {
    levels: BTreeMap<(&'static str, Limit), Level>,
    /// Mean size of a store's messages, as long as it held any.
    means: BTreeMap<&'static str, u64>,
    /// Number of the first message of each store that evicts.
    firsts: BTreeMap<&'static str, u64>,
}

impl Stores {
    /// Why a new task is refused now; `None` if it is accepted.
    pub fn refusal(&self) -> Option<ErrorBody> {
        let full = self.full(Limit::Refuses);
        (!full.is_empty()).then(|| {
            let text = format!("no new tasks: {}", full.join("; "));
            ErrorBody::new(RouterCode::Backpressure, text).retry_after(RETRY_AFTER_S)
        })
    }

    /// Why a new idempotency key is refused now; `None` if it is accepted.
    pub fn key_refusal(&self) -> Option<ErrorBody> {
        let full = self.full(Limit::RefusesKeys);
        (!full.is_empty()).then(|| no_room_for_keys(&full.join("; ")))
    }

    /// What to say about full stores in a readiness report; `None` if there is nothing to say. Full stores are no reason
    /// to send requests elsewhere, because all routers share them.
    pub fn report(&self) -> Option<String> {
        let full = self.full(Limit::Refuses);
        (!full.is_empty()).then(|| format!("new tasks are refused: {}", full.join("; ")))
    }

    fn full(&self, limit: Limit) -> Vec<String> {
        let watched = self.watched.lock();
        let full = watched
            .levels
            .iter()
            .filter(|((_, kind), level)| *kind == limit && **level == Level::Full);
        full.map(|((store, _), _)| format!("{store} is full, {}", advice(store)))
            .collect()
    }
}

/// The error for an assignment that its stream had no room for.
pub fn no_room(error: &bus::Error) -> ErrorBody {
    let text = format!("no new tasks: {STREAM_ASSIGN} is full ({error}), {}", advice(STREAM_ASSIGN));
    ErrorBody::new(RouterCode::Backpressure, text).retry_after(RETRY_AFTER_S)
}

/// The error for an idempotency key that its bucket has no room for.
pub fn no_room_for_keys(why: &str) -> ErrorBody {
    let text = format!("no new idempotency keys: {why}");
    ErrorBody::new(RouterCode::Backpressure, text).retry_after(RETRY_AFTER_S)
}

/// What to do about a store that refuses new tasks.
fn advice(store: &str) -> &'static str {
    match store {
        STREAM_ASSIGN => "workers are behind: add workers, or raise bus.assignments_size",
        STREAM_RESULT => {
            "its consumers are behind: check the routers and every other consumer of results, or raise bus.results_size"
        }
        BUCKET_KEYS => "keys are kept for an hour: use fewer, or raise bus.keys_size",
        STREAM_USAGE => "check the programs in bus.usage_consumers, or raise bus.usage_size",
        _ => "too many tasks are unfinished: add workers, or raise bus.tasks_size",
    }
}

/// Samples every second until cancelled.
pub async fn run(router: Arc<Router>, cancel: CancellationToken) {
    let mut ticks = tokio::time::interval(SAMPLE_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }

        // While the bus is away nothing is known, and requests fail for that reason.
        let sampled = tokio::select! {
            () = cancel.cancelled() => return,
            sampled = router.bus.fills() => sampled,
        };
        let Ok(mut fills) = sampled else { continue };
        // The bus does not limit this bucket: it would evict.
        let keys = fills.iter_mut().filter(|fill| fill.store == BUCKET_KEYS);
        keys.for_each(|fill| fill.max_bytes = Some(router.bus.sizes().keys));
        measure(&fills, unix_ms());
        let changes = {
            let mut watched = router.stores.watched.lock();
            watched.count_evicted(&fills, &router.bus.sizes().usage_consumers);
            let loads = watched.loads(&fills, !router.bus.sizes().usage_consumers.is_empty());
            watched.judge(&loads)
        };
        for (load, level) in changes {
            log(&router, load, level).await;
        }
    }
}

fn measure(fills: &[Fill], now_ms: u64) {
    for fill in fills {
        let age_ms = fill.oldest_ms.map_or(0, |oldest| now_ms.saturating_sub(oldest));
        metrics::gauge!("beamline_store_messages", "store" => fill.store).set(fill.messages as f64);
        metrics::gauge!("beamline_store_bytes", "store" => fill.store).set(fill.bytes as f64);
        metrics::gauge!("beamline_store_max_bytes", "store" => fill.store).set(fill.max_bytes.unwrap_or(0) as f64);
        metrics::gauge!("beamline_store_oldest_seconds", "store" => fill.store).set(age_ms as f64 / 1000.0);
    }
}

impl Watched {
    /// The loads of all stores that have a limit.
    fn loads(&mut self, fills: &[Fill], usage_is_kept: bool) -> Vec<Load> {
        for fill in fills.iter().filter(|fill| fill.messages > 0) {
            self.means.insert(fill.store, fill.bytes.div_ceil(fill.messages));
        }
        let messages = |store| {
            fills
                .iter()
                .find(|fill| fill.store == store)
                .map_or(0, |fill| fill.messages)
        };
        let mean = |store| self.means.get(store).copied().unwrap_or(BYTES_ASSUMED);
        let (running, recorded) = (messages(STREAM_ASSIGN), messages(STREAM_ASSIGN) + messages(STREAM_RESULT));

        let mut loads = Vec::new();
        for fill in fills {
            let Some(max) = fill.max_bytes else { continue };
            let mut add = |limit, used| loads.push(Load { store: fill.store, limit, used, max });
            match fill.store {
                STREAM_ASSIGN => add(Limit::Refuses, fill.bytes),
                STREAM_RESULT => add(Limit::Refuses, fill.bytes + running * mean(STREAM_RESULT)),
                STREAM_USAGE if usage_is_kept => add(Limit::Refuses, fill.bytes + recorded * mean(STREAM_USAGE)),
                BUCKET_TASKS => {
                    // Records of ended tasks make room for those of unfinished ones.
                    add(Limit::Refuses, recorded * ENTRIES_OF_TASK * mean(BUCKET_TASKS));
                    add(Limit::Evicts, fill.bytes);
                }
                BUCKET_KEYS => add(Limit::RefusesKeys, fill.bytes),
                STREAM_USAGE | STREAM_DLQ | STREAM_UNREADABLE | BUCKET_POLICIES => add(Limit::Evicts, fill.bytes),
                _ => {}
            }
        }
        loads
    }

    /// Sets the level of each load; returns those that changed.
    fn judge(&mut self, loads: &[Load]) -> Vec<(Load, Level)> {
        let mut changes = Vec::new();
        for load in loads {
            let level = self.levels.entry((load.store, load.limit)).or_default();
            let next = level.after(load.used, load.max);
            metrics::gauge!("beamline_store_level", "store" => load.store, "limit" => load.limit.name())
                .set(next as u8 as f64);
            if next != *level {
                *level = next;
                changes.push((*load, next));
            }
        }
        changes
    }

    /// Counts what streams have evicted since the last sample, by the number of their first message.
    fn count_evicted(&mut self, fills: &[Fill], usage_consumers: &[String]) {
        for fill in fills {
            let evicts = match fill.store {
                STREAM_DLQ | STREAM_UNREADABLE => true,
                STREAM_USAGE => usage_consumers.is_empty(),
                _ => false,
            };
            if evicts {
                let before = self.firsts.insert(fill.store, fill.first).unwrap_or(fill.first);
                let evicted = fill.first.saturating_sub(before);
                metrics::counter!("beamline_store_evicted_total", "store" => fill.store).increment(evicted);
            }
        }
    }
}

impl Level {
    fn after(self, used: u64, max: u64) -> Self {
        let over = |bounds: Bounds, held: bool| {
            let percent = if held { bounds.ends } else { bounds.begins };
            u128::from(used) * 100 >= u128::from(max) * u128::from(percent)
        };
        if over(FULL, self == Self::Full) {
            Self::Full
        } else if over(NEAR, self >= Self::Near) {
            Self::Near
        } else {
            Self::Low
        }
    }
}

impl Limit {
    fn name(self) -> &'static str {
        match self {
            Self::Refuses => "refuses",
            Self::RefusesKeys => "refuses_keys",
            Self::Evicts => "evicts",
        }
    }
}

/// One line for each change of a level.
async fn log(router: &Router, load: Load, level: Level) {
    let Load { store, limit, used, max } = load;
    match (limit, level) {
        (_, Level::Low) => tracing::info!(store, used, max, "the store has room again"),
        (Limit::Refuses, Level::Near) => {
            tracing::warn!(
                store,
                used,
                max,
                "the store is nearly full; at 90 % new tasks are refused: {}",
                advice(store)
            );
        }
        (Limit::Refuses, Level::Full) => {
            let info = router.bus.stream_info(store).await.unwrap_or_default();
            let behind = info.consumers.into_iter().max_by_key(|(_, backlog)| *backlog);
            let (consumer, backlog) = behind.unwrap_or_default();
            tracing::error!(
                store,
                used,
                max,
                consumer,
                backlog,
                "the store is full, and new tasks are refused: {}",
                advice(store)
            );
        }
        (Limit::RefusesKeys, Level::Near) => {
            tracing::warn!(store, used, max, "the store is nearly full; {}", advice(store));
        }
        (Limit::RefusesKeys, Level::Full) => {
            tracing::error!(
                store,
                used,
                max,
                "the store is full, and new idempotency keys are refused: {}",
                advice(store)
            );
        }
        (Limit::Evicts, Level::Near) => tracing::warn!(store, used, max, "the store is nearly full"),
        (Limit::Evicts, Level::Full) => {
            tracing::warn!(store, used, max, "the store is full and evicts the oldest; raise its size in bus.*_size");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(store: &'static str, messages: u64, bytes: u64, max: u64) -> Fill {
        Fill { store, messages, bytes, max_bytes: Some(max), oldest_ms: None, first: 1 }
    }

    #[test]
    fn levels_end_below_where_they_begin() {
        let mut level = Level::Low;
        for (used, expected) in [
            (79, Level::Low),
            (80, Level::Near),
            (89, Level::Near),
            (90, Level::Full),
            (80, Level::Full),
            (79, Level::Near),
            (70, Level::Near),
            (69, Level::Low),
        ] {
            level = level.after(used, 100);
            assert_eq!(level, expected, "{used}");
        }
    }

    #[test]
    fn accepted_tasks_count_with_the_room_that_they_will_need() {
        let mut watched = Watched::default();
        let used = |watched: &mut Watched, fills: &[Fill], kept, store, limit| {
            let loads = watched.loads(fills, kept);
            loads
                .iter()
                .find(|load| (load.store, load.limit) == (store, limit))
                .map(|load| load.used)
        };

        let fills = [
            fill(STREAM_ASSIGN, 10, 5_000, 10_000),
            fill(STREAM_RESULT, 2, 1_400, 10_000),
            fill(STREAM_USAGE, 4, 800, 10_000),
            fill(BUCKET_TASKS, 100, 30_000, 40_000),
            fill(BUCKET_KEYS, 100, 30_000, 40_000),
        ];
        for (kept, store, limit, expected) in [
            (false, STREAM_ASSIGN, Limit::Refuses, Some(5_000)),
            (false, STREAM_RESULT, Limit::Refuses, Some(1_400 + 10 * 700)),
            (false, STREAM_USAGE, Limit::Evicts, Some(800)),
            (false, STREAM_USAGE, Limit::Refuses, None),
            (true, STREAM_USAGE, Limit::Refuses, Some(800 + 12 * 200)),
            (false, BUCKET_TASKS, Limit::Refuses, Some(12 * 2 * 300)),
            (false, BUCKET_TASKS, Limit::Evicts, Some(30_000)),
            (false, BUCKET_KEYS, Limit::RefusesKeys, Some(30_000)),
            (false, BUCKET_KEYS, Limit::Refuses, None),
        ] {
            assert_eq!(used(&mut watched, &fills, kept, store, limit), expected, "{store}");
        }

        // An empty stream counts with what its messages had last.
        let drained = [fill(STREAM_ASSIGN, 10, 5_000, 10_000), fill(STREAM_RESULT, 0, 0, 10_000)];
        assert_eq!(used(&mut watched, &drained, false, STREAM_RESULT, Limit::Refuses), Some(7_000));
    }

    #[test]
    fn each_change_of_a_level_is_reported_once() {
        let mut watched = Watched::default();
        let load = |used| [Load { store: STREAM_RESULT, limit: Limit::Refuses, used, max: 100 }];
        let changes: Vec<usize> = [10, 85, 86, 95, 96, 60, 50]
            .map(|used| watched.judge(&load(used)).len())
            .to_vec();
        assert_eq!(changes, [0, 1, 0, 1, 0, 1, 0]);
    }
}
