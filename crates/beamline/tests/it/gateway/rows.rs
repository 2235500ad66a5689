//! The source of each row of the error table in the scenarios: the real router, or a scripted responder that replaces
//! it. When the router can cause a row, the row moves from the second list to the first.

use std::collections::BTreeSet;
use wire::router::RouterCode;

/// The real router causes these rows; `e2e_2_errors_that_the_router_causes` checks that it has seen exactly these.
pub const BY_THE_ROUTER: &[&str] = &[
    "backpressure",
    "deadline_exceeded",
    "decision_failed",
    "forbidden",
    "idempotency_conflict",
    "internal",
    "invalid_request",
    "no_provider_available",
    "not_found",
    "policy_not_found",
    "rate_limited",
    "unauthorized",
    "unavailable",
];

/// Rows that the router cannot cause today, and why. `e2e_2_every_row_of_the_table_from_a_scripted_router` covers them,
/// together with the others.
pub const BY_A_SCRIPT: &[(&str, &str)] = &[
    ("budget_exceeded", "policies have no budgets"),
    ("extension_error", "there are no extensions"),
    ("extension_not_found", "there are no extensions"),
    ("extension_timeout", "there are no extensions"),
    ("extension_unavailable", "there are no extensions"),
    ("post_processor_failed", "there are no extensions"),
    ("quota_exceeded", "policies have no quotas"),
];

#[test]
fn every_row_has_one_cause() {
    let by_script = BY_A_SCRIPT.iter().map(|(code, _)| *code);
    let listed: Vec<&str> = BY_THE_ROUTER.iter().copied().chain(by_script).collect();
    let rows: BTreeSet<&str> = RouterCode::KNOWN.iter().map(RouterCode::as_str).collect();
    assert_eq!(listed.iter().copied().collect::<BTreeSet<_>>(), rows);
    assert_eq!(listed.len(), rows.len(), "a row is in both lists");
}
