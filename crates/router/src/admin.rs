//! Answers operators: breakers, extensions, what a request would get, and how complex a policy is.

use crate::Router;
use crate::intake::{self, Contract};
use crate::operators::Role;
use crate::policies::Lookup;
use crate::services::Endpoint;
use bus::Message;
use wire::id;
use wire::json::Json;
use wire::router::{
    Breakers, Complexity, DEFAULT_TENANT, DryRun, ErrorBody, ExtensionsHealth, IntakeCode, PolicyQuery, RouterCode,
    StatusReply, admin,
};

/// The answer to a query on one of the admin subjects.
pub fn answer(router: &Router, endpoint: Endpoint, query: &Message) -> Result<Json, ErrorBody> {
    let needed = match endpoint {
        Endpoint::DryRun => Role::Operator,
        _ => Role::Viewer,
    };
    let authorization = query.headers.get(admin::AUTHORIZATION);
    let operator = router.operators.check(authorization, needed)?;
    tracing::debug!(operator = operator.sub, subject = endpoint.subject(), "an operator asks");

    match endpoint {
        Endpoint::Extensions => Ok(success(ExtensionsHealth::default())),
        Endpoint::DryRun => Ok(success(dry_run(router, query)?)),
        Endpoint::Complexity => Ok(success(complexity(router, query)?)),
        _ => Ok(success(Breakers { breakers: router.breakers.status(router.uptime_ms()) })),
    }
}

fn success<T: serde::Serialize>(data: T) -> Json {
    Json::of(&StatusReply::from(Ok(data)))
}

/// A request that is invalid is refused as in earnest; whether it would be decided is the answer.
fn dry_run(router: &Router, query: &Message) -> Result<DryRun, ErrorBody> {
    let request = intake::read(query, Contract::V1).1?;
    Ok(match router.dry_run(&request) {
        Ok(decision) => DryRun { decision: Some(decision), error: None },
        Err(error) => DryRun { decision: None, error: Some(error) },
    })
}

fn complexity(router: &Router, query: &Message) -> Result<Complexity, ErrorBody> {
    let unfit = |text: String| ErrorBody::invalid(IntakeCode::SchemaValidationFailed, text);
    let asked: PolicyQuery =
        serde_json::from_slice(&query.payload).map_err(|e| unfit(format!("the query does not fit: {e}")))?;
    let tenant = asked.tenant_id.as_deref().unwrap_or(DEFAULT_TENANT);
    let policy = asked.policy_id.as_deref().unwrap_or("default");
    id::check_tenant(tenant).map_err(|e| unfit(format!("tenant_id {e}")))?;
    id::check(policy).map_err(|e| unfit(format!("policy_id {e}")))?;

    let policies = router.policies.current();
    match policies.find(tenant, policy) {
        Lookup::Serves(served) => Ok(Complexity {
            policy_tenant: served.name.tenant.clone(),
            ..served.version.compiled.complexity()
        }),
        Lookup::Refuses(why) => Err(ErrorBody::new(RouterCode::DecisionFailed, why)),
        Lookup::Unknown => Err(crate::decide::unknown_policy(tenant, policy)),
    }
}
