//! Subscribing, recovering and leaving channels.

use crate::client::{Client, Held, frame};
use crate::engine;
use crate::permissions::Denied;
use crate::token::ttl;
use crate::{Node, Rules};
use bus::clock::unix_seconds;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::sync::Arc;
use wire::channels::Position;
use wire::limits::CHANNELS_PER_CLIENT_MAX;
use wire::realtime::{
    ClientInfo, ErrorCode, Join, Leave, Push, Reply, SubRefreshRequest, SubRefreshResult, SubscribeRequest,
    SubscribeResult, Unsubscribe,
};

/// A subscription whose publications the hub collects until it goes live.
pub struct Prepared {
    pub result: SubscribeResult,
    /// The newest position of the history that `result` covers.
    pub position: Position,
    pub rules: Rules,
    /// Seconds until the subscription token expires.
    ttl: Option<u32>,
}

pub async fn subscribe(node: &Node, client: &Arc<Client>, id: u32, request: SubscribeRequest) -> Result<(), Denied> {
    let allowed = node.may_subscribe(client, &request.channel, &request.token);
    let Prepared { mut result, position, rules, ttl } = prepare(node, client, &request, allowed).await?;
    (result.expires, result.ttl) = (ttl.is_some(), ttl.unwrap_or(0));

    let positioned = result.positioned;
    let reply = frame(client.encoding, &Reply { id, subscribe: Some(result), ..Reply::default() });
    node.hub
        .go_live(&request.channel, client, Some(reply), &position, positioned);
    announce(node, client, &request.channel, &rules).await;
    Ok(())
}

/// Registers the subscription, then reads what the client missed. `allowed` has the rules of the channel, or why the
/// client may not subscribe.
pub async fn prepare(
    node: &Node,
    client: &Arc<Client>,
    request: &SubscribeRequest,
    allowed: Result<Rules, Denied>,
) -> Result<Prepared, Denied> {
    let channel = &request.channel;
    if client.is_subscribed(channel) {
        return Err((ErrorCode::AlreadySubscribed, "already subscribed to this channel".into()));
    }
    let rules = allowed?;
    // Renewing a lost subscription does not add to the count.
    if !client.has_subscription(channel) && client.subscription_count() >= CHANNELS_PER_CLIENT_MAX {
        let text = format!("a connection may subscribe to {CHANNELS_PER_CLIENT_MAX} channels; unsubscribe from one");
        return Err((ErrorCode::LimitExceeded, text));
    }
    let (expires, info) = if request.token.is_empty() {
        (None, Bytes::new())
    } else {
        node.subscription_token(client, channel, &request.token)?
    };

    // Registered with client and hub before the engine is used: if the session ends meanwhile, `leave_all` undoes both.
    let held = Held {
        presence: rules.presence,
        join_leave: rules.join_leave,
        expires,
        info,
        lost: false,
    };
    client.add_subscription(channel, held);
    node.hub.join(channel, client);

    match follow_and_recover(node, client, request, &rules).await {
        Ok((result, position)) => Ok(Prepared { result, position, rules, ttl: expires.map(ttl) }),
        Err(error) => {
            tracing::warn!(channel, %error, "a subscription failed");
            client.remove_subscription(channel);
            let last = node.hub.leave(channel, client.number);
            withdraw(node, client, channel, rules.presence, last).await;
            Err(error.denied())
        }
    }
}

/// Follows the channel before its history is read, so that no publication is missed in between.
async fn follow_and_recover(
    node: &Node,
    client: &Client,
    request: &SubscribeRequest,
    rules: &Rules,
) -> Result<(SubscribeResult, Position), engine::Failed> {
    let channel = &request.channel;
    node.engine.follow(channel).await?;
    if rules.presence {
        let info = client.info_on(channel);
        node.engine.present(channel, &client.id, Some(info)).await?;
    }
    recover(node, request, rules).await
}

