//! A connected client: its identity, its subscriptions and its outbox.

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
    /// The sign-in that the newest token was issued for (its claim `sid`).
    login: Mutex<Option<String>>,
    /// The claim `info` of the connection token, as JSON.
    pub info: Bytes,
    pub encoding: Encoding,
    pub outbox: Arc<Outbox>,
    subscriptions: Mutex<HashMap<String, Held>>,
}

/// One subscription of a client.
#[derive(Debug, Clone, Default)]
pub struct Held {
    pub presence: bool,
    pub join_leave: bool,
    /// When the subscription token expires, in Unix seconds.
    pub expires: Option<u64>,
    /// The claim `info` of the subscription token, as JSON.
    pub info: Bytes,
    /// The client missed publications, was notified, and has not resubscribed.
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
        // Unlike `number`, the id is unique across nodes: presence is keyed by it.
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

    /// Sets the sign-in of a new token, which may differ from that of the previous one.
    pub fn set_login(&self, login: Option<String>) {
        *self.login.lock() = login;
    }

    pub fn reply(&self, reply: &Reply) {
        self.outbox.push_reply(frame(self.encoding, reply));
    }

    /// The client as other clients see it on a channel, with the `info` of its subscription token for it.
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

    /// Whether the client has a subscription to the channel, even a lost one.
    pub fn has_subscription(&self, channel: &str) -> bool {
        self.subscriptions.lock().contains_key(channel)
    }

    pub fn subscription_count(&self) -> usize {
        self.subscriptions.lock().len()
    }

    pub fn add_subscription(&self, channel: &str, held: Held) {
        self.subscriptions.lock().insert(channel.into(), held);
    }

    /// Sets the expiry of a refreshed subscription token, in Unix seconds.
    pub fn extend(&self, channel: &str, expires: Option<u64>) {
        if let Some(held) = self.subscriptions.lock().get_mut(channel) {
            held.expires = expires;
        }
    }

    /// Notifies the client that it missed publications, so that it resubscribes. Its presence entry stays until the
    /// client has resubscribed or left.
    pub fn lose_subscription(&self, channel: &str) {
        if let Some(held) = self.subscriptions.lock().get_mut(channel) {
            held.lost = true;
        }
        self.unsubscribed(channel, Unsubscribe::InsufficientState);
    }

    /// Notifies the client that a subscription has ended.
    pub fn unsubscribed(&self, channel: &str, code: Unsubscribe) {
        let unsubscribe = UnsubscribePush { code: code as u32, reason: code.reason().into() };
        let push = Push { unsubscribe: Some(unsubscribe), ..Push::default() };

        self.outbox.push(frame(self.encoding, &Reply::push(channel, push)));
    }

    pub fn remove_subscription(&self, channel: &str) -> Option<Held> {
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

/// The queue of frames for a client, bounded in bytes. Any task may push; the client's session writes.
///
/// Replies do not count against this limit. They have their own: a command is carried out only once [`Outbox::room`]
/// resolves, so at most one reply exceeds half the limit.
pub struct Outbox {
    queue: Mutex<Queue>,
    limit: usize,
    /// Notified when there are frames or a close code to take.
    pub changed: Notify,
    /// Notified when bytes were written.
    sent: Notify,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    /// Bytes that were pushed but not yet written.
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

    /// Queues a push. A client whose unsent bytes would exceed the limit is disconnected as slow.
    pub fn push(&self, frame: Bytes) {
        let mut queue = self.queue.lock();
        // An empty queue accepts a frame of any size, even one larger than the limit.
        if queue.unsent > 0 && queue.unsent + frame.len() > self.limit + queue.replies {
            // The client cannot keep up with the backlog; it recovers it after it reconnects.
            queue.frames.clear();
            queue.close.get_or_insert(Disconnect::Slow);
        }
        self.enqueue(queue, frame);
    }

    /// Queues a reply to one of the client's own commands.
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
                // Queued frames are not marked as replies, but unsent replies cannot exceed the unsent bytes.
                queue.replies = queue.replies.min(queue.unsent);
                if queue.replies <= self.limit / 2 || queue.close.is_some() {
                    return;
                }
            }
            sent.await;
        }
    }

    /// Accepts no more frames. The session writes the queued ones, then a close frame with this code.
    pub fn close(&self, code: Disconnect) {
        self.queue.lock().close.get_or_insert(code);
        self.changed.notify_one();
    }

    /// Moves the queued frames into `frames`. Returns the close code if the connection must be closed.
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

    /// Counts bytes as written, which makes room for more frames.
    pub fn written(&self, bytes: usize) {
        self.queue.lock().unsent -= bytes;
        self.sent.notify_waiters();
    }
}
