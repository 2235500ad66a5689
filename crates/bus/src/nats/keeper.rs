//! Keeps the declared streams and buckets on the server. One that is gone is declared again: the server may come back
//! with an older or an empty store, and an operator may delete a stream.
//!
//! A server whose disk is full or read-only leaves writes without an answer. After one write without an answer, further
//! ones fail at once until a trial write is stored.

use super::buckets;
use super::link::Link;
use super::pool::Pool;
use super::streams::{self, Declared};
use crate::local::subjects::matches;
use crate::pattern::union;
use crate::{BucketConfig, Error, Fill, Result, StreamConfig};
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often everything is declared again.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Pause between attempts while they fail.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How often the connections are compared with those of the last check.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// The key of trial writes, and their size: more than the room that the last block of a file may have left.
const TRIAL_KEY: &str = "@trial";
const TRIAL_BYTES: usize = 16 * 1024;
const STORES_NOTHING: &str = "NATS does not confirm writes; the disk of its JetStream may be full, read-only or slow: see \
                              its log, make room, and restart it if this does not end";

#[derive(Default)]
pub struct Keeper {
    replicas: Option<usize>,
    wanted: Mutex<Wanted>,
    standing: Mutex<Standing>,
    /// Whether a write had no answer and no trial write was stored since.
    doubted: AtomicBool,
    /// One check at a time.
    checking: tokio::sync::Mutex<()>,
    missed: Notify,
}

#[derive(Default, Clone)]
struct Wanted {
    streams: BTreeMap<&'static str, StreamConfig>,
    buckets: BTreeMap<&'static str, BucketConfig>,
}

/// The outcome of the last check.
#[derive(Default)]
struct Standing {
    /// Number of connects before the check.
    connects: u64,
    problem: Option<String>,
}

impl Keeper {
    pub fn new(replicas: Option<usize>) -> Self {
        Self { replicas, ..Self::default() }
    }

    pub async fn declare_stream(&self, link: &Link, stream: StreamConfig) -> Result<()> {
        streams::declare(link, &stream, self.replicas).await?;
        let mut wanted = self.wanted.lock();
        let known = wanted.streams.get(stream.name).map_or(&[][..], |known| &known.subjects);
        let subjects = union(known, &stream.subjects);
        wanted.streams.insert(stream.name, StreamConfig { subjects, ..stream });
        Ok(())
    }

    pub async fn declare_bucket(&self, link: &Link, bucket: BucketConfig) -> Result<()> {
        streams::declare_bucket(link, &bucket, self.replicas).await?;
        self.wanted.lock().buckets.insert(bucket.name, bucket);
        Ok(())
    }

    pub fn has_bucket(&self, bucket: &str) -> bool {
        self.wanted.lock().buckets.contains_key(bucket)
    }

    /// Notes the subjects that a declared stream takes besides those of its declaration.
    pub fn added(&self, stream: &str, subjects: &[String]) {
        if let Some(known) = self.wanted.lock().streams.get_mut(stream) {
            known.subjects = union(&known.subjects, subjects);
        }
    }

    /// Notes that a declared stream does not take the subject any more.
    pub fn removed(&self, stream: &str, subject: &str) {
        if let Some(known) = self.wanted.lock().streams.get_mut(stream) {
            known.subjects.retain(|known| known != subject);
        }
    }

    /// Whether a declared stream takes the subject.
    pub fn takes(&self, subject: &str) -> bool {
        let wanted = self.wanted.lock();
        let mut patterns = wanted.streams.values().flat_map(|stream| &stream.subjects);
        patterns.any(|pattern| matches(pattern, subject))
    }

    /// Checks soon, because a stream or bucket was found missing.
    pub fn missed(&self) {
        self.missed.notify_one();
    }

    /// Notes that a write had no answer.
    pub fn doubt(&self) {
        if !self.doubted.swap(true, Relaxed) {
            tracing::error!("{STORES_NOTHING}; refusing writes until a trial write is stored");
        }
        self.missed();
    }

    /// Fails while there is no sense in a write.
    pub fn stores(&self) -> Result<()> {
        match self.doubted.load(Relaxed) {
            true => Err(Error::Storage(STORES_NOTHING.into())),
            false => Ok(()),
        }
    }

