//! Outcomes: what the end of an assignment means for its provider.
//!
//! The router that records a result judges it once and publishes the outcome to all routers, itself included. So all
//! breakers, cool-downs and latencies follow the same outcomes, whichever router got the result. A router that missed
//! outcomes adopts newer breaker states from the status that every router publishes each second.

use crate::Router;
use crate::policies::Set;
use crate::policy::Compiled;
use bus::{Bus, Message, Subscription};
use std::collections::HashSet;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use wire::limits::COOL_DOWN_DEFAULT_S;
use wire::policy::CircuitBreaker;
use wire::router::{ExecResult, ProviderOutcome, ResultStatus, TaskState, VERSION, Verdict};
use wire::status::{BreakerStatus, RouterStatus};
use wire::subjects;

const QUEUE_MAX: usize = 8192;

/// Errors that the task caused; another task may succeed.
const OF_THE_TASK: [&str; 3] = ["invalid_task", "exit_status", "output"];
/// Errors of a worker that could not start the task.
const NOT_STARTED: [&str; 3] = ["spawn_failed", "unknown_provider", "max_deliver"];

/// Limits of the provider's own that a run may exceed.
const OWN_LIMITS: [&str; 2] = ["timeout", "first_token_timeout"];

/// The one place that decides what counts against a provider. With `client_deadline`, the client set the task's
/// deadline; otherwise the router did, as a multiple of the provider's expected latency.
fn judge(result: &ExecResult, client_deadline: bool) -> Verdict {
    let code = result.error_code.as_deref().unwrap_or_default();
    match result.status {
        ResultStatus::Success => Verdict::Success,
        ResultStatus::Cancelled => Verdict::Neutral,
        // The run exceeded a limit of the provider's own.
        ResultStatus::Timeout if OWN_LIMITS.contains(&code) => Verdict::Failed,
        // The run exceeded a deadline that the client chose, or that is shorter than the provider's limit. Long work is
        // not a failure.
        ResultStatus::Timeout if client_deadline || code == "deadline_exceeded" => Verdict::Neutral,
        ResultStatus::Timeout => Verdict::Failed,
        ResultStatus::Error if code == "rate_limited" || result.retry_after_seconds.is_some() => Verdict::CoolDown {
            retry_after_seconds: result.retry_after_seconds.unwrap_or(COOL_DOWN_DEFAULT_S),
        },
        ResultStatus::Error if OF_THE_TASK.contains(&code) || NOT_STARTED.contains(&code) => Verdict::Neutral,
        ResultStatus::Error => Verdict::Failed,
    }
}

/// Publishes the outcome of the task's assignment to all routers. The provider is the decision's, because the name in a
/// result cannot be trusted.
pub async fn publish(router: &Router, task: &TaskState, result: &ExecResult) {
    let Some(decision) = &task.decision else { return };
    let choice = task.choice.clone().unwrap_or_default();
    let outcome = ProviderOutcome {
        version: VERSION.into(),
        assignment_id: result.assignment_id.clone(),
        provider_id: decision.provider_id.clone(),
        verdict: judge(result, choice.client_deadline),
        latency_ms: result.latency_ms,
        choice,
    };

    let payload = serde_json::to_vec(&outcome)
        .expect("an outcome serializes to JSON")
        .into();
    let message = Message { subject: subjects::OUTCOMES.into(), payload, ..Message::default() };
    if let Err(error) = router.bus.publish(message).await {
        let (provider, request_id) = (&decision.provider_id, &result.request_id);
        tracing::warn!(%error, provider, request_id, "publishing an outcome failed; the routers' breakers miss it");
    }
}

/// What this router receives from all routers.
pub struct Inputs {
    outcomes: Subscription,
    statuses: Subscription,
}

impl Inputs {
    pub async fn subscribe(bus: &Bus) -> bus::Result<Self> {
        Ok(Self {
            outcomes: bus.subscribe(subjects::OUTCOMES, None, QUEUE_MAX).await?,
            statuses: bus.subscribe(subjects::ROUTER_STATUS, None, QUEUE_MAX).await?,
        })
    }
}

pub async fn run(router: Arc<Router>, mut inputs: Inputs, cancel: CancellationToken) {
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            Some(message) = inputs.outcomes.next() => learn(&router, &message),
            Some(message) = inputs.statuses.next() => adopt(&router, &message),
            else => return,
        }
    }
}

