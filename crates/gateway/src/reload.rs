//! Settings that change while the gateway runs.

use crate::{Config, Gateway, socket};
use std::sync::Arc;

/// A hand on a gateway that runs.
#[derive(Clone)]
pub struct Control {
    gateway: Arc<Gateway>,
    file: Option<socket::File>,
}

impl Control {
    pub(crate) fn new(gateway: Arc<Gateway>, file: Option<socket::File>) -> Self {
        Self { gateway, file }
    }

    /// Takes effect at once, also for open connections: what is in flight goes on, and what is above a limit that came
    /// down ends before anything new begins. The socket stays where it is.
    pub fn reload(&self, mut config: Config) {
        let gateway = &self.gateway;
        let before = gateway.config.load_full();
        config.socket = before.socket.clone();
        if config.receive_budget != before.receive_budget {
            // Frames that have begun stay on the old budget until they end, which is soon.
            gateway.receive.store(Arc::new(config.budget()));
        }
        if (config.breaker, config.request_timeout) != (before.breaker, before.request_timeout) {
            gateway.router.configure(config.breaker, config.request_timeout);
        }
        let shared = !config.allowed_uids.is_empty();
        if let Some(file) = &self.file
            && let Err(error) = file.share(shared)
        {
            tracing::error!(%error, shared, "cannot change who may reach the gateway's socket");
        }
        gateway.config.store(Arc::new(config));
    }
}
