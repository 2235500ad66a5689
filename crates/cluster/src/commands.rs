//! What a client may ask for, carried out.

use crate::authorize::Denied;
use crate::client::{Client, Held, Outbox};
use crate::session::{Outcome, TokenEnd, Transport};
use crate::token::Refusal;
use crate::{Node, Rules};
use bus::Headers;
use bus::clock::{unix_ms, unix_seconds};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use wire::channels::{self, Position};
use wire::limits::{CHANNELS_PER_CLIENT_MAX, HISTORY_PAGE_MAX};
use wire::realtime::{
    ClientInfo, Command, ConnectRequest, ConnectResult, Disconnect, ErrorCode, HistoryRequest, HistoryResult, Join,
    Leave, PresenceResult, PresenceStatsResult, Publication, PublishRequest, PublishResult, Push, RefreshRequest,
    RefreshResult, Reply, RpcRequest, RpcResult, SubRefreshRequest, SubRefreshResult, SubscribeRequest,
    SubscribeResult, Unsubscribe, UnsubscribeResult,
};

/// Clients give a command five seconds; what takes longer here is told as an error, not as silence.
const RPC_TIMEOUT: Duration = Duration::from_millis(4500);

/// Carries out the commands of one message, in order. RPCs run beside each other and answer when they are done.
pub async fn carry_out(
    node: Arc<Node>,
    client: Arc<OnceLock<Arc<Client>>>,
    outbox: Arc<Outbox>,
    transport: Transport,
    commands: Vec<Command>,
    mut rpc_room: usize,
) -> Outcome {
    let mut outcome = Outcome::default();
    for command in commands {
        outbox.room().await;
        let Some(connected) = client.get() else {
            let (id, Some(connect)) = (command.id, command.connect) else {
                outcome.close = Some(Disconnect::BadRequest);
                break;
            };
            if id == 0 {
                outcome.close = Some(Disconnect::BadRequest);
                break;
            }
            match connect_client(&node, &client, outbox.clone(), transport, id, connect).await {
                Ok(end) => {
                    outcome.connected = true;
                    outcome.token_end = Some(end);
                    continue;
                }
                Err(close) => {
                    outcome.close = close;
                    break;
                }
            }
        };
        if command.id == 0 && command.send.is_none() {
            outcome.close = Some(Disconnect::BadRequest);
            break;
        }
        let id = command.id;
        if let Some(rpc) = command.rpc {
            if rpc_room == 0 {
                let reply = Reply::failed(id, ErrorCode::TooManyRequests, "too many calls at once on this connection");
                connected.reply(&reply);
            } else {
                rpc_room -= 1;
                outcome.rpcs.push(call(node.clone(), connected.clone(), id, rpc));
            }
            continue;
        }
        if let Some(refresh) = command.refresh {
            match refresh_client(&node, connected, id, &refresh) {
                Ok(end) => outcome.token_end = Some(end),
                Err(close) => {
                    outcome.close = Some(close);
                    break;
                }
            }
            continue;
        }
        if command.connect.is_some() {
            outcome.close = Some(Disconnect::BadRequest);
            break;
        }
        if let Err((code, text)) = one(&node, connected, command).await {
            connected.reply(&Reply::failed(id, code, text));
        }
    }
    outcome
}

