//! Batches published messages, so that messages from many tasks share one write to the server.
//!
//! The scheduler runs a task that has just been woken before other ready tasks. Without this queue, each publish would
//! wake the client's connection task, which would write every message separately.

use async_nats::client::PublishError;
use async_nats::{Client, HeaderMap, Subject};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Maximum messages queued; beyond it, publishers wait.
const WAITING_MAX: usize = 256;
/// Maximum messages passed to the client between two yields.
const BATCH_MAX: usize = 256;

pub struct Outbox(mpsc::Sender<Outgoing>);

pub struct Outgoing {
    pub subject: Subject,
    pub reply: Option<Subject>,
    pub headers: HeaderMap,
    pub payload: Bytes,
}

impl Outbox {
    /// Starts the task that passes messages to the client. On cancellation it passes on what is queued, then ends.
    pub fn open(client: Client, tasks: &TaskTracker, cancel: &CancellationToken) -> Self {
        let (sender, waiting) = mpsc::channel(WAITING_MAX);
        tasks.spawn(run(client, waiting, cancel.clone()));
        Self(sender)
    }

    /// Queues a message; waits while the queue is full. Returns `false` once the outbox is closed.
    pub async fn put(&self, message: Outgoing) -> bool {
        self.0.send(message).await.is_ok()
    }
}

async fn run(client: Client, mut waiting: mpsc::Receiver<Outgoing>, cancel: CancellationToken) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    loop {
        tokio::select! {
            biased;
            // A closed queue still yields the messages that it holds.
            () = cancel.cancelled(), if !waiting.is_closed() => waiting.close(),
            taken = waiting.recv_many(&mut batch, BATCH_MAX) => if taken == 0 { return },
        }

        // Let other ready tasks publish first, so that their messages join this batch.
        tokio::task::yield_now().await;
        while batch.len() < BATCH_MAX
            && let Ok(message) = waiting.try_recv()
        {
            batch.push(message);
        }

        for message in batch.drain(..) {
            if let Err(error) = publish(&client, message).await {
                tracing::warn!(%error, "cannot publish a message to NATS; message dropped");
            }
        }
    }
}

async fn publish(client: &Client, message: Outgoing) -> Result<(), PublishError> {
    let Outgoing { subject, reply, headers, payload } = message;
    match (reply, headers.is_empty()) {
        (None, true) => client.publish(subject, payload).await,
        (None, false) => client.publish_with_headers(subject, headers, payload).await,
        (Some(reply), true) => client.publish_with_reply(subject, reply, payload).await,
        (Some(reply), false) => {
            client
                .publish_with_reply_and_headers(subject, reply, headers, payload)
                .await
        }
    }
}
