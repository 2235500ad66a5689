//! Live subjects of the embedded bus: the subscription table, queue groups, and requests in flight.

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

/// A request in flight. The generation distinguishes it from earlier requests in the same slot, whose replies are late.
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
        Subscription { receiver, guard: Some(Box::new(guard)) }
    }

    /// Delivers the message to every plain subscriber and to one member of each queue group. Returns how many accepted
    /// it.
    pub fn publish(&self, message: Message) -> usize {
        if message.subject.starts_with(INBOX) {
            return usize::from(self.answer(message));
        }

        // Fast path: one exact subscriber receives the message without a clone.
        let table = self.table.read();
        let exact = table
            .exact
            .get(&*message.subject)
            .map(Vec::as_slice)
            .unwrap_or_default();
        if table.wildcards.is_empty() && exact.len() == 1 {
            return usize::from(deliver(&exact[0], message));
        }

        let wild = table
            .wildcards
            .iter()
            .filter(|(pattern, _)| matches(pattern, &message.subject));
        let entries: Vec<&Entry> = exact.iter().chain(wild.map(|(_, entry)| entry)).collect();
        let mut accepted = 0;
        let mut groups: Vec<(&str, Vec<&Entry>)> = Vec::new();
        for entry in entries {
            match &entry.queue {
                None => accepted += usize::from(deliver(entry, message.clone())),
                Some(queue) => match groups.iter_mut().find(|(name, _)| *name == &**queue) {
                    Some((_, members)) => members.push(entry),
                    None => groups.push((queue, vec![entry])),
                },
            }
        }

        for (_, members) in groups {
            // A random start rather than round robin: a counter shared by several groups can select the same member
            // of one group every time.
            let first = rand::random_range(0..members.len());
            // A full member is skipped; the message is dropped only when all members are full.
            let recipient = (0..members.len())
                .map(|n| members[(first + n) % members.len()])
                .find(|member| member.sender.try_send(message.clone()).is_ok());
            match recipient {
                Some(_) => accepted += 1,
                None => log_dropped(&message),
            }
        }
        accepted
    }

    pub async fn request(self: &Arc<Self>, mut message: Message, deadline: Duration) -> Result<Message> {
        let subject = message.subject.clone();
        let (answer, answered) = oneshot::channel();
        let generation = self.next_id.fetch_add(1, Relaxed);
        let slot = self.requests.lock().insert(Waiting { generation, answer });
        // Frees the slot on timeout and also when the caller drops this future.
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

    /// Delivers a reply to the request in flight that its subject names; returns whether one accepted it.
    fn answer(&self, message: Message) -> bool {
        let parsed = message.subject[INBOX.len()..].split_once('.');
        let Some((Ok(slot), Ok(generation))) = parsed.map(|(s, g)| (s.parse::<usize>(), g.parse::<u64>())) else {
            return false;
        };

        let mut requests = self.requests.lock();
        if requests
            .get(slot)
            .is_some_and(|waiting| waiting.generation == generation)
        {
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
            log_dropped(&message);
            false
        }
        Err(mpsc::error::TrySendError::Closed(_)) => false,
    }
}

fn log_dropped(message: &Message) {
    metrics::counter!("beamline_bus_dropped_total").increment(1);
    tracing::warn!(subject = %message.subject, "subscriber queue full; message dropped");
}

/// Frees the request's slot when the requester stops waiting.
struct FreeSlot<'a> {
    subjects: &'a Subjects,
    slot: usize,
    generation: u64,
}

impl Drop for FreeSlot<'_> {
    fn drop(&mut self) {
        let mut requests = self.subjects.requests.lock();
        if requests
            .get(self.slot)
            .is_some_and(|waiting| waiting.generation == self.generation)
        {
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

/// Whether `pattern` matches `subject`. `*` matches one token; `>`, as the last token, matches one or more.
pub fn matches(pattern: &str, subject: &str) -> bool {
    // Most subjects differ from most patterns before the first wildcard, so bytes are compared as far as they agree.
    let same = pattern.bytes().zip(subject.bytes()).take_while(|(p, s)| p == s).count();
    if same == pattern.len() && same == subject.len() {
        return true;
    }
    if !matches!(pattern.as_bytes().get(same), Some(b'*' | b'>')) {
        return false;
    }

    // A wildcard is a token of its own, so both rests begin with a token.
    let mut tokens = subject[same..].split('.');
    for part in pattern[same..].split('.') {
        match (part, tokens.next()) {
            (_, None | Some("")) => return false,
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (part, Some(token)) if part == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// Accepts a subject to publish to: at most 1024 bytes, no empty token, white space, control character or wildcard.
pub fn check_subject(subject: &str) -> Result<()> {
    let fits = !subject.is_empty()
        && subject.len() <= 1024
        && subject
            .split('.')
            .all(|token| !token.is_empty() && token.bytes().all(|b| b > b' ' && b != 0x7f && b != b'*' && b != b'>'));
    fits.then_some(()).ok_or_else(|| Error::InvalidSubject(subject.into()))
}

/// Accepts a subject to subscribe to, which may hold wildcards.
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
    fn patterns_match_as_in_nats() {
        for (pattern, subject, expected) in [
            ("a.b", "a.b", true),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c", false),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            ("*.b", "a.b", true),
            (">", "a", true),
            ("a.b", "a.bc", false),
            ("a.bc", "a.b", false),
            ("a.b.c", "a.b", false),
            ("a.*.c", "a.b.c", true),
            ("a.*.c", "a.b.d", false),
            ("*.*", "a.b", true),
            ("*.>", "a", false),
        ] {
            assert_eq!(matches(pattern, subject), expected, "{pattern} {subject}");
        }
    }

    #[test]
    fn invalid_subjects_are_rejected() {
        for bad in ["", "a..b", ".a", "a.", "a b", "a.\n", "a.*", "a.>"] {
            assert!(check_subject(bad).is_err(), "{bad:?}");
        }
        assert!(check_pattern("a.>.b").is_err() && check_pattern("a.*.>").is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn timed_out_request_frees_its_slot() {
        let subjects = Arc::new(Subjects::default());
        let mut silent = subjects.subscribe("s", None, 2000);

        for _ in 0..1000 {
            let message = Message { subject: "s".into(), ..Message::default() };
            let outcome = subjects.request(message, Duration::from_millis(1)).await;
            assert!(matches!(outcome, Err(Error::Timeout(_))));
        }
        assert_eq!(subjects.requests_in_flight(), 0);

        let late = silent.next().await.unwrap().reply.unwrap();
        assert_eq!(
            subjects.publish(Message { subject: late, ..Message::default() }),
            0,
            "a late reply has no recipient"
        );
    }
}
