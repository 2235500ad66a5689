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

/// Sign-outs that a node remembers. The oldest is forgotten first.
const ENDED_MAX: usize = 10_000;

pub struct Tokens {
    key: DecodingKey,
    validation: Validation,
    /// Sign-ins that have ended. Their tokens are refused even before they expire.
    ended: Mutex<Ended>,
}

#[derive(Default)]
struct Ended {
    known: HashSet<Arc<str>>,
    oldest_first: VecDeque<Arc<str>>,
}

impl Ended {
    fn add(&mut self, sid: &str) {
        let sid: Arc<str> = sid.into();
        if !self.known.insert(sid.clone()) {
            return;
        }
        self.oldest_first.push_back(sid);

        if self.oldest_first.len() > ENDED_MAX {
            let oldest = self
                .oldest_first
                .pop_front()
                .expect("the queue has more than ENDED_MAX");
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
    /// When the token expires, in Unix seconds.
    #[serde(default)]
    pub exp: Option<u64>,
    #[serde(default)]
    pub info: Option<Box<RawValue>>,
    /// Channels that the server subscribes at connect.
    #[serde(default)]
    pub channels: Vec<String>,
    /// The sign-in that the token was issued for. The token is refused once the user has signed out.
    #[serde(default)]
    pub sid: Option<String>,
    /// Set in a subscription token only.
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

/// The JSON of a claim, byte for byte as in the token; empty if there is none.
pub fn json(claim: Option<Box<RawValue>>) -> Bytes {
    claim
        .map(|json| Bytes::from(String::from(Box::<str>::from(json))))
        .unwrap_or_default()
}

impl Tokens {
    pub fn new(secret: &[u8]) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        // `exp` is optional. There is no leeway for new connections: the refresh grace applies only to open ones, in
        // the session.
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
        self.ended.lock().add(sid);
    }

    pub fn has_ended(&self, sid: &str) -> bool {
        self.ended.lock().known.contains(sid)
    }

    /// Checks a connection token. A subscription token is refused, because it grants access to one channel only.
    pub fn connection(&self, token: &str) -> Result<Connection, Refusal> {
        let claims: Connection = self.read(token)?;
        if claims.channel.is_some() {
            return Err(Refusal::Invalid("it is a subscription token (it has the claim channel)".into()));
        }

        if claims.sid.as_deref().is_some_and(|sid| self.has_ended(sid)) {
            return Err(Refusal::Invalid("its user has signed out".into()));
        }
        Ok(claims)
    }

    /// Checks a subscription token. A connection token is refused, since it has no `channel`.
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

/// Seconds until `exp`, which is in Unix seconds; 0 if it has passed.
pub fn ttl(exp: u64) -> u32 {
    u32::try_from(exp.saturating_sub(unix_seconds())).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_sign_out_is_forgotten_first() {
        let mut ended = Ended::default();
        (0..=ENDED_MAX).for_each(|n| ended.add(&n.to_string()));
        ended.add("1");

        assert_eq!((ended.known.len(), ended.oldest_first.len()), (ENDED_MAX, ENDED_MAX));
        assert!(!ended.known.contains("0") && ended.known.contains("1"));
    }
}
