//! A durable pull consumer: asks for as many messages as have room, for as long as it lives.
//!
//! The requests are our own rather than the client library's batches, which stall on idle heartbeats (0.51) and take
//! more than there is room for, so that messages would wait here beyond their `ack_wait`.

use super::convert;
use super::inbox::Awaited;
use super::link::Link;
use super::streams;
use crate::{Acker, Consumer, ConsumerConfig, Delivery, Error, Outcome, Result};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::message::{AckKind, Message as JetMessage};
use async_nats::jetstream::stream::RetentionPolicy;
use async_nats::{HeaderMap, StatusCode, Subject, Subscriber};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Asked for at once at most; what waits here counts against `ack_wait`.
const PULL_MAX: usize = 64;
const PULL_EXPIRES: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Silent for this long, the server has forgotten the pull: it restarted, or the connection was lost.
const SILENCE_MAX: Duration = Duration::from_secs(5);
const RETRY_DELAY: Duration = Duration::from_millis(500);
const LEAVE_DEADLINE: Duration = Duration::from_secs(1);
const ACK_DEADLINE: Duration = Duration::from_secs(5);
const API_PREFIX: &str = "$JS.API";

pub async fn start(
    link: &Arc<Link>,
    config: ConsumerConfig,
    tasks: &TaskTracker,
    end: &CancellationToken,
) -> Result<Consumer> {
    link.connected()?;
    let valid = |c: char| !c.is_whitespace() && !c.is_control() && !".*>/\\".contains(c);
    if config.name.is_empty() || !config.name.chars().all(valid) {
        return Err(Error::InvalidSubject(config.name));
    }
    ensure(link, &config).await?;
    let (sender, receiver) = mpsc::channel(PULL_MAX.min(config.max_ack_pending.max(1)));
    let cancel = end.child_token();
    let hand = Arc::new(Semaphore::new(config.max_in_hand.clamp(1, Semaphore::MAX_PERMITS)));
    let pump = Pump { link: link.clone(), config, sender, hand, cancel: cancel.clone() };
    tasks.spawn(pump.run());
    Ok(Consumer { receiver, _guard: Box::new(cancel.drop_guard()) })
}

/// Creates the consumer, or brings it to this configuration. Where it starts was decided when it was created.
async fn ensure(link: &Link, config: &ConsumerConfig) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::Storage(format!("cannot declare consumer {} of stream {}: {error}", config.name, config.stream))
    };
    let stream = streams::get(link, config.stream).await?.ok_or_else(|| Error::NoStream(config.stream.into()))?;
    let known = stream.get_consumer::<pull::Config>(&config.name).await.ok();
    // A work queue keeps only what nobody has taken, and the server lets its consumers start nowhere else.
    let all = config.from_start || stream.cached_info().config.retention == RetentionPolicy::WorkQueue;
    let deliver_policy = match known {
        Some(consumer) => consumer.cached_info().config.deliver_policy,
        None if all => DeliverPolicy::All,
        None => DeliverPolicy::New,
    };
    let wanted = pull::Config {
        durable_name: Some(config.name.clone()),
        deliver_policy,
        ack_policy: AckPolicy::Explicit,
        ack_wait: config.ack_wait,
        max_deliver: -1,
        max_ack_pending: i64::try_from(config.max_ack_pending.max(1)).unwrap_or(i64::MAX),
        filter_subject: config.filter.clone().unwrap_or_default(),
        ..Default::default()
    };
    stream.create_consumer(wanted).await.map(drop).map_err(|error| failed(&error))
}

struct Pump {
    link: Arc<Link>,
    config: ConsumerConfig,
    sender: mpsc::Sender<Delivery>,
    /// Places for deliveries that are taken and not yet dropped.
    hand: Arc<Semaphore>,
    cancel: CancellationToken,
}

impl Pump {
    async fn run(self) {
        let mut declared = true;
        loop {
            let Err(reason) = self.serve(declared).await else { return };
            let (stream, consumer) = (self.config.stream, &self.config.name);
            tracing::warn!(reason, stream, consumer, "the consumer lost its stream; connecting it again");
            declared = false;
            tokio::select! {
                () = self.cancel.cancelled() => return,
                () = tokio::time::sleep(RETRY_DELAY) => {}
            }
        }
    }

    /// Pulls until nobody takes the deliveries (`Ok`) or the server or connection fails (why).
    /// One subscription serves all pulls; each has its own subject below it.
    async fn serve(&self, declared: bool) -> Result<(), String> {
        let mut connects = self.link.connects();
        connects.mark_unchanged();
        let begin = async {
            if !declared {
                ensure(&self.link, &self.config).await?;
            }
            let inbox = self.link.client.new_inbox();
            let incoming = self.link.client.subscribe(format!("{inbox}.*")).await;
            Ok((inbox, incoming.map_err(|error| Error::Disconnected(error.to_string()))?))
        };
        let (inbox, mut incoming) = tokio::select! {
            () = self.cancel.cancelled() => return Ok(()),
            begun = begin => begun.map_err(|error: Error| error.to_string())?,
        };
        let ended = tokio::select! {
            () = self.cancel.cancelled() => Ok(()),
            ended = self.pull(&inbox, &mut incoming) => ended,
            _ = connects.changed() => Err("it has connected anew".into()),
        };
        self.leave(incoming).await;
        ended
    }