/// Gives a connection its client and says when its token ends; else what to close it with (nothing, if an
/// error reply tells what to do).
async fn connect_client(
    node: &Arc<Node>,
    place: &OnceLock<Arc<Client>>,
    outbox: Arc<Outbox>,
    transport: Transport,
    id: u32,
    request: ConnectRequest,
) -> Result<TokenEnd, Option<Disconnect>> {
    if request.token.is_empty() {
        return Err(Some(Disconnect::InvalidToken));
    }
    let claims = match node.tokens.connection(&request.token) {
        Ok(claims) => claims,
        Err(Refusal::Expired) => {
            let reply = Reply::failed(id, ErrorCode::TokenExpired, "the connection token has expired; get a new one");
            outbox.push(crate::client::frame(transport.encoding, &reply));
            return Err(None);
        }
        Err(Refusal::Invalid(why)) => {
            tracing::debug!(why, "refused a connection token");
            return Err(Some(Disconnect::InvalidToken));
        }
    };
    let info = crate::token::json(claims.info);
    let login = claims.sid.clone();
    let number = node.next_client.fetch_add(1, Relaxed);
    // From here on the session cleans up behind the client, even if this does not get to its end.
    let client = place
        .get_or_init(|| Arc::new(Client::new(number, claims.sub, claims.sid, info, transport.encoding, outbox)))
        .clone();
    node.clients.lock().insert(number, client.clone());
    // A sign-in that ended since the token was read has found no client to close.
    if login.is_some_and(|login| node.tokens.has_ended(&login)) {
        return Err(Some(Disconnect::InvalidToken));
    }
    if node.stopping.is_cancelled() {
        return Err(Some(Disconnect::Shutdown));
    }
    node.stats().connected();

    // Those of the token go live behind the connect reply.
    let mut subs = std::collections::BTreeMap::new();
    let mut live = Vec::new();
    for channel in claims.channels {
        let recover = request.subs.get(&channel).cloned().unwrap_or_default();
        let subscribe = SubscribeRequest { channel: channel.clone(), ..recover };
        match prepare(node, &client, &subscribe, node.rules(&channel).cloned()).await {
            Ok(ready) => {
                subs.insert(channel.clone(), ready.result.clone());
                live.push((channel, ready));
            }
            Err((_, text)) => tracing::warn!(channel, text, "a token's channel was not subscribed"),
        }
    }
    let ttl = claims.exp.map(ttl);
    let config = &node.config;
    let connect = ConnectResult {
        client: client.id.clone(),
        version: format!("beamline {}", env!("CARGO_PKG_VERSION")),
        expires: ttl.is_some(),
        ttl: ttl.unwrap_or(0),
        subs,
        ping: if transport.frame_pings {
            0
        } else {
            config.ping_interval.as_secs().clamp(1, 3600) as u32
        },
        pong: !transport.frame_pings,
        time: i64::try_from(unix_ms()).unwrap_or(0),
        session: client.id.clone(),
        node: config.node.clone(),
        ..ConnectResult::default()
    };
    client.reply(&Reply { id, connect: Some(connect), ..Reply::default() });
    for (channel, ready) in live {
        node.hub
            .go_live(&channel, &client, None, &ready.position, ready.result.positioned);
        announce(node, &client, &channel, &ready.rules).await;
    }
    Ok(TokenEnd::of(ttl))
}

fn refresh_client(node: &Node, client: &Client, id: u32, request: &RefreshRequest) -> Result<TokenEnd, Disconnect> {
    let claims = match node.tokens.connection(&request.token) {
        Ok(claims) => claims,
        Err(Refusal::Expired) => return Err(Disconnect::Expired),
        Err(Refusal::Invalid(_)) => return Err(Disconnect::InvalidToken),
    };
    if claims.sub != client.user {
        return Err(Disconnect::InvalidToken);
    }
    client.set_login(claims.sid);
    let ttl = claims.exp.map(ttl);
    let refresh = RefreshResult {
        client: client.id.clone(),
        version: format!("beamline {}", env!("CARGO_PKG_VERSION")),
        expires: ttl.is_some(),
        ttl: ttl.unwrap_or(0),
    };
    client.reply(&Reply { id, refresh: Some(refresh), ..Reply::default() });
    Ok(TokenEnd::of(ttl))
}

async fn one(node: &Arc<Node>, client: &Arc<Client>, command: Command) -> Result<(), Denied> {
    let id = command.id;
    let reply = |reply: Reply| client.reply(&Reply { id, ..reply });
    if let Some(request) = command.subscribe {
        return subscribe(node, client, id, request).await;
    }
    if let Some(request) = command.unsubscribe {
        unsubscribe(node, client, &request.channel).await;
        reply(Reply { unsubscribe: Some(UnsubscribeResult {}), ..Reply::default() });
    } else if let Some(request) = command.publish {
        publish(node, client, request).await?;
        reply(Reply { publish: Some(PublishResult {}), ..Reply::default() });
    } else if let Some(request) = command.presence {
        let presence = present(node, client, &request.channel).await?;
        reply(Reply { presence: Some(PresenceResult { presence }), ..Reply::default() });
    } else if let Some(request) = command.presence_stats {
        let presence = present(node, client, &request.channel).await?;
        let users: std::collections::HashSet<&str> = presence.values().map(|info| &*info.user).collect();
        let stats = PresenceStatsResult { num_clients: presence.len() as u32, num_users: users.len() as u32 };
        reply(Reply { presence_stats: Some(stats), ..Reply::default() });
    } else if let Some(request) = command.history {
        let history = history(node, client, request).await?;
        reply(Reply { history: Some(history), ..Reply::default() });
    } else if command.ping.is_some() {
        reply(Reply { ping: Some(wire::realtime::PingResult {}), ..Reply::default() });
    } else if let Some(request) = command.sub_refresh {
        let result = sub_refresh(node, client, &request)?;
        reply(Reply { sub_refresh: Some(result), ..Reply::default() });
    } else if command.send.is_none() {
        return Err((ErrorCode::MethodNotFound, "the command has no method that is known".into()));
    }
    Ok(())
}

