//! Signing in and out over HTTP: a cookie for the browser, short tokens for its connection.

use crate::accounts::{self, Accounts, LOGIN_TTL, User};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router, middleware};
use parking_lot::Mutex;
use serde_json::json;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const COOKIE: &str = "beamline";
const BODY_MAX: usize = 4096;
/// Tries at a password, a minute: from one address for one name, and from one address for all.
const TRIES_PER_NAME: u32 = 10;
const TRIES_PER_ADDRESS: u32 = 60;
/// Counts kept at most; beyond it counting begins anew.
const TRIES_KEPT: usize = 100_000;
const MINUTE: Duration = Duration::from_secs(60);

pub struct Auth {
    pub accounts: Arc<Accounts>,
    pub token_secret: Vec<u8>,
    pub token_ttl: Duration,
    pub signup: bool,
    /// Besides our own.
    pub origins: Vec<String>,
    pub tries: Tries,
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

/// A page of another site must not sign anybody in or out.
async fn same_origin(State(auth): State<Arc<Auth>>, request: Request, next: Next) -> Response {
    if request.method() == Method::POST
        && let Some(origin) = foreign(request.headers(), &auth.origins)
    {
        let text = format!("pages of {origin} may not sign in here; add it to http.origins if they should");
        return problem(StatusCode::FORBIDDEN, text);
    }
    let mut response = next.run(request).await;
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The origin of the page that asks, if it is neither ours nor known.
fn foreign<'a>(headers: &'a HeaderMap, known: &[String]) -> Option<&'a str> {
    let header = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let origin = header(header::ORIGIN)?;
    let host = origin.split_once("://").map(|(_, host)| host);
    let ours = host.is_some() && host == header(header::HOST);
    (!ours && !known.iter().any(|known| known == origin)).then_some(origin)
}

#[derive(serde::Deserialize)]
struct Credentials {
    name: String,
    password: String,
}

type Peer = Option<Extension<ConnectInfo<SocketAddr>>>;
type Body = Result<Json<Credentials>, axum::extract::rejection::JsonRejection>;

async fn login(State(auth): State<Arc<Auth>>, peer: Peer, headers: HeaderMap, body: Body) -> Response {
    let Json(Credentials { name, password }) = match body {
        Ok(body) => body,
        Err(rejection) => return problem(rejection.status(), rejection.body_text()),
    };
    if !auth.tries.take(address(&peer), &name) {
        return problem(StatusCode::TOO_MANY_REQUESTS, "too many tries; wait a minute");
    }
    match auth.accounts.verify(&name, &password).await {
        Ok(user) => enter(&auth, &headers, &user).await,
        Err(error) => refused(&error),
    }
}

async fn signup(State(auth): State<Arc<Auth>>, peer: Peer, headers: HeaderMap, body: Body) -> Response {
    if !auth.signup {
        return problem(StatusCode::FORBIDDEN, "accounts are made by the operator here (auth.signup is off)");
    }
    let Json(Credentials { name, password }) = match body {
        Ok(body) => body,
        Err(rejection) => return problem(rejection.status(), rejection.body_text()),
    };
    if !auth.tries.take(address(&peer), &name) {
        return problem(StatusCode::TOO_MANY_REQUESTS, "too many tries; wait a minute");
    }
    match auth.accounts.create(&name, &password).await {
        Ok(user) => enter(&auth, &headers, &user).await,
        Err(error) => refused(&error),
    }
}

async fn logout(State(auth): State<Arc<Auth>>, headers: HeaderMap) -> Response {
    if let Some(token) = cookie(&headers)
        && let Err(error) = auth.accounts.sign_out(token).await
    {
        return refused(&error);
    }
    let gone = format!("{COOKIE}=; HttpOnly; SameSite=Lax; Path=/; Max-Age=0");
    ([(header::SET_COOKIE, gone)], Json(json!({}))).into_response()
}

/// A fresh token for the connection, to a browser that is signed in.
async fn token(State(auth): State<Arc<Auth>>, headers: HeaderMap) -> Response {
    let user = match cookie(&headers) {
        Some(token) => auth.accounts.signed_in(token).await,
        None => Ok(None),
    };
    match user {
        Ok(Some(user)) => Json(auth.identity(&user)).into_response(),
        Ok(None) => {
            let body = json!({"error": "not signed in", "signup": auth.signup});
            (StatusCode::UNAUTHORIZED, Json(body)).into_response()
        }
        Err(error) => refused(&error),
    }
}

