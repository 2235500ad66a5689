//! Answers decide requests: checks in the contract's order, decides, hands over, replies.

use crate::Router;
use crate::breakers::{Place, Scope, Standing};
use crate::policies::{Lookup, Served};
use crate::policy::{Stop, Undecided, World};
use bus::clock::unix_ms;
use bus::{Headers, Message, Subscription};
use futures_util::FutureExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::router::{
    Choice, Context, DecideRequest, DecideResponse, Decision, ErrorBody, ErrorResponse, IntakeCode, RouterCode, VERSION,
};
use wire::{id, limits, subjects, trace};

pub async fn run(router: Arc<Router>, mut requests: Subscription, cancel: CancellationToken) {
    let places = Arc::new(Semaphore::new(router.config.max_in_flight));
    let pushes = TaskTracker::new();
    let mut taken = 0;
    loop {
        let message = if cancel.is_cancelled() {
            // What the bus has given to this router is answered by it; nobody else will.
            taken += 1;
            // (Unconstrained: the scheduler's wish to go on with another task is no empty queue.)
            let waiting = tokio::task::unconstrained(requests.next()).now_or_never().flatten();
            waiting.filter(|_| taken <= crate::QUEUE_MAX)
        } else {
            tokio::select! {
                () = cancel.cancelled() => continue,
                message = requests.next() => message,
            }
        };
        let Some(message) = message else { break };
        let started = Instant::now();
        let (context, outcome) = router.accept(&message);
        match outcome {
            Err(error) => router.refuse(&message, context, error).await,
            // Nobody is called: what the decision held is given back at once.
            Ok(request) if !request.push_assignment => match router.decide(&request, &uuid::Uuid::now_v7().to_string())
            {
                Ok(Chosen { decision, .. }) => {
                    router.stats.decided(&decision, started.elapsed());
                    let answer = DecideResponse { ok: true, decision, context, assignment_id: None };
                    router.reply(&message, &answer).await;
                }
                Err(error) => router.refuse(&message, context, error).await,
            },
            Ok(request) => {
                let Ok(place) = places.clone().try_acquire_owned() else {
                    let text = "too many assignments wait for their acknowledgement; try again";
                    let error = ErrorBody::new(RouterCode::Backpressure, text).retry_after(1);
                    router.refuse(&message, context, error).await;
                    continue;
                };
                let router = router.clone();
                pushes.spawn(async move {
                    router.stats.in_flight.fetch_add(1, Relaxed);
                    match crate::tasks::push(&router, &request).await {
                        Ok((task, decision)) => {
                            router.stats.decided(&decision, started.elapsed());
                            let (provider_id, trace_id) = (&decision.provider_id, context.trace_id.as_deref());
                            let (request_id, tenant_id) = (&request.request_id, &request.tenant_id);
                            tracing::info!(trace_id, tenant_id, request_id, provider_id, "assigned");
                            let assignment_id = task.assignment_id;
                            router
                                .reply(&message, &DecideResponse { ok: true, decision, context, assignment_id })
                                .await;
                        }
                        Err(error) => router.refuse(&message, context, error).await,
                    }
                    router.stats.in_flight.fetch_sub(1, Relaxed);
                    drop(place);
                });
            }
        }
    }
    router.drain(pushes).await;
}

impl Router {
    /// The request, or why it is refused; and the ids that any answer repeats.
    fn accept(&self, message: &Message) -> (Context, Result<DecideRequest, ErrorBody>) {
        if self.backpressure.refuses() {
            let error = ErrorBody::new(RouterCode::Backpressure, "the router is overloaded; try again later");
            return (Context::default(), Err(error.retry_after(crate::backpressure::RETRY_AFTER_S)));
        }
        let size = message.payload.len();
        if size > limits::DECIDE_MAX {
            let text = format!("the request has {size} bytes; at most {} are taken", limits::DECIDE_MAX);
            return (Context::default(), Err(ErrorBody::invalid(IntakeCode::PayloadTooLarge, text)));
        }
        // An array would fit a struct too.
        if message
            .payload
            .trim_ascii_start()
            .first()
            .is_some_and(|byte| *byte != b'{')
        {
            let error = ErrorBody::invalid(IntakeCode::SchemaValidationFailed, "the request is not a JSON object");
            return (Context::default(), Err(error));
        }
        let mut request: DecideRequest = match serde_json::from_slice(&message.payload) {
            Ok(request) => request,
            Err(error) => return undecodable(&message.payload, &error),
        };
        apply_headers(&mut request, &message.headers);
        let context = Context {
            request_id: Some(request.request_id.clone()),
            trace_id: request.trace_id.clone(),
        };
        let outcome = check(&request).map(|()| request);
        (context, outcome)
    }

