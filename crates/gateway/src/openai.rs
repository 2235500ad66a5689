//! The OpenAI-compatible entry: `POST /v1/chat/completions`, `POST /v1/embeddings` and `GET /v1/models`, for unmodified
//! clients of OpenAI's API. A request is a task like any other; the name of its model is that of the policy.

mod answers;
mod events;
mod models;
mod refusal;
mod reply;
mod request;

pub use answers::{Answers, Client};

use crate::Gateway;
use crate::in_flight::{Full, Permit};
use answers::{Asked, Event};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::{any, get, post};
use events::Events;
use futures_util::StreamExt;
use refusal::Refusal;
use request::{Asks, Kind};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::Receiver;
use wire::limits::DECIDE_MAX;

/// The prefix of the entry's paths. A request may be answered late; its deadline bounds it.
pub const PREFIX: &str = "/v1/";

/// A request's body, in bytes: what a decide request may have, less its other fields.
const BODY_MAX: usize = DECIDE_MAX - 16 * 1024;
/// Bytes of a body that is too large which are read and dropped, so that its client reads the refusal.
const DROPPED_MAX: usize = 32 * 1024 * 1024;
/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a stream waits for its first piece before its answer begins: a failure until then has a status of its own.
const FIRST_PIECE: Duration = Duration::from_secs(5);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

pub fn routes(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat).fallback(wrong_method))
        .route("/v1/embeddings", post(embeddings).fallback(wrong_method))
        .route("/v1/models", get(list_models).fallback(wrong_method))
        .route("/v1/models/{*model}", get(show_model).fallback(wrong_method))
        .route("/v1/{*path}", any(unknown))
        .with_state(gateway)
}

async fn chat(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    answer(&gateway, Kind::Chat, request)
        .await
        .unwrap_or_else(Refusal::respond)
}

async fn embeddings(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    answer(&gateway, Kind::Embeddings, request)
        .await
        .unwrap_or_else(Refusal::respond)
}

async fn list_models(State(gateway): State<Arc<Gateway>>, headers: HeaderMap) -> Response {
    let listed = async {
        let tenant = tenant_of(&gateway, &headers)?;
        models::list(&gateway, &tenant).await
    };
    listed.await.map_or_else(Refusal::respond, json)
}

async fn show_model(State(gateway): State<Arc<Gateway>>, Path(model): Path<String>, headers: HeaderMap) -> Response {
    let shown = async {
        let tenant = tenant_of(&gateway, &headers)?;
        models::show(&gateway, &tenant, &model).await
    };
    shown.await.map_or_else(Refusal::respond, json)
}

