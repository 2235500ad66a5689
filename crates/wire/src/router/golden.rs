//! Checks the golden messages of `fixtures/wire/router.json`. v1 is frozen, so each one must decode and encode back to
//! the same bytes. A result may be in a legacy format; then `reads_as` is its current form.

use super::*;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;

#[derive(Deserialize)]
struct Case {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    text: String,
    reads_as: Option<String>,
    /// The HTTP status of an error.
    status: Option<u16>,
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("../../../../fixtures/wire/router.json")).unwrap()
}

fn again<T: Serialize + DeserializeOwned>(case: &Case) -> String {
    let message: T = serde_json::from_str(&case.text).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    serde_json::to_string(&message).unwrap()
}

#[test]
fn every_message_encodes_back_to_its_text() {
    for case in cases() {
        let written = match case.kind.as_str() {
            "decide_request" => again::<DecideRequest>(&case),
            "decide_response" => again::<DecideResponse>(&case),
            "error" => again::<ErrorResponse>(&case),
            "assignment" => again::<ExecAssignment>(&case),
            "output_chunk" => again::<OutputChunk>(&case),
            "usage" => again::<Usage>(&case),
            "provider_outcome" => again::<ProviderOutcome>(&case),
            "task_query" => again::<TaskQuery>(&case),
            "cancel_run" => again::<CancelRun>(&case),
            "task_answer" => again::<TaskAnswer>(&case),
            "dead_letter" => again::<DeadLetter>(&case),
            "stored_policy" => again::<crate::policy::Stored>(&case),
            "policy_index" => again::<crate::policy::Index>(&case),
            "policy_tombstone" => again::<crate::policy::Tombstone>(&case),
            "heartbeat" => again::<crate::status::Heartbeat>(&case),
            "task_state" => again::<TaskState>(&case),
            "key_record" => again::<KeyRecord>(&case),
            "policy_status" => again::<crate::status::PolicyStatus>(&case),
            "result" => {
                let result = ExecResult::decode(case.text.as_bytes()).unwrap_or_else(|e| panic!("{}: {e}", case.name));
                serde_json::to_string(&result).unwrap()
            }
            "backpressure_status" => again::<StatusReply<Backpressure>>(&case),
            "breakers" => again::<StatusReply<Breakers>>(&case),
            "extensions_health" => again::<StatusReply<ExtensionsHealth>>(&case),
            "dry_run" => again::<StatusReply<DryRun>>(&case),
            "policy_query" => again::<PolicyQuery>(&case),
            "complexity" => again::<StatusReply<Complexity>>(&case),
            "service_ping" => again::<services::Ping>(&case),
            "service_info" => again::<services::Info>(&case),
            "service_stats" => again::<services::Stats>(&case),
            "refused_result" => {
                assert!(ExecResult::decode(case.text.as_bytes()).is_err(), "{}", case.name);
                continue;
            }
            other => panic!("{}: unknown message type {other:?}", case.name),
        };
        assert_eq!(&written, case.reads_as.as_ref().unwrap_or(&case.text), "{}", case.name);
    }
}

#[test]
fn every_code_reason_status_and_state_has_a_golden_message() {
    let cases = cases();

    let mut codes = BTreeSet::new();
    for case in cases.iter().filter(|case| case.kind == "error") {
        let response: ErrorResponse = serde_json::from_str(&case.text).unwrap();
        assert_eq!(Some(response.error.status()), case.status, "{}", case.name);
        assert_eq!(response.error.status() == 429, response.error.retry_after_seconds.is_some(), "{}", case.name);
        codes.insert(response.error.code);
    }
    assert_eq!(codes, RouterCode::KNOWN.iter().cloned().collect());

    let shown = |part: String| cases.iter().any(|case| case.text.contains(&part));
    use Reason::*;
    for reason in [Sticky, Weighted, BestScore, Fallback, Retry, CircuitBreakerFallback] {
        assert!(shown(format!("\"reason\":\"{}\"", reason.as_str())), "{reason:?}");
    }
    for status in [ResultStatus::Success, ResultStatus::Error, ResultStatus::Timeout, ResultStatus::Cancelled] {
        assert!(shown(format!("\"status\":\"{}\"", status.as_str())), "{status:?}");
    }
    for verdict in ["success", "failed", "cool_down", "neutral"] {
        assert!(shown(format!("\"verdict\":\"{verdict}\"")), "{verdict}");
    }
    for state in [State::Queued, State::Assigned, State::Running, State::Completed, State::Failed, State::Cancelled] {
        assert!(shown(format!("\"state\":{}", serde_json::to_string(&state).unwrap())), "{state:?}");
    }
}
