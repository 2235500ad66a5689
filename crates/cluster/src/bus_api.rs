//! What the other parts ask of channels over the bus.

use crate::Node;
use crate::authorize::Denied;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bus::{Bus, Message, Subscription};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::task::unconstrained;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::channels::{
    Answer, Broadcast, Channels, Disconnect, Done, History, Info, NodeInfo, Position, Positions, Presence,
    PresenceInfo, PresenceResult, Publish,
};
use wire::limits::PUBLICATION_MAX;
use wire::realtime::{ErrorCode, Publication};
use wire::subjects;

const QUEUE_MAX: usize = 8192;
/// Operations carried out at once.
const CONCURRENT_MAX: usize = 256;
/// To every node, also the one that sends it: end a user's connections.
const NODE_DISCONNECT: &str = "beamline.nodes.v1.disconnect";

pub struct Operations {
    publish: Subscription,
    broadcast: Subscription,
    history: Subscription,
    presence: Subscription,
    disconnect: Subscription,
    node_disconnect: Subscription,
}

impl Operations {
    pub async fn subscribe(bus: &Bus) -> bus::Result<Self> {
        let group = Some(subjects::NODES_GROUP);
        Ok(Self {
            publish: bus.subscribe(subjects::CHANNELS_PUBLISH, group, QUEUE_MAX).await?,
            broadcast: bus.subscribe(subjects::CHANNELS_BROADCAST, group, QUEUE_MAX).await?,
            history: bus.subscribe(subjects::CHANNELS_HISTORY, group, QUEUE_MAX).await?,
            presence: bus.subscribe(subjects::CHANNELS_PRESENCE, group, QUEUE_MAX).await?,
            disconnect: bus.subscribe(subjects::CHANNELS_DISCONNECT, group, QUEUE_MAX).await?,
            node_disconnect: bus.subscribe(NODE_DISCONNECT, None, QUEUE_MAX).await?,
        })
    }
}

pub async fn run(node: Arc<Node>, mut operations: Operations, cancel: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONCURRENT_MAX));
    let tracker = TaskTracker::new();
    loop {
        let place = places
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let (kind, message) = tokio::select! {
            () = cancel.cancelled() => break,
            Some(message) = operations.publish.next() => ("publish", message),
            Some(message) = operations.broadcast.next() => ("broadcast", message),
            Some(message) = operations.history.next() => ("history", message),
            Some(message) = operations.presence.next() => ("presence", message),
            Some(message) = operations.disconnect.next() => ("disconnect", message),
            Some(message) = operations.node_disconnect.next() => {
                if let Ok(Disconnect { user, session }) = serde_json::from_slice(&message.payload) {
                    node.disconnect(&user, session.as_deref(), wire::realtime::Disconnect::ForceDisconnect);
                }
                continue;
            }
            else => break,
        };
        let node = node.clone();
        let mut work = Box::pin(async move {
            let answer = node.operate(kind, &message.payload).await;
            if let Some(reply) = message.reply {
                let answer = match answer {
                    Ok(result) => Answer::success(result),
                    Err((code, text)) => Answer::failure(code as u32, text),
                };
                let payload = serde_json::to_vec(&answer).expect("an answer is JSON").into();
                if let Err(error) = node
                    .bus
                    .publish(Message { subject: reply, payload, ..Message::default() })
                    .await
                {
                    tracing::debug!(%error, "an answer was not published");
                }
            }
            drop(place);
        });
        // Begun here, one after the other, publications to a channel queue for it in the order in which they came; a
        // budget that is used up must not send one to the end.
        if futures_util::poll!(unconstrained(&mut work)).is_pending() {
            tracker.spawn(work);
        }
    }
    tracker.close();
    tracker.wait().await;
}

