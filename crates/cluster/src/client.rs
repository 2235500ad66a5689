//! One connected client, as the rest of the node sees it: who it is, where it is subscribed, what it is owed.

use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, MutexGuard};
use std::collections::{HashMap, VecDeque};
use tokio::sync::Notify;
use wire::realtime::{ClientInfo, Disconnect, Encoding, Push, Reply, Unsubscribe, UnsubscribePush, encode_reply};
use wire::websocket::{self, Opcode};

pub struct Client {
    /// Of this node's life.
    pub number: u64,
    pub id: String,
    pub user: String,
    /// The sign-in that its newest token was made for.
    login: Mutex<Option<String>>,
    /// JSON from the token.
    pub info: Bytes,
    pub encoding: Encoding,
    pub outbox: std::sync::Arc<Outbox>,
    subscriptions: Mutex<HashMap<String, Held>>,
}

/// A subscription as its client holds it.
#[derive(Debug, Clone, Default)]
pub struct Held {
    pub presence: bool,
    pub join_leave: bool,
    /// Of a private channel's token, seconds since the epoch.
    pub expires: Option<u64>,
    /// JSON from the subscription's token.
    pub info: Bytes,
    /// It missed something, was told so and has not subscribed again.
    pub lost: bool,
}

impl Client {
    pub fn new(
        number: u64,
        user: String,
        login: Option<String>,
        info: Bytes,
        encoding: Encoding,
        outbox: std::sync::Arc<Outbox>,
    ) -> Self {
        let id = uuid::Uuid::new_v4().to_string();
        Self {
            number,
            id,
            user,
            login: Mutex::new(login),
            info,
            encoding,
            outbox,
            subscriptions: Mutex::default(),
        }
    }

    pub fn is_of_login(&self, login: &str) -> bool {
        self.login.lock().as_deref() == Some(login)
    }

    /// A refreshed token may come from another sign-in of the same user.
    pub fn set_login(&self, login: Option<String>) {
        *self.login.lock() = login;
    }

    pub fn reply(&self, reply: &Reply) {
        self.outbox.push_reply(frame(self.encoding, reply));
    }

    /// Who it is on a channel: with what its subscription token says of it there.
    pub fn info_on(&self, channel: &str) -> ClientInfo {
        let chan_info = self
            .subscriptions
            .lock()
            .get(channel)
            .map(|held| held.info.clone())
            .unwrap_or_default();
        ClientInfo {
            user: self.user.clone(),
            client: self.id.clone(),
            conn_info: self.info.clone(),
            chan_info,
        }
    }

    pub fn is_subscribed(&self, channel: &str) -> bool {
        self.subscriptions.lock().get(channel).is_some_and(|held| !held.lost)
    }

    /// Whether it has the channel, be it lost.
    pub fn holds(&self, channel: &str) -> bool {
        self.subscriptions.lock().contains_key(channel)
    }

    pub fn subscription_count(&self) -> usize {
        self.subscriptions.lock().len()
    }

    pub fn hold(&self, channel: &str, held: Held) {
        self.subscriptions.lock().insert(channel.into(), held);
    }

    /// A refreshed token says until when it may stay.
    pub fn extend(&self, channel: &str, expires: Option<u64>) {
        if let Some(held) = self.subscriptions.lock().get_mut(channel) {
            held.expires = expires;
        }
    }

    /// It missed something on a channel: it is told to subscribe again. Its presence stays until it has, or is gone.
    pub fn lose(&self, channel: &str) {
        if let Some(held) = self.subscriptions.lock().get_mut(channel) {
            held.lost = true;
        }
        self.unsubscribed(channel, Unsubscribe::InsufficientState);
    }

    /// Tells it that a subscription is over.
    pub fn unsubscribed(&self, channel: &str, code: Unsubscribe) {
        let unsubscribe = UnsubscribePush { code: code as u32, reason: code.reason().into() };
        let push = Push { unsubscribe: Some(unsubscribe), ..Push::default() };
        self.outbox.push(frame(self.encoding, &Reply::push(channel, push)));
    }

    pub fn forget(&self, channel: &str) -> Option<Held> {
        self.subscriptions.lock().remove(channel)
    }

    pub fn subscriptions(&self) -> Vec<(String, Held)> {
        self.subscriptions
            .lock()
            .iter()
            .map(|(channel, held)| (channel.clone(), held.clone()))
            .collect()
    }
}

/// A reply as one WebSocket frame.
pub fn frame(encoding: Encoding, reply: &Reply) -> Bytes {
    let mut payload = Vec::with_capacity(128);
    encode_reply(encoding, reply, &mut payload);
    let opcode = match encoding {
        Encoding::Json => Opcode::Text,
        Encoding::Protobuf => Opcode::Binary,
    };
    let mut frame = BytesMut::with_capacity(payload.len() + 10);
    websocket::encode(opcode, &payload, &mut frame);
    frame.freeze()
}

/// What a client is owed: bounded in bytes, filled by anyone, emptied by its session.
///
/// Answers to a client's own commands do not count against the bound: the next command waits for [`Outbox::room`], so
/// there is never more of them than one beyond half the bound.
pub struct Outbox {
    queue: Mutex<Queue>,
    limit: usize,
    /// There is something to take.
    pub changed: Notify,
    sent: Notify,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    /// Bytes that were pushed and are not written.
    unsent: usize,
    /// As many of them are answers.
    answers: usize,
    close: Option<Disconnect>,
}

impl Outbox {
    pub fn new(limit: usize) -> Self {
        Self {
            queue: Mutex::default(),
            limit,
            changed: Notify::new(),
            sent: Notify::new(),
        }
    }

    /// What the client did not ask for: a client that does not take it in time is closed as slow.
    pub fn push(&self, frame: Bytes) {
        let mut queue = self.queue.lock();
        if queue.unsent > 0 && queue.unsent + frame.len() > self.limit + queue.answers {
            queue.frames.clear();
            queue.close.get_or_insert(Disconnect::Slow);
        }
        self.enqueue(queue, frame);
    }

    pub fn push_reply(&self, frame: Bytes) {
        let mut queue = self.queue.lock();
        queue.answers += frame.len();
        self.enqueue(queue, frame);
    }

    fn enqueue(&self, mut queue: MutexGuard<'_, Queue>, frame: Bytes) {
        if queue.close.is_none() {
            queue.unsent += frame.len();
            queue.frames.push_back(frame);
        }
        drop(queue);
        self.changed.notify_one();
    }

    /// Resolves once there is room for a further answer.
    pub async fn room(&self) {
        loop {
            let sent = self.sent.notified();
            {
                let mut queue = self.queue.lock();
                queue.answers = queue.answers.min(queue.unsent);
                if queue.answers <= self.limit / 2 || queue.close.is_some() {
                    return;
                }
            }
            sent.await;
        }
    }

    /// Nothing is taken any more; what waits is still written, then the goodbye.
    pub fn close(&self, code: Disconnect) {
        self.queue.lock().close.get_or_insert(code);
        self.changed.notify_one();
    }

    /// Moves what waits into `frames`; the code, once it is to be closed.
    pub fn take(&self, frames: &mut VecDeque<Bytes>) -> Option<Disconnect> {
        let mut queue = self.queue.lock();
        if frames.is_empty() {
            std::mem::swap(frames, &mut queue.frames);
        } else {
            frames.append(&mut queue.frames);
        }
        queue.close
    }

    pub fn written(&self, bytes: usize) {
        self.queue.lock().unsent -= bytes;
        self.sent.notify_waiters();
    }
}
