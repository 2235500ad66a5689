//! A durable JetStream pull consumer that pulls as many messages as it has room for, until it is dropped.
//!
//! A consumer that shares its places with others asks the stream for what is stored, for as many messages as it has
//! places. When there is nothing left, it waits for the next message with a pull that holds no place, and that it takes
//! back when all places are taken.
//!
//! The pump sends its own pull requests instead of using the client library's batches. Those stall on idle heartbeats (0.51)
//! and pull more than there is room for, so messages would sit here beyond their `ack_wait`.

use super::convert;
use super::inbox::Awaited;
use super::link::Link;
use super::{streams, subscription};
use crate::places::{Member, Place, Reserved};
use crate::{Acker, Consumer, ConsumerConfig, Delivery, Error, Outcome, Places, Result};
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, Info, pull};
use async_nats::jetstream::message::{AckKind, Message as JetMessage};
use async_nats::jetstream::stream::RetentionPolicy;
use async_nats::{HeaderMap, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Maximum messages pulled and queued here; the `ack_wait` of a queued message is already running.
const PULL_MAX: usize = 64;
const PULL_EXPIRES: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_secs(2);
/// A server that sends neither messages nor heartbeats for this long has lost the pull: it restarted, or the connection
/// was lost.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// A shared consumer with places to spare asks for this long, so that a stream of messages needs few pulls. Until then it
/// keeps these places from the others.
const LINGER: Duration = Duration::from_millis(50);
/// A delivery that waits for a place this long is returned: other consumers took the last one at the same moment.
const PLACE_DEADLINE: Duration = Duration::from_millis(250);
/// While all places are taken, a shared consumer that found nothing looks again this often.
const FULL_PAUSE: Duration = Duration::from_millis(20);
const RETRY_DELAY: Duration = Duration::from_millis(500);
/// Pauses after refused pulls: the first, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Pulls that may wait at the server for one consumer. Each process that shares it has one; the default of 512 would
/// bound the fleet.
const WAITING_MAX: i64 = 16_384;
/// Maximum wait for the server to process the unsubscribe. Long enough for a slow server, because messages that are not
/// returned are redelivered only after their ack wait.
const LEAVE_DEADLINE: Duration = Duration::from_secs(5);
const ACK_DEADLINE: Duration = Duration::from_secs(5);
const API_PREFIX: &str = "$JS.API";
/// A consumer of an older version counts as unread after this long without activity.
const UNREAD_AFTER: Duration = Duration::from_secs(10);

pub async fn start(
    link: &Arc<Link>,
    config: ConsumerConfig,
    places: &Places,
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
    let pump = Pump {
        link: link.clone(),
        config,
        sender,
        places: places.join(),
        cancel: cancel.clone(),
    };
    tasks.spawn(pump.run());
    Ok(Consumer { receiver, _guard: Box::new(cancel.drop_guard()) })
}

/// Creates the consumer or updates it to this configuration. An existing consumer keeps its start position.
async fn ensure(link: &Link, config: &ConsumerConfig) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::Storage(format!("cannot declare consumer {} of stream {}: {error}", config.name, config.stream))
    };
    let stream = streams::get(link, config.stream)
        .await?
        .ok_or_else(|| Error::NoStream(config.stream.into()))?;
    let existing = stream.get_consumer::<pull::Config>(&config.name).await.ok();
    // A work queue's consumers always start with the stored messages; the server accepts nothing else.
    let all = config.from_start || stream.cached_info().config.retention == RetentionPolicy::WorkQueue;
    // Servers refuse to change these two.
    let (deliver_policy, max_waiting) = match existing {
        Some(consumer) => {
            let current = &consumer.cached_info().config;
            (current.deliver_policy, current.max_waiting)
        }
        None if all => (DeliverPolicy::All, WAITING_MAX),
        None => (DeliverPolicy::New, WAITING_MAX),
    };

    let wanted = pull::Config {
        durable_name: Some(config.name.clone()),
        deliver_policy,
        ack_policy: AckPolicy::Explicit,
        ack_wait: config.ack_wait,
        max_deliver: -1,
        max_waiting,
        max_ack_pending: i64::try_from(config.max_ack_pending.max(1)).unwrap_or(i64::MAX),
        filter_subject: config.filter.clone().unwrap_or_default(),
        ..Default::default()
    };
    stream
        .create_consumer(wanted)
        .await
        .map(drop)
        .map_err(|error| failed(&error))
}

