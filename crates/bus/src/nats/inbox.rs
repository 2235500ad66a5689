//! Routes replies to requests in flight: one wildcard subscription per connection and a slab of waiters.
//!
//! `async_nats::Client::request` leaks about 353 bytes for every request that times out. Here a slot is freed when its
//! holder drops it, answered or not, and a generation number keeps a late reply from reaching the slot's next holder.

use async_nats::Message;
use parking_lot::Mutex;
use slab::Slab;
use tokio::sync::oneshot;

/// Header of the empty reply that tells a requester that a full queue dropped its request.
pub const DROPPED_HEADER: &str = "Beamline-Dropped";

/// Which message counts as the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// The first message.
    Reply,
    /// A JetStream acknowledgement of a publish. Replies from live subscribers of the subject do not count.
    PubAck,
}

/// The fate of a message that arrived in the inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    Delivered,
    /// The requester has stopped waiting.
    Late,
    /// Not addressed to a slot, or not the kind of reply that its holder awaits.
    Ignored,
}

pub struct Inbox {
    prefix: String,
    waiters: Mutex<Waiters>,
}

#[derive(Default)]
struct Waiters {
    slots: Slab<Waiting>,
    generation: u64,
    closed: bool,
}

struct Waiting {
    generation: u64,
    awaited: Awaited,
    answer: oneshot::Sender<Message>,
}

/// The reply address of one request; dropping it frees the slot.
pub struct Slot<'a> {
    inbox: &'a Inbox,
    slot: usize,
    generation: u64,
}

impl Inbox {
    pub fn new(prefix: String) -> Self {
        Self { prefix, waiters: Mutex::default() }
    }

    /// The wildcard subject to subscribe to; it covers the subjects of all slots.
    pub fn pattern(&self) -> String {
        format!("{}.*", self.prefix)
    }

    /// Reserves a slot for one request, or returns `None` once the inbox is closed. The receiver fails when the
    /// connection is lost.
    pub fn reserve(&self, awaited: Awaited) -> Option<(Slot<'_>, oneshot::Receiver<Message>)> {
        let (answer, answered) = oneshot::channel();
        let mut waiters = self.waiters.lock();
        if waiters.closed {
            return None;
        }

        waiters.generation += 1;
        let generation = waiters.generation;
        let slot = waiters.slots.insert(Waiting { generation, awaited, answer });
        Some((Slot { inbox: self, slot, generation }, answered))
    }

    /// Delivers a reply to the request that its subject names.
    pub fn answer(&self, message: Message) -> Disposition {
        let Some((slot, generation)) = parse(&message.subject) else {
            return Disposition::Ignored;
        };
        let mut waiters = self.waiters.lock();
        match waiters.slots.get(slot) {
            Some(waiting) if waiting.generation == generation => {
                if waiting.awaited == Awaited::PubAck && !is_pub_ack(&message) {
                    return Disposition::Ignored;
                }
                // The requester may have given up a moment ago without having freed the slot yet.
                let sent = waiters.slots.remove(slot).answer.send(message);
                sent.map_or(Disposition::Late, |()| Disposition::Delivered)
            }
            _ => Disposition::Late,
        }
    }

    /// Fails all requests in flight, because the connection was lost. New requests are possible.
    pub fn fail_all(&self) {
        self.waiters.lock().slots.clear();
    }

    /// Fails all requests in flight and refuses new ones.
    pub fn close(&self) {
        let mut waiters = self.waiters.lock();
        waiters.closed = true;
        waiters.slots.clear();
    }

    pub fn waiting(&self) -> usize {
        self.waiters.lock().slots.len()
    }
}

impl Slot<'_> {
    /// The reply subject to put on the request.
    pub fn subject(&self) -> String {
        format!("{}.{}-{}", self.inbox.prefix, self.slot, self.generation)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut waiters = self.inbox.waiters.lock();
        if waiters
            .slots
            .get(self.slot)
            .is_some_and(|waiting| waiting.generation == self.generation)
        {
            waiters.slots.remove(self.slot);
        }
    }
}

