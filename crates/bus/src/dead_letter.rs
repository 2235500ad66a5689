//! Dead letters: messages that a consumer cannot handle, stored for an operator to inspect.
//!
//! A message that ran out of deliveries goes to the stream DLQ. One that cannot be read, or that is of nothing that is
//! known, goes to a stream of its own, because anybody can send any number of those.

use crate::{Bus, Delivery, Error, Headers, Message, Result};
use base64::Engine;
use parking_lot::Mutex;
use std::time::{Duration, Instant};
use wire::router::{DeadLetter, headers};
use wire::subjects;

/// Messages that cannot be used are logged at most this often.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Stores a dead letter for a message that was read but could not be handled, then terminates the delivery so that it is
/// never redelivered.
///
/// The operation is idempotent: after a crash between the two steps the message is redelivered and buried again, and
/// the message id keeps the stream from storing a second dead letter.
pub async fn bury(bus: &Bus, delivery: &Delivery, reason: &str) -> Result<()> {
    let v2 = delivery.message.headers.get(headers::CONTRACT_VERSION) == Some(headers::CONTRACT_V2);
    let subject = match v2 {
        true => subjects::DEAD_LETTER_V2.into(),
        false => subjects::dead_letter(&delivery.message.subject),
    };
    append(bus, delivery, reason, subject).await?;

    metrics::counter!("beamline_dead_letters_total").increment(1);
    tracing::error!(
        subject = %delivery.message.subject,
        reason,
        delivered = delivery.delivered,
        "message moved to the dead-letter stream"
    );
    delivery.term().await
}

/// As [`bury`], for a message that cannot be read, or a result of a task that nobody knows any more.
pub async fn bury_unreadable(bus: &Bus, delivery: &Delivery, reason: &str) -> Result<()> {
    let subject = subjects::unreadable(&delivery.message.subject);
    match append(bus, delivery, reason, subject).await {
        // It has no value that would justify holding up the messages behind it.
        Err(error @ Error::Full(_)) => {
            tracing::debug!(%error, "a message that cannot be used was dropped");
        }
        stored => stored?,
    }

    metrics::counter!("beamline_dead_letters_total").increment(1);
    metrics::counter!("beamline_unreadable_messages_total").increment(1);
    if let Some(more) = LOGGED.lock().next(Instant::now()) {
        let subject = &*delivery.message.subject;
        tracing::error!(subject, reason, more, "a message that cannot be used was moved out of its stream");
    }
    delivery.term().await
}

static LOGGED: Mutex<Logged> = Mutex::new(Logged { last: None, suppressed: 0 });

/// Bounds the rate of log lines about messages that cannot be used.
struct Logged {
    last: Option<Instant>,
    suppressed: u64,
}

impl Logged {
    /// How many messages were not logged since the last line; `None` if this one is not logged either.
    fn next(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.duration_since(last) < LOG_INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

async fn append(bus: &Bus, delivery: &Delivery, reason: &str, subject: String) -> Result<()> {
    let message = &delivery.message;
    let (payload, base64) = match std::str::from_utf8(&message.payload) {
        Ok(text) => (text.to_string(), false),
        Err(_) => (base64::engine::general_purpose::STANDARD.encode(&message.payload), true),
    };
    let letter = DeadLetter {
        original_subject: message.subject.to_string(),
        reason: reason.into(),
        delivered: delivery.delivered,
        first_seen_ms: delivery.stored_ms,
        last_seen_ms: crate::clock::unix_ms(),
        headers: message.headers.iter().map(|(k, v)| (k.into(), v.into())).collect(),
        payload,
        base64,
    };

    let msg_id = format!("dlq-{}-{}", message.subject, delivery.sequence);
    let headers = match subject == subjects::DEAD_LETTER_V2 {
        true => v2_headers(&message.headers, &letter, &msg_id),
        false => Headers::new(),
    };
    match store(bus, &letter, &subject, &headers, &msg_id).await {
        // The envelope can push a payload near the limit over it. Without this fallback the message could never be
        // buried and would be redelivered forever.
        Err(Error::TooLarge { .. }) => {
            let text = format!("{reason} (its payload of {} bytes does not fit a dead letter)", message.payload.len());
            let letter = DeadLetter { reason: text, payload: String::new(), base64: false, ..letter };
            store(bus, &letter, &subject, &headers, &msg_id).await
        }
        stored => stored,
    }
}

/// The headers of a dead letter of v2: those of its message that every message of v2 has, and why it is one.
fn v2_headers(of: &Headers, letter: &DeadLetter, msg_id: &str) -> Headers {
    let mut own = Headers::new();
    for name in [headers::TRACE_ID, headers::TENANT_ID, headers::CONTRACT_VERSION, headers::REQUEST_ID] {
        if let Some(value) = of.get(name) {
            own.insert(name, value);
        }
    }
    own.with(headers::MSG_ID, msg_id)
        .with(headers::DLQ_REASON, &letter.reason)
        .with(headers::ORIGINAL_SUBJECT, &letter.original_subject)
}

async fn store(bus: &Bus, letter: &DeadLetter, subject: &str, headers: &Headers, msg_id: &str) -> Result<()> {
    let payload = serde_json::to_vec(letter)
        .expect("a dead letter serializes to JSON")
        .into();
    let message = Message { subject: subject.into(), reply: None, headers: headers.clone(), payload };
    bus.append(message, Some(msg_id)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_is_logged_in_each_interval() {
        let mut logged = Logged { last: None, suppressed: 0 };
        let start = Instant::now();
        assert_eq!(logged.next(start), Some(0));
        assert_eq!((logged.next(start), logged.next(start)), (None, None));
        assert_eq!(logged.next(start + LOG_INTERVAL), Some(2));
    }
}