/// A subscription that collects, and what its reply says.
struct Prepared {
    result: SubscribeResult,
    position: Position,
    rules: Rules,
    /// Seconds that the subscription's token is still good for.
    ttl: Option<u32>,
}

async fn subscribe(node: &Arc<Node>, client: &Arc<Client>, id: u32, request: SubscribeRequest) -> Result<(), Denied> {
    let allowed = node.may_subscribe(client, &request.channel, &request.token);
    let Prepared { mut result, position, rules, ttl } = prepare(node, client, &request, allowed).await?;
    (result.expires, result.ttl) = (ttl.is_some(), ttl.unwrap_or(0));
    let positioned = result.positioned;
    let reply = crate::client::frame(client.encoding, &Reply { id, subscribe: Some(result), ..Reply::default() });
    node.hub
        .go_live(&request.channel, client, Some(reply), &position, positioned);
    announce(node, client, &request.channel, &rules).await;
    Ok(())
}

async fn prepare(
    node: &Arc<Node>,
    client: &Arc<Client>,
    request: &SubscribeRequest,
    allowed: Result<Rules, Denied>,
) -> Result<Prepared, Denied> {
    let channel = &request.channel;
    if client.is_subscribed(channel) {
        return Err((ErrorCode::AlreadySubscribed, "already subscribed to this channel".into()));
    }
    let rules = allowed?;
    if !client.holds(channel) && client.subscription_count() >= CHANNELS_PER_CLIENT_MAX {
        let text = format!("a connection may hold {CHANNELS_PER_CLIENT_MAX} channels");
        return Err((ErrorCode::LimitExceeded, text));
    }
    let (expires, info) = match request.token.is_empty() {
        true => (None, Bytes::new()),
        false => node.subscription_token(client, channel, &request.token)?,
    };
    let ttl = expires.map(ttl);
    client.hold(
        channel,
        Held {
            presence: rules.presence,
            join_leave: rules.join_leave,
            expires,
            info,
            lost: false,
        },
    );
    node.hub.join(channel, client);
    let prepared = async {
        node.engine.follow(channel).await?;
        if rules.presence {
            node.engine
                .present(channel, &client.id, Some(client.info_on(channel)))
                .await?;
        }
        recover(node, request, &rules).await
    };
    match prepared.await {
        Ok((result, position)) => Ok(Prepared { result, position, rules, ttl }),
        Err(error) => {
            tracing::warn!(channel, %error, "a subscription failed");
            client.forget(channel);
            let last = node.hub.leave(channel, client.number);
            withdraw(node, client, channel, rules.presence, last).await;
            Err(error.denied())
        }
    }
}

/// The subscribe result, with what was missed if all of it is there; and the offset up to which the client has it all.
async fn recover(
    node: &Node,
    request: &SubscribeRequest,
    rules: &Rules,
) -> Result<(SubscribeResult, Position), crate::engine::Failed> {
    if !rules.keeps_history() {
        let result = SubscribeResult { was_recovering: request.recover, ..SubscribeResult::default() };
        return Ok((result, Position::default()));
    }
    let since = Position { offset: request.offset, epoch: request.epoch.clone() };
    let wanted = request.recover && rules.recovers();
    let page = node
        .engine
        .history(&request.channel, rules, wanted.then_some(&since))
        .await?;
    // Whole: the epoch is the same and the first that was missed is still there.
    let same = request.epoch.is_empty() || request.epoch == page.position.epoch;
    let whole = page
        .publications
        .first()
        .map_or(request.offset == page.position.offset, |first| Some(first.offset) == request.offset.checked_add(1));
    let recovered = wanted && same && whole && request.offset <= page.position.offset;
    let result = SubscribeResult {
        recoverable: rules.recovers(),
        positioned: rules.recovers(),
        epoch: page.position.epoch.clone(),
        offset: page.position.offset,
        was_recovering: request.recover,
        recovered,
        publications: if recovered { page.publications } else { Vec::new() },
        ..SubscribeResult::default()
    };
    Ok((result, page.position))
}

