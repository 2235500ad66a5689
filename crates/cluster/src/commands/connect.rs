//! The commands `connect` and `refresh`, which present a connection token.

use super::subscriptions::{self, Prepared};
use super::{Connection, Failure};
use super::{TokenEnd, Transport};
use crate::Node;
use crate::client::Client;
use crate::token::{self, Refusal, Tokens, ttl};
use bus::clock::unix_ms;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use wire::realtime::{
    ConnectRequest, ConnectResult, Disconnect, ErrorCode, RefreshRequest, RefreshResult, Reply, SubscribeRequest,
};

const VERSION: &str = concat!("beamline ", env!("CARGO_PKG_VERSION"));

/// Authenticates the client, subscribes it to the channels of its token, and replies. Returns when the token expires.
pub async fn connect(connection: &Connection, id: u32, request: ConnectRequest) -> Result<TokenEnd, Failure> {
    let node = &*connection.node;
    let mut claims = authenticate(&node.tokens, &request.token)?;
    let channels = std::mem::take(&mut claims.channels);
    let ttl = claims.exp.map(ttl);

    let client = admit(connection, claims)?;
    let subscriptions = prepare_all(node, &client, channels, request.subs).await;

    // Publications to these channels are collected until the reply is queued.
    let connect = connect_result(node, &client, connection.transport, ttl, &subscriptions);
    client.reply(&Reply { id, connect: Some(connect), ..Reply::default() });
    for (channel, prepared) in subscriptions {
        let Prepared { result, position, rules, .. } = prepared;
        node.hub.go_live(&channel, &client, None, &position, result.positioned);
        subscriptions::announce(node, &client, &channel, &rules).await;
    }
    Ok(TokenEnd::of(ttl))
}

fn authenticate(tokens: &Tokens, token: &str) -> Result<token::Connection, Failure> {
    if token.is_empty() {
        return Err(Failure::Close(Disconnect::InvalidToken));
    }
    tokens.connection(token).map_err(|refusal| match refusal {
        // An error reply rather than a disconnect, so that the client fetches a new token and connects again.
        Refusal::Expired => {
            let text = "the connection token has expired; get a new one";
            Failure::Denied(ErrorCode::TokenExpired, text.into())
        }
        Refusal::Invalid(why) => {
            tracing::debug!(why, "refused a connection token");
            Failure::Close(Disconnect::InvalidToken)
        }
    })
}

/// Adds the client to the node. The connection slot removes it, however the session ends.
fn admit(connection: &Connection, claims: token::Connection) -> Result<Arc<Client>, Failure> {
    let node = &connection.node;
    let login = claims.sid.clone();
    let number = node.next_client.fetch_add(1, Relaxed);
    let client = connection.client.get_or_init(|| {
        let (info, encoding) = (token::json(claims.info), connection.transport.encoding);
        Arc::new(Client::new(number, claims.sub, claims.sid, info, encoding, connection.outbox.clone()))
    });
    node.clients.lock().insert(number, client.clone());

    // A sign-out after the token was checked may have missed this client, which was not in the map yet.
    if login.is_some_and(|login| node.tokens.has_ended(&login)) {
        return Err(Failure::Close(Disconnect::InvalidToken));
    }
    if node.stopping.is_cancelled() {
        return Err(Failure::Close(Disconnect::Shutdown));
    }
    node.stats().connected();
    Ok(client.clone())
}

/// Prepares a subscription to each channel of the token, from the positions in `recover` where the client gave one. A
/// channel that cannot be subscribed is left out of the reply.
async fn prepare_all(
    node: &Node,
    client: &Arc<Client>,
    channels: Vec<String>,
    mut recover: BTreeMap<String, SubscribeRequest>,
) -> Vec<(String, Prepared)> {
    let mut subscriptions = Vec::with_capacity(channels.len());
    for channel in channels {
        let request = SubscribeRequest { channel: channel.clone(), ..recover.remove(&channel).unwrap_or_default() };
        // The token names the channel, so only its namespace must exist.
        let rules = node.rules(&channel).cloned();
        match subscriptions::prepare(node, client, &request, rules).await {
            Ok(prepared) => subscriptions.push((channel, prepared)),
            Err((_, text)) => tracing::warn!(channel, text, "cannot subscribe a channel of a connection token"),
        }
    }
    subscriptions
}

fn connect_result(
    node: &Node,
    client: &Client,
    transport: Transport,
    ttl: Option<u32>,
    subscriptions: &[(String, Prepared)],
) -> ConnectResult {
    let ping = node.config.ping_interval.as_secs().clamp(1, 3600) as u32;
    ConnectResult {
        client: client.id.clone(),
        version: VERSION.into(),
        expires: ttl.is_some(),
        ttl: ttl.unwrap_or(0),
        subs: subscriptions
            .iter()
            .map(|(channel, prepared)| (channel.clone(), prepared.result.clone()))
            .collect(),
        // WebSocket ping frames are not announced in the protocol.
        ping: if transport.frame_pings { 0 } else { ping },
        pong: !transport.frame_pings,
        time: i64::try_from(unix_ms()).unwrap_or(0),
        session: client.id.clone(),
        node: node.config.node.clone(),
        ..ConnectResult::default()
    }
}

/// Accepts a newer token of the same user. Returns when the token expires.
pub fn refresh(
    tokens: &Tokens,
    client: &Client,
    request: &RefreshRequest,
) -> Result<(RefreshResult, TokenEnd), Failure> {
    let claims = tokens.connection(&request.token).map_err(|refusal| match refusal {
        Refusal::Expired => Failure::Close(Disconnect::Expired),
        Refusal::Invalid(_) => Failure::Close(Disconnect::InvalidToken),
    })?;
    if claims.sub != client.user {
        return Err(Failure::Close(Disconnect::InvalidToken));
    }

    // From now on, ending this sign-in disconnects the client.
    client.set_login(claims.sid);
    let ttl = claims.exp.map(ttl);
    let refreshed = RefreshResult {
        client: client.id.clone(),
        version: VERSION.into(),
        expires: ttl.is_some(),
        ttl: ttl.unwrap_or(0),
    };
    Ok((refreshed, TokenEnd::of(ttl)))
}
