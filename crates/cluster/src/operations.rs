//! The operations of the channels API, which other parts use over the bus and other programs over HTTP.

use crate::Node;
use crate::permissions::Denied;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bus::Message;
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};
use wire::channels::{
    Broadcast, Channels, Disconnect, Done, History, Info, NodeInfo, Position, Positions, Presence, PresenceInfo,
    PresenceResult, Publish,
};
use wire::limits::PUBLICATION_MAX;
use wire::realtime::{ErrorCode, HistoryResult, Publication};

/// Subject of a disconnect for every node. The operation itself goes to one node of the group, which publishes here.
pub const NODE_DISCONNECT: &str = "beamline.nodes.v1.disconnect";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Publish,
    Broadcast,
    History,
    Presence,
    Disconnect,
    /// HTTP only, because the answer covers this node alone.
    Channels,
    /// HTTP only, because the answer covers this node alone.
    Info,
}

impl Operation {
    /// The operation of a path `/api/<name>`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "publish" => Self::Publish,
            "broadcast" => Self::Broadcast,
            "history" => Self::History,
            "presence" => Self::Presence,
            "disconnect" => Self::Disconnect,
            "channels" => Self::Channels,
            "info" => Self::Info,
            _ => return None,
        })
    }
}

impl Node {
    /// Carries out an operation. The result is raw JSON, because a parsed value would sort the keys and round the
    /// numbers of publications.
    pub async fn operate(&self, operation: Operation, request: &[u8]) -> Result<Box<RawValue>, Denied> {
        match operation {
            Operation::Publish => json(self.publish_for_service(read(request)?).await?),
            Operation::Broadcast => json(self.broadcast(read(request)?).await?),
            Operation::History => json(self.history_for_service(read(request)?).await?),
            Operation::Presence => json(self.presence(read(request)?).await?),
            Operation::Disconnect => json(self.disconnect_everywhere(read(request)?).await?),
            Operation::Channels => json(self.channels()),
            Operation::Info => json(self.info()),
        }
    }

    async fn publish_for_service(&self, request: Publish) -> Result<Position, Denied> {
        let data = data(request.data, request.b64)?;
        let publication = Publication { data, tags: request.tags, ..Publication::default() };
        self.publish_as_service(&request.channel, publication, request.skip_history, request.idempotency_key)
            .await
    }

    async fn broadcast(&self, request: Broadcast) -> Result<Positions, Denied> {
        let data = data(request.data, request.b64)?;
        let mut positions = Vec::with_capacity(request.channels.len());
        // Stops at the first failure; the channels before it keep their publication.
        for channel in &request.channels {
            let publication = Publication { data: data.clone(), ..Publication::default() };
            positions.push(
                self.publish_as_service(channel, publication, request.skip_history, None)
                    .await?,
            );
        }
        Ok(Positions { positions })
    }

    /// Publishes for a service. The permissions of clients do not apply, only the channel's history settings.
    async fn publish_as_service(
        &self,
        channel: &str,
        publication: Publication,
        skip_history: bool,
        idempotency_key: Option<String>,
    ) -> Result<Position, Denied> {
        let mut rules = self.rules(channel)?.clone();
        if skip_history {
            // Published as in a channel without history: no offset, no recovery.
            rules.history_size = 0;
        }
        self.publish(channel, publication, &rules, idempotency_key).await
    }

    async fn history_for_service(&self, request: History) -> Result<HistoryResult, Denied> {
        let rules = self.rules(&request.channel)?;
        self.history(&request.channel, rules, request.limit, request.since, request.reverse)
            .await
    }

    async fn presence(&self, request: Presence) -> Result<PresenceResult, Denied> {
        // Refuses invalid names and unknown namespaces.
        self.rules(&request.channel)?;

        let presence = self.engine.presence(&request.channel).await;
        let presence = presence.map_err(|error| error.denied())?;
        Ok(PresenceResult {
            presence: presence
                .into_iter()
                .map(|(client, info)| (client.clone(), PresenceInfo { user: info.user, client }))
                .collect(),
        })
    }

    /// Makes every node, this one included, close the connections of a user.
    async fn disconnect_everywhere(&self, request: Disconnect) -> Result<Done, Denied> {
        let payload = serde_json::to_vec(&request)
            .expect("a request serializes to JSON")
            .into();
        let message = Message { subject: NODE_DISCONNECT.into(), payload, ..Message::default() };
        self.bus
            .publish(message)
            .await
            .map_err(|error| (ErrorCode::Internal, error.to_string()))?;
        Ok(Done {})
    }

    fn channels(&self) -> Channels {
        Channels {
            channels: self.hub.followed().iter().map(|name| name.to_string()).collect(),
        }
    }

    fn info(&self) -> Info {
        Info {
            nodes: vec![NodeInfo {
                name: self.config.node.clone(),
                version: env!("CARGO_PKG_VERSION").into(),
                engine: self.engine.describe().into(),
                num_clients: self.clients.lock().len(),
                num_channels: self.hub.channels(),
            }],
        }
    }
}

fn read<T: DeserializeOwned>(request: &[u8]) -> Result<T, Denied> {
    serde_json::from_slice(request)
        .map_err(|error| (ErrorCode::BadRequest, format!("cannot read the request: {error}")))
}

fn json(result: impl Serialize) -> Result<Box<RawValue>, Denied> {
    to_raw_value(&result).map_err(|error| (ErrorCode::Internal, error.to_string()))
}

fn data(json: Option<Box<RawValue>>, b64: Option<String>) -> Result<Bytes, Denied> {
    // Some programs set the field that they do not use to `null`.
    let json = json.filter(|json| b64.is_none() || json.get() != "null");
    let data = match (json, b64) {
        (Some(json), None) => Bytes::from(String::from(Box::<str>::from(json))),
        (None, Some(b64)) => match STANDARD.decode(b64) {
            Ok(bytes) => bytes.into(),
            Err(error) => return Err((ErrorCode::BadRequest, format!("b64 is not base64: {error}"))),
        },
        _ => return Err((ErrorCode::BadRequest, "give exactly one of data and b64".into())),
    };

    if data.len() > PUBLICATION_MAX {
        let text = format!("the publication has {} bytes; at most {PUBLICATION_MAX} are allowed", data.len());
        return Err((ErrorCode::LimitExceeded, text));
    }
    Ok(data)
}