async fn unsubscribe(node: &Node, client: &Client, channel: &str) {
    let info = client.info_on(channel);
    let Some(held) = client.forget(channel) else { return };
    let last = node.hub.leave(channel, client.number);
    depart(node, client, channel, &held, info, last).await;
}

/// Tells the engine and the other subscribers that a client has left; the hub no longer has it.
async fn depart(node: &Node, client: &Client, channel: &str, held: &Held, info: ClientInfo, last: bool) {
    withdraw(node, client, channel, held.presence, last).await;
    if held.join_leave {
        let leave = Leave { info: Some(info) };
        node.engine
            .event(channel, Push { leave: Some(leave), ..Push::default() })
            .await;
    }
}

async fn withdraw(node: &Node, client: &Client, channel: &str, presence: bool, last: bool) {
    if last {
        node.engine.unfollow(channel).await;
    }
    if presence && let Err(error) = node.engine.present(channel, &client.id, None).await {
        tracing::debug!(channel, %error, "a presence entry was not removed; it expires by itself");
    }
}

async fn announce(node: &Node, client: &Client, channel: &str, rules: &Rules) {
    if rules.join_leave {
        let join = Join { info: Some(client.info_on(channel)) };
        node.engine
            .event(channel, Push { join: Some(join), ..Push::default() })
            .await;
    }
}

/// Ends everything that a closed connection held. Deliveries to it stop at once, however long the engine takes for the
/// rest.
pub async fn disconnected(node: &Node, client: &Client) {
    node.clients.lock().remove(&client.number);
    let departures: Vec<_> = client
        .subscriptions()
        .into_iter()
        .map(|(channel, held)| {
            let (info, last) = (client.info_on(&channel), node.hub.leave(&channel, client.number));
            client.forget(&channel);
            (channel, held, info, last)
        })
        .collect();

    for (channel, held, info, last) in departures {
        depart(node, client, &channel, &held, info, last).await;
    }
}

async fn publish(node: &Node, client: &Client, request: PublishRequest) -> Result<(), Denied> {
    let rules = node.may_publish(client, &request.channel)?;
    if request.data.is_empty() {
        return Err((ErrorCode::BadRequest, "a publication has data".into()));
    }
    let info = Some(client.info_on(&request.channel));
    let publication = Publication { data: request.data, info, ..Publication::default() };
    node.publish(&request.channel, publication, &rules, None).await?;
    Ok(())
}

impl Node {
    /// Through the engine; returns once it has acknowledged.
    pub async fn publish(
        &self,
        channel: &str,
        publication: Publication,
        rules: &Rules,
        idempotency_key: Option<String>,
    ) -> Result<Position, Denied> {
        let started = std::time::Instant::now();
        let published = self.engine.publish(channel, publication, rules, idempotency_key).await;
        self.stats().published(started.elapsed());
        published.map_err(|error| {
            tracing::warn!(channel, %error, "a publication failed");
            error.denied()
        })
    }
}

async fn present(
    node: &Node,
    client: &Client,
    channel: &str,
) -> Result<std::collections::BTreeMap<String, ClientInfo>, Denied> {
    let rules = node.may_read(client, channel)?;
    if !rules.presence {
        let text = "presence is off; presence = true in the channel's namespace turns it on";
        return Err((ErrorCode::NotAvailable, text.into()));
    }
    node.engine.presence(channel).await.map_err(|error| error.denied())
}

async fn history(node: &Node, client: &Client, request: HistoryRequest) -> Result<HistoryResult, Denied> {
    let rules = node.may_read(client, &request.channel)?;
    let since = request
        .since
        .map(|since| Position { offset: since.offset, epoch: since.epoch });
    node.history(&request.channel, &rules, request.limit, since, request.reverse)
        .await
}

