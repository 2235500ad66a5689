//! Carries out the commands of a client.

mod connect;
mod rpc;
mod subscriptions;

pub use subscriptions::{expire, leave_all};

use crate::Node;
use crate::client::{Client, Outbox, frame};
use crate::permissions::Denied;
use futures_util::future::{BoxFuture, join_all};
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, OnceLock};
use tokio::task::unconstrained;
use wire::channels::Position;
use wire::realtime::{
    ClientInfo, Command, Disconnect, Encoding, ErrorCode, HistoryRequest, HistoryResult, Method, PingResult,
    PresenceResult, PresenceStatsResult, Publication, PublishRequest, PublishResult, Reply, UnsubscribeResult,
};

/// RPCs that one client may have in flight.
pub const RPCS_MAX: usize = 32;
/// Publications of one message that are in flight at once.
const PUBLICATIONS_MAX: usize = 64;

/// The transport options that a client chose in its upgrade request.
#[derive(Debug, Clone, Copy)]
pub struct Transport {
    pub encoding: Encoding,
    /// Pings are WebSocket ping frames instead of protocol messages.
    pub frame_pings: bool,
}

/// When a connection token expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenEnd {
    Never,
    /// Seconds from now.
    In(u32),
}

impl TokenEnd {
    pub fn of(ttl: Option<u32>) -> Self {
        ttl.map_or(Self::Never, Self::In)
    }
}

/// The effects of one message's commands on the session.
#[derive(Default)]
pub struct Outcome {
    /// The expiry of the new token, if a connect or refresh succeeded.
    pub token_end: Option<TokenEnd>,
    pub rpcs: Vec<BoxFuture<'static, ()>>,
    pub close: Option<Disconnect>,
}

/// The parts of a connection that its commands use.
#[derive(Clone)]
pub struct Connection {
    pub node: Arc<Node>,
    /// Set by the connect command.
    pub client: Arc<OnceLock<Arc<Client>>>,
    pub outbox: Arc<Outbox>,
    pub transport: Transport,
}

impl Connection {
    fn reply(&self, reply: &Reply) {
        self.outbox.push_reply(frame(self.transport.encoding, reply));
    }
}

/// Why a command was not carried out.
enum Failure {
    /// The client gets an error reply.
    Denied(ErrorCode, String),
    /// The connection is closed.
    Close(Disconnect),
}

impl From<Denied> for Failure {
    fn from((code, text): Denied) -> Self {
        Self::Denied(code, text)
    }
}

/// Carries out the commands of one message, in order. RPCs are only started: the session runs them concurrently with
/// later commands. `rpcs` is the number of RPCs in flight.
pub async fn carry_out(connection: Connection, commands: Vec<Command>, rpcs: usize) -> Outcome {
    let mut outcome = Outcome::default();
    let mut commands = commands
        .into_iter()
        .map(|command| (command.id, command.into_method()))
        .peekable();
    while let Some((id, method)) = commands.next() {
        // Backpressure: no further command is carried out while the client does not read its replies.
        connection.outbox.room().await;

        let done = match (connection.client.get(), method) {
            (None, method) => connect_first(&connection, id, method, &mut outcome).await,
            (Some(client), Some(Method::Publish(first))) if id != 0 => {
                let mut requests = vec![(id, first)];
                let more =
                    |(id, method): &(u32, Option<Method>)| *id != 0 && matches!(method, Some(Method::Publish(_)));
                while requests.len() < PUBLICATIONS_MAX
                    && let Some((id, Some(Method::Publish(request)))) = commands.next_if(more)
                {
                    requests.push((id, request));
                }
                publish_all(&connection.node, client, requests).await;
                Ok(())
            }
            (Some(client), method) => carry_out_one(&connection.node, client, id, method, rpcs, &mut outcome).await,
        };

        match done {
            Ok(()) => {}
            Err(Failure::Close(code)) => {
                outcome.close = Some(code);
                break;
            }
            Err(Failure::Denied(code, text)) => {
                connection.reply(&Reply::failed(id, code, text));
                // The client may retry the connect, but the rest of this message relied on the refused one.
                if connection.client.get().is_none() {
                    break;
                }
            }
        }
    }
    outcome
}

/// Carries out the first command of a connection, which must be a connect.
async fn connect_first(
    connection: &Connection,
    id: u32,
    method: Option<Method>,
    outcome: &mut Outcome,
) -> Result<(), Failure> {
    match method {
        Some(Method::Connect(request)) if id != 0 => {
            outcome.token_end = Some(connect::connect(connection, id, request).await?);
            Ok(())
        }
        _ => Err(Failure::Close(Disconnect::BadRequest)),
    }
}

