//! Dead letters: what could not be handled, kept whole in the stream DLQ.

use crate::{Bus, Delivery, Error, Message, Result};
use base64::Engine;
use std::time::{SystemTime, UNIX_EPOCH};
use wire::router::DeadLetter;

/// Stores the delivery's dead letter, then ends its redelivery. A crash in between repeats; the message id keeps it one.
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
        last_seen_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64),
        headers: message.headers.iter().map(|(k, v)| (k.into(), v.into())).collect(),
        payload,
        base64,
    };
    let msg_id = format!("dlq-{}-{}", message.subject, delivery.sequence);
    match append(bus, &letter, &msg_id).await {
        // Around it, what just fitted the bus does not any more: without an end it would be delivered without end.
        Err(Error::TooLarge { .. }) => {
            let text = format!("{reason} (its payload of {} bytes does not fit a dead letter)", message.payload.len());
            append(bus, &DeadLetter { reason: text, payload: String::new(), base64: false, ..letter }, &msg_id).await?;
        }
        stored => stored?,
    }
    metrics::counter!("beamline_dead_letters_total").increment(1);
    tracing::error!(subject = %message.subject, reason, delivered = delivery.delivered, "a message went to the dead letters");
    delivery.term().await
}

async fn append(bus: &Bus, letter: &DeadLetter, msg_id: &str) -> Result<()> {
    let subject = wire::subjects::dead_letter(&letter.original_subject).into();
    let payload = serde_json::to_vec(letter).expect("a dead letter is JSON").into();
    bus.append(Message { subject, payload, ..Message::default() }, Some(msg_id)).await.map(drop)
}
