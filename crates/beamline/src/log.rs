//! Log lines on stderr, human or JSON.

use crate::config::Settings;
use std::io::IsTerminal;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// What is logged, which may change.
pub struct Filter(reload::Handle<EnvFilter, Registry>);

pub fn init(settings: &Settings) -> anyhow::Result<Filter> {
    let (filter, handle) = reload::Layer::new(filter(settings)?);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = if settings.values.text("log.format") == "json" {
        lines
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .boxed()
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).boxed()
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    Ok(Filter(handle))
}

impl Filter {
    pub fn set(&self, settings: &Settings) -> anyhow::Result<()> {
        Ok(self.0.reload(filter(settings)?)?)
    }
}

fn filter(settings: &Settings) -> anyhow::Result<EnvFilter> {
    let mut level = settings.values.text("log.level");
    if level == "info" {
        // Its events are lines of the bus as well.
        level.push_str(",async_nats=warn");
    }
    EnvFilter::try_new(&level).map_err(|e| anyhow::anyhow!("log.level {level:?} is not a filter: {e}"))
}