/// Creates the consumer unless it exists. An existing one stays as it is, because a program of the operator's may have
/// created it for itself.
pub async fn create(link: &Link, config: &ConsumerConfig) -> Result<()> {
    match info_of(link, config.stream, &config.name).await? {
        Some(_) => Ok(()),
        None => ensure(link, config).await,
    }
}

/// Deletes a consumer that nobody reads: no pull waits for messages, and nothing was delivered or acknowledged lately.
pub async fn retire(link: &Link, stream: &str, name: &str) -> Result<()> {
    let Some(info) = info_of(link, stream, name).await? else {
        return Ok(());
    };
    let lately = crate::clock::unix_seconds().saturating_sub(UNREAD_AFTER.as_secs());
    let active = [info.delivered.last_active, info.ack_floor.last_active, Some(info.created)];
    let is_read = info.num_waiting > 0
        || active
            .into_iter()
            .flatten()
            .any(|at| u64::try_from(at.unix_timestamp()).is_ok_and(|at| at > lately));
    if is_read {
        return Ok(());
    }

    delete(link, stream, name).await?;
    tracing::info!(stream, consumer = name, "deleted a consumer of an older version that nobody reads");
    Ok(())
}

/// The filter of a consumer that has no backlog and for which no pull waits.
pub async fn idle_filter(link: &Link, stream: &str, name: &str) -> Result<Option<String>> {
    let info = info_of(link, stream, name).await?;
    let idle = info.filter(|info| info.num_pending == 0 && info.num_ack_pending == 0 && info.num_waiting == 0);
    Ok(idle.map(|info| info.config.filter_subject))
}

pub async fn delete(link: &Link, stream: &str, name: &str) -> Result<()> {
    let what = format!("cannot delete consumer {name} of stream {stream}");
    let deleted = streams::api::<Value>(link, &format!("CONSUMER.DELETE.{stream}.{name}"), &what).await?;
    deleted.map(drop).map_err(|error| streams::unavailable(&what, &error))
}

async fn info_of(link: &Link, stream: &str, name: &str) -> Result<Option<Info>> {
    let what = format!("cannot query consumer {name} of stream {stream}");
    match streams::api::<Info>(link, &format!("CONSUMER.INFO.{stream}.{name}"), &what).await? {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.error_code() == ErrorCode::CONSUMER_NOT_FOUND => Ok(None),
        Err(error) => Err(streams::unavailable(&what, &error)),
    }
}

/// How a pull ended.
enum PullEnd {
    /// All messages that it asked for have arrived.
    Complete,
    /// It has expired, or there are no more messages.
    Done,
    /// The consumer was dropped.
    Dropped,
    /// The server refused the pull, for this reason. It may accept the next one.
    Refused(String),
    /// All shared places are taken.
    Full,
}

/// How the pulls of one subscription ended.
enum Served {
    Dropped,
    Full,
}

/// What a pull asks for.
struct Pull {
    batch: usize,
    expires: Option<Duration>,
}

impl Pull {
    /// Waits for messages.
    fn waiting(batch: usize) -> Self {
        Self { batch, expires: Some(PULL_EXPIRES) }
    }
}

/// Where the places of a pull's deliveries come from.
enum Source {
    Reserved(Reserved),
    /// Reserved when a message arrives.
    OnArrival,
}

/// One subscription and its pulls.
struct Session {
    inbox: String,
    incoming: Subscriber,
    connects: watch::Receiver<u64>,
}

struct Pump {
    link: Arc<Link>,
    config: ConsumerConfig,
    sender: mpsc::Sender<Delivery>,
    places: Member,
    cancel: CancellationToken,
}