async fn wrong_method(request: Request) -> Response {
    let text = format!("{} is not possible on {}", request.method(), request.uri().path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", text).respond()
}

async fn unknown(request: Request) -> Response {
    let text = format!(
        "{} is not served here; /v1/chat/completions, /v1/embeddings and /v1/models are",
        request.uri().path()
    );
    Refusal::new(StatusCode::NOT_FOUND, "unknown_url", text).respond()
}

/// The permits of a request that was admitted: the gateway's and its tenant's.
type Permits = (Permit, Permit<Arc<str>>);

async fn answer(gateway: &Arc<Gateway>, kind: Kind, request: Request) -> Result<Response, Refusal> {
    let stats = &gateway.shared.stats;
    let (asked, permits) = admit(gateway, kind, request)
        .await
        .inspect_err(|refusal| stats.failed(refusal.counted_as()))?;
    stats.admitted();

    let request_id = asked.request_id.clone();
    let reply = reply::Head::new(&request_id, &asked.asks.model);
    let (streams, include_usage) = (asked.asks.streams, asked.asks.include_usage);
    let mut events = gateway.answers.start(gateway, asked, permits)?;

    let answered = if streams {
        stream(&mut events).await
    } else {
        whole(&mut events, &reply, kind).await
    };
    let mut response = match answered {
        Ok(Answered::Whole(body)) => json(body),
        Ok(Answered::Begun(first)) => event_stream(Events::new(reply, events, include_usage), first),
        Err(refusal) => refusal.respond(),
    };
    let id = HeaderValue::try_from(request_id).expect("a UUID is a header's value");
    response.headers_mut().insert(REQUEST_ID, id);
    Ok(response)
}

/// Checks a request's key, reads its body, and takes its permits.
async fn admit(gateway: &Gateway, kind: Kind, request: Request) -> Result<(Asked, Permits), Refusal> {
    let (parts, body) = request.into_parts();
    let tenant = tenant_of(gateway, &parts.headers)?;
    let body = read(gateway, &parts.headers, body).await?;
    let asks = Asks::read(kind, &body)?;

    // Taken only once the body is complete, so that a client that sends slowly holds no permit.
    let admission = &gateway.shared.admission;
    let permits = admission
        .request_of_tenant(&tenant)
        .map_err(|full| busy(&full, &tenant))?;

    let traceparent = parts.headers.get("traceparent").and_then(|value| value.to_str().ok());
    let asked = Asked {
        tenant,
        request_id: uuid::Uuid::now_v7().to_string(),
        traceparent: traceparent.map(String::from),
        asks,
    };
    Ok((asked, permits))
}

enum Answered {
    Whole(Vec<u8>),
    /// A stream has begun, perhaps with its first event.
    Begun(Option<Event>),
}

async fn whole(events: &mut Receiver<Event>, head: &reply::Head, kind: Kind) -> Result<Answered, Refusal> {
    while let Some(event) = events.recv().await {
        let Event::Ended(ended) = event else { continue };
        let result = reply::result(&ended?)?;
        let body = match kind {
            Kind::Chat => head.completion(&result),
            Kind::Embeddings => head.embeddings(&result)?,
        };
        return Ok(Answered::Whole(body));
    }
    Err(Refusal::internal("the answer was lost"))
}

/// Waits until a stream can begin, or has failed before it.
async fn stream(events: &mut Receiver<Event>) -> Result<Answered, Refusal> {
    match tokio::time::timeout(FIRST_PIECE, events.recv()).await {
        Ok(Some(Event::Ended(ended))) => {
            let ended = ended?;
            // A task that failed before it said anything.
            reply::result(&ended)?;
            Ok(Answered::Begun(Some(Event::Ended(Ok(ended)))))
        }
        Ok(Some(event)) => Ok(Answered::Begun(Some(event))),
        Ok(None) => Err(Refusal::internal("the answer was lost")),
        Err(_) => Ok(Answered::Begun(None)),
    }
}

fn event_stream(events: Events, first: Option<Event>) -> Response {
    let mut response = Response::new(Body::from_stream(events.stream(first)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Some reverse proxies would hold back the first events.
    headers.insert(BUFFERING, HeaderValue::from_static("no"));
    response
}

fn json(body: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(body));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The tenant of the request's key.
fn tenant_of(gateway: &Gateway, headers: &HeaderMap) -> Result<Arc<str>, Refusal> {
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = given.and_then(|given| {
        let (scheme, key) = given.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });

    let tenant = key.and_then(|key| gateway.shared.admission.settings().keys.tenant(key));
    tenant.ok_or_else(|| {
        let text = if key.is_some() {
            "the API key is wrong; gateway.api_keys has the tenants' keys, and `beamline api-key` prints that of default"
        } else {
            "there is no API key; send it in the header Authorization, as Bearer KEY"
        };
        Refusal::new(StatusCode::UNAUTHORIZED, "invalid_api_key", text)
    })
}

/// Reads a request's body within the memory that all connections share.
async fn read(gateway: &Gateway, headers: &HeaderMap, body: Body) -> Result<Bytes, Refusal> {
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    let size = length.map_or(BODY_MAX, |length: usize| length.min(BODY_MAX));
    let claim = gateway.shared.admission.settings().receive.claim(size);
    let Some(_share) = claim.try_take() else {
        let text = "too many requests are being received; gateway.receive_budget is the limit";
        return Err(Refusal::busy(text));
    };

    let received = tokio::time::timeout(BODY_TIMEOUT, collect(body, size)).await;
    received.unwrap_or_else(|_| {
        let text = format!("the body has not arrived within {BODY_TIMEOUT:?}");
        Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", text))
    })
}

/// The body, if it has at most [`BODY_MAX`] bytes. The rest of a larger one is dropped.
async fn collect(body: Body, size: usize) -> Result<Bytes, Refusal> {
    let (mut kept, mut received) = (Vec::with_capacity(size), 0);
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| Refusal::invalid(None, "the body broke off"))?;
        received += piece.len();
        if received <= BODY_MAX {
            kept.extend_from_slice(&piece);
        } else if received > DROPPED_MAX {
            break;
        } else {
            kept = Vec::new();
        }
    }

    if received > BODY_MAX {
        let text = format!("a request has at most {BODY_MAX} bytes");
        return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", text));
    }
    Ok(kept.into())
}

fn busy(full: &Full, tenant: &str) -> Refusal {
    Refusal::busy(match full {
        Full::All => "too many requests are in flight; gateway.max_in_flight is the limit".into(),
        Full::User => {
            format!("tenant {tenant:?} has too many requests in flight; gateway.max_in_flight_per_tenant is the limit")
        }
    })
}