/// Applies one outcome to this router's breakers and latencies.
fn learn(router: &Router, message: &Message) {
    // A newer router may publish a verdict that this one does not know; it cannot count that.
    let Ok(outcome) = serde_json::from_slice::<ProviderOutcome>(&message.payload) else {
        return;
    };

    router.open.ended(&outcome.assignment_id);
    let policies = router.policies.current();
    let policy = policies.own(&outcome.choice.policy_tenant, &outcome.choice.policy_id);
    let rules = policy.and_then(|policy| router.rules_of(policy));
    router.breakers.ended(&outcome, rules.as_ref(), router.uptime_ms());
    if outcome.verdict == Verdict::Success {
        router.stats.took(&outcome.provider_id, outcome.latency_ms);
    }
}

/// Adopts newer breaker states from another router's status.
fn adopt(router: &Router, message: &Message) {
    let Ok(status) = serde_json::from_slice::<RouterStatus>(&message.payload) else {
        return;
    };
    if status.router != router.id {
        let served = Served::of(router);
        router
            .breakers
            .adopt(&status.breakers, router.uptime_ms(), |breaker| served.rules(breaker));
    }
}

/// Forgets the breakers of policies that are gone and of providers that no policy names any more.
pub fn forget(router: &Router) {
    let served = Served::of(router);
    router.breakers.retain(|breaker| served.rules(breaker).is_some());
}

/// The policies and the providers they name: nothing else has a breaker.
struct Served<'a> {
    router: &'a Router,
    policies: Arc<Set>,
    providers: HashSet<String>,
}

impl<'a> Served<'a> {
    fn of(router: &'a Router) -> Self {
        let policies = Arc::clone(&router.policies.current());
        let providers = policies
            .iter()
            .flat_map(Compiled::providers)
            .map(String::from)
            .collect();
        Self { router, policies, providers }
    }

    /// The rules of a breaker; `None` if no such breaker may exist.
    fn rules(&self, breaker: &BreakerStatus) -> Option<CircuitBreaker> {
        let Some((tenant, policy)) = breaker.tenant.as_ref().zip(breaker.policy.as_ref()) else {
            return self
                .providers
                .contains(&breaker.provider)
                .then_some(self.router.config.circuit_breaker);
        };

        let policy = self.policies.own(tenant, policy)?;
        let named = policy.providers().any(|provider| provider == breaker.provider);
        self.router.rules_of(policy).filter(|_| named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn verdict_follows_status_code_and_deadline() {
        let check = |status: &str, code: Option<&str>, client_deadline: bool, expected: Verdict| {
            let result = json!({"assignment_id": "a", "request_id": "r", "status": status, "provider_id": "p",
                "job": {"type": "t"}, "error_code": code});
            let result = ExecResult::decode(result.to_string().as_bytes()).unwrap();
            assert_eq!(judge(&result, client_deadline), expected, "{status} {code:?} {client_deadline}");
        };
        let both = |status: &str, code: Option<&str>, expected: Verdict| {
            check(status, code, false, expected);
            check(status, code, true, expected);
        };
        both("success", None, Verdict::Success);
        both("cancelled", Some("cancelled"), Verdict::Neutral);
        for code in ["invalid_task", "exit_status", "output", "spawn_failed", "unknown_provider", "max_deliver"] {
            both("error", Some(code), Verdict::Neutral);
        }
        for code in [Some("unreachable"), Some("refused"), Some("broken_stream"), Some("of a foreign worker"), None] {
            both("error", code, Verdict::Failed);
        }
        both("timeout", Some("timeout"), Verdict::Failed);
        both("timeout", Some("first_token_timeout"), Verdict::Failed);
        both("timeout", Some("deadline_exceeded"), Verdict::Neutral);
        for code in [Some("of a foreign worker"), None] {
            check("timeout", code, false, Verdict::Failed);
            check("timeout", code, true, Verdict::Neutral);
        }
        both("error", Some("rate_limited"), Verdict::CoolDown { retry_after_seconds: COOL_DOWN_DEFAULT_S });
    }

    #[test]
    fn error_with_retry_after_is_a_cool_down() {
        let result = json!({"assignment_id": "a", "request_id": "r", "status": "error", "provider_id": "p",
            "job": {"type": "t"}, "error_code": "overloaded", "retry_after_seconds": 7});
        let result = ExecResult::decode(result.to_string().as_bytes()).unwrap();
        assert_eq!(judge(&result, false), Verdict::CoolDown { retry_after_seconds: 7 });
    }
}
