//! What is published, gathered before it is given to the client, so that one write takes what many tasks publish at once.
//!
//! The scheduler runs a task that has just been woken next, before others that are ready: the client's connection would
//! write after each message, and the server would read each by itself.

use async_nats::client::PublishError;
use async_nats::{Client, HeaderMap, Subject};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Messages that may wait here; then publishers do.
const WAITING_MAX: usize = 256;
/// Given to the client at once.
const BATCH_MAX: usize = 256;

pub struct Outbox(mpsc::Sender<Outgoing>);

pub struct Outgoing {
    pub subject: Subject,
    pub reply: Option<Subject>,
    pub headers: HeaderMap,
    pub payload: Bytes,
}

impl Outbox {
    /// Until cancelled; what was put in before is given to the client then.
    pub fn open(client: Client, tasks: &TaskTracker, cancel: &CancellationToken) -> Self {
        let (sender, waiting) = mpsc::channel(WAITING_MAX);
        tasks.spawn(run(client, waiting, cancel.clone()));
        Self(sender)
    }

    /// Waits while it is full; false once it is closed.
    pub async fn put(&self, message: Outgoing) -> bool {
        self.0.send(message).await.is_ok()
    }
}

async fn run(client: Client, mut waiting: mpsc::Receiver<Outgoing>, cancel: CancellationToken) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    loop {
        tokio::select! {
            biased;
            () = cancel.cancelled(), if !waiting.is_closed() => waiting.close(),
            taken = waiting.recv_many(&mut batch, BATCH_MAX) => if taken == 0 { return },
        }
        // Whoever else is ready to publish does so first.
        tokio::task::yield_now().await;
        while batch.len() < BATCH_MAX
            && let Ok(message) = waiting.try_recv()
        {
            batch.push(message);
        }
        for message in batch.drain(..) {
            if let Err(error) = give(&client, message).await {
                tracing::warn!(%error, "a message was not sent");
            }
        }
    }
}

async fn give(client: &Client, Outgoing { subject, reply, headers, payload }: Outgoing) -> Result<(), PublishError> {
    match (reply, headers.is_empty()) {
        (None, true) => client.publish(subject, payload).await,
        (None, false) => client.publish_with_headers(subject, headers, payload).await,
        (Some(reply), true) => client.publish_with_reply(subject, reply, payload).await,
        (Some(reply), false) => client.publish_with_reply_and_headers(subject, reply, headers, payload).await,
    }
}