async fn enter(auth: &Auth, headers: &HeaderMap, user: &User) -> Response {
    let token = match auth.accounts.sign_in(user).await {
        Ok(token) => token,
        Err(error) => return refused(&error),
    };
    // Behind TLS the cookie must not leave it.
    let tls = headers.get(header::ORIGIN).is_some_and(|origin| origin.as_bytes().starts_with(b"https://"));
    let secure = if tls { "; Secure" } else { "" };
    let cookie = format!("{COOKIE}={token}; HttpOnly; SameSite=Lax; Path=/; Max-Age={}{secure}", LOGIN_TTL.as_secs());
    ([(header::SET_COOKIE, cookie)], Json(auth.identity(user))).into_response()
}

impl Auth {
    fn identity(&self, user: &User) -> serde_json::Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let claims = json!({
            "sub": user.id, "iat": now, "exp": now + self.token_ttl.as_secs(), "info": {"name": user.name},
        });
        let key = jsonwebtoken::EncodingKey::from_secret(&self.token_secret);
        let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).expect("claims are JSON");
        json!({"user": user.id, "name": user.name, "token": token, "signup": self.signup})
    }
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    cookies.flat_map(|line| line.split(';')).find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        (name == COOKIE && !value.is_empty()).then_some(value)
    })
}

/// Of whoever asks. An IPv6 network of 64 bits is one household, or one attacker.
fn address(peer: &Peer) -> IpAddr {
    let Some(Extension(ConnectInfo(peer))) = peer else { return IpAddr::from([0, 0, 0, 0]) };
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
            tracing::error!(%error, "accounts cannot be used");
            return problem(StatusCode::SERVICE_UNAVAILABLE, "accounts cannot be used now; try again in a moment");
        }
    };
    problem(status, error.to_string())
}

fn problem(status: StatusCode, text: impl Into<String>) -> Response {
    (status, Json(json!({"error": text.into()}))).into_response()
}

/// Tries at passwords within the running minute.
#[derive(Default)]
pub struct Tries(Mutex<(Option<Instant>, HashMap<(IpAddr, String), u32>)>);

impl Tries {
    fn take(&self, address: IpAddr, name: &str) -> bool {
        let mut tries = self.0.lock();
        let (since, counts) = &mut *tries;
        let now = Instant::now();
        if since.is_none_or(|since| now.duration_since(since) >= MINUTE) || counts.len() >= TRIES_KEPT {
            *since = Some(now);
            counts.clear();
        }
        // The empty name counts all of the address: it also bounds how many names one can have noted.
        let all = counts.entry((address, String::new())).or_default();
        *all += 1;
        if *all > TRIES_PER_ADDRESS {
            return false;
        }
        let one = counts.entry((address, name.chars().take(64).collect::<String>().to_lowercase() + "\n")).or_default();
        *one += 1;
        *one <= TRIES_PER_NAME
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_counted_by_name_and_by_address() {
        let tries = Tries::default();
        let address = |n| IpAddr::from([127, 0, 0, n]);
        assert!((0..TRIES_PER_NAME).all(|_| tries.take(address(1), "ann")));
        assert!(!tries.take(address(1), "Ann"));
        assert!(tries.take(address(1), "bob") && tries.take(address(2), "ann"));
        let others = (0..100).filter(|n| tries.take(address(1), &n.to_string())).count();
        assert!(others < 60, "{others}");
    }

    #[test]
    fn an_address_is_counted_with_its_household() {
        let seen = |text: &str| address(&Some(Extension(ConnectInfo(SocketAddr::new(text.parse().unwrap(), 1)))));
        assert_eq!(seen("2001:db8:1:2:3::4"), seen("2001:db8:1:2:ffff::1"));
        assert_ne!(seen("2001:db8:1:2::1"), seen("2001:db8:1:3::1"));
        assert_eq!(seen("::ffff:192.0.2.1"), seen("192.0.2.1"));
    }

    #[test]
    fn the_cookie_is_found_among_others() {
        let mut headers = HeaderMap::new();
        headers.append(header::COOKIE, HeaderValue::from_static("a=b; beamline=xyz; c=d"));
        assert_eq!(cookie(&headers), Some("xyz"));
    }
}