fn parse(subject: &str) -> Option<(usize, u64)> {
    let (_, token) = subject.rsplit_once('.')?;
    let (slot, generation) = token.split_once('-')?;
    Some((slot.parse().ok()?, generation.parse().ok()?))
}

/// Whether the message comes from JetStream: a status, an acknowledgement, or an error with JetStream's own code.
fn is_pub_ack(message: &Message) -> bool {
    if message.status.is_some() {
        return true;
    }
    let body = serde_json::from_slice::<serde_json::Value>(&message.payload).unwrap_or_default();
    body.get("error").is_some_and(|error| error.get("err_code").is_some())
        || (body.get("stream").is_some() && body.get("seq").is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(subject: String, payload: &'static str) -> Message {
        Message {
            subject: subject.into(),
            reply: None,
            payload: payload.into(),
            headers: None,
            status: None,
            description: None,
            length: 0,
        }
    }

    #[test]
    fn dropped_slot_is_freed_and_late_reply_misses_next_holder() {
        let inbox = Inbox::new("_INBOX.me".into());
        let (first, answered) = inbox.reserve(Awaited::Reply).unwrap();
        let late = first.subject();
        drop((first, answered));
        assert_eq!(inbox.waiting(), 0);

        let (second, mut answered) = inbox.reserve(Awaited::Reply).unwrap();
        assert_eq!(inbox.answer(reply(late, "late")), Disposition::Late);
        assert_eq!(inbox.answer(reply(second.subject(), "mine")), Disposition::Delivered);
        assert_eq!(answered.try_recv().unwrap().payload, "mine");
        assert_eq!(inbox.waiting(), 0);
    }

    #[test]
    fn reply_after_receiver_is_dropped_is_late() {
        let inbox = Inbox::new("_INBOX.me".into());
        let (slot, answered) = inbox.reserve(Awaited::Reply).unwrap();
        drop(answered);
        assert_eq!(inbox.answer(reply(slot.subject(), "late")), Disposition::Late);
        drop(slot);
        assert_eq!(inbox.waiting(), 0);
    }

    #[test]
    fn lost_connection_fails_requests_in_flight_but_not_later_ones() {
        let inbox = Inbox::new("_INBOX.me".into());
        let waiting: Vec<_> = (0..3).map(|_| inbox.reserve(Awaited::Reply).unwrap()).collect();
        inbox.fail_all();

        let (next, mut answered) = inbox.reserve(Awaited::Reply).unwrap();
        for (slot, mut answered) in waiting {
            assert!(matches!(answered.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
            assert_eq!(inbox.answer(reply(slot.subject(), "late")), Disposition::Late);
        }

        assert_eq!(inbox.answer(reply(next.subject(), "mine")), Disposition::Delivered);
        assert_eq!(answered.try_recv().unwrap().payload, "mine");
    }

    #[test]
    fn subscriber_reply_is_not_taken_for_a_pub_ack() {
        let inbox = Inbox::new("_INBOX.me".into());
        let (slot, mut answered) = inbox.reserve(Awaited::PubAck).unwrap();
        for payload in ["", "{}", "hello", r#"{"error":"no"}"#] {
            assert_eq!(inbox.answer(reply(slot.subject(), payload)), Disposition::Ignored, "{payload}");
        }
        assert_eq!(inbox.answer(reply(slot.subject(), r#"{"stream":"S","seq":1}"#)), Disposition::Delivered);
        assert!(answered.try_recv().is_ok());
    }

    #[test]
    fn foreign_subjects_are_ignored_and_close_fails_requests_in_flight() {
        let inbox = Inbox::new("_INBOX.me".into());
        let (_slot, mut answered) = inbox.reserve(Awaited::Reply).unwrap();
        for foreign in ["", "_INBOX.me", "_INBOX.me.x", "_INBOX.me.0", "_INBOX.me.-1-1"] {
            assert_eq!(inbox.answer(reply(foreign.into(), "")), Disposition::Ignored, "{foreign}");
        }
        assert_eq!(inbox.answer(reply("_INBOX.me.9-9".into(), "")), Disposition::Late);

        inbox.close();
        assert!(matches!(answered.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        assert!(inbox.reserve(Awaited::Reply).is_none());
    }
}
