//! Connection and subscription tokens: JWTs signed with the deployment's secret.

use bytes::Bytes;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

pub struct Tokens {
    key: DecodingKey,
    validation: Validation,
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
    claim.map(|json| Bytes::from(String::from(Box::<str>::from(json)))).unwrap_or_default()
}

impl Tokens {
    pub fn new(secret: &[u8]) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.required_spec_claims.clear();
        validation.validate_aud = false;
        validation.leeway = 0;
        Self { key: DecodingKey::from_secret(secret), validation }
    }

    pub fn read<T: DeserializeOwned + Clone>(&self, token: &str) -> Result<T, Refusal> {
        match jsonwebtoken::decode::<T>(token, &self.key, &self.validation) {
            Ok(data) => Ok(data.claims),
            Err(error) if *error.kind() == ErrorKind::ExpiredSignature => Err(Refusal::Expired),
            Err(error) => Err(Refusal::Invalid(error.to_string())),
        }
    }
}
