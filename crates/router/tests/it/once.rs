//! Nothing is assigned or billed twice, however late a request or a result is repeated.

use crate::{Router, SOON, push, result};
use serde_json::{Value, json};
use wire::subjects::{self, BUCKET_TASKS, STREAM_ASSIGN, STREAM_DLQ, STREAM_RESULT, STREAM_UNREADABLE, STREAM_USAGE};

/// Changes the record of the task `r1`; a null removes a field. The assignment id is one that no stream has seen, so an
/// append would be stored, as after the end of the dedup window.
async fn change_record(router: &Router, fields: Value) {
    let (bytes, _) = router.bus.kv_get(BUCKET_TASKS, "acme/r1").await.unwrap().unwrap();
    let mut record: Value = serde_json::from_slice(&bytes).unwrap();
    record["assignment_id"] = json!(format!("a-{}", fields));
    for (key, value) in fields.as_object().unwrap() {
        record[key] = value.clone();
    }
    record.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    let value = record.to_string().into();
    router.bus.kv_put(BUCKET_TASKS, "acme/r1", value, None).await.unwrap();
}

pub async fn only_a_reserved_task_is_assigned_again_and_only_in_time(router: Router) {
    let first = router.decide(&push("r1")).await;
    let assignments = async || router.bus.stream_info(STREAM_ASSIGN).await.unwrap().messages;
    assert_eq!(assignments().await, 1);

    let now = bus::clock::unix_ms();
    let hours = |count: u64| count * 3_600_000;
    for (name, fields) in [
        ("committed", json!({"committed": true, "reserved_ms": now})),
        ("running", json!({"committed": null, "reserved_ms": now, "state": "running"})),
        ("of the previous version", json!({"committed": null, "reserved_ms": null, "state": "assigned"})),
    ] {
        change_record(&router, fields).await;
        let repeated = router.decide(&push("r1")).await;
        assert_eq!(repeated["decision"], first["decision"], "{name}: {repeated}");
        assert_eq!(assignments().await, 1, "{name}");
    }

    for (name, reserved_ms) in [("late", now - hours(2)), ("clock set back since", now + hours(1))] {
        change_record(&router, json!({"committed": null, "reserved_ms": reserved_ms, "state": "assigned"})).await;
        let repeated = router.decide(&push("r1")).await;
        assert_eq!(repeated["error"]["code"], "deadline_exceeded", "{name}: {repeated}");
        assert_eq!(assignments().await, 1, "{name}");
    }

    // The router that created the record ended before it appended the assignment.
    change_record(&router, json!({"committed": null, "reserved_ms": now, "state": "assigned"})).await;
    for _ in 0..3 {
        let repeated = router.decide(&push("r1")).await;
        assert_eq!(repeated["decision"], first["decision"], "{repeated}");
        assert_eq!(assignments().await, 2, "healed once");
    }
}

async fn settled(router: &Router) {
    testkit::eventually(SOON, || async {
        let info = router.bus.stream_info(STREAM_RESULT).await.unwrap();
        info.consumers
            .iter()
            .all(|(name, pending)| name != "router" || *pending == 0)
    })
    .await;
}

fn of_nobody(assignment_id: &str) -> String {
    let assignment = json!({"assignment_id": assignment_id, "request_id": "r", "executor": {"provider_id": "p"},
        "job": {"type": "t"}});
    result(&assignment, "success").to_string()
}

pub async fn result_of_an_unknown_task_is_billed_once(router: Router) {
    router.append(subjects::RESULT, of_nobody("foreign")).await;
    settled(&router).await;
    testkit::eventually(SOON, || async { router.bus.stream_info(STREAM_USAGE).await.unwrap().messages == 1 }).await;

    // Another assignment that was billed so long ago that the stream of usage has forgotten it.
    let billed = subjects::billed_key("forgotten");
    router
        .bus
        .kv_put(BUCKET_TASKS, &billed, "1000000".into(), None)
        .await
        .unwrap();
    for id in ["foreign", "forgotten"] {
        router.append(subjects::RESULT, of_nobody(id)).await;
    }
    settled(&router).await;
    assert_eq!(router.stored(STREAM_USAGE).await.len(), 1);
}

pub async fn result_that_is_replayed_after_a_day_is_a_dead_letter(router: Router) {
    // The id of an assignment that a router made in 2023.
    router
        .append(subjects::RESULT, of_nobody("018bcfe5-6800-7abc-8def-0123456789ab"))
        .await;
    testkit::eventually(SOON, || async { router.bus.stream_info(STREAM_UNREADABLE).await.unwrap().messages == 1 })
        .await;
    let letter = router.stored(STREAM_UNREADABLE).await.remove(0);
    assert!(letter["reason"].as_str().unwrap().contains("more than a day before"), "{letter}");
    settled(&router).await;
    let count = async |stream| router.bus.stream_info(stream).await.unwrap().messages;
    assert_eq!(count(STREAM_USAGE).await, 0);
    assert_eq!(count(STREAM_DLQ).await, 0, "anybody can send these, so they evict no letter that an operator needs");
}
