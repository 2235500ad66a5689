//! One connected client, as the rest of the node sees it: its identity, its subscriptions and its outbox.

use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, MutexGuard};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use tokio::sync::Notify;
use wire::realtime::{ClientInfo, Disconnect, Encoding, Push, Reply, Unsubscribe, UnsubscribePush, encode_reply};
use wire::websocket::{self, Opcode};

pub struct Client {
    /// Unique on this node.
    pub number: u64,
    pub id: String,
    pub user: String,
    /// The sign-in of its newest token.
    login: Mutex<Option<String>>,
    /// The claim `info` of the connection token, as JSON.
    pub info: Bytes,
    pub encoding: Encoding,
    pub outbox: Arc<Outbox>,
    subscriptions: Mutex<HashMap<String, Held>>,
}

/// What a client holds of a subscription.
#[derive(Debug, Clone, Default)]
pub struct Held {
    pub presence: bool,
    pub join_leave: bool,
    /// When the subscription token expires, in Unix seconds.
    pub expires: Option<u64>,
    /// The claim `info` of the subscription token, as JSON.
    pub info: Bytes,
    /// The client missed publications, was told so and has not subscribed again.
    pub lost: bool,
}

impl Client {
    pub fn new(
        number: u64,
        user: String,
        login: Option<String>,
        info: Bytes,
        encoding: Encoding,
        outbox: Arc<Outbox>,
    ) -> Self {
        // Unlike `number`, unique across nodes: presence is keyed by it.
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

    /// A new token may be of another sign-in of the same user.
    pub fn set_login(&self, login: Option<String>) {
        *self.login.lock() = login;
    }

    pub fn reply(&self, reply: &Reply) {
        self.outbox.push_reply(frame(self.encoding, reply));
    }

    /// The client as others see it on a channel, with the `info` of its subscription token there.
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

    /// Whether the client holds the channel, even if its subscription was lost.
    pub fn holds(&self, channel: &str) -> bool {
        self.subscriptions.lock().contains_key(channel)
    }

    pub fn subscription_count(&self) -> usize {
        self.subscriptions.lock().len()
    }

    pub fn hold(&self, channel: &str, held: Held) {
        self.subscriptions.lock().insert(channel.into(), held);
    }

    /// Takes the expiry of a refreshed subscription token.
    pub fn extend(&self, channel: &str, expires: Option<u64>) {
        if let Some(held) = self.subscriptions.lock().get_mut(channel) {
            held.expires = expires;
        }
    }

    /// Tells the client that it missed publications, so that it subscribes again. Its presence stays until it has done
    /// so or has left.
    pub fn lose(&self, channel: &str) {
        if let Some(held) = self.subscriptions.lock().get_mut(channel) {
            held.lost = true;
        }
        self.unsubscribed(channel, Unsubscribe::InsufficientState);
    }

    /// Tells the client that a subscription has ended.
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

/// The frames that wait for a client: bounded in bytes, filled by anyone, emptied by the client's session.
///
/// Replies do not count against the bound. They have their own: a command is carried out only when [`Outbox::room`]
/// resolves, so at most one reply goes beyond half the bound.
pub struct Outbox {
    queue: Mutex<Queue>,
    limit: usize,
    /// Notified when there is something to take.
    pub changed: Notify,
    sent: Notify,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    /// Bytes that were pushed and are not written yet.
    unsent: usize,
    /// How many of the unsent bytes are replies.
    replies: usize,
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

    /// Adds a frame that is no reply. A client whose unsent bytes would exceed the limit is closed as slow.
    pub fn push(&self, frame: Bytes) {
        let mut queue = self.queue.lock();
        // A single frame of any size is taken: it may be larger than the limit.
        if queue.unsent > 0 && queue.unsent + frame.len() > self.limit + queue.replies {
            // The client cannot take the backlog, and recovers it when it comes back.
            queue.frames.clear();
            queue.close.get_or_insert(Disconnect::Slow);
        }
        self.enqueue(queue, frame);
    }

    /// Adds a reply to one of the client's own commands.
    pub fn push_reply(&self, frame: Bytes) {
        let mut queue = self.queue.lock();
        queue.replies += frame.len();
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

    /// Resolves once there is room for another reply.
    pub async fn room(&self) {
        loop {
            // Registered before the check, so that a write in between is not missed.
            let sent = self.sent.notified();
            {
                let mut queue = self.queue.lock();
                // Frames are not marked as replies: what is unsent bounds how many of them can be left.
                queue.replies = queue.replies.min(queue.unsent);
                if queue.replies <= self.limit / 2 || queue.close.is_some() {
                    return;
                }
            }
            sent.await;
        }
    }

    /// Accepts no more frames. The session writes those that wait, then a close frame with this code.
    pub fn close(&self, code: Disconnect) {
        self.queue.lock().close.get_or_insert(code);
        self.changed.notify_one();
    }

    /// Moves the waiting frames into `frames`. Returns the close code once the connection is to be closed.
    pub fn take(&self, frames: &mut VecDeque<Bytes>) -> Option<Disconnect> {
        let mut queue = self.queue.lock();
        if frames.is_empty() {
            // The usual case: swapping moves no frames and reuses both buffers.
            std::mem::swap(frames, &mut queue.frames);
        } else {
            frames.append(&mut queue.frames);
        }
        queue.close
    }

    /// Counts written bytes, which makes room.
    pub fn written(&self, bytes: usize) {
        self.queue.lock().unsent -= bytes;
        self.sent.notify_waiters();
    }
}
