//! A consumer: its cursor and its outstanding deliveries.

use super::StoredAt;
use crate::local::record::{CursorRecord, DeliveredRecord, Group, Kind, SettledRecord};
use crate::local::subjects::matches;
use crate::{ConsumerConfig, Outcome};
use journal::Place;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub struct Consumer {
    pub filter: Option<String>,
    /// The cursor: messages before this sequence were delivered at least once, or did not match the filter.
    pub next: u64,
    /// The cursor in the log.
    flushed: u64,
    /// Outstanding deliveries, by sequence: delivered and not settled.
    out: BTreeMap<u64, Out>,
    /// The same deliveries by the time at which they are due for redelivery: `(due_ms, sequence)`.
    due: BTreeSet<(u64, u64)>,
    /// Number of messages that are not settled, delivered or not.
    pub pending: u64,
    /// Whether `max_ack_pending` reduced the last claim.
    blocked: bool,
    /// Whether this process has opened it.
    pub opened: bool,
}

#[derive(Clone, Copy)]
struct Out {
    delivered: u32,
    due_ms: u64,
}

/// A delivery of one message.
pub struct Claimed {
    pub sequence: u64,
    pub delivered: u32,
    pub stored_ms: u64,
    pub place: Place,
}

/// The effect of a settlement.
pub struct Settled {
    /// The message was acknowledged or terminated.
    pub done: bool,
    /// A claim may now return more messages.
    pub wakes: bool,
}

impl Consumer {
    pub fn new(next: u64) -> Self {
        Self { next, flushed: next, ..Self::default() }
    }

    pub fn wants(&self, subject: &str) -> bool {
        self.filter.as_deref().is_none_or(|filter| matches(filter, subject))
    }

    /// Whether the message is still to be delivered or settled.
    pub fn needs(&self, sequence: u64, subject: &str) -> bool {
        self.out.contains_key(&sequence) || (sequence >= self.next && self.wants(subject))
    }

    /// Claims up to `max` messages: first those due for redelivery, then new ones. `last` is the newest sequence of the
    /// stream.
    pub fn claim(
        &mut self,
        group: &mut Group,
        config: &ConsumerConfig,
        messages: &BTreeMap<u64, StoredAt>,
        last: u64,
        max: usize,
        clock_ms: u64,
    ) -> Vec<Claimed> {
        let due: Vec<u64> = self
            .due
            .range(..=(clock_ms, u64::MAX))
            .map(|(_, sequence)| *sequence)
            .collect();

        let held = self.out.len() - due.len();
        let room = config.max_ack_pending.saturating_sub(held);
        self.blocked = room < max;
        let max = max.min(room);
        let until = clock_ms + super::millis(config.ack_wait);
        let mut claimed = Vec::new();

        // In the order of the stream, not of the deadlines.
        let mut again: Vec<u64> = due;
        again.sort_unstable();
        for sequence in again.into_iter().take(max) {
            let Some(message) = messages.get(&sequence) else {
                continue;
            };
            let delivered = self.out.get(&sequence).map_or(1, |out| out.delivered + 1);
            self.hold(sequence, Out { delivered, due_ms: until });

            let (stream, consumer) = (config.stream.to_string(), config.name.clone());
            group.push(Kind::Delivered(DeliveredRecord { stream, consumer, sequence, delivered }));
            claimed.push(Claimed { sequence, delivered, stored_ms: message.stored_ms, place: message.place });
        }

        while claimed.len() < max {
            let Some((sequence, message)) = messages.range(self.next..).next() else {
                self.next = last + 1;
                break;
            };
            self.next = sequence + 1;
            if self.wants(&message.subject) {
                self.hold(*sequence, Out { delivered: 1, due_ms: until });
                let (stored_ms, place) = (message.stored_ms, message.place);
                claimed.push(Claimed { sequence: *sequence, delivered: 1, stored_ms, place });
            }
        }
        claimed
    }

    /// Settles a delivery. Has no effect if the delivery is no longer outstanding.
    pub fn settle(
        &mut self,
        group: &mut Group,
        config: &ConsumerConfig,
        sequence: u64,
        outcome: Outcome,
        removes: bool,
        clock_ms: u64,
    ) -> Settled {
        let Some(out) = self.out.get(&sequence).copied() else {
            return Settled { done: false, wakes: false };
        };

        let due_ms = match outcome {
            Outcome::Nak(delay) => clock_ms.saturating_add(super::millis(delay)),
            Outcome::InProgress => clock_ms + super::millis(config.ack_wait),
            Outcome::Ack | Outcome::Term => {
                // The cursor goes first: its replay marks the messages before it as outstanding, which would undo a
                // settlement that was replayed earlier.
                self.flush_cursor(group, config.stream, &config.name);
                let (stream, consumer) = (config.stream.to_string(), config.name.clone());
                group.push(Kind::Settled(SettledRecord { stream, consumer, sequence, removes }));
                self.settled(sequence);
                return Settled { done: true, wakes: self.blocked };
            }
        };
        self.hold(sequence, Out { due_ms, ..out });
        Settled { done: false, wakes: matches!(outcome, Outcome::Nak(_)) }
    }

