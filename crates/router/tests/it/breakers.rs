//! Circuit breakers and cool-downs: what makes a provider unavailable, to which tenants and for how long, and that
//! all routers reach the same state.

use crate::{Router, SOON, changed, connect, push, request, result, write};
use bus::{Bus, Message};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wire::policy::CircuitBreaker;
use wire::status::{BreakerStatus, RouterStatus};
use wire::subjects;

const ONE: &str = r#"{"providers": [{"name": "p", "weight": 1}]}"#;
/// The open state outlasts every test, and the half-open state admits one probe at a time.
const RULES: CircuitBreaker = CircuitBreaker {
    failure_threshold: 3,
    error_rate_threshold: 1.0,
    min_calls: 100,
    timeout_ms: 600_000,
    half_open_max_calls: 1,
    success_threshold: 2,
};

async fn router(files: &[(&str, &str)]) -> Router {
    let dir = TempDir::new().unwrap();
    for (name, text) in files {
        write(dir.path(), name, text);
    }
    Router::ruled(dir, None, RULES).await
}

/// Pushes a task and returns its assignment, or the error of the refusal.
async fn assign(router: &Router, request: &Value) -> Result<Value, Value> {
    let answer = router.decide(request).await;
    if answer["ok"] != true {
        return Err(answer["error"].clone());
    }
    let task = router.task(request["request_id"].as_str().unwrap()).await;
    Ok(json!({"assignment_id": task["task"]["assignment_id"], "request_id": request["request_id"],
        "executor": {"provider_id": answer["decision"]["provider_id"]}, "job": {"type": "t"}}))
}

async fn end(router: &Router, assignment: &Value, status: &str, fields: Value) {
    router
        .append(subjects::RESULT, changed(result(assignment, status), fields).to_string())
        .await;
}

/// Pushes a task and reports its failure.
async fn fail(router: &Router, request: &Value) {
    let assignment = assign(router, request).await.unwrap();
    end(router, &assignment, "error", json!({"error_code": "unreachable"})).await;
}

fn of(tenant: &str, request: Value) -> Value {
    changed(request, json!({"tenant_id": tenant}))
}

/// Publishes the breaker state of `p` as the status of another router: the shortest way into a state.
async fn told(bus: &Bus, generation: u64, state: &str) {
    let breaker = BreakerStatus {
        provider: "p".into(),
        state: state.into(),
        generation,
        ..BreakerStatus::default()
    };
    let status = RouterStatus {
        router: "another".into(),
        breakers: vec![breaker],
        ..RouterStatus::default()
    };
    let payload = serde_json::to_vec(&status).unwrap().into();
    let subject = subjects::ROUTER_STATUS.into();
    bus.publish(Message { subject, payload, ..Message::default() })
        .await
        .unwrap();
}

async fn half_open(router: &Router, generation: u64) {
    told(&router.bus, generation, "half_open").await;
    router
        .breaker("p", None, |breaker| breaker["state"] == "half_open")
        .await;
}

#[tokio::test]
async fn providers_own_limit_counts_as_failure_and_a_clients_deadline_does_not() {
    let router = router(&[("default/default.json", ONE)]).await;
    let short = json!({"options": {"deadline_ms": 50}});
    for n in 0..5 {
        let assignment = assign(&router, &changed(push(&format!("r{n}")), short.clone()))
            .await
            .unwrap();
        end(&router, &assignment, "timeout", json!({"error_code": "deadline_exceeded"})).await;
        let foreign = assign(&router, &changed(push(&format!("f{n}")), short.clone()))
            .await
            .unwrap();
        end(&router, &foreign, "timeout", json!({})).await;
    }

    let last = assign(&router, &push("last")).await.unwrap();
    end(&router, &last, "success", json!({})).await;
    router
        .breaker("p", None, |breaker| breaker["calls"] == 1 && breaker["failures"] == 0)
        .await;

    for n in 0..3 {
        let assignment = assign(&router, &changed(push(&format!("own{n}")), short.clone()))
            .await
            .unwrap();
        end(&router, &assignment, "timeout", json!({"error_code": "timeout"})).await;
    }
    router.breaker("p", None, |breaker| breaker["state"] == "open").await;
}

#[tokio::test]
async fn strict_policy_keeps_a_provider_from_its_own_tenant_only() {
    let strict = r#"{"providers": [{"name": "p", "weight": 1}], "circuit_breaker": {"failure_threshold": 1}}"#;
    let router = router(&[("default/default.json", ONE), ("acme/default.json", strict)]).await;
    fail(&router, &of("acme", push("r1"))).await;
    router
        .breaker("p", Some("acme/default"), |breaker| breaker["state"] == "open")
        .await;
    let refused = assign(&router, &of("acme", push("r2"))).await.unwrap_err();
    assert_eq!(refused["code"], "no_provider_available");
    for n in 0..20 {
        assert_eq!(router.decide(&of("other", request(&format!("o{n}")))).await["ok"], true, "others are served");
    }
    router
        .breaker("p", None, |breaker| breaker["state"] == "closed" && breaker["failures"] == 1)
        .await;

    // A policy that no longer has breaker rules of its own has no breaker either.
    router.policy("acme/default.json", ONE);
    let own = |breaker: &Value| breaker["tenant"] == "acme";
    router
        .status(|status| !status["breakers"].as_array().unwrap().iter().any(own))
        .await;
}