    /// Decides who handles the request, and holds a place for it as `holder` where a breaker of that provider is half
    /// open.
    pub fn decide(&self, request: &DecideRequest, holder: &str) -> Result<Chosen<'_>, ErrorBody> {
        if request.deadline.is_some_and(|deadline| deadline < unix_ms()) {
            return Err(ErrorBody::new(
                RouterCode::DeadlineExceeded,
                "the request's deadline passed before it was decided",
            ));
        }
        let policies = self.policies.current();
        let name = request.policy_id.as_deref().unwrap_or("default");
        let served = match policies.find(&request.tenant_id, name) {
            Lookup::Serves(served) => served,
            // Not `unavailable`: gateways would take the router for failing, for everybody.
            Lookup::Refuses(why) => return Err(ErrorBody::new(RouterCode::DecisionFailed, why)),
            Lookup::Unknown => {
                let tenant = &request.tenant_id;
                let text = format!("tenant {tenant:?} has no policy {name:?}, and neither has tenant \"default\"");
                return Err(ErrorBody::new(RouterCode::PolicyNotFound, text));
            }
        };
        let (owner, policy) = (served.name.tenant.as_str(), &served.version.compiled);
        let scope = Scope { tenant: owner, policy: name, rules: self.rules_of(policy) };
        let mut seen = Seen { router: self, served, scope, now_ms: self.uptime_ms(), taken: Vec::new() };
        loop {
            let decision = policy
                .decide(request, &seen)
                .map_err(|undecided| seen.refusal(&undecided))?;
            let Some(place) = self
                .breakers
                .reserve(&decision.provider_id, &scope, holder, seen.now_ms)
            else {
                // Another decision took its last place since we looked.
                seen.taken.push(decision.provider_id);
                continue;
            };
            let choice = Choice {
                generation: place.generation,
                policy_tenant: owner.into(),
                policy_id: name.into(),
                policy_generation: place.policy_generation,
                client_deadline: request
                    .options
                    .as_ref()
                    .is_some_and(|options| options.deadline_ms.is_some()),
            };
            return Ok(Chosen { decision, choice, place });
        }
    }

    async fn refuse(&self, message: &Message, context: Context, error: ErrorBody) {
        self.stats.refused(&error);
        // What is wrong with a request repeats parts of it: that is for whoever sent it, not for the log.
        let why = if error.code == RouterCode::InvalidRequest {
            "the request is not valid"
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
        self.reply(message, &ErrorResponse::new(error, context)).await;
    }

    async fn reply(&self, message: &Message, answer: &impl serde::Serialize) {
        self.send(message.reply.clone().unwrap_or_else(|| subjects::DECIDE_REPLY.into()), answer)
            .await;
    }

    pub async fn send(&self, subject: Arc<str>, answer: &impl serde::Serialize) {
        let payload = serde_json::to_vec(answer).expect("an answer is JSON").into();
        if let Err(error) = self
            .bus
            .publish(Message { subject, payload, ..Message::default() })
            .await
        {
            tracing::warn!(%error, "an answer was not sent");
        }
    }
}

/// A decision with the provider's leave to be called.
pub struct Chosen<'a> {
    pub decision: Decision,
    pub choice: Choice,
    pub place: Place<'a>,
}

/// The world as a decision sees it.
struct Seen<'a> {
    router: &'a Router,
    served: &'a Served,
    scope: Scope<'a>,
    now_ms: u64,
    /// Providers whose last place others have taken meanwhile.
    taken: Vec<String>,
}

impl Seen<'_> {
    fn standing(&self, provider: &str) -> Standing {
        self.router.breakers.standing(provider, &self.scope, self.now_ms)
    }

    fn refusal(&self, undecided: &Undecided) -> ErrorBody {
        let out = match undecided {
            Undecided::NoWeight => return ErrorBody::new(RouterCode::DecisionFailed, undecided.to_string()),
            Undecided::Constrained => return ErrorBody::new(RouterCode::NoProviderAvailable, undecided.to_string()),
            Undecided::AllOpen(out) => out,
        };
        let cooling = out.iter().filter_map(|provider| match self.standing(provider) {
            Standing::CoolingDown { ms } => Some(ms),
            Standing::Eligible | Standing::Out => None,
        });
        // Whoever waits for the first of them is served.
        let Some(ms) = cooling.min() else {
            return ErrorBody::new(RouterCode::NoProviderAvailable, undecided.to_string());
        };
        let seconds = ms.div_ceil(1000).max(1);
        let text = format!("out of service for now: {}; try again in {seconds} s", out.join(", "));
        ErrorBody::new(RouterCode::RateLimited, text).retry_after(seconds)
    }
}