    /// Gives back what has come and nobody takes: once the server knows that we are gone, or it would come here again.
    async fn leave(&self, mut incoming: Subscriber) {
        let told = async {
            incoming.unsubscribe().await.map_err(|error| Error::Disconnected(error.to_string()))?;
            self.link.round_trip(LEAVE_DEADLINE).await
        };
        if let Err(error) = told.await {
            tracing::debug!(%error, "what was pulled comes again after its ack wait");
            return;
        }
        while let Some(message) = incoming.next().await {
            if let (None, Some(reply)) = (message.status, message.reply) {
                let settle = Settle { link: self.link.clone(), reply };
                let given = settle.settle(Outcome::Nak(Duration::ZERO)).await;
                given.unwrap_or_else(|error| tracing::debug!(%error, "a message was not given back"));
            }
        }
    }

    async fn pull(&self, inbox: &str, incoming: &mut Subscriber) -> Result<(), String> {
        // Half the room at once, so that a busy consumer does not pull one by one; but a place in hand is never left
        // empty while others are worked on.
        let half = self.sender.max_capacity().div_ceil(2);
        let least = if self.config.max_in_hand > PULL_MAX { half } else { 1 };
        for number in 0_u64.. {
            let Ok(room) = self.sender.reserve_many(least).await else { return Ok(()) };
            drop(room);
            let Some(places) = self.places(least).await else { return Ok(()) };
            let reply = format!("{inbox}.{number}");
            self.ask(&reply, places.num_permits()).await.map_err(|error| error.to_string())?;
            if self.take(incoming, &reply, places).await?.is_none() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// As many places as there is room for now, at least `least`.
    async fn places(&self, least: usize) -> Option<OwnedSemaphorePermit> {
        let count = |places: usize| u32::try_from(places).unwrap_or(u32::MAX);
        let mut places = self.hand.clone().acquire_many_owned(count(least)).await.ok()?;
        let more = self.hand.available_permits().min(self.sender.capacity().saturating_sub(least));
        if let Ok(rest) = self.hand.clone().try_acquire_many_owned(count(more)) {
            places.merge(rest);
        }
        Some(places)
    }

    async fn ask(&self, reply: &str, batch: usize) -> Result<()> {
        let ask = json!({
            "batch": batch,
            "expires": u64::try_from(PULL_EXPIRES.as_nanos()).unwrap_or(u64::MAX),
            "idle_heartbeat": u64::try_from(HEARTBEAT.as_nanos()).unwrap_or(u64::MAX),
        });
        let message = crate::Message {
            subject: format!("{API_PREFIX}.CONSUMER.MSG.NEXT.{}.{}", self.config.stream, self.config.name).into(),
            reply: Some(reply.into()),
            payload: ask.to_string().into(),
            ..crate::Message::default()
        };
        self.link.publish(message).await
    }

    /// Hands over what one pull brings, until it is used up or has ended; `None` when nobody takes it any more.
    async fn take(
        &self,
        incoming: &mut Subscriber,
        reply: &str,
        mut places: OwnedSemaphorePermit,
    ) -> Result<Option<()>, String> {
        while places.num_permits() > 0 {
            let message = timeout_at(Instant::now() + SILENCE_MAX, incoming.next()).await;
            let message = message.map_err(|_| "the server is silent".to_string())?.ok_or("the connection is closed")?;
            let Some(status) = message.status else {
                let Some(place) = places.split(1) else { return Ok(Some(())) };
                let Some(delivery) = self.delivery(message, place) else {
                    tracing::error!(stream = self.config.stream, "a message came without its place in the stream");
                    continue;
                };
                // There is room: only this task fills the queue, and it asked for no more than fits.
                if self.sender.send(delivery).await.is_err() {
                    return Ok(None);
                }
                continue;
            };
            // An earlier pull's end says nothing about this one.
            if status == StatusCode::IDLE_HEARTBEAT || message.subject.as_str() != reply {
                continue;
            }
            let ended = [StatusCode::TIMEOUT, StatusCode::NOT_FOUND].contains(&status);
            let text = message.description.unwrap_or_default();
            if ended || text.contains("Batch Completed") {
                return Ok(Some(()));
            }
            return Err(format!("{status} {text}"));
        }
        Ok(Some(()))
    }

    fn delivery(&self, message: async_nats::Message, place: OwnedSemaphorePermit) -> Option<Delivery> {
        let message = JetMessage { message, context: self.link.jetstream.clone() };
        let info = message.info().ok()?;
        let (sequence, delivered) = (info.stream_sequence, u32::try_from(info.delivered).unwrap_or(u32::MAX));
        let stored_ms = u64::try_from(info.published.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
        let reply = message.reply.clone()?;
        let mut ours = convert::from_nats(message.message);
        ours.reply = None;
        let acker = Arc::new(Settle { link: self.link.clone(), reply });
        Some(Delivery { message: ours, delivered, sequence, stored_ms, acker, _place: place })
    }
}

struct Settle {
    link: Arc<Link>,
    reply: Subject,
}

#[async_trait]
impl Acker for Settle {
    /// An end (ack, term) is confirmed by the server; the others are only sent.
    async fn settle(&self, outcome: Outcome) -> Result<()> {
        let kind = match outcome {
            Outcome::Ack => AckKind::Ack,
            Outcome::Term => AckKind::Term,
            Outcome::InProgress => AckKind::Progress,
            Outcome::Nak(delay) => AckKind::Nak((!delay.is_zero()).then_some(delay)),
        };
        let payload: Bytes = kind.into();
        if matches!(outcome, Outcome::Ack | Outcome::Term) {
            return self.link.ask(&self.reply, HeaderMap::new(), payload, Awaited::Reply, ACK_DEADLINE).await.map(drop);
        }
        let message = crate::Message { subject: self.reply.as_str().into(), payload, ..crate::Message::default() };
        self.link.publish(message).await
    }
}