#[tokio::test]
async fn breaker_rules_that_a_policy_omits_are_the_operators() {
    let partial = r#"{"providers": [{"name": "p", "weight": 1}], "circuit_breaker": {"timeout_ms": 1000}}"#;
    let router = router(&[("default/default.json", partial)]).await;
    for n in 0..3 {
        fail(&router, &push(&format!("r{n}"))).await;
    }

    // The built-in threshold is five; the operator's is three.
    router
        .breaker("p", Some("default/default"), |breaker| breaker["generation"] == 1)
        .await;
}

#[tokio::test]
async fn busy_endpoint_cools_down_without_a_failure() {
    let two = r#"{"providers": [{"name": "p", "weight": 1}, {"name": "spare"}],
        "rules": [{"when": "task.type == 'any'", "to": ["p", "spare"]}]}"#;
    let router = router(&[("default/default.json", two)]).await;
    let busy = json!({"error_code": "rate_limited", "retry_after_seconds": 600});
    for n in 0..5 {
        let id = format!("r{n}");
        let Ok(assignment) = assign(&router, &push(&id)).await else {
            break;
        };
        end(&router, &assignment, "error", busy.clone()).await;
    }

    let cooling = |breaker: &Value| {
        breaker["cooling_down_ms"]
            .as_u64()
            .is_some_and(|ms| ms > 0 && ms <= 600_000)
    };
    router
        .breaker("p", None, |breaker| {
            breaker["state"] == "cooling_down" && cooling(breaker) && breaker["failures"] == 0
        })
        .await;

    let refused = assign(&router, &push("refused")).await.unwrap_err();
    assert_eq!(refused["code"], "rate_limited");
    assert!((500..=600).contains(&refused["retry_after_seconds"].as_u64().unwrap()), "{refused}");
    let any = changed(push("any"), json!({"task": {"type": "any", "payload": {}}}));
    assert_eq!(router.decide(&any).await["decision"]["provider_id"], "spare");
}

#[tokio::test]
async fn cool_down_ends_by_itself() {
    let router = router(&[("default/default.json", ONE)]).await;
    let assignment = assign(&router, &push("r")).await.unwrap();
    end(&router, &assignment, "error", json!({"error_code": "rate_limited", "retry_after_seconds": 1})).await;
    router.breaker("p", None, |breaker| breaker["cool_downs"] == 1).await;
    testkit::eventually(SOON, || async { router.decide(&request("later")).await["ok"] == true }).await;
}

#[tokio::test]
async fn concurrent_decisions_take_the_last_place_once() {
    let router = router(&[("default/default.json", ONE)]).await;
    half_open(&router, 1).await;

    // The long deadline keeps the probe's place from expiring while a slow machine is still deciding.
    let patient = |n| changed(push(&format!("r{n}")), json!({"options": {"deadline_ms": 600_000}}));
    let pushes: Vec<Value> = (0..40).map(patient).collect();
    let answers = futures_util::future::join_all(pushes.iter().map(|push| router.decide(push))).await;

    let served = answers.iter().filter(|answer| answer["ok"] == true).count();
    assert_eq!(served, 1, "{answers:?}");
    let refused = answers
        .iter()
        .filter(|answer| answer["error"]["code"] == "no_provider_available")
        .count();
    assert_eq!(refused, 39);
}

#[tokio::test]
async fn every_end_of_a_task_returns_its_place() {
    let router = router(&[("default/default.json", ONE)]).await;
    half_open(&router, 1).await;
    for n in 0..20 {
        assert_eq!(router.decide(&request(&format!("d{n}"))).await["ok"], true, "a decision takes no place: {n}");
    }

    for (n, (status, fields)) in [
        ("cancelled", json!({})),
        ("error", json!({"error_code": "spawn_failed"})),
        ("error", json!({"error_code": "rate_limited", "retry_after_seconds": 1})),
        ("success", json!({})),
    ]
    .into_iter()
    .enumerate()
    {
        // The deadline outlasts the test, so that only the outcome can return the place.
        let patient = changed(push(&format!("r{n}")), json!({"options": {"deadline_ms": 600_000}}));
        testkit::eventually(SOON, || async { router.decide(&patient).await["ok"] == true }).await;
        let assignment = assign(&router, &patient).await.unwrap();
        assert!(assign(&router, &push(&format!("next{n}"))).await.is_err(), "the only place is taken");
        end(&router, &assignment, status, fields).await;
    }
    testkit::eventually(SOON, || async { router.decide(&push("after")).await["ok"] == true }).await;
}

