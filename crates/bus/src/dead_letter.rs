//! Dead letters: messages that a consumer cannot handle, stored in the stream DLQ for an operator to inspect.

use crate::{Bus, Delivery, Error, Message, Result};
use base64::Engine;
use wire::router::DeadLetter;

/// Stores a dead letter for the delivery, then terminates the delivery so that it is never redelivered.
///
/// The operation is idempotent: after a crash between the two steps the message is redelivered and buried again, and
/// the message id keeps the stream from storing a second dead letter.
pub async fn bury(bus: &Bus, delivery: &Delivery, reason: &str) -> Result<()> {
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
    match append(bus, &letter, &msg_id).await {
        // The envelope can push a payload near the limit over it. Without this fallback the message could never be
        // buried and would be redelivered forever.
        Err(Error::TooLarge { .. }) => {
            let text = format!("{reason} (its payload of {} bytes does not fit a dead letter)", message.payload.len());
            append(bus, &DeadLetter { reason: text, payload: String::new(), base64: false, ..letter }, &msg_id).await?;
        }
        stored => stored?,
    }

    metrics::counter!("beamline_dead_letters_total").increment(1);
    tracing::error!(
        subject = %message.subject,
        reason,
        delivered = delivery.delivered,
        "message moved to the dead-letter stream"
    );
    delivery.term().await
}

async fn append(bus: &Bus, letter: &DeadLetter, msg_id: &str) -> Result<()> {
    let subject = wire::subjects::dead_letter(&letter.original_subject).into();
    let payload = serde_json::to_vec(letter)
        .expect("a dead letter serializes to JSON")
        .into();
    bus.append(Message { subject, payload, ..Message::default() }, Some(msg_id))
        .await
        .map(drop)
}
