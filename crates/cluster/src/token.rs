//! Connection and subscription tokens: JWTs signed with the deployment's secret.

use bus::clock::unix_seconds;
use bytes::Bytes;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use parking_lot::Mutex;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::value::RawValue;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

/// Sign-outs that a node remembers; beyond it the oldest is forgotten.
const ENDED_MAX: usize = 10_000;

pub struct Tokens {
    key: DecodingKey,
    validation: Validation,
    /// Sign-ins that are over: their tokens open nothing, though they have not run out yet.
    ended: Mutex<Ended>,
}

#[derive(Default)]
struct Ended {
    known: HashSet<Arc<str>>,
    oldest_first: VecDeque<Arc<str>>,
}

impl Ended {
    fn note(&mut self, sid: &str) {
        let sid: Arc<str> = sid.into();
        if !self.known.insert(sid.clone()) {
            return;
        }
        self.oldest_first.push_back(sid);
        if self.oldest_first.len() > ENDED_MAX
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.known.remove(&oldest);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    Expired,
    Invalid(String),
}

#[derive(Debug, Clone, Deserialize)]
pub struct Connection {
    pub sub: String,
    /// Seconds since the epoch.
    #[serde(default)]
    pub exp: Option<u64>,
    #[serde(default)]
    pub info: Option<Box<RawValue>>,
    /// Subscribed by the server at connect.
    #[serde(default)]
    pub channels: Vec<String>,
    /// The sign-in that the token was made for: it ends with it.
    #[serde(default)]
    pub sid: Option<String>,
    /// Marks a subscription token.
    #[serde(default)]
    channel: Option<IgnoredAny>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Subscription {
    pub sub: String,
    pub channel: String,
    #[serde(default)]
    pub exp: Option<u64>,
    #[serde(default)]
    pub info: Option<Box<RawValue>>,
}

/// A claim as it stands in the token.
pub fn json(claim: Option<Box<RawValue>>) -> Bytes {
    claim
        .map(|json| Bytes::from(String::from(Box::<str>::from(json))))
        .unwrap_or_default()
}

impl Tokens {
    pub fn new(secret: &[u8]) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.required_spec_claims.clear();
        validation.validate_aud = false;
        validation.leeway = 0;
        Self {
            key: DecodingKey::from_secret(secret),
            validation,
            ended: Mutex::default(),
        }
    }

    /// Refuses the tokens of a sign-in from now on.
    pub fn end(&self, sid: &str) {
        self.ended.lock().note(sid);
    }

    pub fn has_ended(&self, sid: &str) -> bool {
        self.ended.lock().known.contains(sid)
    }

    /// A token for one channel opens no connection: whoever was given it may see that channel and nothing else.
    pub fn connection(&self, token: &str) -> Result<Connection, Refusal> {
        let claims: Connection = self.read(token)?;
        if claims.channel.is_some() {
            return Err(Refusal::Invalid("it has a channel: it is a subscription token".into()));
        }
        if claims.sid.as_deref().is_some_and(|sid| self.has_ended(sid)) {
            return Err(Refusal::Invalid("its user has signed out".into()));
        }
        Ok(claims)
    }

    /// A connection token has no `channel`, which a subscription token must have.
    pub fn subscription(&self, token: &str) -> Result<Subscription, Refusal> {
        self.read(token)
    }

    fn read<T: DeserializeOwned + Clone>(&self, token: &str) -> Result<T, Refusal> {
        match jsonwebtoken::decode::<T>(token, &self.key, &self.validation) {
            Ok(data) => Ok(data.claims),
            Err(error) if *error.kind() == ErrorKind::ExpiredSignature => Err(Refusal::Expired),
            Err(error) => Err(Refusal::Invalid(error.to_string())),
        }
    }
}

/// Seconds until `exp`.
pub fn ttl(exp: u64) -> u32 {
    u32::try_from(exp.saturating_sub(unix_seconds())).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_sign_out_is_forgotten_first() {
        let mut ended = Ended::default();
        (0..=ENDED_MAX).for_each(|n| ended.note(&n.to_string()));
        ended.note("1");
        assert_eq!((ended.known.len(), ended.oldest_first.len()), (ENDED_MAX, ENDED_MAX));
        assert!(!ended.known.contains("0") && ended.known.contains("1"));
    }
}
