//! A pump: claims what is available for one consumer and hands it over, until the consumer is dropped.

use super::store::{ConsumerHandle, Store};
use crate::{Acker, Consumer, ConsumerConfig, Delivery, Outcome, Result};
use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
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
    let hand = Arc::new(Semaphore::new(config.max_in_hand.clamp(1, Semaphore::MAX_PERMITS)));
    let cancel = end.child_token();
    tasks.spawn(pump(store, handle, sender, hand, cancel.clone()));
    Ok(Consumer { receiver, _guard: Box::new(cancel.drop_guard()) })
}

async fn pump(
    store: Arc<Store>,
    consumer: ConsumerHandle,
    sender: mpsc::Sender<Delivery>,
    hand: Arc<Semaphore>,
    cancel: CancellationToken,
) {
    loop {
        // Listen first, then look: what is appended in between is not missed.
        let work = consumer.work.clone();
        let told = work.notified();
        tokio::pin!(told);
        told.as_mut().enable();
        let Some(mut places) = room(&sender, &hand, &cancel).await else { return };
        let room = places.num_permits();
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
                        _place: places.split(1).expect("no more is claimed than there are places"),
                    };
                    // Once it is closed, all of the claim is for others.
                    if let Err(refused) = sender.send(delivery).await {
                        crate::give_back(&refused.0).await;
                    }
                }
                if more { Duration::ZERO } else { claim.next.unwrap_or(IDLE_MAX).min(IDLE_MAX) }
            }
            Err(error) => {
                tracing::error!(%error, stream = consumer.stream, "cannot take messages from the stream; trying again");
                Duration::from_secs(1)
            }
        };
        drop(places);
        tokio::select! {
            () = cancel.cancelled() => return,
            () = told => {}
            () = tokio::time::sleep(idle) => {}
        }
    }
}

/// Places for the deliveries that the consumer can take now: at least one, else `None` once it is gone.
async fn room(
    sender: &mpsc::Sender<Delivery>,
    hand: &Arc<Semaphore>,
    cancel: &CancellationToken,
) -> Option<OwnedSemaphorePermit> {
    let ready = async {
        drop(sender.reserve().await.ok()?);
        hand.clone().acquire_owned().await.ok()
    };
    let mut places = tokio::select! {
        () = cancel.cancelled() => return None,
        place = ready => place?,
    };
    let more = hand.available_permits().min(sender.capacity().saturating_sub(1));
    // Only this pump takes places, so those that were free are.
    if let Ok(rest) = hand.clone().try_acquire_many_owned(u32::try_from(more).unwrap_or(u32::MAX)) {
        places.merge(rest);
    }
    Some(places)
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
