//! Who causes which row of the table of errors in the scenarios: the router itself, or a responder on NATS in its place.
//! The router's own work shortens the second list.

use std::collections::BTreeSet;
use wire::router::RouterCode;

/// Caused by the real router in `e2e_2_errors_that_the_router_causes`, which checks that it has seen exactly these.
pub const BY_THE_ROUTER: &[&str] = &[
    "backpressure",
    "deadline_exceeded",
    "decision_failed",
    "idempotency_conflict",
    "invalid_request",
    "no_provider_available",
    "not_found",
    "policy_not_found",
    "unavailable",
];

/// Caused by nothing that the router has today, and why. `e2e_2_every_row_of_the_table_from_a_scripted_router` drives
/// them, and the others with them.
pub const BY_A_SCRIPT: &[(&str, &str)] = &[
    ("budget_exceeded", "policies have no budgets"),
    ("extension_error", "there are no extensions"),
    ("extension_not_found", "there are no extensions"),
    ("extension_timeout", "there are no extensions"),
    ("extension_unavailable", "there are no extensions"),
    ("forbidden", "tenants are refused by the gateway, with code 13; there are no validators and roles"),
    ("internal", "a task's record would have to be broken"),
    ("post_processor_failed", "there are no extensions"),
    ("quota_exceeded", "policies have no quotas"),
    ("rate_limited", "policies have no rate limit"),
    ("unauthorized", "of the gateway itself over HTTP; the router asks nobody on the bus who they are"),
];

#[test]
fn every_row_has_one_cause() {
    let by_script = BY_A_SCRIPT.iter().map(|(code, _)| *code);
    let listed: Vec<&str> = BY_THE_ROUTER.iter().copied().chain(by_script).collect();
    let rows: BTreeSet<&str> = RouterCode::KNOWN.iter().map(RouterCode::as_str).collect();
    assert_eq!(listed.iter().copied().collect::<BTreeSet<_>>(), rows);
    assert_eq!(listed.len(), rows.len(), "a row is in both lists");
}
