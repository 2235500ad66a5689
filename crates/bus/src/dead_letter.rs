//! Dead letters: what could not be handled, kept whole in the stream DLQ.

use crate::{Bus, Delivery, Message, Result};
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
    let subject = wire::subjects::dead_letter(&message.subject);
    let msg_id = format!("dlq-{}-{}", message.subject, delivery.sequence);
    let payload = serde_json::to_vec(&letter).expect("a dead letter is JSON").into();
    bus.append(Message { subject: subject.into(), payload, ..Message::default() }, Some(&msg_id)).await?;
    metrics::counter!("beamline_dead_letters_total").increment(1);
    tracing::error!(subject = %message.subject, reason, delivered = delivery.delivered, "a message went to the dead letters");
    delivery.term().await
}
