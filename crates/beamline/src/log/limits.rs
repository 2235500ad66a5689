//! Which lines are written: those of the access log by its setting, and of every other message at most so many a second.
//!
//! One line of the code may be reached by every request: a refusal, a warning about a full queue. Each gets a token
//! bucket, so that a flood costs little and leaves room for the lines of others.

use crate::config::Access;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::Instant;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// The target of the lines of the access log: one for each task, where it ends.
const ACCESS: &str = "access";
/// With `log.access = "sampled"`, one in so many tasks is always logged, chosen by its id.
const SAMPLE: u32 = 100;

/// Lines of one message that may be written at once: enough for a start that loads a thousand policies.
const BURST: f64 = 1000.0;
/// Lines of one message that may be written per second for long. journald's own limit for a whole service is 333.
const PER_SECOND: f64 = 100.0;

/// A layer that decides about each event, before it is formatted. Clones share their state.
#[derive(Clone)]
pub struct Limits(Arc<Shared>);

struct Shared {
    access: AtomicU8,
    started: Instant,
    buckets: Mutex<HashMap<Identifier, Bucket>>,
}

/// Lines of one message that were left out.
pub struct Suppressed {
    pub at: &'static Metadata<'static>,
    pub lines: u64,
}

impl Limits {
    pub fn new(access: Access) -> Self {
        Self(Arc::new(Shared {
            access: AtomicU8::new(access as u8),
            started: Instant::now(),
            buckets: Mutex::default(),
        }))
    }

    pub fn set(&self, access: Access) {
        self.0.access.store(access as u8, Relaxed);
        tracing::callsite::rebuild_interest_cache();
    }

    /// What was left out since the last call. The lines of the access log do not count: leaving them out is its purpose.
    pub fn suppressed(&self) -> Vec<Suppressed> {
        let mut buckets = self.0.buckets.lock();
        let suppressed = buckets.values_mut().filter_map(|bucket| {
            let lines = std::mem::take(&mut bucket.suppressed);
            (lines > 0 && bucket.at.target() != ACCESS).then_some(Suppressed { at: bucket.at, lines })
        });
        suppressed.collect()
    }

    fn access(&self) -> Access {
        match self.0.access.load(Relaxed) {
            x if x == Access::Off as u8 => Access::Off,
            x if x == Access::All as u8 => Access::All,
            _ => Access::Sampled,
        }
    }

    fn has_room(&self, at: &'static Metadata<'static>) -> bool {
        let now = self.0.started.elapsed().as_secs_f64();
        let mut buckets = self.0.buckets.lock();
        let bucket = buckets.entry(at.callsite()).or_insert_with(|| Bucket::new(at, now));
        bucket.take(now)
    }
}

impl<S: Subscriber> Layer<S> for Limits {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.target() != ACCESS || self.access() != Access::Off
    }

    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let at = event.metadata();
        if at.target() == ACCESS && (self.access() == Access::All || is_chosen(event)) {
            return true;
        }
        // Whoever asks for more than INFO wants to see everything.
        *at.level() > Level::INFO || self.has_room(at)
    }
}

/// Lines of one message: full buckets hold [`BURST`] and gain [`PER_SECOND`].
struct Bucket {
    at: &'static Metadata<'static>,
    left: f64,
    seen: f64,
    suppressed: u64,
}

impl Bucket {
    fn new(at: &'static Metadata<'static>, now: f64) -> Self {
        Self { at, left: BURST, seen: now, suppressed: 0 }
    }

    fn take(&mut self, now: f64) -> bool {
        self.left = BURST.min(self.left + (now - self.seen).max(0.0) * PER_SECOND);
        self.seen = now;
        if self.left < 1.0 {
            self.suppressed += 1;
            return false;
        }
        self.left -= 1.0;
        true
    }
}

/// Whether a task is in the log however busy the process is: it failed, or its id is in the sample. The hash depends on
/// nothing but the id, so that all processes choose the same tasks.
fn is_chosen(event: &Event<'_>) -> bool {
    let mut task = Task { is_chosen: false };
    event.record(&mut task);
    task.is_chosen
}

struct Task {
    is_chosen: bool,
}

impl Visit for Task {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.is_chosen |= match field.name() {
            "status" => value != "success",
            "request_id" => is_in_sample(value),
            _ => false,
        };
    }

    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
}

fn is_in_sample(request_id: &str) -> bool {
    crc32fast::hash(request_id.as_bytes()).is_multiple_of(SAMPLE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tracing_subscriber::layer::SubscriberExt;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Lines {
        fn take(&self) -> Vec<String> {
            let bytes = std::mem::take(&mut *self.0.lock());
            String::from_utf8(bytes).unwrap().lines().map(String::from).collect()
        }
    }

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn run(test: impl FnOnce(&Limits, &Lines)) {
        let (limits, lines) = (Limits::new(Access::Sampled), Lines::default());
        let writer = lines.clone();
        let subscriber = tracing_subscriber::registry()
            .with(limits.clone())
            .with(tracing_subscriber::fmt::layer().with_writer(move || writer.clone()));
        tracing::subscriber::with_default(subscriber, || test(&limits, &lines));
    }

    fn end_tasks(count: u32, status: &str) {
        for n in 0..count {
            let request_id = format!("task-{n}");
            tracing::info!(target: "access", request_id, status, "task ended");
        }
    }

    #[test]
    fn sampled_access_log_has_all_tasks_while_they_are_few_then_a_sample_and_every_failure() {
        run(|limits, lines| {
            end_tasks(1000, "success");
            assert_eq!(lines.take().len(), 1000);

            end_tasks(20_000, "success");
            let sampled = (0..20_000).filter(|n| is_in_sample(&format!("task-{n}"))).count();
            let logged = lines.take();
            // The bucket gains some lines while the test runs.
            assert!((sampled..sampled + 3000).contains(&logged.len()), "{} of {sampled}", logged.len());
            assert!((150..250).contains(&sampled), "{sampled}");
            for n in (0..20_000).filter(|n| is_in_sample(&format!("task-{n}"))) {
                assert!(logged.iter().any(|line| line.contains(&format!("\"task-{n}\""))), "task-{n}");
            }

            for status in ["error", "timeout", "cancelled"] {
                end_tasks(2000, status);
                assert_eq!(lines.take().len(), 2000, "{status}");
            }
            assert_eq!(limits.suppressed().len(), 0, "sampling is no loss");
        });
    }

    #[test]
    fn access_log_is_switched_while_running() {
        run(|limits, lines| {
            for (access, logged) in [(Access::All, 3000), (Access::Off, 0), (Access::All, 3000)] {
                limits.set(access);
                end_tasks(3000, "success");
                assert_eq!(lines.take().len(), logged, "{access:?}");
            }
        });
    }

    #[test]
    fn flood_of_one_message_is_cut_and_counted_and_leaves_room_for_others() {
        run(|limits, lines| {
            for n in 0..20_000 {
                tracing::info!(n, "refused");
            }
            let logged = lines.take().len();
            assert!((1000..4000).contains(&logged), "{logged}");
            tracing::info!("another message");
            assert_eq!(lines.take().len(), 1);

            let suppressed = limits.suppressed();
            assert_eq!(suppressed.len(), 1);
            assert_eq!(suppressed[0].lines as usize, 20_000 - logged);
            assert_eq!(limits.suppressed().len(), 0, "each is reported once");
        });
    }

    #[test]
    fn debug_lines_have_no_limit() {
        run(|_, lines| {
            for n in 0..3000 {
                tracing::debug!(n, "detail");
            }
            assert_eq!(lines.take().len(), 3000);
        });
    }
}
