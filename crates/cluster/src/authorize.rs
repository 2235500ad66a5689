//! Who may do what on which channel.

use crate::rules::{Rules, namespace_of};
use crate::token::Refusal;
use crate::{Node, client::Client};
use bytes::Bytes;
use wire::limits::CHANNEL_MAX;
use wire::realtime::ErrorCode;

/// The code and text of an error reply.
pub type Denied = (ErrorCode, String);

impl Node {
    /// The rules of a channel, if it may exist.
    pub fn rules(&self, channel: &str) -> Result<&Rules, Denied> {
        if channel.is_empty() || channel.len() > CHANNEL_MAX || channel.chars().any(char::is_control) {
            let text = format!("a channel's name has 1 to {CHANNEL_MAX} bytes and no control characters");
            return Err((ErrorCode::BadRequest, text));
        }
        crate::rules::of(channel, &self.config.namespaces, &self.config.defaults).ok_or_else(|| {
            let namespace = namespace_of(channel).unwrap_or_default();
            let text = format!("no namespace {namespace:?}; add it to [[cluster.namespaces]]");
            (ErrorCode::UnknownChannel, text)
        })
    }

    /// Whether a client may be on a channel; `token` is the subscription's.
    pub fn may_subscribe(&self, client: &Client, channel: &str, token: &str) -> Result<Rules, Denied> {
        let rules = self.may_touch(client, channel)?;
        if channel.starts_with('$') {
            self.subscription_token(client, channel, token)?;
        }
        Ok(rules.clone())
    }

    pub fn may_publish(&self, client: &Client, channel: &str) -> Result<Rules, Denied> {
        let rules = self.may_touch(client, channel)?;
        if !rules.publish {
            let text = "clients may not publish here; publish = true in the channel's namespace lets them";
            return Err((ErrorCode::PermissionDenied, text.into()));
        }
        if channel.starts_with('$') && !client.is_subscribed(channel) {
            return Err((ErrorCode::PermissionDenied, "a private channel is for its subscribers".into()));
        }
        Ok(rules.clone())
    }

    /// Whether a client may ask for a channel's history or presence: it must be on it.
    pub fn may_read(&self, client: &Client, channel: &str) -> Result<Rules, Denied> {
        let rules = self.may_touch(client, channel)?;
        if !client.is_subscribed(channel) {
            return Err((ErrorCode::PermissionDenied, "subscribe to the channel first".into()));
        }
        Ok(rules.clone())
    }

    /// Until when the token lets the client stay, and what it says of it on the channel.
    pub fn subscription_token(
        &self,
        client: &Client,
        channel: &str,
        token: &str,
    ) -> Result<(Option<u64>, Bytes), Denied> {
        if token.is_empty() {
            return Err((ErrorCode::PermissionDenied, "a private channel needs a subscription token".into()));
        }
        let claims = self.tokens.subscription(token).map_err(|refusal| match refusal {
            Refusal::Expired => (ErrorCode::TokenExpired, "the subscription token has expired".into()),
            Refusal::Invalid(why) => {
                (ErrorCode::PermissionDenied, format!("the subscription token is not valid: {why}"))
            }
        })?;
        if claims.channel != channel || claims.sub != client.user {
            return Err((ErrorCode::PermissionDenied, "the subscription token is for another user or channel".into()));
        }
        Ok((claims.exp, crate::token::json(claims.info)))
    }

    fn may_touch(&self, client: &Client, channel: &str) -> Result<&Rules, Denied> {
        let rules = self.rules(channel)?;
        let denied = |text: &str| Err((ErrorCode::PermissionDenied, text.to_string()));
        if client.user.is_empty() {
            return denied("the token names no user (claim sub)");
        }
        match channel.rsplit_once('#') {
            Some((_, users)) if !users.split(',').any(|user| user == client.user) => {
                denied("this channel is for the users named after its #")
            }
            None if rules.user_limited => denied("channels of this namespace name their users after a #"),
            _ => Ok(rules),
        }
    }
}
