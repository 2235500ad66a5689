//! Publishes messages to the channel of their room.

use crate::channels::{self, Channels};
use wire::chat::{Event, Message};

/// Publishes the final version of an answer, once for each of its requests and states, even if this is called again or
/// by another web app.
pub async fn publish_ended(channels: &Channels, request_id: &str, message: &Message) -> Result<(), String> {
    let key = format!("{request_id}-{}", message.state.as_str());
    let event = Event::Message { message: message.clone() };
    let channel = channels::of_room(&message.room);
    channels.publish_json(&channel, &event, Some(key)).await
}

/// Publishes the current version of a message. A person's message is published once, even if this is called again. The
/// versions of an answer replace each other, so a repeat is harmless.
pub async fn publish(channels: &Channels, message: &Message) -> Result<(), String> {
    let key = message.nonce.is_some().then(|| format!("message-{}", message.id));
    let event = Event::Message { message: message.clone() };
    let channel = channels::of_room(&message.room);
    channels.publish_json(&channel, &event, key).await
}
