//! Signing in and out over HTTP. The browser gets a cookie, and short-lived tokens for its connection.

use crate::accounts::{self, Accounts, LOGIN_TTL, User};
use crate::channels::Channels;
use crate::rate_limits::Wait;
use crate::sign_in_limits::{self, Ended, Guesses, Try};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{AppendHeaders, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router, middleware};
use bus::clock::unix_seconds;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

const COOKIE: &str = "beamline";
const BODY_MAX: usize = 4096;
/// Proves that an account has signed in with this browser before. It grants no access.
const DEVICE_COOKIE: &str = "beamline-device";
const DEVICE_TTL: Duration = Duration::from_secs(365 * 86_400);

pub struct Auth {
    pub accounts: Arc<Accounts>,
    pub token_secret: Vec<u8>,
    pub token_ttl: Duration,
    pub signup: bool,
    /// Origins whose pages may sign in, besides our own.
    pub origins: Vec<String>,
    /// Accounts that people cannot create on the page.
    pub operators: Vec<String>,
    pub channels: Channels,
    pub guesses: Guesses,
}

pub fn routes(auth: Arc<Auth>) -> Router {
    Router::new()
        .route("/auth/login", post(login))
        .route("/auth/signup", post(signup))
        .route("/auth/logout", post(logout))
        .route("/auth/token", get(token))
        .layer(axum::extract::DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn_with_state(auth.clone(), same_origin))
        .with_state(auth)
}

/// Refuses POST requests of other sites, whose pages must not sign anybody in or out.
async fn same_origin(State(auth): State<Arc<Auth>>, request: Request, next: Next) -> Response {
    if request.method() == Method::POST
        && let Some(origin) = foreign(request.headers(), &auth.origins)
    {
        let text = format!("pages of {origin} may not sign in here; add it to http.origins if they should");
        return problem(StatusCode::FORBIDDEN, text);
    }

    // Replies contain tokens, which caches must not store.
    let mut response = next.run(request).await;
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Returns the origin of the page that sent the request, if it is neither ours nor in `known`.
fn foreign<'a>(headers: &'a HeaderMap, known: &[String]) -> Option<&'a str> {
    let header = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let origin = header(header::ORIGIN)?;

    // Compares the host only: behind a proxy that ends TLS, the scheme differs.
    let host = origin.split_once("://").map(|(_, host)| host);
    let ours = host.is_some() && host == header(header::HOST);
    (!ours && !known.iter().any(|known| known == origin)).then_some(origin)
}

#[derive(Deserialize)]
struct Credentials {
    name: String,
    password: String,
}

/// The reply to a sign-in, and to a request for a fresh token.
#[derive(Serialize)]
struct Identity<'a> {
    user: &'a str,
    name: &'a str,
    token: String,
    /// Whether people may create accounts themselves.
    signup: bool,
}

/// The reply to a request for a token by a browser that is not signed in.
#[derive(Serialize)]
struct NotSignedIn {
    error: &'static str,
    signup: bool,
}

#[derive(Serialize)]
struct SignedOut {}

#[derive(Serialize)]
struct Problem {
    error: String,
}

/// The claims of a connection token.
#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    /// The sign-in that the token belongs to. Its connections end with it.
    sid: String,
    iat: u64,
    exp: u64,
    info: Info<'a>,
}

/// The part of the claims that other clients can see.
#[derive(Serialize)]
struct Info<'a> {
    name: &'a str,
}

/// The claims in [`DEVICE_COOKIE`].
#[derive(Serialize, Deserialize, Clone)]
struct Device {
    sub: String,
    jti: String,
    exp: u64,
}

type Peer = Option<Extension<ConnectInfo<SocketAddr>>>;
type Body = Result<Json<Credentials>, axum::extract::rejection::JsonRejection>;

async fn login(State(auth): State<Arc<Auth>>, peer: Peer, headers: HeaderMap, body: Body) -> Response {
    let Json(Credentials { name, password }) = match body {
        Ok(body) => body,
        Err(rejection) => return problem(rejection.status(), rejection.body_text()),
    };

    let device = auth.device(&headers, &sign_in_limits::account(&name));
    let by = Try { address: address(&peer), name, device };
    let trying = match auth.guesses.trying(&by, Instant::now()) {
        Ok(trying) => trying,
        Err(wait) => return too_many("too many attempts", wait),
    };

    let verified = auth.accounts.verify(&by.name, &password).await;
    let ended = match &verified {
        Ok(_) => Ended::Right,
        Err(accounts::Error::Wrong) => Ended::Wrong,
        Err(_) => Ended::NotTried,
    };
    trying.ended(ended);

    match verified {
        Ok(user) => enter(&auth, &headers, &user).await,
        Err(error) => {
            if ended == Ended::Wrong {
                tracing::info!(address = %by.address, "sign-in refused: wrong name or password");
            }
            refused(&error)
        }
    }
}