impl Node {
    /// `limit` 0: position only; negative: all, up to [`HISTORY_PAGE_MAX`].
    pub async fn history(
        &self,
        channel: &str,
        rules: &Rules,
        limit: i32,
        since: Option<Position>,
        reverse: bool,
    ) -> Result<HistoryResult, Denied> {
        if !rules.keeps_history() {
            let text = "no history is kept; history_size and history_ttl in the channel's namespace keep one";
            return Err((ErrorCode::NotAvailable, text.into()));
        }
        let page = self.engine.history(channel, rules, None).await;
        let page = page.map_err(|error| error.denied())?;
        let mut publications = page.publications;
        if let Some(since) = since {
            if !since.epoch.is_empty() && since.epoch != page.position.epoch {
                let text = "the history began anew; read it without since";
                return Err((ErrorCode::UnrecoverablePosition, text.into()));
            }
            publications.retain(|p| {
                if reverse {
                    p.offset < since.offset
                } else {
                    p.offset > since.offset
                }
            });
        }
        if reverse {
            publications.reverse();
        }
        publications.truncate(usize::try_from(limit).unwrap_or(usize::MAX).min(HISTORY_PAGE_MAX));
        Ok(HistoryResult { publications, epoch: page.position.epoch, offset: page.position.offset })
    }
}

fn sub_refresh(node: &Node, client: &Client, request: &SubRefreshRequest) -> Result<SubRefreshResult, Denied> {
    if !client.is_subscribed(&request.channel) {
        return Err((ErrorCode::PermissionDenied, "not subscribed to this channel".into()));
    }
    let (expires, _) = node.subscription_token(client, &request.channel, &request.token)?;
    client.extend(&request.channel, expires);
    let ttl = expires.map(ttl);
    Ok(SubRefreshResult { expires: ttl.is_some(), ttl: ttl.unwrap_or(0) })
}

/// Ends the subscriptions whose token ran out and was not refreshed; the client comes again with a new one.
pub fn expire_subscriptions(node: &Arc<Node>, client: &Arc<Client>) -> Option<BoxFuture<'static, ()>> {
    let over = unix_seconds().saturating_sub(node.config.refresh_grace.as_secs());
    let mut expired = client.subscriptions();
    expired.retain(|(_, held)| !held.lost && held.expires.is_some_and(|exp| exp < over));
    if expired.is_empty() {
        return None;
    }
    let (node, client) = (node.clone(), client.clone());
    Some(Box::pin(async move {
        for (channel, _) in expired {
            unsubscribe(&node, &client, &channel).await;
            client.unsubscribed(&channel, Unsubscribe::Expired);
        }
    }))
}

/// What a browser calls, asked of whoever answers that method on the bus.
fn call(node: Arc<Node>, client: Arc<Client>, id: u32, request: RpcRequest) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let answer = answer(&node, &client, request).await;
        client.outbox.room().await;
        client.reply(&match answer {
            Ok(data) => Reply { id, rpc: Some(RpcResult { data }), ..Reply::default() },
            Err((code, text)) => Reply {
                id,
                error: Some(wire::realtime::Error { code, message: text, temporary: matches!(code, 100 | 111) }),
                ..Reply::default()
            },
        });
    })
}

async fn answer(node: &Node, client: &Client, request: RpcRequest) -> Result<Bytes, (u32, String)> {
    let Some(subject) = wire::subjects::rpc(&request.method) else {
        return Err((ErrorCode::MethodNotFound as u32, "no such method".into()));
    };
    let headers = Headers::new()
        .with(channels::RPC_USER, &client.user)
        .with(channels::RPC_CLIENT, &client.id)
        .with(channels::RPC_ENCODING, client.encoding.as_str());
    let reply = node
        .bus
        .request(&subject, headers, request.data, RPC_TIMEOUT)
        .await
        .map_err(|error| match error {
            bus::Error::NoResponders(_) => {
                (ErrorCode::MethodNotFound as u32, format!("nobody answers {:?}", request.method))
            }
            bus::Error::Timeout(_) => (ErrorCode::Internal as u32, format!("{:?} took too long", request.method)),
            other => (ErrorCode::Internal as u32, other.to_string()),
        })?;
    match reply.headers.get(channels::RPC_ERROR_CODE) {
        None => Ok(reply.payload),
        Some(code) => {
            let text = String::from_utf8_lossy(&reply.payload).into_owned();
            Err((code.parse().unwrap_or(ErrorCode::Internal as u32), text))
        }
    }
}

/// Seconds until `exp`.
fn ttl(exp: u64) -> u32 {
    u32::try_from(exp.saturating_sub(unix_seconds())).unwrap_or(u32::MAX)
}