    /// Writes to a bucket whose entries expire, if a write had no answer.
    async fn try_write(&self, link: &Link) -> Result<()> {
        if !self.doubted.load(Relaxed) {
            return Ok(());
        }
        let buckets = self.wanted.lock().buckets.clone();
        if let Some(bucket) = buckets.values().find(|bucket| bucket.max_age.is_some()) {
            // The second write leaves little behind.
            for size in [TRIAL_BYTES, 0] {
                let written = buckets::put(link, bucket.name, TRIAL_KEY, vec![0; size].into(), None).await;
                written.map_err(|error| Error::Storage(format!("{STORES_NOTHING} ({error})")))?;
            }
        }
        self.doubted.store(false, Relaxed);
        tracing::info!("NATS stores writes again");
        Ok(())
    }

    pub async fn fills(&self, link: &Link) -> Result<Vec<Fill>> {
        let wanted = self.wanted.lock().clone();
        let streams = wanted.streams.keys().map(|name| (*name, name.to_string()));
        let buckets = wanted.buckets.keys().map(|name| (*name, streams::bucket_stream(name)));
        let stores: Vec<_> = streams.chain(buckets).collect();
        let fills = stores.iter().map(|(store, stream)| streams::fill(link, store, stream));
        Ok(try_join_all(fills).await?.into_iter().flatten().collect())
    }

    /// Fails while a declared stream or bucket is missing, or writes have no answer. After a reconnect, this checks
    /// first.
    pub async fn health(&self, pool: &Pool) -> Result<()> {
        let wanted = self.wanted.lock().clone();
        if wanted.streams.is_empty() && wanted.buckets.is_empty() {
            return Ok(());
        }
        if self.standing.lock().connects != pool.connects() {
            return self.check(pool).await;
        }
        if let Some(problem) = &self.standing.lock().problem {
            return Err(Error::Storage(problem.clone()));
        }
        self.stores()
    }

    /// Checks every [`CHECK_INTERVAL`], after each reconnect, and when something was missed, until cancelled.
    pub async fn run(self: Arc<Self>, pool: Arc<Pool>, cancel: CancellationToken) {
        let mut due = Instant::now() + CHECK_INTERVAL;
        loop {
            let missed = tokio::select! {
                () = cancel.cancelled() => return,
                () = self.missed.notified() => true,
                () = tokio::time::sleep(LOOK_INTERVAL) => false,
            };
            let reconnected = self.standing.lock().connects != pool.connects();
            if !missed && !reconnected && Instant::now() < due {
                continue;
            }

            let checked = tokio::select! {
                () = cancel.cancelled() => return,
                checked = self.check(&pool) => checked,
            };
            let pause = if checked.is_ok() {
                CHECK_INTERVAL
            } else {
                RETRY_INTERVAL
            };
            due = Instant::now() + pause;
            if checked.is_err() {
                // Whoever misses a stream meanwhile waits for the next attempt.
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = tokio::time::sleep(RETRY_INTERVAL) => {}
                }
            }
        }
    }

    /// Declares everything again.
    async fn check(&self, pool: &Pool) -> Result<()> {
        let _one = self.checking.lock().await;
        let connects = pool.connects();
        let declared = match self.declare_all(pool.mine()).await {
            Ok(()) => self.try_write(pool.mine()).await,
            failed => failed,
        };

        let mut standing = self.standing.lock();
        match &declared {
            Ok(()) if standing.problem.take().is_some() => {
                tracing::info!("the streams and buckets are on NATS again");
            }
            Ok(()) => {}
            Err(error) => {
                let problem = error.to_string();
                if standing.problem.as_ref() != Some(&problem) {
                    tracing::error!(problem, "the streams and buckets on NATS cannot be checked; trying again");
                }
                standing.problem = Some(problem);
            }
        }
        if declared.is_ok() {
            standing.connects = connects;
        }
        declared
    }

    async fn declare_all(&self, link: &Link) -> Result<()> {
        let wanted = self.wanted.lock().clone();
        let lost = |store| tracing::error!(store, "NATS had lost it; what it held is gone, and it was declared again");
        for stream in wanted.streams.values() {
            if streams::declare(link, stream, self.replicas).await? == Declared::Created {
                lost(stream.name);
            }
        }
        for bucket in wanted.buckets.values() {
            if streams::declare_bucket(link, bucket, self.replicas).await? == Declared::Created {
                lost(bucket.name);
            }
        }
        Ok(())
    }
}
