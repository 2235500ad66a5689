//! Serves decide requests: reads each one, decides, pushes the task if the client asks for it, replies.

use crate::Router;
use crate::decide::Chosen;
use crate::intake::{Contract, Request};
use crate::keys::Answer;
use bus::{Bus, Headers, Message, Subscription};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::router::{Context, DecideResponse, ErrorBody, ErrorResponse, IntakeCode, RouterCode, headers as x};
use wire::{id, subjects};

/// Decide requests of one contract that wait for this router. Beyond it, the bus fails new requests with "no
/// responders".
const QUEUE_MAX: usize = 8192;

/// When to try again after too many pushes.
const PUSH_RETRY_AFTER_S: u64 = 1;

/// The requests of one contract.
pub struct Requests {
    pub contract: Contract,
    pub subscription: Subscription,
    /// One for each request whose answer waits for a store; both contracts share them.
    pub slots: Arc<Semaphore>,
}

impl Requests {
    pub async fn subscribe(bus: &Bus, contract: Contract, slots: &Arc<Semaphore>) -> bus::Result<Self> {
        let group = Some(subjects::DECIDE_GROUP);
        let subscription = bus.subscribe(contract.endpoint().subject(), group, QUEUE_MAX).await?;
        Ok(Self { contract, subscription, slots: slots.clone() })
    }
}

/// Serves until cancelled, then answers what the bus has delivered to this router: no other router will.
pub async fn run(router: Arc<Router>, requests: Requests, cancel: CancellationToken) {
    let Requests { contract, mut subscription, slots } = requests;
    let pushes = TaskTracker::new();

    while let Some(message) = subscription.next_until(&cancel).await {
        let exchange = Exchange { started: Instant::now(), message, contract };
        exchange.serve(&router, &slots, &pushes).await;
    }

    router.drain(pushes).await;
}

/// One request and its answer.
struct Exchange {
    started: Instant,
    message: Message,
    contract: Contract,
}

impl Exchange {
    async fn serve(self, router: &Arc<Router>, slots: &Arc<Semaphore>, pushes: &TaskTracker) {
        // Before anything is read: refusing must stay cheap.
        if router.backpressure.refuses() {
            let error = ErrorBody::new(RouterCode::Backpressure, "the router is overloaded; try again later")
                .retry_after(crate::backpressure::RETRY_AFTER_S);
            return self.refuse(router, Context::default(), error).await;
        }

        let (context, request) = match crate::intake::read(&self.message, self.contract) {
            (context, Ok(request)) => (context, request),
            (context, Err(error)) => return self.refuse(router, context, error).await,
        };
        if !request.push_assignment && request.key().is_none() {
            return self.decide(router, context, &request).await;
        }

        match slots.clone().try_acquire_owned() {
            Ok(slot) => _ = pushes.spawn(self.store(router.clone(), context, request, slot)),
            Err(_) => {
                let text = "too many assignments wait for their acknowledgement; try again";
                let error = ErrorBody::new(RouterCode::Backpressure, text).retry_after(PUSH_RETRY_AFTER_S);
                self.refuse(router, context, error).await;
            }
        }
    }

    /// Answers with the decision alone. The provider is not called, so its place in a half-open breaker is released at
    /// once.
    async fn decide(self, router: &Router, context: Context, request: &Request) {
        let holder = uuid::Uuid::now_v7().to_string();
        match router.decide(request, &holder) {
            Ok(Chosen { decision, .. }) => {
                router.stats.decided(&decision, self.started.elapsed());
                let answer = DecideResponse { ok: true, decision, context, assignment_id: None, result_subject: None };
                self.reply(router, None, &answer).await;
            }
            Err(error) => self.refuse(router, context, error).await,
        }
    }

    /// Answers once the task's assignment, or what the request's idempotency key is answered, is stored. Holds `slot`
    /// until then.
    async fn store(self, router: Arc<Router>, context: Context, request: Request, slot: OwnedSemaphorePermit) {
        router.stats.in_flight.fetch_add(1, Relaxed);

        match crate::keys::answer(&router, &request).await {
            Ok(Answer { request_id, decision, assignment_id, result_subject }) => {
                router.stats.decided(&decision, self.started.elapsed());
                tracing::debug!(
                    trace_id = context.trace_id,
                    tenant_id = request.tenant_id,
                    request_id,
                    assignment_id,
                    provider_id = decision.provider_id,
                    "decided and stored"
                );
                // That of the first request with the key, whose task it is.
                let context = Context { request_id: Some(request_id), ..context };
                let answer = DecideResponse { ok: true, decision, context, assignment_id, result_subject };
                self.reply(&router, None, &answer).await;
            }
            Err(error) => self.refuse(&router, context, error).await,
        }

        router.stats.in_flight.fetch_sub(1, Relaxed);
        drop(slot);
    }

    async fn refuse(&self, router: &Router, context: Context, error: ErrorBody) {
        router.stats.refused(&error);

        // The message of an invalid request quotes parts of it, which belong to the client and not in the log.
        let why = if error.code == RouterCode::InvalidRequest {
            "the request is invalid"
        } else {
            error.message.as_str()
        };
        tracing::info!(
            trace_id = context.trace_id,
            request_id = context.request_id,
            error_code = error.code.as_str(),
            intake_error_code = error.intake_error_code.as_ref().map(IntakeCode::as_str),
            "refused: {why}"
        );
        let code = error.code.clone();
        self.reply(router, Some(&code), &ErrorResponse::new(error, context))
            .await;
    }

    /// Replies to the client's inbox, or on the contract's subject if the request has none.
    async fn reply(&self, router: &Router, error: Option<&RouterCode>, answer: &impl serde::Serialize) {
        router
            .answered
            .add(self.contract.endpoint(), self.started.elapsed(), error);
        let inbox = self.message.reply.clone();
        let subject = inbox.unwrap_or_else(|| self.contract.reply_subject().into());
        router.send(subject, self.reply_headers(), answer).await;
    }

    /// An answer of v2 repeats the ids of its request's headers, as far as they are valid.
    fn reply_headers(&self) -> Headers {
        let mut repeated = Headers::new();
        if self.contract == Contract::V2 {
            repeated.insert(x::CONTRACT_VERSION, x::CONTRACT_V2);
            for name in [x::TRACE_ID, x::TENANT_ID, x::REQUEST_ID] {
                let value = self.message.headers.get(name);
                value
                    .filter(|value| id::is_valid(value))
                    .into_iter()
                    .for_each(|value| repeated.insert(name, value));
            }
        }
        repeated
    }
}
