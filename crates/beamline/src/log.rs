//! Log lines on stderr, human or JSON.

use crate::config::Settings;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

pub fn init(settings: &Settings) -> anyhow::Result<()> {
    let level = settings.values.text("log.level");
    let filter = EnvFilter::try_new(&level).map_err(|e| anyhow::anyhow!("log.level {level:?} is not a filter: {e}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if settings.values.text("log.format") == "json" {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).init();
    } else {
        builder.with_ansi(std::io::stderr().is_terminal()).init();
    }
    Ok(())
}
