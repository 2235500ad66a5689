//! The peer on NATS: the shortest durable way there and back. Publish, pull, publish the result, acknowledge.

use super::PAYLOAD;
use crate::Result;
use crate::gateway::lanes::Ask;
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::{Config, RetentionPolicy};
use async_nats::jetstream::{self, Context};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

const JOBS: &str = "bench.jobs";
const RESULTS: &str = "bench.results";
/// Jobs that the worker runs at once; more than any load has in flight.
const CONCURRENT: usize = 1000;

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<()>>>>;

/// A worker and a reader of its results, on connections of their own.
pub struct Loop {
    client: Context,
    waiting: Waiting,
    tasks: JoinSet<()>,
}

impl Loop {
    pub async fn start(url: &str) -> Result<Self> {
        let client = jetstream::new(async_nats::connect(url).await?);
        let worker = jetstream::new(async_nats::connect(url).await?);

        let stream = |name: &str, subject: &str, retention| Config {
            name: name.into(),
            subjects: vec![subject.into()],
            retention,
            ..Config::default()
        };
        let jobs = client
            .create_stream(stream("JOBS", JOBS, RetentionPolicy::WorkQueue))
            .await?;
        client
            .create_stream(stream("RESULTS", RESULTS, RetentionPolicy::Limits))
            .await?;
        let consumer = pull::Config {
            durable_name: Some("worker".into()),
            ack_policy: AckPolicy::Explicit,
            max_ack_pending: -1,
            ..pull::Config::default()
        };
        jobs.create_consumer(consumer.clone()).await?;

        // Results arrive live, while the stream stores them.
        let results = async_nats::connect(url).await?;
        let mut results_live = results.subscribe(RESULTS).await?;
        results.flush().await?;

        let mut tasks = JoinSet::new();
        let waiting = Waiting::default();
        let waiters = waiting.clone();
        tasks.spawn(async move {
            let _connected = results;
            while let Some(result) = results_live.next().await {
                let id = result.payload.first_chunk().map(|id| u64::from_be_bytes(*id));
                if let Some(waiter) = id.and_then(|id| waiters.lock().remove(&id)) {
                    let _ = waiter.send(());
                }
            }
        });

        let pulled = worker
            .get_stream("JOBS")
            .await?
            .get_consumer::<pull::Config>("worker")
            .await?;
        let messages = pulled.stream().max_messages_per_batch(CONCURRENT).messages().await?;
        tasks.spawn(messages.for_each_concurrent(CONCURRENT, move |job| {
            let worker = worker.clone();
            async move {
                let Ok(job) = job else { return };
                if let Ok(stored) = worker.publish(RESULTS, job.payload.clone()).await
                    && stored.await.is_ok()
                {
                    let _ = job.ack().await;
                }
            }
        }));
        Ok(Self { client, waiting, tasks })
    }

    pub fn ask(&self) -> Ask {
        let (client, waiting) = (self.client.clone(), self.waiting.clone());
        let last = Arc::new(AtomicU64::new(0));
        Arc::new(move |_| {
            let (client, waiting, last) = (client.clone(), waiting.clone(), last.clone());
            async move { job(&client, &waiting, last.fetch_add(1, Relaxed)).await }
                .map(|done| done.map_err(|error| error.to_string()))
                .boxed()
        })
    }

    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn job(client: &Context, waiting: &Waiting, id: u64) -> Result {
    let mut payload = id.to_be_bytes().to_vec();
    payload.resize(PAYLOAD, b'x');

    let (done, finished) = oneshot::channel();
    waiting.lock().insert(id, done);
    client.publish(JOBS, Bytes::from(payload)).await?.await?;
    finished.await?;
    Ok(())
}
