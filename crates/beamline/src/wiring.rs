//! Runs the process once its settings are loaded: start, serve, drain.
//!
//! The order of the drain is the order of the fields of [`Stages`].

use crate::activation::Given;
use crate::config::{Layers, Settings};
use crate::log::Log;
use crate::notify;
use anyhow::{Result, bail};
use reload::Reload;
use stages::Stages;
use start::Running;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

mod announce;
pub mod bind;
mod reload;
mod stages;
mod start;

/// The inputs of a start: settings, their sources and inherited sockets.
pub struct Start {
    pub layers: Layers,
    pub settings: Settings,
    pub given: Given,
    pub log: Log,
}

/// Runs the process until a signal arrives or a part ends unexpectedly, then drains.
pub async fn up(start: Start) -> Result<()> {
    // Signals are handled from here on, so that a start that waits for an unreachable server can be interrupted.
    let mut signals = Signals::new()?;
    let deadline = start.settings.shutdown_deadline;
    let draining = CancellationToken::new();
    let mut stages = Stages::new();

    let ended = start_and_serve(start, &mut signals, &mut stages, draining.clone()).await;

    notify::stopping();
    draining.cancel();
    let in_time = tokio::select! {
        in_time = stages.drain(deadline) => in_time,
        name = signals.end.next() => bail!("{name} came a second time: ended without draining"),
    };

    ended?;
    if !in_time {
        bail!("a stage did not drain within shutdown.deadline ({deadline:?}); the log names it");
    }
    tracing::info!("drained and stopped");
    Ok(())
}

/// Returns `Ok` when a signal requests a stop, and an error when the start or a part fails.
async fn start_and_serve(
    start: Start,
    signals: &mut Signals,
    stages: &mut Stages,
    draining: CancellationToken,
) -> Result<()> {
    let Start { layers, settings, given, log } = start;
    notify::status("starting");
    let running = tokio::select! {
        running = start::start(&settings, given, &log, stages, draining) => running?,
        name = signals.end.next() => {
            tracing::info!(signal = name, "ended during the start");
            return Ok(());
        }
    };

    let Running { bus, gateway, endpoint, status } = running;
    notify::ready(&status);
    let reload = Reload { layers, settings, log, bus, gateway, status };
    tokio::select! {
        name = signals.end.next() => {
            tracing::info!(signal = name, "draining");
            Ok(())
        }
        ended = stages.first_end() => {
            if let Err(error) = &ended {
                tracing::error!("{error:#}; draining the rest");
            }
            ended
        }
        never = reload.run(&mut signals.hangup) => match never {},
        never = notify::watchdog(|| endpoint.answers()) => match never {},
    }
}

struct Signals {
    end: EndSignals,
    /// SIGHUP asks for a reload.
    hangup: Signal,
}

struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            end: EndSignals {
                terminate: signal(SignalKind::terminate())?,
                interrupt: signal(SignalKind::interrupt())?,
            },
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

impl EndSignals {
    /// Waits for SIGTERM or Ctrl-C, and returns the signal's name.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
