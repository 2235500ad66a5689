//! Serves decide requests: reads each one, decides, pushes the task if the client asks for it, replies.

use crate::Router;
use crate::decide::Chosen;
use bus::{Message, Subscription};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::router::{Context, DecideRequest, DecideResponse, ErrorBody, ErrorResponse, IntakeCode, RouterCode};
use wire::subjects;

/// When to try again after too many pushes.
const PUSH_RETRY_AFTER_S: u64 = 1;

/// Serves until cancelled, then answers what the bus has delivered to this router: no other router will.
pub async fn run(router: Arc<Router>, mut requests: Subscription, cancel: CancellationToken) {
    let slots = Arc::new(Semaphore::new(router.config.max_in_flight));
    let pushes = TaskTracker::new();

    while let Some(message) = requests.next_until(&cancel).await {
        let exchange = Exchange { started: Instant::now(), message };
        exchange.serve(&router, &slots, &pushes).await;
    }

    router.drain(pushes).await;
}

/// One request and its answer.
struct Exchange {
    started: Instant,
    message: Message,
}

impl Exchange {
    async fn serve(self, router: &Arc<Router>, slots: &Arc<Semaphore>, pushes: &TaskTracker) {
        // Before anything is read: refusing must stay cheap.
        if router.backpressure.refuses() {
            let error = ErrorBody::new(RouterCode::Backpressure, "the router is overloaded; try again later")
                .retry_after(crate::backpressure::RETRY_AFTER_S);
            return self.refuse(router, Context::default(), error).await;
        }

        let (context, request) = match crate::intake::read(&self.message) {
            (context, Ok(request)) => (context, request),
            (context, Err(error)) => return self.refuse(router, context, error).await,
        };
        if !request.push_assignment {
            return self.decide(router, context, &request).await;
        }

        match slots.clone().try_acquire_owned() {
            Ok(slot) => _ = pushes.spawn(self.push(router.clone(), context, request, slot)),
            Err(_) => {
                let text = "too many assignments wait for their acknowledgement; try again";
                let error = ErrorBody::new(RouterCode::Backpressure, text).retry_after(PUSH_RETRY_AFTER_S);
                self.refuse(router, context, error).await;
            }
        }
    }

    /// Answers with the decision alone. The provider is not called, so its place in a half-open breaker is released at
    /// once.
    async fn decide(self, router: &Router, context: Context, request: &DecideRequest) {
        let holder = uuid::Uuid::now_v7().to_string();
        match router.decide(request, &holder) {
            Ok(Chosen { decision, .. }) => {
                router.stats.decided(&decision, self.started.elapsed());
                let answer = DecideResponse { ok: true, decision, context, assignment_id: None, result_subject: None };
                self.reply(router, &answer).await;
            }
            Err(error) => self.refuse(router, context, error).await,
        }
    }

    /// Pushes the task and answers once its assignment is stored. Holds `slot` until then.
    async fn push(self, router: Arc<Router>, context: Context, request: DecideRequest, slot: OwnedSemaphorePermit) {
        router.stats.in_flight.fetch_add(1, Relaxed);

        match crate::assign::push(&router, &request).await {
            Ok((task, decision)) => {
                router.stats.decided(&decision, self.started.elapsed());
                tracing::debug!(
                    trace_id = context.trace_id,
                    tenant_id = request.tenant_id,
                    request_id = request.request_id,
                    provider_id = decision.provider_id,
                    "assigned"
                );
                let result_subject = request.result_subject.filter(|subject| task.will_tell(subject));
                let assignment_id = task.assignment_id;
                let answer = DecideResponse { ok: true, decision, context, assignment_id, result_subject };
                self.reply(&router, &answer).await;
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
        self.reply(router, &ErrorResponse::new(error, context)).await;
    }

    /// Replies to the client's inbox, or on the contract's subject if the request has none.
    async fn reply(&self, router: &Router, answer: &impl serde::Serialize) {
        let inbox = self.message.reply.clone();
        router
            .send(inbox.unwrap_or_else(|| subjects::DECIDE_REPLY.into()), answer)
            .await;
    }
}
