//! Idempotency keys: the first answer for every repeat, from every router, whatever ends in between.

use crate::{Router, changed, connect, push, request};
use serde_json::{Value, json};
use tempfile::TempDir;
use wire::policy::CircuitBreaker;
use wire::subjects::{BUCKET_KEYS, BUCKET_TASKS, STREAM_ASSIGN};

fn keyed(request: Value, key: &str) -> Value {
    changed(request, json!({"idempotency_key": key}))
}

/// A policy with one provider.
fn only(provider: &str) -> String {
    json!({"version": provider, "providers": [{"name": provider, "weight": 1}]}).to_string()
}

async fn assignments(router: &Router) -> u64 {
    router.bus.stream_info(STREAM_ASSIGN).await.unwrap().messages
}

async fn entry(router: &Router, key: &str) -> Value {
    let (bytes, _) = router
        .bus
        .kv_get(BUCKET_KEYS, &format!("acme/{key}"))
        .await
        .unwrap()
        .unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

/// Writes an entry as a router leaves it that ends after it reserved the key.
async fn reserve(router: &Router, key: &str, request_id: &str, digest: &Value) {
    let value = json!({"request_id": request_id, "digest": digest}).to_string().into();
    let key = format!("acme/{key}");
    router.bus.kv_put(BUCKET_KEYS, &key, value, None).await.unwrap();
}

pub async fn repeat_gets_the_first_answer_after_a_restart_with_another_policy(router: Router) {
    router.policy("acme/default.json", &only("a"));
    testkit::eventually(crate::SOON, || async { router.decide(&request("r")).await["decision"]["provider_id"] == "a" })
        .await;
    let (decided, pushed) = (keyed(request("d1"), "decide"), keyed(push("p1"), "push"));
    let first = [router.decide(&decided).await, router.decide(&pushed).await];
    assert!(first.iter().all(|answer| answer["ok"] == true), "{first:?}");

    router.policy("acme/default.json", &only("b"));
    let router = router.restart().await;
    assert_eq!(router.decide(&request("r")).await["decision"]["provider_id"], "b");
    assert_eq!([router.decide(&decided).await, router.decide(&pushed).await], first);

    // A client may number and trace its repeats anew; the answer names the first request, whose task it is.
    let anew = |id: &str| json!({"request_id": id, "trace_id": "another", "deadline": 99_999_999_999_999_u64});
    for (asked, first) in [(decided, &first[0]), (pushed, &first[1])] {
        let repeated = router.decide(&changed(asked, anew("another"))).await;
        assert_eq!(repeated["decision"], first["decision"], "{repeated}");
        assert_eq!(repeated["assignment_id"], first["assignment_id"]);
        assert_eq!(repeated["context"], json!({"request_id": first["context"]["request_id"], "trace_id": "another"}));
    }
    assert_eq!(assignments(&router).await, 1);

    // A repeat is answered even if the policy is gone, and a new request is not.
    let gone = changed(keyed(request("g1"), "gone"), json!({"policy_id": "none"}));
    assert_eq!(router.decide(&gone).await["error"]["code"], "policy_not_found");
}

pub async fn key_with_another_body_is_a_conflict_for_its_tenant_only(router: Router) {
    let conflict = json!({"code": "idempotency_conflict",
        "message": "a request with this idempotency_key and another body exists; choose another key"});
    for (first, key) in [(request("r1"), "d"), (push("r2"), "p")] {
        let first = keyed(first, key);
        assert_eq!(router.decide(&first).await["ok"], true);
        for other in [
            json!({"task": {"type": "t", "payload": {"prompt": "ho"}}}),
            json!({"metadata": {"a": 1}}),
            json!({"push_assignment": key == "d"}),
            // Refused as a conflict, not for the policy: the key comes first.
            json!({"policy_id": "none"}),
        ] {
            assert_eq!(router.decide(&changed(first.clone(), other)).await["error"], conflict);
        }
        let of_beta = changed(first, json!({"tenant_id": "beta", "task": {"type": "t", "payload": {}}}));
        assert_eq!(router.decide(&of_beta).await["ok"], true, "another tenant's key is another key");
    }
    assert_eq!(assignments(&router).await, 2);
}

pub async fn refused_request_takes_no_key(router: Router) {
    for (asked, key) in [(request("r1"), "d"), (push("r2"), "p")] {
        let asked = keyed(asked, key);
        let refused = router
            .decide(&changed(asked.clone(), json!({"policy_id": "none"})))
            .await;
        assert_eq!(refused["error"]["code"], "policy_not_found");
        assert_eq!(router.decide(&asked).await["ok"], true, "it may be corrected");
    }
}

#[tokio::test]
async fn empty_key_is_none() {
    let router = Router::local().await;
    for n in 0..3 {
        let asked = changed(keyed(push(&format!("r{n}")), ""), json!({"metadata": {"n": n}}));
        assert_eq!(router.decide(&asked).await["ok"], true);
        assert_eq!(router.decide(&changed(asked, json!({"push_assignment": false}))).await["ok"], true);
    }
    assert_eq!(assignments(&router).await, 3);
    assert!(router.bus.kv_get(BUCKET_KEYS, "acme/").await.unwrap().is_none());
}

pub async fn many_at_once_are_one_task(router: Router) {
    let beside = Router::beside(TempDir::new().unwrap(), router.bus.clone(), CircuitBreaker::default()).await;
    for key in ["k1", "k2", "k3"] {
        let at_once = (0..16).map(|n| {
            let asked = keyed(push(&format!("{key}-{n}")), key);
            let router = &router;
            async move { router.decide(&asked).await }
        });
        let answers = futures_util::future::join_all(at_once).await;
        for answer in &answers {
            assert_eq!(answer["ok"], true, "{answer}");
            assert_eq!(answer, &answers[0]);
        }
    }
    assert_eq!(assignments(&router).await, 3);
    beside.stop().await;
}

/// A router ends after it reserved a key: before the task is stored, or before the answer is committed.
pub async fn reserved_key_leads_to_the_task_of_the_first_request(router: Router) {
    let pushed = router.decide(&keyed(push("p1"), "k1")).await;
    let stored = entry(&router, "k1").await;
    assert_eq!(stored["answer"]["assignment_id"], pushed["assignment_id"], "committed: {stored}");

    reserve(&router, "k1", "p1", &stored["digest"]).await;
    let repeated = router.decide(&keyed(push("p2"), "k1")).await;
    assert_eq!(repeated, pushed, "the task was stored");
    assert_eq!(assignments(&router).await, 1);

    reserve(&router, "k2", "p3", &stored["digest"]).await;
    let first = router.decide(&keyed(push("p4"), "k2")).await;
    assert_eq!((&first["ok"], &first["context"]["request_id"]), (&json!(true), &json!("p3")), "{first}");
    assert_eq!(entry(&router, "k2").await["answer"]["assignment_id"], first["assignment_id"]);
    for id in ["p3", "p4", "p5"] {
        assert_eq!(router.decide(&keyed(push(id), "k2")).await, first);
    }
    assert_eq!(router.task("p3").await["task"]["assignment_id"], first["assignment_id"]);
    assert_eq!(router.task("p4").await["error"]["code"], "not_found");
    assert_eq!(assignments(&router).await, 2);
}

pub async fn task_whose_record_was_evicted_is_not_run_again(router: Router) {
    let asked = changed(keyed(push("p1"), "k"), json!({"result_subject": "beamline.result.v1.me"}));
    let pushed = router.decide(&asked).await;
    assert_eq!(pushed["result_subject"], "beamline.result.v1.me", "{pushed}");
    let another = changed(asked.clone(), json!({"result_subject": "beamline.result.v1.you"}));
    assert_eq!(router.decide(&another).await["result_subject"], "beamline.result.v1.you", "both are told");

    router
        .bus
        .kv_put(BUCKET_TASKS, "acme/p1", "gone".into(), None)
        .await
        .unwrap();
    let repeated = router.decide(&asked).await;
    assert_eq!(repeated["assignment_id"], pushed["assignment_id"]);
    assert_eq!((&repeated["decision"], repeated.get("result_subject")), (&pushed["decision"], None));
    assert_eq!(assignments(&router).await, 1);
}

/// Two routers of unequal policies: whichever of them answers, the answer is the first one.
#[tokio::test]
async fn routers_with_different_policies_give_one_answer() {
    let server = testkit::NatsServer::start().await;
    let mut routers = Vec::new();
    for provider in ["a", "b"] {
        let dir = TempDir::new().unwrap();
        crate::write(dir.path(), "acme/default.json", &only(provider));
        routers.push(Router::beside(dir, connect(&server).await, CircuitBreaker::default()).await);
    }

    for n in 0..20 {
        let asked = |id: String, base: fn(&str) -> Value| keyed(base(&id), &format!("k{n}"));
        let base = if n % 2 == 0 { request } else { push };
        let answers = (0..6).map(|m| {
            let (router, asked) = (&routers[m % 2], asked(format!("r{n}-{m}"), base));
            async move { router.decide(&asked).await }
        });
        let answers = futures_util::future::join_all(answers).await;
        assert!(
            answers
                .iter()
                .all(|answer| *answer == answers[0] && answer["ok"] == true),
            "{answers:?}"
        );
    }
    assert_eq!(assignments(&routers[0]).await, 10);
}

#[tokio::test]
async fn entry_that_cannot_be_read_is_an_error_and_runs_nothing() {
    let router = Router::with_policies(&[]).await;
    router
        .bus
        .kv_put(BUCKET_KEYS, "acme/k", "{".into(), None)
        .await
        .unwrap();
    for asked in [request("r"), push("p")] {
        let refused = router.decide(&keyed(asked, "k")).await;
        assert_eq!(refused["error"]["code"], "internal", "{refused}");
    }
    assert_eq!(assignments(&router).await, 0);
}
