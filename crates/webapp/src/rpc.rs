//! RPCs of pages on `beamline.rpc.v1.<method>`. All web apps share them through a queue group.

use bus::{Bus, Headers, Message, Subscription};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::channels::{RPC_ERROR_CODE, RPC_USER};
use wire::realtime::ErrorCode;

/// The queue group of all web apps.
pub const GROUP: &str = "webapp";
const QUEUE_MAX: usize = 1024;
/// Maximum calls handled concurrently.
const CONCURRENT_MAX: usize = 256;

pub struct Caller {
    pub user: String,
}

/// Why a call is refused: the code and text of the error that the page receives.
#[derive(Debug, PartialEq)]
pub struct Refusal(pub ErrorCode, pub String);

impl Refusal {
    pub fn bad(text: impl Into<String>) -> Self {
        Self(ErrorCode::BadRequest, text.into())
    }

    /// A temporary conflict: a retry succeeds.
    pub fn again(text: &str) -> Self {
        Self(ErrorCode::Internal, text.into())
    }

    /// An internal failure. The log has the reason; the page gets the trace id of the log line.
    pub fn internal(what: &'static str, error: impl std::fmt::Display) -> Self {
        Self::failed("something went wrong on the server; try again", what, error)
    }

    /// Like [`Self::internal`], with another text for the page.
    pub fn failed(public: &str, what: &'static str, error: impl std::fmt::Display) -> Self {
        let trace_id = uuid::Uuid::new_v4().simple().to_string();
        tracing::error!(%trace_id, %error, "{what}");
        Self(ErrorCode::Internal, format!("{public} (trace {trace_id})"))
    }
}

/// Answers calls.
pub trait Handler: Send + Sync + 'static {
    fn call(
        &self,
        method: &'static str,
        caller: Caller,
        payload: Bytes,
    ) -> impl Future<Output = Result<Bytes, Refusal>> + Send;
}

/// Subscriptions to methods, in which calls are queued until [`Methods::serve`].
pub struct Methods {
    bus: Bus,
    methods: Vec<(&'static str, Subscription)>,
}

impl Methods {
    pub async fn subscribe(bus: &Bus, names: &[&'static str]) -> bus::Result<Self> {
        let mut methods = Vec::new();
        for name in names {
            let subject = wire::subjects::rpc(name).expect("the names of our methods are valid in subjects");
            methods.push((*name, bus.subscribe(&subject, Some(GROUP), QUEUE_MAX).await?));
        }
        Ok(Self { bus: bus.clone(), methods })
    }

    /// Subscribes to one method without a queue group.
    pub async fn subscribe_alone(bus: &Bus, name: &'static str, subject: &str) -> bus::Result<Self> {
        Ok(Self {
            bus: bus.clone(),
            methods: vec![(name, bus.subscribe(subject, None, QUEUE_MAX).await?)],
        })
    }

    /// Answers calls until cancelled, then those that the bus has delivered to this web app.
    pub async fn serve(self, handler: Arc<impl Handler>, cancel: CancellationToken) {
        let places = Arc::new(Semaphore::new(CONCURRENT_MAX));
        let tracker = TaskTracker::new();

        let loops: FuturesUnordered<_> = self
            .methods
            .into_iter()
            .map(|(method, mut calls)| {
                let (bus, handler, places, cancel) =
                    (self.bus.clone(), handler.clone(), places.clone(), cancel.clone());
                let tracker = tracker.clone();
                async move {
                    while let Some(call) = calls.next_until(&cancel).await {
                        // While no permit is available, calls wait in the subscription, which is bounded.
                        let place = places
                            .clone()
                            .acquire_owned()
                            .await
                            .expect("the semaphore is never closed");
                        let (bus, handler) = (bus.clone(), handler.clone());
                        tracker.spawn(async move {
                            answer(&bus, &*handler, method, call).await;
                            drop(place);
                        });
                    }
                }
            })
            .collect();
        loops.collect::<()>().await;

        tracker.close();
        tracker.wait().await;
    }
}

/// Forwards a call to another web app, and returns that web app's answer. Fails if it does not answer.
pub async fn forward(
    bus: &Bus,
    subject: &str,
    caller: &Caller,
    payload: Bytes,
    deadline: Duration,
) -> bus::Result<Result<Bytes, Refusal>> {
    let headers = Headers::new().with(RPC_USER, &caller.user);
    let reply = bus.request(subject, headers, payload, deadline).await?;
    let Some(code) = reply.headers.get(RPC_ERROR_CODE) else {
        return Ok(Ok(reply.payload));
    };

    // The codes that the handler of events returns. Any other code is an internal error.
    let known = [
        ErrorCode::BadRequest,
        ErrorCode::PermissionDenied,
        ErrorCode::TooManyRequests,
        ErrorCode::LimitExceeded,
    ];
    let code = known
        .into_iter()
        .find(|known| code.parse() == Ok(*known as u32))
        .unwrap_or(ErrorCode::Internal);
    Ok(Err(Refusal(code, String::from_utf8_lossy(&reply.payload).into_owned())))
}

async fn answer(bus: &Bus, handler: &impl Handler, method: &'static str, call: Message) {
    let caller = Caller { user: call.headers.get(RPC_USER).unwrap_or_default().to_string() };
    let answer = match &*caller.user {
        "" => Err(Refusal(ErrorCode::Unauthorized, "sign in first".into())),
        _ => handler.call(method, caller, call.payload).await,
    };

    // Without a reply subject, no caller waits for the answer.
    let Some(subject) = call.reply else { return };
    let mut reply = Message { subject, ..Message::default() };
    match answer {
        Ok(payload) => reply.payload = payload,
        Err(Refusal(code, text)) => {
            reply.headers.insert(RPC_ERROR_CODE, (code as u32).to_string());
            reply.payload = text.into();
        }
    }
    if let Err(error) = bus.publish(reply).await {
        tracing::debug!(method, %error, "cannot publish the answer to a call");
    }
}