impl Node {
    /// One operation by its name; the server API and the bus share it. The result is text: a parsed value would sort keys
    /// and round numbers of the publications in it.
    pub async fn operate(&self, kind: &str, payload: &[u8]) -> Result<Box<RawValue>, Denied> {
        match kind {
            "publish" => {
                let request: Publish = read(payload)?;
                let data = data(request.data, request.b64)?;
                let publication = Publication { data, tags: request.tags, ..Publication::default() };
                let key = request.idempotency_key;
                result(
                    self.put(&request.channel, publication, request.skip_history, key)
                        .await?,
                )
            }
            "broadcast" => {
                let request: Broadcast = read(payload)?;
                let data = data(request.data, request.b64)?;
                let mut positions = Vec::with_capacity(request.channels.len());
                for channel in &request.channels {
                    let publication = Publication { data: data.clone(), ..Publication::default() };
                    positions.push(self.put(channel, publication, request.skip_history, None).await?);
                }
                result(Positions { positions })
            }
            "history" => {
                let request: History = read(payload)?;
                let rules = self.rules(&request.channel)?;
                result(
                    self.history(&request.channel, rules, request.limit, request.since, request.reverse)
                        .await?,
                )
            }
            "presence" => {
                let request: Presence = read(payload)?;
                self.rules(&request.channel)?;
                let presence = self.engine.presence(&request.channel).await;
                let presence = presence.map_err(|error| error.denied())?;
                let presence = presence
                    .into_iter()
                    .map(|(client, info)| (client.clone(), PresenceInfo { user: info.user, client }));
                result(PresenceResult { presence: presence.collect() })
            }
            "disconnect" => {
                let request: Disconnect = read(payload)?;
                let payload = serde_json::to_vec(&request).expect("a request is JSON").into();
                let message = Message { subject: NODE_DISCONNECT.into(), payload, ..Message::default() };
                self.bus
                    .publish(message)
                    .await
                    .map_err(|e| (ErrorCode::Internal, e.to_string()))?;
                result(Done {})
            }
            "channels" => result(Channels {
                channels: self.hub.followed().iter().map(|name| name.to_string()).collect(),
            }),
            "info" => result(Info {
                nodes: vec![NodeInfo {
                    name: self.config.node.clone(),
                    version: env!("CARGO_PKG_VERSION").into(),
                    engine: self.engine.describe().into(),
                    num_clients: self.clients.lock().len(),
                    num_channels: self.hub.channels(),
                }],
            }),
            other => Err((ErrorCode::MethodNotFound, format!("no method {other:?}"))),
        }
    }

    async fn put(
        &self,
        channel: &str,
        publication: Publication,
        skip_history: bool,
        key: Option<String>,
    ) -> Result<Position, Denied> {
        let mut rules = self.rules(channel)?.clone();
        if skip_history {
            rules.history_size = 0;
        }
        self.publish(channel, publication, &rules, key).await
    }
}

fn read<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Denied> {
    serde_json::from_slice(payload).map_err(|e| (ErrorCode::BadRequest, format!("the request does not fit: {e}")))
}

fn result(result: impl Serialize) -> Result<Box<RawValue>, Denied> {
    to_raw_value(&result).map_err(|e| (ErrorCode::Internal, e.to_string()))
}

fn data(json: Option<Box<RawValue>>, b64: Option<String>) -> Result<Bytes, Denied> {
    // A program may write `null` for the one of the two that it does not use.
    let json = json.filter(|json| b64.is_none() || json.get() != "null");
    let data = match (json, b64) {
        (Some(json), None) => Bytes::from(String::from(Box::<str>::from(json))),
        (None, Some(b64)) => match STANDARD.decode(b64) {
            Ok(bytes) => bytes.into(),
            Err(error) => return Err((ErrorCode::BadRequest, format!("b64 is not base64: {error}"))),
        },
        _ => return Err((ErrorCode::BadRequest, "exactly one of data and b64 is to be given".into())),
    };
    if data.len() > PUBLICATION_MAX {
        return Err((ErrorCode::LimitExceeded, format!("a publication may have {PUBLICATION_MAX} bytes")));
    }
    Ok(data)
}
