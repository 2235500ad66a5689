//! The pump of an embedded consumer: it claims available messages and sends them to the consumer until that is dropped.

use super::state::Step;
use super::store::{ConsumerHandle, Store};
use crate::places::{Member, Reserved};
use crate::{Acker, Consumer, ConsumerConfig, Delivery, Outcome, Places, Result};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Maximum deliveries claimed and queued for the consumer; the `ack_wait` of a queued delivery is already running.
const CLAIM_MAX: usize = 64;
/// The pump polls the store at least this often, even without a notification.
const IDLE_MAX: Duration = Duration::from_secs(5);

pub async fn start(
    store: Arc<Store>,
    config: ConsumerConfig,
    places: &Places,
    tasks: &TaskTracker,
    end: &CancellationToken,
) -> Result<Consumer> {
    let handle = store.consumer(&config).await?;
    let (sender, receiver) = mpsc::channel(CLAIM_MAX.min(config.max_ack_pending.max(1)));
    let cancel = end.child_token();
    tasks.spawn(pump(store, handle, sender, places.join(), cancel.clone()));
    Ok(Consumer { receiver, _guard: Box::new(cancel.drop_guard()) })
}

async fn pump(
    store: Arc<Store>,
    consumer: ConsumerHandle,
    sender: mpsc::Sender<Delivery>,
    places: Member,
    cancel: CancellationToken,
) {
    loop {
        // Register for the notification before claiming, so that an append in between still wakes the pump.
        let work = consumer.work.clone();
        let notified = work.notified();
        tokio::pin!(notified);
        notified.as_mut().enable();

        let Some(mut reserved) = reserve(&sender, &places, &cancel).await else {
            return;
        };
        let room = reserved.len();
        let idle = match store.claim(&consumer, room).await {
            Ok(claim) => {
                let more = claim.messages.len() == room;
                for claimed in claim.messages {
                    let acker = Acker::Local(Settle {
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
                        place: reserved.take(),
                    };

                    // The consumer was dropped: release the rest of the claim to other consumers at once.
                    if let Err(refused) = sender.send(delivery).await {
                        crate::give_back(&refused.0).await;
                    }
                }
                // A full claim means that more messages may be available.
                if more {
                    Duration::ZERO
                } else {
                    claim.next.unwrap_or(IDLE_MAX).min(IDLE_MAX)
                }
            }
            Err(error) => {
                let stream = consumer.config.stream;
                tracing::error!(%error, stream, "cannot claim messages from the stream; retrying");
                Duration::from_secs(1)
            }
        };
        drop(reserved);

        tokio::select! {
            () = cancel.cancelled() => return,
            () = notified => {}
            () = tokio::time::sleep(idle) => {}
        }
    }
}

/// Waits until the consumer can take a delivery and returns a place for each one it can take now, at least one. `None`
/// means that the consumer was dropped.
async fn reserve(sender: &mpsc::Sender<Delivery>, places: &Member, cancel: &CancellationToken) -> Option<Reserved> {
    let ready = async {
        drop(sender.reserve().await.ok()?);
        Some(places.reserve(1, sender.capacity()).await)
    };
    tokio::select! {
        () = cancel.cancelled() => None,
        reserved = ready => reserved,
    }
}

pub struct Settle {
    store: Arc<Store>,
    consumer: ConsumerHandle,
    sequence: u64,
}

impl Settle {
    /// The step of a batch that acknowledges the delivery.
    pub fn step(&self) -> Step {
        Step::Ack { consumer: self.consumer.config.clone(), sequence: self.sequence }
    }

    /// For a settlement after which a claim may find more than before.
    pub fn wake_consumers(&self) {
        self.consumer.work.notify_waiters();
    }

    pub async fn settle(&self, outcome: Outcome) -> Result<()> {
        self.store.settle(&self.consumer, self.sequence, outcome).await
    }
}
