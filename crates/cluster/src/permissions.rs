//! Authorization: what a client may do on a channel.

use crate::rules::{Rules, namespace_of};
use crate::token::Refusal;
use crate::{Node, client::Client};
use bytes::Bytes;
use wire::limits::CHANNEL_MAX;
use wire::realtime::ErrorCode;

/// A refusal: the code and text of the error reply.
pub type Denied = (ErrorCode, String);

impl Node {
    /// The rules of a channel; an error if its name is invalid or its namespace unknown.
    pub fn rules(&self, channel: &str) -> Result<&Rules, Denied> {
        if channel.is_empty() || channel.len() > CHANNEL_MAX || channel.chars().any(char::is_control) {
            let text = format!("a channel name must have 1 to {CHANNEL_MAX} bytes and no control characters");
            return Err((ErrorCode::BadRequest, text));
        }

        crate::rules::of(channel, &self.config.namespaces, &self.config.defaults).ok_or_else(|| {
            let namespace = namespace_of(channel).unwrap_or_default();
            let text = format!("no namespace {namespace:?}; add it to [[cluster.namespaces]]");
            (ErrorCode::UnknownChannel, text)
        })
    }

    /// Checks that a client may subscribe. `token` is the subscription token, which only private channels require.
    pub fn may_subscribe(&self, client: &Client, channel: &str, token: &str) -> Result<Rules, Denied> {
        let rules = self.may_touch(client, channel)?;
        if channel.starts_with('$') {
            self.subscription_token(client, channel, token)?;
        }
        Ok(rules.clone())
    }

    /// Checks that a client may publish.
    pub fn may_publish(&self, client: &Client, channel: &str) -> Result<Rules, Denied> {
        let rules = self.may_touch(client, channel)?;
        if !rules.publish {
            let text = "clients may not publish on this channel; set publish = true in its namespace to let them";
            return Err((ErrorCode::PermissionDenied, text.into()));
        }
        // The subscription token was checked when the client subscribed.
        if channel.starts_with('$') && !client.is_subscribed(channel) {
            return Err((
                ErrorCode::PermissionDenied,
                "subscribe to the private channel before publishing on it".into(),
            ));
        }
        Ok(rules.clone())
    }

    /// Checks that a client may read a channel's history and presence: only subscribers may.
    pub fn may_read(&self, client: &Client, channel: &str) -> Result<Rules, Denied> {
        let rules = self.may_touch(client, channel)?;
        if !client.is_subscribed(channel) {
            return Err((ErrorCode::PermissionDenied, "subscribe to the channel first".into()));
        }
        Ok(rules.clone())
    }

    /// Checks a subscription token. Returns when it expires, in Unix seconds, and its claim `info`.
    pub fn subscription_token(
        &self,
        client: &Client,
        channel: &str,
        token: &str,
    ) -> Result<(Option<u64>, Bytes), Denied> {
        if token.is_empty() {
            return Err((ErrorCode::PermissionDenied, "a subscription token is required on a private channel".into()));
        }

        let claims = self.tokens.subscription(token).map_err(|refusal| match refusal {
            Refusal::Expired => (ErrorCode::TokenExpired, "the subscription token has expired".into()),
            Refusal::Invalid(why) => {
                (ErrorCode::PermissionDenied, format!("the subscription token is not valid: {why}"))
            }
        })?;

        // The token must belong to this user and this channel.
        if claims.channel != channel || claims.sub != client.user {
            return Err((ErrorCode::PermissionDenied, "the subscription token is for another user or channel".into()));
        }
        Ok((claims.exp, crate::token::json(claims.info)))
    }

    /// Checks the conditions common to every use of a channel.
    fn may_touch(&self, client: &Client, channel: &str) -> Result<&Rules, Denied> {
        let rules = self.rules(channel)?;
        let denied = |text: &str| Err((ErrorCode::PermissionDenied, text.to_string()));
        if client.user.is_empty() {
            return denied("the connection token names no user; set its claim sub");
        }

        match channel.rsplit_once('#') {
            Some((_, users)) if !users.split(',').any(|user| user == client.user) => {
                denied("only the users named after the # may use this channel")
            }
            None if rules.user_limited => denied("a channel of this namespace must name its users after a #"),
            _ => Ok(rules),
        }
    }
}
