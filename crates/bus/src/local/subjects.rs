//! Live subjects: who subscribes to what, queue groups, and requests that wait for their answer.

use crate::{Error, Message, Result, Subscription};
use parking_lot::{Mutex, RwLock};
use slab::Slab;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

const INBOX: &str = "_INBOX.";

#[derive(Default)]
pub struct Subjects {
    table: RwLock<Table>,
    requests: Mutex<Slab<Waiting>>,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Table {
    exact: HashMap<String, Vec<Entry>>,
    wildcards: Vec<(String, Entry)>,
}

#[derive(Clone)]
struct Entry {
    id: u64,
    queue: Option<Arc<str>>,
    sender: mpsc::Sender<Message>,
}

/// A request in flight. The generation keeps a late reply from reaching the slot's next owner.
struct Waiting {
    generation: u64,
    answer: oneshot::Sender<Message>,
}

impl Subjects {
    pub fn subscribe(self: &Arc<Self>, subject: &str, queue: Option<&str>, capacity: usize) -> Subscription {
        let (sender, receiver) = mpsc::channel(capacity.max(1));
        let id = self.next_id.fetch_add(1, Relaxed);
        let entry = Entry { id, queue: queue.map(Into::into), sender };
        let mut table = self.table.write();
        if is_wildcard(subject) {
            table.wildcards.push((subject.into(), entry));
        } else {
            table.exact.entry(subject.into()).or_default().push(entry);
        }
        let guard = Unsubscribe { subjects: self.clone(), subject: subject.into(), id };
        Subscription { receiver, _guard: Box::new(guard) }
    }

    /// Hands the message to every subscriber and one member of each queue group; how many took it.
    pub fn publish(&self, message: Message) -> usize {
        if message.subject.starts_with(INBOX) {
            return usize::from(self.answer(message));
        }
        let table = self.table.read();
        let exact = table.exact.get(&*message.subject).map(Vec::as_slice).unwrap_or_default();
        if table.wildcards.is_empty() && exact.len() == 1 {
            return usize::from(deliver(&exact[0], message));
        }
        let wild = table.wildcards.iter().filter(|(pattern, _)| matches(pattern, &message.subject));
        let entries: Vec<&Entry> = exact.iter().chain(wild.map(|(_, entry)| entry)).collect();
        let mut taken = 0;
        let mut groups: Vec<(&str, Vec<&Entry>)> = Vec::new();
        for entry in entries {
            match &entry.queue {
                None => taken += usize::from(deliver(entry, message.clone())),
                Some(queue) => match groups.iter_mut().find(|(name, _)| *name == &**queue) {
                    Some((_, members)) => members.push(entry),
                    None => groups.push((queue, vec![entry])),
                },
            }
        }
        for (_, members) in groups {
            // Not in turn: a turn that several groups share can fall to the same member of one every time.
            let first = rand::random_range(0..members.len());
            // A full member passes its turn on; only when all are full is the message dropped.
            let one = (0..members.len())
                .map(|n| members[(first + n) % members.len()])
                .find(|member| member.sender.try_send(message.clone()).is_ok());
            match one {
                Some(_) => taken += 1,
                None => dropped(&message),
            }
        }
        taken
    }

    pub async fn request(self: &Arc<Self>, mut message: Message, deadline: Duration) -> Result<Message> {
        let subject = message.subject.clone();
        let (answer, answered) = oneshot::channel();
        let generation = self.next_id.fetch_add(1, Relaxed);
        let slot = self.requests.lock().insert(Waiting { generation, answer });
        let _free = FreeSlot { subjects: self, slot, generation };
        message.reply = Some(format!("{INBOX}{slot}.{generation}").into());
        if self.publish(message) == 0 {
            return Err(Error::NoResponders(subject.to_string()));
        }
        match tokio::time::timeout(deadline, answered).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) | Err(_) => Err(Error::Timeout(subject.to_string())),
        }
    }

    fn answer(&self, message: Message) -> bool {
        let parsed = message.subject[INBOX.len()..].split_once('.');
        let Some((Ok(slot), Ok(generation))) = parsed.map(|(s, g)| (s.parse::<usize>(), g.parse::<u64>())) else {
            return false;
        };
        let mut requests = self.requests.lock();
        if requests.get(slot).is_some_and(|waiting| waiting.generation == generation) {
            return requests.remove(slot).answer.send(message).is_ok();
        }
        metrics::counter!("beamline_bus_late_replies_total").increment(1);
        false
    }

    #[cfg(test)]
    pub fn requests_in_flight(&self) -> usize {
        self.requests.lock().len()
    }
}

