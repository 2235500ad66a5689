//! SIGHUP: the settings are read again, and certificates; what may change while we run does.

use super::parts;
use crate::config::{self, Changes, Layers, Settings};
use crate::{log, notify};
use anyhow::Result;
use bus::Bus;
use std::convert::Infallible;
use tokio::signal::unix::Signal;

/// What the process runs with, and from where it came.
pub struct Reload {
    pub layers: Layers,
    pub settings: Settings,
    pub filter: log::Filter,
    pub bus: Bus,
    pub gateway: Option<gateway::Control>,
    /// For the service manager, when it is done.
    pub status: String,
}

impl Reload {
    /// At each signal; one that comes meanwhile is another reload.
    pub async fn run(mut self, hangups: &mut Signal) -> Infallible {
        while hangups.recv().await.is_some() {
            notify::reloading();
            let done = self.once().await;
            let outcome = if done { "done" } else { "refused" };
            metrics::counter!("beamline_reloads_total", "outcome" => outcome).increment(1);
            let status = if done {
                self.status.clone()
            } else {
                format!("{}; not reloaded, see the log", self.status)
            };
            notify::ready(&status);
        }
        std::future::pending().await
    }

    async fn once(&mut self) -> bool {
        tracing::info!("SIGHUP: reading the settings again");
        let fresh = match config::load(&self.layers) {
            Ok(fresh) => fresh,
            Err(problems) => {
                for problem in problems.0 {
                    tracing::error!(at = problem.at, "the settings are left as they were: {}", problem.what);
                }
                return false;
            }
        };
        for warning in &fresh.warnings {
            tracing::warn!("{warning}");
        }
        match self.take(fresh) {
            Ok(Changes { taken, waiting }) => {
                let settings = if taken.is_empty() {
                    "none has changed".into()
                } else {
                    taken.join(", ")
                };
                tracing::info!(settings, "reloaded");
                if !waiting.is_empty() {
                    tracing::warn!(settings = waiting.join(", "), "changed, and needs a restart");
                }
            }
            Err(error) => {
                tracing::error!("the settings are left as they were: {error:#}");
                return false;
            }
        }
        // Limits hold even if the certificates are bad, and those in use stay.
        match self.bus.reload().await {
            Ok(()) => true,
            Err(error) => {
                // The connections that there are stay: nothing is disconnected.
                let error = match error {
                    bus::Error::Disconnected(problem) => problem,
                    other => other.to_string(),
                };
                tracing::error!(error, "the bus keeps the certificates and credentials that it has");
                false
            }
        }
    }

    /// All or nothing.
    fn take(&mut self, fresh: Settings) -> Result<Changes> {
        let mut settings = self.settings.clone();
        let changes = settings.renew(fresh);
        let gateway = match &self.gateway {
            Some(gateway) => Some((gateway, parts::gateway_config(&settings)?)),
            None => None,
        };
        self.filter.set(&settings)?;
        if let Some((gateway, config)) = gateway {
            gateway.reload(config);
        }
        self.settings = settings;
        Ok(changes)
    }
}