impl Pump {
    async fn run(self) {
        // `start` has just declared the consumer.
        let mut declared = true;
        loop {
            let reason = match self.serve(declared).await {
                Ok(Served::Dropped) => return,
                Ok(Served::Full) => {
                    declared = true;
                    tokio::select! {
                        () = self.cancel.cancelled() => return,
                        () = tokio::time::sleep(FULL_PAUSE) => continue,
                    }
                }
                Err(reason) => reason,
            };

            let (stream, consumer) = (self.config.stream, &self.config.name);
            tracing::warn!(reason, stream, consumer, "consumer lost its stream; resubscribing");
            declared = false;

            tokio::select! {
                () = self.cancel.cancelled() => return,
                () = tokio::time::sleep(RETRY_DELAY) => {}
            }
        }
    }

    /// Pulls until the consumer is dropped, all shared places are taken, or the server or connection fails (`Err` with
    /// the reason). One subscription serves all pulls; each pull has its own reply subject below it.
    async fn serve(&self, declared: bool) -> Result<Served, String> {
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
        let (inbox, incoming) = tokio::select! {
            () = self.cancel.cancelled() => return Ok(Served::Dropped),
            begun = begin => begun.map_err(|error: Error| error.to_string())?,
        };

        let mut session = Session { inbox, incoming, connects };
        let ended = self.pull(&mut session).await;
        self.leave(session.incoming).await;
        ended
    }

    /// Unsubscribes and naks messages that have arrived but were not delivered. The server must process the unsubscribe
    /// first; otherwise it would redeliver them here.
    async fn leave(&self, mut incoming: Subscriber) {
        let unsubscribed = async {
            subscription::leave(&mut incoming).await?;
            self.link.round_trip(LEAVE_DEADLINE).await
        };
        if let Err(error) = unsubscribed.await {
            tracing::debug!(%error, "cannot unsubscribe; pulled messages are redelivered after their ack wait");
            return;
        }

        while let Some(message) = subscription::arrived(&mut incoming) {
            if let (None, Some(reply)) = (message.status, message.reply) {
                let settle = Settle { link: self.link.clone(), reply };
                let returned = settle.settle(Outcome::Nak(Duration::ZERO)).await;
                returned.unwrap_or_else(|error| {
                    tracing::debug!(%error, "cannot nak a message; it is redelivered after its ack wait");
                });
            }
        }
    }

