//! SIGHUP: reloads the settings and the bus's certificates, and applies what a running process can change.

use super::bind;
use crate::config::{self, Changes, Layers, Settings};
use crate::log::Log;
use crate::notify;
use anyhow::Result;
use bus::Bus;
use std::convert::Infallible;
use tokio::signal::unix::Signal;

/// The handles that a reload changes, and the sources of the settings.
pub struct Reload {
    pub layers: Layers,
    pub settings: Settings,
    pub log: Log,
    pub bus: Bus,
    pub gateway: Option<gateway::Control>,
    /// The status line that the service manager shows before and after a reload.
    pub status: String,
}

impl Reload {
    /// Reloads at each signal. A signal that arrives during a reload triggers another one.
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
        // Settings first: new limits take effect even if the certificates cannot be used.
        self.reload_settings() && self.reload_bus().await
    }

    fn reload_settings(&mut self) -> bool {
        let fresh = match config::load(&self.layers) {
            Ok(fresh) => fresh,
            Err(problems) => {
                for problem in problems.0 {
                    tracing::error!(at = problem.at, "the settings stay as they were: {}", problem.what);
                }
                return false;
            }
        };
        for warning in &fresh.warnings {
            tracing::warn!("{warning}");
        }

        let changes = match self.take(&fresh) {
            Ok(changes) => changes,
            Err(error) => {
                tracing::error!("the settings stay as they were: {error:#}");
                return false;
            }
        };
        let taken = if changes.applied.is_empty() {
            "none has changed".into()
        } else {
            changes.applied.join(", ")
        };
        tracing::info!(settings = taken, "reloaded");
        if !changes.needs_restart.is_empty() {
            tracing::warn!(
                settings = changes.needs_restart.join(", "),
                "these settings changed, and each needs a restart"
            );
        }
        true
    }

    /// Makes the bus read its certificates and credentials again.
    async fn reload_bus(&self) -> bool {
        let Err(error) = self.bus.reload().await else {
            return true;
        };
        let error = match error {
            // This variant's own text says that the bus is disconnected, but its open connections stay.
            bus::Error::Disconnected(problem) => problem,
            other => other.to_string(),
        };
        tracing::error!(error, "cannot reload the bus's certificates and credentials; the current ones stay in use");
        false
    }

    /// Applies all live settings, or none.
    fn take(&mut self, fresh: &Settings) -> Result<Changes> {
        let mut settings = self.settings.clone();
        let changes = settings.renew(fresh)?;
        let gateway = match &self.gateway {
            Some(gateway) => Some((gateway, bind::gateway_config(&settings)?)),
            None => None,
        };

        self.log.set(&settings)?;
        if let Some((gateway, config)) = gateway {
            gateway.reload(config);
        }
        self.settings = settings;
        Ok(changes)
    }
}
