//! Who waits for which reply: one wildcard subscription for all requests of a connection, and a slab behind it.
//!
//! `async_nats::Client::request` keeps about 353 bytes for every request that times out. Here a slot is freed when its
//! holder goes, answered or not, and its generation keeps a late reply from the slot's next holder.

use async_nats::Message;
use parking_lot::Mutex;
use slab::Slab;
use tokio::sync::oneshot;

/// Set on the empty reply that tells a requester its request was dropped by a full queue.
pub const DROPPED_HEADER: &str = "Beamline-Dropped";

/// What counts as the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// The first message.
    Reply,
    /// A stream's word on a publish; what live subscribers of the subject say does not count.
    PubAck,
}

/// What became of a message that came to the inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handed {
    Over,
    /// Nobody waits for it any more.
    Late,
    /// Not the answer that somebody waits for, or none at all.
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

/// A place in the inbox; dropping it frees it.
pub struct Slot<'a> {
    inbox: &'a Inbox,
    slot: usize,
    generation: u64,
}

impl Inbox {
    pub fn new(prefix: String) -> Self {
        Self { prefix, waiters: Mutex::default() }
    }

    /// The subject of the one subscription.
    pub fn pattern(&self) -> String {
        format!("{}.*", self.prefix)
    }

    /// `None` once closed.
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

    /// Hands a reply to whoever waits for it.
    pub fn answer(&self, message: Message) -> Handed {
        let Some((slot, generation)) = parse(&message.subject) else { return Handed::Ignored };
        let mut waiters = self.waiters.lock();
        match waiters.slots.get(slot) {
            Some(waiting) if waiting.generation == generation => {
                if waiting.awaited == Awaited::PubAck && !is_pub_ack(&message) {
                    return Handed::Ignored;
                }
                // Whoever waited may have given up a moment ago and be about to free the slot.
                let handed = waiters.slots.remove(slot).answer.send(message);
                handed.map_or(Handed::Late, |()| Handed::Over)
            }
            _ => Handed::Late,
        }
    }

    /// The connection is lost: who waits now learns that nothing will come.
    pub fn lose(&self) {
        self.waiters.lock().slots.clear();
    }

    /// Everyone who waits learns that nothing will come.
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
    /// Where the answer must go.
    pub fn subject(&self) -> String {
        format!("{}.{}-{}", self.inbox.prefix, self.slot, self.generation)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut waiters = self.inbox.waiters.lock();
        if waiters.slots.get(self.slot).is_some_and(|waiting| waiting.generation == self.generation) {
            waiters.slots.remove(self.slot);
        }
    }
}

fn parse(subject: &str) -> Option<(usize, u64)> {
    let (_, token) = subject.rsplit_once('.')?;
    let (slot, generation) = token.split_once('-')?;
    Some((slot.parse().ok()?, generation.parse().ok()?))
}

fn is_pub_ack(message: &Message) -> bool {
    if message.status.is_some() {
        return true;
    }
    let said = serde_json::from_slice::<serde_json::Value>(&message.payload).unwrap_or_default();
    said.get("error").is_some_and(|error| error.get("err_code").is_some())
        || (said.get("stream").is_some() && said.get("seq").is_some())
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
    fn a_slot_given_up_is_free_and_its_late_reply_reaches_nobody() {
        let inbox = Inbox::new("_INBOX.me".into());
        let (first, answered) = inbox.reserve(Awaited::Reply).unwrap();
        let late = first.subject();
        drop((first, answered));
        assert_eq!(inbox.waiting(), 0);
        let (second, mut answered) = inbox.reserve(Awaited::Reply).unwrap();
        assert_eq!(inbox.answer(reply(late, "late")), Handed::Late);
        assert_eq!(inbox.answer(reply(second.subject(), "mine")), Handed::Over);
        assert_eq!(answered.try_recv().unwrap().payload, "mine");
        assert_eq!(inbox.waiting(), 0);
    }

    #[test]
    fn a_reply_between_the_deadline_and_the_slots_end_is_late_too() {
        let inbox = Inbox::new("_INBOX.me".into());
        let (slot, answered) = inbox.reserve(Awaited::Reply).unwrap();
        drop(answered);
        assert_eq!(inbox.answer(reply(slot.subject(), "late")), Handed::Late);
        drop(slot);
        assert_eq!(inbox.waiting(), 0);
    }

    #[test]
    fn a_lost_connection_tells_all_who_wait_and_none_who_come_after() {
        let inbox = Inbox::new("_INBOX.me".into());
        let waiting: Vec<_> = (0..3).map(|_| inbox.reserve(Awaited::Reply).unwrap()).collect();
        inbox.lose();
        let (next, mut answered) = inbox.reserve(Awaited::Reply).unwrap();
        for (slot, mut answered) in waiting {
            assert!(matches!(answered.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
            assert_eq!(inbox.answer(reply(slot.subject(), "late")), Handed::Late);
        }
        assert_eq!(inbox.answer(reply(next.subject(), "mine")), Handed::Over);
        assert_eq!(answered.try_recv().unwrap().payload, "mine");
    }

    #[test]
    fn a_subscriber_cannot_acknowledge_for_a_stream() {
        let inbox = Inbox::new("_INBOX.me".into());
        let (slot, mut answered) = inbox.reserve(Awaited::PubAck).unwrap();
        for not_it in ["", "{}", "hello", r#"{"error":"no"}"#] {
            assert_eq!(inbox.answer(reply(slot.subject(), not_it)), Handed::Ignored, "{not_it}");
        }
        assert_eq!(inbox.answer(reply(slot.subject(), r#"{"stream":"S","seq":1}"#)), Handed::Over);
        assert!(answered.try_recv().is_ok());
    }

    #[test]
    fn foreign_subjects_are_ignored_and_closing_tells_everyone() {
        let inbox = Inbox::new("_INBOX.me".into());
        let (_slot, mut answered) = inbox.reserve(Awaited::Reply).unwrap();
        for foreign in ["", "_INBOX.me", "_INBOX.me.x", "_INBOX.me.0", "_INBOX.me.-1-1"] {
            assert_eq!(inbox.answer(reply(foreign.into(), "")), Handed::Ignored, "{foreign}");
        }
        assert_eq!(inbox.answer(reply("_INBOX.me.9-9".into(), "")), Handed::Late);
        inbox.close();
        assert!(matches!(answered.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        assert!(inbox.reserve(Awaited::Reply).is_none());
    }
}