async fn carry_out_one(
    node: &Node,
    client: &Arc<Client>,
    id: u32,
    method: Option<Method>,
    rpcs: usize,
    outcome: &mut Outcome,
) -> Result<(), Failure> {
    // Every method except `send` has a reply, which needs an id.
    if id == 0 && !matches!(method, Some(Method::Send(_))) {
        return Err(Failure::Close(Disconnect::BadRequest));
    }

    let reply = match method {
        // A publication with an id was carried out together with those beside it.
        Some(Method::Connect(_) | Method::Publish(_)) => return Err(Failure::Close(Disconnect::BadRequest)),
        // The hub sends the reply, so that it precedes the first live publication.
        Some(Method::Subscribe(request)) => return Ok(subscriptions::subscribe(node, client, id, request).await?),
        Some(Method::Unsubscribe(request)) => {
            subscriptions::unsubscribe(node, client, &request.channel).await;
            Reply { unsubscribe: Some(UnsubscribeResult {}), ..Reply::default() }
        }
        Some(Method::Presence(request)) => {
            let presence = presence(node, client, &request.channel).await?;
            Reply { presence: Some(PresenceResult { presence }), ..Reply::default() }
        }
        Some(Method::PresenceStats(request)) => {
            let stats = presence_stats(&presence(node, client, &request.channel).await?);
            Reply { presence_stats: Some(stats), ..Reply::default() }
        }
        Some(Method::History(request)) => {
            let history = history(node, client, request).await?;
            Reply { history: Some(history), ..Reply::default() }
        }
        Some(Method::Ping(_)) => Reply { ping: Some(PingResult {}), ..Reply::default() },
        // Accepted and dropped: the server has no consumer for client messages.
        Some(Method::Send(_)) => return Ok(()),
        Some(Method::Rpc(_)) if rpcs + outcome.rpcs.len() >= RPCS_MAX => {
            let text = format!("a connection may have {RPCS_MAX} RPCs in flight; wait for a reply");
            return Err(Failure::Denied(ErrorCode::TooManyRequests, text));
        }
        Some(Method::Rpc(request)) => {
            outcome
                .rpcs
                .push(rpc::call(node.bus.clone(), client.clone(), id, request));
            return Ok(());
        }
        Some(Method::Refresh(request)) => {
            let (refresh, token_end) = connect::refresh(&node.tokens, client, &request)?;
            outcome.token_end = Some(token_end);
            Reply { refresh: Some(refresh), ..Reply::default() }
        }
        Some(Method::SubRefresh(request)) => {
            let refreshed = subscriptions::refresh(node, client, &request)?;
            Reply { sub_refresh: Some(refreshed), ..Reply::default() }
        }
        None => {
            let text = "the command has no method that this server knows";
            return Err(Failure::Denied(ErrorCode::MethodNotFound, text.into()));
        }
    };
    client.reply(&Reply { id, ..reply });
    Ok(())
}

/// Carries out adjacent publish commands together, so that they share a commit of the engine. Each is first polled in
/// the order of the commands, which is then the order of the publications in a channel; `unconstrained`, because an
/// exhausted coop budget would make one of them queue later.
async fn publish_all(node: &Node, client: &Client, requests: Vec<(u32, PublishRequest)>) {
    let publications = requests
        .into_iter()
        .map(async |(id, request)| (id, publish(node, client, request).await));
    for (id, published) in unconstrained(join_all(publications)).await {
        client.reply(&match published {
            Ok(()) => Reply { id, publish: Some(PublishResult {}), ..Reply::default() },
            Err((code, text)) => Reply::failed(id, code, text),
        });
    }
}

async fn publish(node: &Node, client: &Client, request: PublishRequest) -> Result<(), Denied> {
    let rules = node.may_publish(client, &request.channel)?;
    if request.data.is_empty() {
        return Err((ErrorCode::BadRequest, "the publication has no data".into()));
    }

    let info = Some(client.info_on(&request.channel));
    let publication = Publication { data: request.data, info, ..Publication::default() };
    node.publish(&request.channel, publication, &rules, None).await?;
    Ok(())
}

async fn presence(node: &Node, client: &Client, channel: &str) -> Result<BTreeMap<String, ClientInfo>, Denied> {
    let rules = node.may_read(client, channel)?;
    if !rules.presence {
        let text = "presence is off on this channel; set presence = true in its namespace";
        return Err((ErrorCode::NotAvailable, text.into()));
    }
    node.engine.presence(channel).await.map_err(|error| error.denied())
}

fn presence_stats(presence: &BTreeMap<String, ClientInfo>) -> PresenceStatsResult {
    let users: HashSet<&str> = presence.values().map(|info| &*info.user).collect();
    PresenceStatsResult { num_clients: presence.len() as u32, num_users: users.len() as u32 }
}

async fn history(node: &Node, client: &Client, request: HistoryRequest) -> Result<HistoryResult, Denied> {
    let rules = node.may_read(client, &request.channel)?;
    let since = request
        .since
        .map(|since| Position { offset: since.offset, epoch: since.epoch });
    node.history(&request.channel, &rules, request.limit, since, request.reverse)
        .await
}