    /// The earliest time at which an outstanding delivery is due for redelivery.
    pub fn next_due(&self, clock_ms: u64) -> Option<u64> {
        self.due.range((clock_ms + 1, 0)..).next().map(|(due_ms, _)| *due_ms)
    }

    /// Accounts for a message that the stream has deleted.
    pub fn dropped(&mut self, sequence: u64, subject: &str) {
        let unread = sequence >= self.next && self.wants(subject);
        if unread {
            self.pending -= 1;
        } else {
            self.settled(sequence);
        }
    }

    /// Records the cursor if it has advanced since it was last recorded.
    pub fn flush_cursor(&mut self, group: &mut Group, stream: &str, name: &str) {
        if self.is_unflushed() {
            self.flushed = self.next;
            group.push(Kind::Cursor(CursorRecord { stream: stream.into(), consumer: name.into(), next: self.next }));
        }
    }

    pub fn is_unflushed(&self) -> bool {
        self.flushed < self.next
    }

    /// Sequences and delivery counts of the outstanding deliveries.
    pub fn out(&self) -> impl Iterator<Item = (u64, u32)> {
        self.out.iter().map(|(sequence, out)| (*sequence, out.delivered))
    }

    /// Restores the consumer from a record. Outstanding deliveries are due at once, because no delivery outlives the
    /// process that held it.
    pub fn restore(&mut self, next: u64, out: impl Iterator<Item = (u64, u32)>) {
        self.next = self.next.max(next);
        self.flushed = self.next;
        out.for_each(|(sequence, delivered)| self.hold(sequence, Out { delivered, due_ms: 0 }));
    }

    pub fn replay_cursor(&mut self, next: u64, messages: &BTreeMap<u64, StoredAt>) {
        if next <= self.next {
            return;
        }

        for (sequence, message) in messages.range(self.next..next) {
            if self.wants(&message.subject) {
                self.hold(*sequence, Out { delivered: 1, due_ms: 0 });
            }
        }
        self.next = next;
        self.flushed = next;
    }

    pub fn replay_delivered(&mut self, sequence: u64, delivered: u32) {
        if let Some(out) = self.out.get_mut(&sequence) {
            out.delivered = out.delivered.max(delivered);
        }
    }

    pub fn settled(&mut self, sequence: u64) {
        if let Some(out) = self.out.remove(&sequence) {
            self.due.remove(&(out.due_ms, sequence));
            self.pending = self.pending.saturating_sub(1);
        }
    }

    /// Ends a replay: deliveries of deleted messages are no longer outstanding.
    pub fn retain_stored(&mut self, messages: &BTreeMap<u64, StoredAt>) {
        self.out.retain(|sequence, _| messages.contains_key(sequence));
        self.due.retain(|(_, sequence)| messages.contains_key(sequence));
        self.count_pending(messages);
    }

    pub fn count_pending(&mut self, messages: &BTreeMap<u64, StoredAt>) {
        let unread = messages
            .range(self.next..)
            .filter(|(_, message)| self.wants(&message.subject))
            .count();
        self.pending = (self.out.len() + unread) as u64;
    }

    /// Takes over the outstanding deliveries from the state before an outage of the log. Their deadlines are postponed
    /// by the length of the outage, during which no delivery could be settled or extended.
    pub fn adopt(&mut self, before: &Self, messages: &BTreeMap<u64, StoredAt>, last: u64, outage_ms: u64) {
        // The log may lack the newest cursor. It also lacks the newest messages, whose sequences are assigned again.
        let flushed = self.flushed;
        self.replay_cursor(before.next.min(last + 1), messages);
        self.flushed = flushed;

        for (sequence, out) in &before.out {
            if self.out.contains_key(sequence) {
                let due_ms = out.due_ms.saturating_add(outage_ms);
                self.hold(*sequence, Out { due_ms, ..*out });
            }
        }
        self.blocked = before.blocked;
        self.opened = before.opened;
    }

    /// Adds an outstanding delivery, or changes its deadline.
    fn hold(&mut self, sequence: u64, out: Out) {
        if let Some(before) = self.out.insert(sequence, out) {
            self.due.remove(&(before.due_ms, sequence));
        }
        self.due.insert((out.due_ms, sequence));
    }
}