fn deliver(entry: &Entry, message: Message) -> bool {
    match entry.sender.try_send(message) {
        Ok(()) => true,
        Err(mpsc::error::TrySendError::Full(message)) => {
            dropped(&message);
            false
        }
        Err(mpsc::error::TrySendError::Closed(_)) => false,
    }
}

fn dropped(message: &Message) {
    metrics::counter!("beamline_bus_dropped_total").increment(1);
    tracing::warn!(subject = %message.subject, "a subscriber's queue is full; a message was dropped");
}

struct FreeSlot<'a> {
    subjects: &'a Subjects,
    slot: usize,
    generation: u64,
}

impl Drop for FreeSlot<'_> {
    fn drop(&mut self) {
        let mut requests = self.subjects.requests.lock();
        if requests.get(self.slot).is_some_and(|waiting| waiting.generation == self.generation) {
            requests.remove(self.slot);
        }
    }
}

struct Unsubscribe {
    subjects: Arc<Subjects>,
    subject: String,
    id: u64,
}

impl Drop for Unsubscribe {
    fn drop(&mut self) {
        let mut table = self.subjects.table.write();
        if is_wildcard(&self.subject) {
            table.wildcards.retain(|(_, entry)| entry.id != self.id);
        } else if let Some(entries) = table.exact.get_mut(&self.subject) {
            entries.retain(|entry| entry.id != self.id);
            if entries.is_empty() {
                table.exact.remove(&self.subject);
            }
        }
    }
}

fn is_wildcard(subject: &str) -> bool {
    subject.split('.').any(|token| token == "*" || token == ">")
}

/// Whether `pattern` (with `*` for one token, `>` for one or more at the end) takes `subject`.
pub fn matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for part in pattern.split('.') {
        match (part, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (part, Some(token)) if part == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// A subject to publish to: no wildcards.
pub fn check_subject(subject: &str) -> Result<()> {
    let fits = !subject.is_empty()
        && subject.len() <= 1024
        && subject
            .split('.')
            .all(|token| !token.is_empty() && token.bytes().all(|b| b > b' ' && b != 0x7f && b != b'*' && b != b'>'));
    fits.then_some(()).ok_or_else(|| Error::InvalidSubject(subject.into()))
}

/// A subject to subscribe to.
pub fn check_pattern(pattern: &str) -> Result<()> {
    let last = pattern.split('.').count() - 1;
    let fits = pattern.split('.').enumerate().all(|(n, token)| match token {
        "*" => true,
        ">" => n == last,
        token => check_subject(token).is_ok(),
    });
    fits.then_some(()).ok_or_else(|| Error::InvalidSubject(pattern.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_take_what_they_should() {
        for (pattern, subject, expected) in [
            ("a.b", "a.b", true),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c", false),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            ("*.b", "a.b", true),
            (">", "a", true),
            ("a.b", "a.bc", false),
        ] {
            assert_eq!(matches(pattern, subject), expected, "{pattern} {subject}");
        }
    }

    #[test]
    fn bad_subjects_are_refused() {
        for bad in ["", "a..b", ".a", "a.", "a b", "a.\n", "a.*", "a.>"] {
            assert!(check_subject(bad).is_err(), "{bad:?}");
        }
        assert!(check_pattern("a.>.b").is_err() && check_pattern("a.*.>").is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_timed_out_request_leaves_nothing_behind() {
        let subjects = Arc::new(Subjects::default());
        let mut silent = subjects.subscribe("s", None, 2000);
        for _ in 0..1000 {
            let message = Message { subject: "s".into(), ..Message::default() };
            let outcome = subjects.request(message, Duration::from_millis(1)).await;
            assert!(matches!(outcome, Err(Error::Timeout(_))));
        }
        assert_eq!(subjects.requests_in_flight(), 0);
        let late = silent.next().await.unwrap().reply.unwrap();
        assert_eq!(subjects.publish(Message { subject: late, ..Message::default() }), 0, "a late reply reaches nobody");
    }
}
