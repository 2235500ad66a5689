//! Requests to the WebSocket nodes over the bus: publications, and the end of connections.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bus::{Bus, Headers};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::to_raw_value;
use std::time::Duration;
use wire::channels::{Answer, Disconnect, Position, Publish};
use wire::subjects;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Announces rooms that are created or deleted. Every page subscribes to it.
pub const LOBBY: &str = "chat:lobby";

/// The channel of a room.
pub fn of_room(room: &str) -> String {
    format!("chat:{room}")
}

#[derive(Clone)]
pub struct Channels(Bus);

impl Channels {
    pub fn new(bus: Bus) -> Self {
        Self(bus)
    }

    pub async fn publish_bytes(&self, channel: &str, data: &[u8]) -> Result<(), String> {
        self.publish(Publish {
            channel: channel.into(),
            b64: Some(STANDARD.encode(data)),
            ..Publish::default()
        })
        .await
    }

    /// Publishes JSON. A publication with a key is idempotent.
    pub async fn publish_json(&self, channel: &str, data: &impl Serialize, key: Option<String>) -> Result<(), String> {
        let data = to_raw_value(data).map_err(|e| e.to_string())?;
        self.publish(Publish {
            channel: channel.into(),
            data: Some(data),
            idempotency_key: key,
            ..Publish::default()
        })
        .await
    }

    /// Publishes to current subscribers only; the channel's history does not keep it.
    pub async fn publish_passing(&self, channel: &str, data: &impl Serialize) -> Result<(), String> {
        let data = to_raw_value(data).map_err(|e| e.to_string())?;
        self.publish(Publish {
            channel: channel.into(),
            data: Some(data),
            skip_history: true,
            ..Publish::default()
        })
        .await
    }

    /// Ends the connections that one sign-in of a user opened.
    pub async fn disconnect(&self, user: &str, session: &str) -> Result<(), String> {
        let disconnect = Disconnect { user: user.into(), session: Some(session.into()) };
        let answer = self.request::<_, serde_json::Value>(subjects::CHANNELS_DISCONNECT, &disconnect);
        answer.await.map(|_| ())
    }

    async fn publish(&self, publish: Publish) -> Result<(), String> {
        let answer = self.request::<_, Position>(subjects::CHANNELS_PUBLISH, &publish);
        answer.await.map(|_| ())
    }

    async fn request<Q: Serialize, A: DeserializeOwned>(&self, subject: &str, request: &Q) -> Result<A, String> {
        let payload = serde_json::to_vec(request).map_err(|e| e.to_string())?.into();
        let answer = self.0.request(subject, Headers::new(), payload, REQUEST_TIMEOUT).await;
        let answer = answer.map_err(|e| e.to_string())?;

        let answer: Answer<A> = serde_json::from_slice(&answer.payload).map_err(|e| e.to_string())?;
        answer.into_result().map_err(|failure| failure.message)
    }
}
