//! Log lines on stderr, for people or as JSON.

use crate::config::{LogFormat, Settings};
use std::io::IsTerminal;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// A handle that changes the log filter on a reload.
pub struct Filter(reload::Handle<EnvFilter, Registry>);

pub fn init(settings: &Settings) -> anyhow::Result<Filter> {
    let (filter, handle) = reload::Layer::new(filter(settings)?);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match settings.log_format {
        LogFormat::Human => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .boxed(),
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
    let mut level = settings.log_level.clone();
    if level == "info" {
        // The bus logs the events of the NATS client itself.
        level.push_str(",async_nats=warn");
    }
    EnvFilter::try_new(&level).map_err(|e| anyhow::anyhow!("log.level {level:?} is not a log filter: {e}"))
}
