//! What the web app asks of the WebSocket nodes: publications, over the bus.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bus::{Bus, Headers};
use serde::Serialize;
use serde_json::value::to_raw_value;
use std::time::Duration;
use wire::channels::{Answer, Disconnect, Position, Publish};
use wire::subjects;

const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Rooms were made or changed; every page hears it.
pub const LOBBY: &str = "chat:lobby";

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

    /// With a key, saying it again is saying it once.
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

    /// For those who listen now; not kept.
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

    /// Ends the connections that a sign-in of a user has opened.
    pub async fn disconnect(&self, user: &str, session: &str) -> Result<(), String> {
        let disconnect = Disconnect { user: user.into(), session: Some(session.into()) };
        let payload = serde_json::to_vec(&disconnect).map_err(|e| e.to_string())?.into();
        let answer = self
            .0
            .request(subjects::CHANNELS_DISCONNECT, Headers::new(), payload, PUBLISH_TIMEOUT)
            .await;
        let answer = answer.map_err(|e| e.to_string())?;
        let answer: Answer<serde_json::Value> = serde_json::from_slice(&answer.payload).map_err(|e| e.to_string())?;
        answer.into_result().map(|_| ()).map_err(|failure| failure.message)
    }

    async fn publish(&self, publish: Publish) -> Result<(), String> {
        let payload = serde_json::to_vec(&publish).map_err(|e| e.to_string())?.into();
        let answer = self
            .0
            .request(subjects::CHANNELS_PUBLISH, Headers::new(), payload, PUBLISH_TIMEOUT)
            .await;
        let answer = answer.map_err(|e| e.to_string())?;
        let answer: Answer<Position> = serde_json::from_slice(&answer.payload).map_err(|e| e.to_string())?;
        answer.into_result().map(|_| ()).map_err(|failure| failure.message)
    }
}
