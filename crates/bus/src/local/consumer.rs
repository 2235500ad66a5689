//! A pump: claims what is available for one consumer and hands it over, until the consumer is dropped.

use super::store::{ConsumerHandle, Store};
use crate::{Acker, Consumer, ConsumerConfig, Delivery, Outcome, Result};
use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Claimed at once at most; what is claimed and not yet taken counts against `ack_wait`.
const CLAIM_MAX: usize = 64;
/// Looks again after this long at the latest, whatever was told.
const IDLE_MAX: Duration = Duration::from_secs(5);

pub async fn start(
    store: Arc<Store>,
    config: ConsumerConfig,
    tasks: &TaskTracker,
    end: &CancellationToken,
) -> Result<Consumer> {
    let handle = store.consumer(&config).await?;
    let (sender, receiver) = mpsc::channel(CLAIM_MAX.min(config.max_ack_pending.max(1)));
    let cancel = end.child_token();
    tasks.spawn(pump(store, handle, sender, cancel.clone()));
    Ok(Consumer { receiver, _guard: Box::new(cancel.drop_guard()) })
}

async fn pump(store: Arc<Store>, consumer: ConsumerHandle, sender: mpsc::Sender<Delivery>, cancel: CancellationToken) {
    loop {
        // Listen first, then look: what is appended in between is not missed.
        let work = consumer.work.clone();
        let told = work.notified();
        tokio::pin!(told);
        told.as_mut().enable();
        let Some(room) = room(&sender, &cancel).await else { return };
        let idle = match store.claim(&consumer, room).await {
            Ok(claim) => {
                let more = claim.messages.len() == room;
                for claimed in claim.messages {
                    let acker = Arc::new(Settle {
                        store: store.clone(),
                        consumer: consumer.clone(),
                        sequence: claimed.sequence,
                    });
                    let delivery = Delivery {
                        message: claimed.message,
                        delivered: claimed.delivered,
                        sequence: claimed.sequence,
                        stored_ms: claimed.stored_ms,
                        acker,
                    };
                    if sender.send(delivery).await.is_err() {
                        return;
                    }
                }
                if more { Duration::ZERO } else { claim.next.unwrap_or(IDLE_MAX).min(IDLE_MAX) }
            }
            Err(error) => {
                tracing::error!(%error, stream = consumer.stream, "cannot take messages from the stream; trying again");
                Duration::from_secs(1)
            }
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            () = told => {}
            () = tokio::time::sleep(idle) => {}
        }
    }
}

/// How many deliveries the consumer can take now: at least one, else `None` once it is gone.
async fn room(sender: &mpsc::Sender<Delivery>, cancel: &CancellationToken) -> Option<usize> {
    let permit = tokio::select! {
        () = cancel.cancelled() => return None,
        permit = sender.reserve() => permit.ok()?,
    };
    drop(permit);
    Some(sender.capacity().max(1))
}

struct Settle {
    store: Arc<Store>,
    consumer: ConsumerHandle,
    sequence: u64,
}

#[async_trait]
impl Acker for Settle {
    async fn settle(&self, outcome: Outcome) -> Result<()> {
        self.store.settle(&self.consumer, self.sequence, outcome).await
    }
}
