//! Operators prove themselves with a token that the deployment's secret signs: `beamline operator-token` prints one.

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::{Deserialize, Serialize};
use std::fmt;
use wire::router::{ErrorBody, RouterCode};

/// The audience of operators' tokens. Tokens for other purposes name none or another one.
pub const AUDIENCE: &str = "beamline-operator";
/// A longer credential is no token, and not worth decoding.
const TOKEN_MAX: usize = 4096;

/// What an operator may do. A role may do whatever the roles before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// See the state of routers, and policies.
    Viewer,
    /// Try out what a request would get.
    Operator,
    /// Nothing more yet.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

/// The claims of an operator's token. Times are in Unix seconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Claims {
    /// The operator's name, for logs.
    pub sub: String,
    pub aud: String,
    pub role: Role,
    pub iat: u64,
    pub exp: u64,
}

/// Checks operators' tokens.
pub struct Operators {
    /// `None`: there is no secret, and nobody is an operator.
    key: Option<DecodingKey>,
    validation: Validation,
}

impl Operators {
    pub fn new(secret: &[u8]) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_required_spec_claims(&["exp", "sub", "aud"]);
        validation.set_audience(&[AUDIENCE]);
        validation.leeway = 0;
        Self {
            key: (!secret.is_empty()).then(|| DecodingKey::from_secret(secret)),
            validation,
        }
    }

    /// The operator whose token is in the value of the header `authorization`, if its role may do what `needed` may.
    pub fn check(&self, authorization: Option<&str>, needed: Role) -> Result<Claims, ErrorBody> {
        let refuse = |why: &str| Err(ErrorBody::new(RouterCode::Unauthorized, why));
        let Some(value) = authorization else {
            return refuse("operators only: send the header authorization: Bearer <token of beamline operator-token>");
        };
        let (scheme, token) = value.split_once(' ').unwrap_or_default();
        if !scheme.eq_ignore_ascii_case("bearer") {
            return refuse("the header authorization is not Bearer and a token");
        }
        let Some(key) = self.key.as_ref().filter(|_| token.len() <= TOKEN_MAX) else {
            return refuse("the operator's token is not valid here");
        };

        let claims = match jsonwebtoken::decode::<Claims>(token.trim(), key, &self.validation) {
            Ok(decoded) => decoded.claims,
            Err(error) if *error.kind() == ErrorKind::ExpiredSignature => {
                return refuse("the operator's token has expired; make a new one with beamline operator-token");
            }
            Err(_) => return refuse("the operator's token is not valid here"),
        };
        if claims.role < needed {
            let text = format!("the role {} may not do this; {needed} may", claims.role);
            return Err(ErrorBody::new(RouterCode::Forbidden, text));
        }
        Ok(claims)
    }
}