async fn signup(State(auth): State<Arc<Auth>>, peer: Peer, headers: HeaderMap, body: Body) -> Response {
    if !auth.signup {
        return problem(StatusCode::FORBIDDEN, "only an operator creates accounts here (auth.signup is off)");
    }
    let Json(Credentials { name, password }) = match body {
        Ok(body) => body,
        Err(rejection) => return problem(rejection.status(), rejection.body_text()),
    };

    // Operators' accounts are created on the command line, so that the first visitor cannot become an operator.
    if auth.operators.contains(&sign_in_limits::account(&name)) {
        return problem(StatusCode::BAD_REQUEST, format!("the name {name} is reserved; choose another"));
    }
    if let Err(wait) = auth.guesses.signup(address(&peer), Instant::now()) {
        return too_many("too many new accounts", wait);
    }

    match auth.accounts.create(&name, &password).await {
        Ok(user) => enter(&auth, &headers, &user).await,
        Err(error) => refused(&error),
    }
}

async fn logout(State(auth): State<Arc<Auth>>, headers: HeaderMap) -> Response {
    if let Some(token) = cookie(&headers, COOKIE)
        && let Err(error) = auth.end(token).await
    {
        return refused(&error);
    }
    // The cookie is removed even if its sign-in has ended already.
    let gone = format!("{COOKIE}=; HttpOnly; SameSite=Lax; Path=/; Max-Age=0");
    ([(header::SET_COOKIE, gone)], Json(SignedOut {})).into_response()
}

/// Issues a fresh connection token to a browser that is signed in.
async fn token(State(auth): State<Arc<Auth>>, headers: HeaderMap) -> Response {
    let login = cookie(&headers, COOKIE);
    let user = match login {
        Some(login) => auth.accounts.signed_in(login).await,
        None => Ok(None),
    };

    match user {
        Ok(Some(user)) => Json(auth.identity(&user, login.unwrap_or_default())).into_response(),
        Ok(None) => {
            let body = NotSignedIn { error: "not signed in", signup: auth.signup };
            (StatusCode::UNAUTHORIZED, Json(body)).into_response()
        }
        Err(error) => refused(&error),
    }
}

/// Signs a user in with the browser, and the previous user of the browser out.
async fn enter(auth: &Auth, headers: &HeaderMap, user: &User) -> Response {
    if let Some(old) = cookie(headers, COOKIE)
        && let Err(error) = auth.end(old).await
    {
        return refused(&error);
    }

    let login = match auth.accounts.sign_in(user).await {
        Ok(login) => login,
        Err(error) => return refused(&error),
    };

    // A page served over TLS gets cookies that the browser sends over TLS only.
    let tls = headers
        .get(header::ORIGIN)
        .is_some_and(|origin| origin.as_bytes().starts_with(b"https://"));
    let secure = if tls { "; Secure" } else { "" };
    let set = |name: &str, value: &str, path: &str, ttl: Duration| {
        let cookie = format!("{name}={value}; HttpOnly; SameSite=Lax; Path={path}; Max-Age={}{secure}", ttl.as_secs());
        (header::SET_COOKIE, cookie)
    };
    let device = auth.known_device(user);
    // Appended, since both headers have the same name and a plain array would keep only the second.
    let cookies =
        AppendHeaders([set(COOKIE, &login, "/", LOGIN_TTL), set(DEVICE_COOKIE, &device, "/auth", DEVICE_TTL)]);
    (cookies, Json(auth.identity(user, &login))).into_response()
}

