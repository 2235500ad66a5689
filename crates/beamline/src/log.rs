//! Log lines on stderr, for people or as JSON, written by a thread of their own.

mod limits;
mod queue;

use crate::config::{LogFormat, Settings};
use limits::{Limits, Suppressed};
use queue::Queue;
pub use queue::Writer;
use std::io::IsTerminal;
use std::panic::PanicHookInfo;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// How long the exit waits for the last lines.
const LAST_LINES_MAX: Duration = Duration::from_secs(1);
/// How long a panic waits for its line. The process may abort next, and its lines with it.
const PANIC_LINE_MAX: Duration = Duration::from_millis(100);

/// Changes what is logged, and reports what was not. Clones share their state.
#[derive(Clone)]
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    limits: Limits,
    queue: Queue,
    /// Dropped lines that the log mentions.
    reported: Arc<AtomicU64>,
}

/// Starts the log. Dropping the writer writes the last lines.
pub fn init(settings: &Settings) -> anyhow::Result<(Log, Writer)> {
    let writer = Writer::start(std::io::stderr(), LAST_LINES_MAX)?;
    let queue = writer.queue().clone();
    let limits = Limits::new(settings.log_access);

    let (filter, handle) = reload::Layer::new(filter(settings)?);
    let lines = fmt::layer().with_writer(queue.clone());
    let lines = match settings.log_format {
        LogFormat::Human => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .boxed(),
    };

    tracing_subscriber::registry()
        .with(filter)
        .with(limits.clone())
        .with(lines)
        .init();
    log_panics(queue.clone());
    Ok((Log { filter: handle, limits, queue, reported: Arc::default() }, writer))
}

impl Log {
    pub fn set(&self, settings: &Settings) -> anyhow::Result<()> {
        self.filter.reload(filter(settings)?)?;
        self.limits.set(settings.log_access);
        Ok(())
    }

    /// Adds text for people to the lines of the log.
    pub fn say(&self, text: &str) {
        self.queue.push(text.as_bytes());
    }

    /// Logs how many lines are missing since the last report, once stderr takes lines again.
    pub fn report_missing(&self) {
        if let Some(dropped) = self.queue.dropped() {
            let lines = dropped.saturating_sub(self.reported.swap(dropped, Relaxed));
            if lines > 0 {
                tracing::warn!(lines, "log lines were dropped: stderr took them too slowly, or failed");
            }
        }

        for Suppressed { at, lines } in self.limits.suppressed() {
            metrics::counter!("beamline_log_dropped_total", "reason" => "limit").increment(lines);
            let at = format!("{}:{}", at.target(), at.line().unwrap_or_default());
            tracing::warn!(lines, at, "log lines of one message were left out: there were too many at once");
        }
    }
}

fn filter(settings: &Settings) -> anyhow::Result<EnvFilter> {
    let mut level = settings.log_level.clone();
    if level == "info" {
        // The bus logs the events of the NATS client itself.
        level.push_str(",async_nats=warn");
    }
    EnvFilter::try_new(&level).map_err(|e| anyhow::anyhow!("log.level {level:?} is not a log filter: {e}"))
}

/// Makes panics lines of the log. The standard hook writes to stderr itself, and waits for it.
fn log_panics(queue: Queue) {
    std::panic::set_hook(Box::new(move |panic: &PanicHookInfo<'_>| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let text = panic.payload_as_str().unwrap_or("a panic without text");
        let at = panic.location().map(ToString::to_string);
        // Captured only if $RUST_BACKTRACE asks for it.
        let backtrace = std::backtrace::Backtrace::capture();
        let backtrace =
            (backtrace.status() == std::backtrace::BacktraceStatus::Captured).then(|| backtrace.to_string());

        tracing::error!(thread, at, backtrace, "panicked: {text}");
        queue.flush(PANIC_LINE_MAX);
    }));
}
