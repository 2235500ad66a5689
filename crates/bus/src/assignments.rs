//! Assignments in the stream ASSIGN: which consumer takes them, how long they have waited, and moving them between the
//! common subject and those of providers.

use crate::clock::unix_ms;
use crate::{Bus, ConsumerConfig, Delivery, Headers, Message, Result, Write, tasks};
use std::time::Duration;
use uuid::Uuid;
use wire::router::{ExecAssignment, headers};
use wire::subjects::{ASSIGN, STREAM_ASSIGN, assign_to};

/// The stream redelivers an assignment that is not reported in progress for this long.
pub const ACK_WAIT: Duration = Duration::from_secs(30);
/// Assignments whose provider nobody has wait for their deadline as deliveries that are not settled. They must not keep
/// those from their workers that come after them.
const MAX_ACK_PENDING: usize = 100_000;
/// When a moved assignment was first stored: milliseconds since the epoch, by the clock of the stream.
const SENT_AT: &str = headers::SENT_AT_MS;
/// The deliveries of a moved assignment before it was moved.
const DELIVERED_BEFORE: &str = headers::RETRY_COUNT;
/// Task records expire after a day; whatever is older is a replay.
const RECORDS_MAX_AGE_MS: u64 = 86_400_000;
/// Prefix of the consumers of providers' subjects, and the consumer of the common one.
const CONSUMER: &str = "worker";

/// The consumer of a subject of assignments. A work queue allows only one for each subject, so all workers share it.
pub fn consumer(subject: &str, max_in_hand: usize) -> ConsumerConfig {
    let provider = subject.strip_prefix(ASSIGN).unwrap_or_default().replace('.', "-");
    ConsumerConfig {
        stream: STREAM_ASSIGN,
        name: format!("{CONSUMER}{provider}"),
        filter: Some(subject.into()),
        ack_wait: ACK_WAIT,
        max_ack_pending: MAX_ACK_PENDING,
        max_in_hand,
        from_start: true,
    }
}

/// The provider's subject that a consumer reads; `None` if it reads another one.
pub fn subject_of(consumer: &str) -> Option<String> {
    assign_to(consumer.strip_prefix(CONSUMER)?.strip_prefix('-')?)
}

/// When the assignment was first stored, in milliseconds since the epoch: moving it does not make it younger.
pub fn sent_ms(delivery: &Delivery) -> u64 {
    let first = delivery.message.headers.get(SENT_AT).and_then(|text| text.parse().ok());
    first.map_or(delivery.stored_ms, |first: u64| first.min(delivery.stored_ms))
}

/// The number of this delivery, with those before a move: output of a later attempt replaces that of earlier ones.
pub fn attempt(delivery: &Delivery) -> u32 {
    let before = delivery.message.headers.get(DELIVERED_BEFORE);
    let before: u32 = before.and_then(|text| text.parse().ok()).unwrap_or_default();
    before.saturating_add(delivery.delivered)
}

/// Whether the assignment came from another subject.
pub fn is_moved(delivery: &Delivery) -> bool {
    delivery.message.headers.get(SENT_AT).is_some()
}

/// Moves an assignment to another subject, where its deliveries count from one. Safe to repeat.
pub async fn move_to(bus: &Bus, delivery: &Delivery, assignment: &ExecAssignment, subject: &str) -> Result<()> {
    let mut moved = Headers::new();
    let kept = delivery.message.headers.iter();
    // The server's own headers belong to the first message.
    let kept = kept.filter(|(name, _)| ![SENT_AT, DELIVERED_BEFORE].contains(name) && !name.starts_with("Nats-"));
    kept.for_each(|(name, value)| moved.insert(name.to_string(), value));
    moved.insert(SENT_AT, sent_ms(delivery).to_string());
    moved.insert(DELIVERED_BEFORE, attempt(delivery).to_string());

    let message = Message {
        subject: subject.into(),
        reply: None,
        headers: moved,
        payload: delivery.message.payload.clone(),
    };
    let msg_id = move_id(delivery, &assignment.assignment_id);
    let mut writes = Vec::from_iter((subject == ASSIGN).then(|| tasks::note_assignment(assignment)));
    writes.extend([Write::Append { message, msg_id: Some(&msg_id) }, Write::Ack(delivery)]);
    bus.write(writes).await?;
    Ok(())
}

/// Whether the assignment was moved already, and only the acknowledgement of this delivery is missing.
pub async fn was_moved(bus: &Bus, delivery: &Delivery, assignment_id: &str) -> Result<bool> {
    bus.seen(STREAM_ASSIGN, &move_id(delivery, assignment_id)).await
}

/// Every move has another sequence, so that an assignment can be moved back.
fn move_id(delivery: &Delivery, assignment_id: &str) -> String {
    format!("{assignment_id}-from-{}", delivery.sequence)
}

/// Whether an assignment was made more than a day before this time: then no record can know it. The ids that routers
/// choose are UUIDs of version 7, which begin with the time; other ids say nothing.
pub fn made_a_day_before(assignment_id: &str, time_ms: u64) -> bool {
    made_ms(assignment_id).is_some_and(|made| made.saturating_add(RECORDS_MAX_AGE_MS) < time_ms)
}

/// When a router made the assignment, in milliseconds since the epoch, if its id says so.
pub fn made_ms(assignment_id: &str) -> Option<u64> {
    let id = Uuid::parse_str(assignment_id)
        .ok()
        .filter(|id| id.get_version_num() == 7)?;
    let (seconds, nanoseconds) = id.get_timestamp()?.to_unix();
    let made = seconds * 1000 + u64::from(nanoseconds) / 1_000_000;
    // A time far in the future is not one.
    (made < unix_ms().saturating_add(RECORDS_MAX_AGE_MS)).then_some(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consumer_and_subject_name_each_other() {
        let common = consumer(ASSIGN, 1);
        assert_eq!((&*common.name, common.filter.as_deref()), ("worker", Some(ASSIGN)));
        assert_eq!(subject_of(&common.name), None);

        let subject = assign_to("gpu-1").unwrap();
        assert_eq!(consumer(&subject, 1).name, "worker-gpu-1");
        assert_eq!(subject_of("worker-gpu-1"), Some(subject));
        for other in ["billing", "worker-", "workers-x", "worker-dlq"] {
            assert_eq!(subject_of(other), None, "{other}");
        }
    }

    #[test]
    fn id_of_version_7_says_when_it_was_made() {
        let made = 0x019b_7680_0000;
        let id = "019b7680-0000-7abc-8def-0123456789ab";
        assert!(!made_a_day_before(id, made + RECORDS_MAX_AGE_MS));
        assert!(made_a_day_before(id, made + RECORDS_MAX_AGE_MS + 1));

        for other in ["a-1", "019b7680-0000-4abc-8def-0123456789ab", "ffffffff-ffff-7abc-8def-0123456789ab", "é", ""] {
            assert!(!made_a_day_before(other, u64::MAX), "{other}");
        }
    }
}