#[tokio::test]
async fn results_from_before_the_trip_do_not_count_as_probes() {
    let router = router(&[("default/default.json", ONE)]).await;
    let mut before = Vec::new();
    for n in 0..8 {
        before.push(assign(&router, &push(&format!("r{n}"))).await.unwrap());
    }
    for assignment in &before[..3] {
        end(&router, assignment, "error", json!({})).await;
    }
    router
        .breaker("p", None, |breaker| breaker["state"] == "open" && breaker["generation"] == 1)
        .await;

    half_open(&router, 1).await;
    for assignment in &before[3..7] {
        end(&router, assignment, "success", json!({})).await;
    }
    end(&router, &before[7], "error", json!({})).await;
    testkit::eventually(SOON, || async { router.bus.stream_info(subjects::STREAM_USAGE).await.unwrap().messages == 8 })
        .await;

    for n in 0..2 {
        let id = format!("probe{n}");
        testkit::eventually(SOON, || async { router.decide(&push(&id)).await["ok"] == true }).await;
        router
            .breaker("p", None, |breaker| breaker["state"] == "half_open" && breaker["generation"] == 1)
            .await;
        let probe = assign(&router, &push(&id)).await.unwrap();
        end(&router, &probe, "success", json!({})).await;
    }
    router
        .breaker("p", None, |breaker| breaker["state"] == "closed" && breaker["generation"] == 1)
        .await;
}

/// Starts another router on the bus, with the policies under `dir`.
async fn another(bus: Bus, dir: &std::path::Path) -> (JoinHandle<Result<(), router::Error>>, CancellationToken) {
    let config = router::Config {
        policies: dir.join("policies"),
        circuit_breaker: RULES,
        ..router::Config::default()
    };
    let bound = router::bind(config, bus).await.unwrap();
    let cancel = CancellationToken::new();
    (tokio::spawn(bound.run(cancel.clone())), cancel)
}

/// Waits until this many routers report the breaker of all tenants in this state and generation.
async fn all(routers: usize, bus: &Bus, state: &str, generation: u64) {
    let mut statuses = bus.subscribe(subjects::ROUTER_STATUS, None, 256).await.unwrap();
    let mut latest: BTreeMap<String, (String, u64)> = BTreeMap::new();
    let agreed = async {
        loop {
            let message = statuses.next().await.unwrap();
            let status: RouterStatus = serde_json::from_slice(&message.payload).unwrap();
            let of_all = status.breakers.into_iter().find(|breaker| breaker.tenant.is_none());
            if let Some(breaker) = of_all {
                latest.insert(status.router, (breaker.state, breaker.generation));
            }
            if latest
                .values()
                .filter(|seen| **seen == (state.into(), generation))
                .count()
                == routers
            {
                return;
            }
        }
    };

    if tokio::time::timeout(SOON, agreed).await.is_err() {
        panic!("{routers} routers do not agree on {state} {generation}");
    }
}

pub async fn all_routers_follow_the_same_outcomes_and_a_late_one_adopts_them(mut router: Router) {
    let dir = router.dir.path().to_path_buf();
    router.policy("default/default.json", ONE);
    router.cancel.cancel();
    (&mut router.running).await.unwrap().unwrap();
    let bus = async || match &router.server {
        None => router.bus.clone(),
        Some(server) => connect(server).await,
    };
    let mut running = Vec::new();
    for _ in 0..3 {
        running.push(another(bus().await, &dir).await);
    }

    // Each result is delivered to one router only; three failures still open the breaker on all three.
    for n in 0..3 {
        fail(&router, &push(&format!("r{n}"))).await;
    }
    all(3, &router.bus, "open", 1).await;
    for n in 0..30 {
        let refused = assign(&router, &push(&format!("x{n}"))).await.unwrap_err();
        assert_eq!(refused["code"], "no_provider_available", "whichever router answers");
    }

    running.push(another(bus().await, &dir).await);
    all(4, &router.bus, "open", 1).await;

    // Successful probes close the breaker on every router.
    told(&router.bus, 1, "half_open").await;
    all(4, &router.bus, "half_open", 1).await;
    for n in 0..2 {
        let id = format!("probe{n}");
        testkit::eventually(SOON, || async { router.decide(&push(&id)).await["ok"] == true }).await;
        let probe = assign(&router, &push(&id)).await.unwrap();
        end(&router, &probe, "success", json!({})).await;
    }
    all(4, &router.bus, "closed", 1).await;
    for (running, cancel) in running {
        cancel.cancel();
        running.await.unwrap().unwrap();
    }
}