    /// Sends one pull after another. It ends only where no message is in hand.
    async fn pull(&self, session: &mut Session) -> Result<Served, String> {
        let mut pause = PAUSE_MIN;
        for number in 0_u64.. {
            let ended = match self.places.is_alone() {
                true => self.pull_alone(number, session).await?,
                false => self.pull_beside_others(number, session).await?,
            };
            match ended {
                PullEnd::Complete | PullEnd::Done => pause = PAUSE_MIN,
                PullEnd::Dropped => return Ok(Served::Dropped),
                PullEnd::Full => return Ok(Served::Full),
                PullEnd::Refused(why) => {
                    let (stream, consumer) = (self.config.stream, &self.config.name);
                    tracing::debug!(why, stream, consumer, "the server refused a pull; trying again");
                    let pausing = tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0)));
                    tokio::select! {
                        () = self.cancel.cancelled() => return Ok(Served::Dropped),
                        () = pausing => {}
                    }
                    pause = PAUSE_MAX.min(2 * pause);
                }
            }
        }
        Ok(Served::Dropped)
    }

    /// One pull that holds its places until it ends.
    async fn pull_alone(&self, number: u64, session: &mut Session) -> Result<PullEnd, String> {
        // A wide consumer waits until half of its queue is free, so that it does not pull messages one by one. A narrow
        // one must not leave a worker idle while others are busy.
        let half = self.sender.max_capacity().div_ceil(2);
        let least = if self.places.size() > PULL_MAX { half } else { 1 };

        let Some(reserved) = self.reserve(least).await else {
            return Ok(PullEnd::Dropped);
        };
        let pull = Pull::waiting(reserved.len());
        self.exchange(&number.to_string(), pull, session, Source::Reserved(reserved))
            .await
    }

    /// Asks for what is stored, then waits for the next message.
    async fn pull_beside_others(&self, number: u64, session: &mut Session) -> Result<PullEnd, String> {
        let Some(reserved) = self.reserve(1).await else {
            return Ok(PullEnd::Dropped);
        };
        let (batch, linger) = (reserved.len(), reserved.len() > 1);
        let stored = Pull { batch, expires: linger.then_some(LINGER) };
        let ended = self
            .exchange(&number.to_string(), stored, session, Source::Reserved(reserved))
            .await?;
        if !matches!(ended, PullEnd::Done) {
            return Ok(ended);
        }
        if self.places.full().now_or_never().is_some() {
            return Ok(PullEnd::Full);
        }
        self.exchange(&format!("{number}-next"), Pull::waiting(1), session, Source::OnArrival)
            .await
    }

    /// Waits until the queue and the places have room for `least` deliveries; reserves places for what fits the queue.
    /// `None` if the consumer was dropped.
    async fn reserve(&self, least: usize) -> Option<Reserved> {
        let reserved = async {
            drop(self.sender.reserve_many(least).await.ok()?);
            Some(self.places.reserve(least, self.sender.capacity()).await)
        };
        tokio::select! {
            () = self.cancel.cancelled() => None,
            reserved = reserved => reserved,
        }
    }

    /// Sends one pull of this name and delivers its messages.
    async fn exchange(&self, name: &str, pull: Pull, session: &mut Session, source: Source) -> Result<PullEnd, String> {
        let (reply, batch) = (format!("{}.{name}", session.inbox), pull.batch);
        self.request(&reply, pull).await.map_err(|error| error.to_string())?;
        self.receive(session, &reply, batch, source).await
    }

    /// Sends one pull request, to be answered on `reply`.
    async fn request(&self, reply: &str, pull: Pull) -> Result<()> {
        let request = pull::BatchConfig {
            batch: pull.batch,
            expires: pull.expires,
            no_wait: pull.expires.is_none(),
            // The server refuses heartbeats that are not much more frequent than the pull is long.
            idle_heartbeat: pull
                .expires
                .filter(|time| *time > 2 * HEARTBEAT)
                .map_or(Duration::ZERO, |_| HEARTBEAT),
            ..pull::BatchConfig::default()
        };
        let message = crate::Message {
            subject: format!("{API_PREFIX}.CONSUMER.MSG.NEXT.{}.{}", self.config.stream, self.config.name).into(),
            reply: Some(reply.into()),
            payload: serde_json::to_vec(&request)
                .expect("a pull request serializes to JSON")
                .into(),
            ..crate::Message::default()
        };
        self.link.publish(message).await
    }

    /// The place of a delivery that has arrived; `None` if there is none.
    async fn place(&self, source: &mut Source) -> Option<Place> {
        match source {
            Source::Reserved(reserved) => reserved.take(),
            Source::OnArrival => timeout(PLACE_DEADLINE, self.places.reserve(1, 1)).await.ok()?.take(),
        }
    }

    /// Delivers the messages of one pull until it ends. An error means that the server may have lost the consumer.
    async fn receive(
        &self,
        session: &mut Session,
        reply: &str,
        batch: usize,
        mut source: Source,
    ) -> Result<PullEnd, String> {
        let mut left = batch;
        while left > 0 {
            // Only this wait ends early: what has arrived is delivered or returned.
            let message = tokio::select! {
                message = timeout(SILENCE_MAX, session.incoming.next()) => message,
                () = self.cancel.cancelled() => return Ok(PullEnd::Dropped),
                // After a reconnect the server no longer knows the pull.
                _ = session.connects.changed() => return Err("the connection was re-established".into()),
                () = self.places.full(), if matches!(source, Source::OnArrival) => return Ok(PullEnd::Full),
            };
            let message = message
                .map_err(|_| "the server sent no message or heartbeat".to_string())?
                .ok_or("the connection is closed")?;

            // Messages carry no status; status messages report on the pull itself.
            let Some(status) = message.status else {
                left -= 1;
                let Some(delivery) = self.delivery(message) else {
                    tracing::error!(stream = self.config.stream, "message without JetStream metadata ignored");
                    continue;
                };
                let place = self.place(&mut source).await;
                if !self.deliver(delivery, place).await {
                    return Ok(PullEnd::Dropped);
                }
                continue;
            };

            // The end of an earlier pull may arrive late; it does not end this one.
            if status == StatusCode::IDLE_HEARTBEAT || message.subject.as_str() != reply {
                continue;
            }

            let ended = [StatusCode::TIMEOUT, StatusCode::NOT_FOUND].contains(&status);
            let text = message.description.unwrap_or_default();
            if ended
                || ["Batch Completed", "Exceeded MaxAckPending"]
                    .iter()
                    .any(|why| text.contains(why))
            {
                return Ok(PullEnd::Done);
            }
            // The consumer exists, but has too many pulls, or its server is about to change.
            if ["Exceeded MaxWaiting", "Leadership Change", "Server Shutdown"]
                .iter()
                .any(|why| text.contains(why))
            {
                return Ok(PullEnd::Refused(text));
            }
            return Err(format!("{status} {text}"));
        }
        Ok(PullEnd::Complete)
    }

    /// Queues the delivery, or returns it to the stream if there is no place for it. Returns `false` if the consumer was
    /// dropped.
    async fn deliver(&self, mut delivery: Delivery, place: Option<Place>) -> bool {
        if place.is_none() {
            crate::give_back(&delivery).await;
            return true;
        }

        delivery.place = place;
        // Only this task fills the queue, and it requested no more than fits. A `send` could be cancelled while it waits
        // for the scheduler, and the message would come back only after its ack wait.
        match self.sender.try_send(delivery) {
            Ok(()) => true,
            Err(TrySendError::Full(delivery)) => {
                crate::give_back(&delivery).await;
                true
            }
            Err(TrySendError::Closed(delivery)) => {
                crate::give_back(&delivery).await;
                false
            }
        }
    }

    /// `None` if the message carries no JetStream metadata.
    fn delivery(&self, message: async_nats::Message) -> Option<Delivery> {
        let message = JetMessage { message, context: self.link.jetstream.clone() };
        let info = message.info().ok()?;
        let (sequence, delivered) = (info.stream_sequence, u32::try_from(info.delivered).unwrap_or(u32::MAX));
        let stored_ms = u64::try_from(info.published.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);

        let reply = message.reply.clone()?;
        let mut converted = convert::from_nats(message.message);
        // The reply subject is the address for acknowledgements, not a request to answer.
        converted.reply = None;
        let acker = Acker::Nats(Settle { link: self.link.clone(), reply });
        Some(Delivery { message: converted, delivered, sequence, stored_ms, acker, place: None })
    }
}

pub struct Settle {
    link: Arc<Link>,
    reply: Subject,
}

impl Settle {
    /// Waits for the server to confirm an ack or term; a nak or progress report is only sent.
    pub async fn settle(&self, outcome: Outcome) -> Result<()> {
        let kind = match outcome {
            Outcome::Ack => AckKind::Ack,
            Outcome::Term => AckKind::Term,
            Outcome::InProgress => AckKind::Progress,
            Outcome::Nak(delay) => AckKind::Nak((!delay.is_zero()).then_some(delay)),
        };
        let payload: Bytes = kind.into();

        if matches!(outcome, Outcome::Ack | Outcome::Term) {
            return self
                .link
                .ask(&self.reply, HeaderMap::new(), payload, Awaited::Reply, ACK_DEADLINE)
                .await
                .map(drop);
        }

        let message = crate::Message {
            subject: self.reply.as_str().into(),
            payload,
            ..crate::Message::default()
        };
        self.link.publish(message).await
    }
}