impl Auth {
    fn identity<'a>(&self, user: &'a User, login: &str) -> Identity<'a> {
        let now = unix_seconds();
        let claims = Claims {
            sub: &user.id,
            sid: accounts::session(login),
            iat: now,
            exp: now + self.token_ttl.as_secs(),
            info: Info { name: &user.name },
        };
        let key = EncodingKey::from_secret(&self.token_secret);
        let token = jsonwebtoken::encode(&Header::default(), &claims, &key).expect("claims serialize to JSON");
        Identity { user: &user.id, name: &user.name, token, signup: self.signup }
    }

    /// Ends a sign-in and the connections that it opened. Connections of other browsers stay open.
    async fn end(&self, login: &str) -> accounts::Result<()> {
        let Some(user) = self.accounts.sign_out(login).await? else {
            return Ok(());
        };
        let closed = self.channels.disconnect(&user, &accounts::session(login)).await;
        if let Err(error) = closed {
            tracing::warn!(
                user,
                error,
                "cannot close the connections of a user who signed out; they end when their tokens expire"
            );
        }
        Ok(())
    }

    /// Creates the cookie by which [`Self::device`] recognizes the browser.
    fn known_device(&self, user: &User) -> String {
        let jti = uuid::Uuid::new_v4().simple().to_string();
        let device = Device { sub: user.id.clone(), jti, exp: unix_seconds() + DEVICE_TTL.as_secs() };
        let key = EncodingKey::from_secret(&self.device_secret());
        jsonwebtoken::encode(&Header::default(), &device, &key).expect("claims serialize to JSON")
    }

    /// Returns the id of the browser, if this account has signed in with it before.
    fn device(&self, headers: &HeaderMap, account: &str) -> Option<String> {
        let key = DecodingKey::from_secret(&self.device_secret());
        let validation = Validation::new(Algorithm::HS256);
        let device = jsonwebtoken::decode::<Device>(cookie(headers, DEVICE_COOKIE)?, &key, &validation).ok()?;
        (device.claims.sub == account).then_some(device.claims.jti)
    }

    /// Differs from the secret of connection tokens, so that neither a device cookie is accepted as a token nor a token
    /// as a device cookie.
    fn device_secret(&self) -> Vec<u8> {
        accounts::hash(&[b"device".as_slice(), &self.token_secret].concat()).into_bytes()
    }
}

fn cookie<'a>(headers: &'a HeaderMap, wanted: &str) -> Option<&'a str> {
    let cookies = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    cookies.flat_map(|line| line.split(';')).find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        (name == wanted && !value.is_empty()).then_some(value)
    })
}

fn too_many(what: &str, wait: Wait) -> Response {
    let wait = wait.seconds();
    let mut response = problem(StatusCode::TOO_MANY_REQUESTS, format!("{what}; try again in {wait} s"));
    response.headers_mut().insert(header::RETRY_AFTER, wait.into());
    response
}

/// The address by which attempts are counted. IPv6 addresses are counted by their /64 network, which belongs to one
/// household or one attacker.
fn address(peer: &Peer) -> IpAddr {
    // The peer is missing only if the router is served without connect info, as in tests.
    let Some(Extension(ConnectInfo(peer))) = peer else {
        return IpAddr::from([0, 0, 0, 0]);
    };
    match peer.ip().to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

fn refused(error: &accounts::Error) -> Response {
    let status = match error {
        accounts::Error::Invalid(_) => StatusCode::BAD_REQUEST,
        accounts::Error::Taken(_) => StatusCode::CONFLICT,
        accounts::Error::Wrong => StatusCode::UNAUTHORIZED,
        accounts::Error::Busy => StatusCode::SERVICE_UNAVAILABLE,
        accounts::Error::Database(_) | accounts::Error::Hash(_) => {
            tracing::error!(%error, "cannot access the accounts");
            return problem(
                StatusCode::SERVICE_UNAVAILABLE,
                "accounts are temporarily unavailable; try again in a moment",
            );
        }
    };
    problem(status, error.to_string())
}

fn problem(status: StatusCode, text: impl Into<String>) -> Response {
    (status, Json(Problem { error: text.into() })).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_addresses_count_by_their_network() {
        let seen = |text: &str| address(&Some(Extension(ConnectInfo(SocketAddr::new(text.parse().unwrap(), 1)))));
        assert_eq!(seen("2001:db8:1:2:3::4"), seen("2001:db8:1:2:ffff::1"));
        assert_ne!(seen("2001:db8:1:2::1"), seen("2001:db8:1:3::1"));
        assert_eq!(seen("::ffff:192.0.2.1"), seen("192.0.2.1"));
    }

    #[test]
    fn cookie_is_found_among_others() {
        let mut headers = HeaderMap::new();
        headers.append(header::COOKIE, HeaderValue::from_static("a=b; beamline=xyz; c=d"));
        assert_eq!(cookie(&headers, COOKIE), Some("xyz"));
        assert_eq!(cookie(&headers, DEVICE_COOKIE), None);
    }
}
