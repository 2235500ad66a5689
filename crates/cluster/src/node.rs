//! The state that all connections of a node share: draining, disconnecting, publishing and reading histories.

use crate::client::Client;
use crate::engine::Engine;
use crate::hub::Hub;
use crate::permissions::Denied;
use crate::status::Stats;
use crate::token::Tokens;
use crate::{Config, Rules};
use bus::Bus;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::channels::Position;
use wire::limits::HISTORY_PAGE_MAX;
use wire::realtime::{Disconnect, ErrorCode, HistoryResult, Publication};

/// How long a drain waits for sessions to end after it has closed the last client.
const DRAIN_GRACE: Duration = Duration::from_secs(5);
/// Timers have a resolution of one millisecond, so a drain combines pauses shorter than this.
const PAUSE_MIN: Duration = Duration::from_millis(2);

pub struct Node {
    pub config: Config,
    pub bus: Bus,
    pub hub: Arc<Hub>,
    pub engine: Arc<dyn Engine>,
    pub tokens: Tokens,
    /// Connected clients by their number.
    pub clients: Mutex<HashMap<u64, Arc<Client>>>,
    pub next_client: AtomicU64,
    /// Open sockets, including those whose client has not connected yet.
    pub connections: AtomicUsize,
    pub sessions: TaskTracker,
    /// Cancelled when a drain begins.
    pub stopping: CancellationToken,
    /// Runs the cleanup after a session has panicked.
    pub runtime: tokio::runtime::Handle,
    stats: Stats,
}

impl Node {
    /// Must be called in a Tokio runtime.
    pub fn new(config: Config, bus: Bus, hub: Arc<Hub>, engine: Arc<dyn Engine>) -> Self {
        Self {
            tokens: Tokens::new(&config.token_secret),
            config,
            bus,
            hub,
            engine,
            clients: Mutex::default(),
            next_client: AtomicU64::new(1),
            connections: AtomicUsize::new(0),
            sessions: TaskTracker::new(),
            stopping: CancellationToken::new(),
            runtime: tokio::runtime::Handle::current(),
            stats: Stats::default(),
        }
    }

    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Refuses new clients and disconnects the connected ones, paced over `drain_period`. Returns when all sessions
    /// have ended, or [`DRAIN_GRACE`] after the last disconnect.
    pub async fn drain(&self) {
        self.stopping.cancel();
        let clients: Vec<_> = self.clients.lock().values().cloned().collect();
        let pause = self.config.drain_period / u32::try_from(clients.len().max(1)).unwrap_or(u32::MAX);

        // Absolute due times rather than pauses, so that late timers do not stretch the drain.
        let mut due = Instant::now();
        for client in clients {
            client.outbox.close(Disconnect::Shutdown);
            due += pause;
            if due > Instant::now() + PAUSE_MIN {
                tokio::time::sleep_until(due).await;
            }
        }

        // Also waits for the cleanup after panicked sessions.
        self.sessions.close();
        if tokio::time::timeout(DRAIN_GRACE, self.sessions.wait()).await.is_err() {
            tracing::warn!(
                sessions = self.sessions.len(),
                "some clients did not read their close frame in time; abandoning their sessions"
            );
        }
    }

    /// Closes the connections of a user on this node: all of them, or those of one sign-in.
    pub fn disconnect(&self, user: &str, login: Option<&str>, code: Disconnect) {
        // Ended first, so that a client that is connecting with such a token is either refused or already in the map.
        if let Some(login) = login {
            self.tokens.end(login);
        }

        let clients = self.clients.lock();
        clients
            .values()
            .filter(|client| client.user == user && login.is_none_or(|login| client.is_of_login(login)))
            .for_each(|client| client.outbox.close(code));
    }

    /// Publishes through the engine. Returns the position once the engine has acknowledged the publication.
    pub async fn publish(
        &self,
        channel: &str,
        publication: Publication,
        rules: &Rules,
        idempotency_key: Option<String>,
    ) -> Result<Position, Denied> {
        let started = std::time::Instant::now();
        let published = self.engine.publish(channel, publication, rules, idempotency_key).await;
        self.stats.published(started.elapsed());
        published.map_err(|error| {
            tracing::warn!(channel, %error, "a publication failed");
            error.denied()
        })
    }

    /// Reads a page of a channel's history. A `limit` of 0 returns only the position, a negative one all publications,
    /// up to [`HISTORY_PAGE_MAX`]. With `since`, returns the publications after that position, or with `reverse` those
    /// before it.
    pub async fn history(
        &self,
        channel: &str,
        rules: &Rules,
        limit: i32,
        since: Option<Position>,
        reverse: bool,
    ) -> Result<HistoryResult, Denied> {
        if !rules.keeps_history() {
            let text = "this channel keeps no history; set history_size and history_ttl in its namespace";
            return Err((ErrorCode::NotAvailable, text.into()));
        }
        let page = self.engine.history(channel, rules, None).await;
        let page = page.map_err(|error| error.denied())?;

        let mut publications = page.publications;
        if let Some(since) = since {
            if !since.epoch.is_empty() && since.epoch != page.position.epoch {
                let text = "the channel has begun a new epoch; read its history without since";
                return Err((ErrorCode::UnrecoverablePosition, text.into()));
            }
            publications.retain(|publication| {
                if reverse {
                    publication.offset < since.offset
                } else {
                    publication.offset > since.offset
                }
            });
        }
        if reverse {
            publications.reverse();
        }
        publications.truncate(usize::try_from(limit).unwrap_or(usize::MAX).min(HISTORY_PAGE_MAX));
        Ok(HistoryResult { publications, epoch: page.position.epoch, offset: page.position.offset })
    }
}
