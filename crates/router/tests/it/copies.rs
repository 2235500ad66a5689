//! Copies of results for those who wait for them.

use crate::{Router, SOON, push, result};
use bus::{Headers, Message, Subscription};
use serde_json::{Value, json};
use wire::subjects;

fn pushed_by(request_id: &str, result_subject: &str) -> Value {
    let mut request = push(request_id);
    request["result_subject"] = json!(result_subject);
    request
}

async fn copies(router: &Router) -> Subscription {
    router.bus.subscribe("beamline.result.v1.*", None, 64).await.unwrap()
}

async fn receivers(copies: &mut Subscription, count: usize) -> Vec<String> {
    let mut subjects = Vec::new();
    for _ in 0..count {
        let copy = tokio::time::timeout(SOON, copies.next()).await.unwrap().unwrap();
        subjects.push(copy.subject.to_string());
    }
    subjects.sort();
    subjects
}

/// Appends the result of the assignment, with the header of a worker that has sent a copy itself, if it has.
async fn end(router: &Router, assignment: &Value, copied_to: Option<&str>) {
    let headers = copied_to.map(|subject| Headers::new().with(subjects::RESULT_COPY_HEADER, subject));
    let message = Message {
        subject: subjects::RESULT.into(),
        reply: None,
        headers: headers.unwrap_or_default(),
        payload: result(assignment, "success").to_string().into(),
    };
    router.bus.append(message, None).await.unwrap();
}

pub async fn copies_go_to_all_who_wait_except_the_one_that_the_worker_told(router: Router) {
    let (a, b, c) = ("beamline.result.v1.a", "beamline.result.v1.b", "beamline.result.v1.c");
    let mut copies = copies(&router).await;

    let first = router.decide(&pushed_by("r", a)).await;
    assert_eq!(first["result_subject"], a, "{first}");
    let repeated = router.decide(&pushed_by("r", b)).await;
    assert_eq!((&repeated["result_subject"], &repeated["assignment_id"]), (&json!(b), &first["assignment_id"]));
    let query = json!({"request_id": "r", "tenant_id": "acme", "result_subject": c});
    let known = router.ask(subjects::GET_DECISION, &query).await;
    assert_eq!((&known["result_subject"], &known["task"]["result_subjects"]), (&json!(c), &Value::Null), "{known}");

    let assignment = router.stored(subjects::STREAM_ASSIGN).await.remove(0);
    assert_eq!(assignment["correlation"]["result_subject"], a);
    end(&router, &assignment, Some(a)).await;
    assert_eq!(receivers(&mut copies, 2).await, [b, c]);

    // Nothing will come any more: the record has the result.
    testkit::eventually(SOON, || async { router.task("r").await["task"]["state"] == "completed" }).await;
    for late in [router.decide(&pushed_by("r", b)).await, router.ask(subjects::GET_DECISION, &query).await] {
        assert_eq!((&late["ok"], &late["result_subject"]), (&json!(true), &Value::Null), "{late}");
    }

    // A v1 worker sends no copies.
    let foreign = router.decide(&pushed_by("foreign", a)).await;
    let mut assignment = assignment;
    (assignment["request_id"], assignment["assignment_id"]) = (json!("foreign"), foreign["assignment_id"].clone());
    end(&router, &assignment, None).await;
    assert_eq!(receivers(&mut copies, 1).await, [a]);
}

#[tokio::test]
async fn those_who_wait_for_one_result_are_bounded() {
    let router = Router::local().await;
    let subject = |n: usize| format!("beamline.result.v1.{n}");
    for n in 0..12 {
        let answer = router.decide(&pushed_by("r", &subject(n))).await;
        assert_eq!(answer["result_subject"] == json!(subject(n)), n < 8, "{n}: {answer}");
    }
}

#[tokio::test]
async fn result_subject_outside_its_prefix_is_refused() {
    let router = Router::local().await;
    for bad in ["", "caf.exec.assign.v1", "beamline.result.v1.", "beamline.result.v1.a.b", "beamline.result.v1.*"] {
        let refused = router.decide(&pushed_by("r", bad)).await;
        assert_eq!(refused["error"]["intake_error_code"], "SCHEMA_VALIDATION_FAILED", "{bad}: {refused}");
        let query = json!({"request_id": "r", "tenant_id": "acme", "result_subject": bad});
        let refused = router.ask(subjects::GET_DECISION, &query).await;
        assert_eq!(refused["error"]["code"], "invalid_request", "{bad}: {refused}");
    }
}