impl World for Seen<'_> {
    fn is_available(&self, provider: &str) -> bool {
        !self.taken.iter().any(|taken| taken == provider) && self.standing(provider) == Standing::Eligible
    }

    fn latency_ms(&self, provider: &str) -> Option<f64> {
        self.router.stats.latency_ms(provider)
    }

    fn rule_failed(&self, rule: usize, why: &Stop) {
        self.served.rule_failed(rule, why);
    }
}

fn undecodable<T>(payload: &[u8], error: &serde_json::Error) -> (Context, Result<T, ErrorBody>) {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(payload) else {
        return (
            Context::default(),
            Err(ErrorBody::invalid(IntakeCode::SchemaValidationFailed, format!("the request is not JSON: {error}"))),
        );
    };
    let text = |key: &str| value.get(key).and_then(|v| v.as_str()).map(String::from);
    let context = Context { request_id: text("request_id"), trace_id: text("trace_id") };
    let wrong_version = text("version").filter(|version| version != VERSION);
    let error = match wrong_version {
        Some(version) => unsupported(&version),
        None => ErrorBody::invalid(IntakeCode::SchemaValidationFailed, format!("the request does not fit: {error}")),
    };
    (context, Err(error))
}

fn unsupported(version: &str) -> ErrorBody {
    ErrorBody::invalid(
        IntakeCode::VersionUnsupported,
        format!("version {version:?} is not served here; version \"1\" is"),
    )
}

/// Headers beat the payload. A trace id that only `traceparent` carries is taken from there. A wrong header is counted
/// and as good as none.
fn apply_headers(request: &mut DecideRequest, headers: &Headers) {
    let _counted = header(headers, "version", |version| version == VERSION);
    if let Some(tenant) = tenant_header(headers) {
        request.tenant_id = tenant.into();
    }
    let parent =
        header(headers, "traceparent", |parent| trace::trace_id_of(parent).is_some()).and_then(trace::trace_id_of);
    if let Some(trace) = header(headers, "trace_id", id::is_valid) {
        request.trace_id = Some(trace.into());
    } else if request.trace_id.is_none() {
        request.trace_id = parent.map(String::from);
    }
}

/// A header that fits; one that does not is counted.
fn header<'a>(headers: &'a Headers, name: &'static str, fits: impl Fn(&str) -> bool) -> Option<&'a str> {
    let value = headers.get(name)?;
    if !fits(value) {
        metrics::counter!("beamline_router_contract_violations_total", "header" => name).increment(1);
        return None;
    }
    Some(value)
}

/// The tenant that the header names.
pub fn tenant_header(headers: &Headers) -> Option<&str> {
    header(headers, "tenant_id", id::is_tenant)
}

/// Version, correlation, fields, tenant: in this order.
fn check(request: &DecideRequest) -> Result<(), ErrorBody> {
    if request.version != VERSION {
        return Err(unsupported(&request.version));
    }
    let flow = [&request.run_id, &request.flow_id, &request.step_id];
    if flow.iter().any(|id| id.is_some()) && !flow.iter().all(|id| id.is_some()) {
        return Err(ErrorBody::invalid(
            IntakeCode::CorrelationFieldsInvalid,
            "run_id, flow_id and step_id stand together or not at all",
        ));
    }
    let [run, flow_id, step] = flow.map(Option::as_ref);
    let unfit = |text: String| ErrorBody::invalid(IntakeCode::SchemaValidationFailed, text);
    for (name, id) in [
        ("request_id", Some(&request.request_id)),
        ("trace_id", request.trace_id.as_ref()),
        ("run_id", run),
        ("flow_id", flow_id),
        ("step_id", step),
        ("policy_id", request.policy_id.as_ref()),
        ("task.type", Some(&request.task.task_type)),
    ] {
        id.map_or(Ok(()), |id| id::check(id))
            .map_err(|error| unfit(format!("{name} {error}")))?;
    }
    if let Some(key) = &request.idempotency_key {
        id::check_idempotency_key(key).map_err(|error| unfit(format!("idempotency_key {error}")))?;
    }
    if request.task.payload.is_none() && request.task.payload_ref.is_none() {
        return Err(unfit("the task has neither payload nor payload_ref".into()));
    }
    id::check_tenant(&request.tenant_id).map_err(|error| unfit(format!("tenant_id {error}")))
}
