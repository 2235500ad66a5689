//! One connected client, as the rest of the node sees it: who it is, where it is subscribed, what it is owed.

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tokio::sync::Notify;
use wire::realtime::{ClientInfo, Disconnect, Encoding, Reply, encode_reply};
use wire::websocket::{self, Opcode};

pub struct Client {
    /// Of this node's life.
    pub number: u64,
    pub id: String,
    pub user: String,
    /// JSON from the token.
    pub info: Bytes,
    pub encoding: Encoding,
    pub outbox: std::sync::Arc<Outbox>,
    subscriptions: Mutex<HashMap<String, Held>>,
}

/// A subscription as its client holds it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Held {
    pub presence: bool,
    pub join_leave: bool,
    /// Of a private channel's token, seconds since the epoch.
    pub expires: Option<u64>,
}

impl Client {
    pub fn new(number: u64, user: String, info: Bytes, encoding: Encoding, outbox: std::sync::Arc<Outbox>) -> Self {
        let id = uuid::Uuid::new_v4().to_string();
        Self { number, id, user, info, encoding, outbox, subscriptions: Mutex::default() }
    }

    pub fn client_info(&self) -> ClientInfo {
        ClientInfo {
            user: self.user.clone(),
            client: self.id.clone(),
            conn_info: self.info.clone(),
            chan_info: Bytes::new(),
        }
    }

    pub fn reply(&self, reply: &Reply) {
        self.outbox.push(frame(self.encoding, reply));
    }

    pub fn is_subscribed(&self, channel: &str) -> bool {
        self.subscriptions.lock().contains_key(channel)
    }

    pub fn subscription_count(&self) -> usize {
        self.subscriptions.lock().len()
    }

    pub fn hold(&self, channel: &str, held: Held) {
        self.subscriptions.lock().insert(channel.into(), held);
    }

    pub fn forget(&self, channel: &str) -> Option<Held> {
        self.subscriptions.lock().remove(channel)
    }

    pub fn subscriptions(&self) -> Vec<(String, Held)> {
        self.subscriptions.lock().iter().map(|(channel, held)| (channel.clone(), *held)).collect()
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
pub struct Outbox {
    queue: Mutex<Queue>,
    /// Bytes that were pushed and are not written.
    unsent: AtomicUsize,
    limit: usize,
    pub changed: Notify,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    close: Option<Disconnect>,
}

impl Outbox {
    pub fn new(limit: usize) -> Self {
        Self { queue: Mutex::default(), unsent: AtomicUsize::new(0), limit, changed: Notify::new() }
    }

    pub fn push(&self, frame: Bytes) {
        let mut queue = self.queue.lock();
        if queue.close.is_some() {
            return;
        }
        let unsent = self.unsent.fetch_add(frame.len(), Relaxed);
        if unsent > 0 && unsent + frame.len() > self.limit {
            queue.frames.clear();
            queue.close = Some(Disconnect::Slow);
        } else {
            queue.frames.push_back(frame);
        }
        drop(queue);
        self.changed.notify_one();
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
        self.unsent.fetch_sub(bytes, Relaxed);
    }
}