/// Returns the subscribe result and the channel's newest position. The result holds the missed publications only if all
/// of them are still in the history.
async fn recover(
    node: &Node,
    request: &SubscribeRequest,
    rules: &Rules,
) -> Result<(SubscribeResult, Position), engine::Failed> {
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

    let same_epoch = request.epoch.is_empty() || request.epoch == page.position.epoch;
    // The history is contiguous, so nothing is missing if it continues right after the client's offset.
    let complete = match page.publications.first() {
        Some(first) => Some(first.offset) == request.offset.checked_add(1),
        None => request.offset == page.position.offset,
    };
    let recovered = wanted && same_epoch && complete && request.offset <= page.position.offset;

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

/// Publishes the client's join, if the channel announces joins and leaves.
pub async fn announce(node: &Node, client: &Client, channel: &str, rules: &Rules) {
    if rules.join_leave {
        let join = Join { info: Some(client.info_on(channel)) };
        node.engine
            .event(channel, Push { join: Some(join), ..Push::default() })
            .await;
    }
}

pub async fn unsubscribe(node: &Node, client: &Client, channel: &str) {
    // Read before the subscription is removed, because the info of its token is removed with it.
    let info = client.info_on(channel);
    let Some(held) = client.remove_subscription(channel) else {
        return;
    };

    let last = node.hub.leave(channel, client.number);
    depart(node, client, channel, &held, info, last).await;
}

/// Ends all subscriptions of a closed connection. The client is removed from the hub first, because the engine may be
/// slow.
pub async fn leave_all(node: &Node, client: &Client) {
    node.clients.lock().remove(&client.number);
    let departures: Vec<_> = client
        .subscriptions()
        .into_iter()
        .map(|(channel, held)| {
            let info = client.info_on(&channel);
            let last = node.hub.leave(&channel, client.number);
            client.remove_subscription(&channel);
            (channel, held, info, last)
        })
        .collect();

    for (channel, held, info, last) in departures {
        depart(node, client, &channel, &held, info, last).await;
    }
}

/// Removes a client that has left the hub from the engine, and announces its leave. `last`: the channel has no other
/// subscriber on this node.
async fn depart(node: &Node, client: &Client, channel: &str, held: &Held, info: ClientInfo, last: bool) {
    withdraw(node, client, channel, held.presence, last).await;
    if held.join_leave {
        let leave = Leave { info: Some(info) };
        node.engine
            .event(channel, Push { leave: Some(leave), ..Push::default() })
            .await;
    }
}

/// Undoes a subscription in the engine: the follow, if it was the last one on this node, and the presence entry.
async fn withdraw(node: &Node, client: &Client, channel: &str, presence: bool, last: bool) {
    if last {
        node.engine.unfollow(channel).await;
    }
    if presence {
        let removed = node.engine.present(channel, &client.id, None).await;
        if let Err(error) = removed {
            tracing::debug!(channel, %error, "cannot remove a presence entry; it will expire");
        }
    }
}

/// Extends a subscription with a newer token.
pub fn refresh(node: &Node, client: &Client, request: &SubRefreshRequest) -> Result<SubRefreshResult, Denied> {
    if !client.is_subscribed(&request.channel) {
        return Err((ErrorCode::PermissionDenied, "not subscribed to this channel".into()));
    }

    let (expires, _) = node.subscription_token(client, &request.channel, &request.token)?;
    client.extend(&request.channel, expires);
    let ttl = expires.map(ttl);
    Ok(SubRefreshResult { expires: ttl.is_some(), ttl: ttl.unwrap_or(0) })
}

/// Ends the subscriptions whose token was not refreshed within the grace after its expiry; the client resubscribes with
/// a new token. `None` if there are no such subscriptions.
pub fn expire(node: &Arc<Node>, client: &Arc<Client>) -> Option<BoxFuture<'static, ()>> {
    let latest = unix_seconds().saturating_sub(node.config.refresh_grace.as_secs());
    let mut expired = client.subscriptions();
    expired.retain(|(_, held)| !held.lost && held.expires.is_some_and(|exp| exp < latest));
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
