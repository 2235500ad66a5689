//! The five end-to-end scenarios of the gateway, each by name: `cargo test -p beamline --test it e2e_3`.
//!
//! The gateway runs in its own process on a real nats-server, and so do the router and the worker. Where the real
//! router cannot cause the behaviour under test, a scripted responder on NATS replaces it: in scenario 2 for the rows
//! that [`rows`] names, in scenario 3 for replies around and after the deadline.

mod causes;
mod overload;
mod rows;
mod stage;

use crate::process::Process;
use bus::{Message, Subscription};
use client::{Client, Error};
use futures_util::StreamExt;
use serde_json::{Value, json};
use stage::{Outcomes, PATIENCE, Raw, Stage};
use std::collections::BTreeSet;
use std::time::Duration;
use testkit::eventually;
use wire::ipc::{ErrorDetail, FrameType};
use wire::router::RouterCode;
use wire::subjects;

/// Scenario 4: the number of requests (the environment's `HAPPY` overrides it), of connections that share them, and of
/// requests in flight on each connection.
const HAPPY: usize = 1000;
const HAPPY_CLIENTS: usize = 4;
const HAPPY_AT_ONCE: usize = 100;
/// Scenario 5: how often it kills NATS, how many requests succeed or fail between two changes, and when it gives up.
const STORMS: usize = 10;
const STORM_REQUESTS: usize = 20;
const STORM_PATIENCE: Duration = Duration::from_secs(120);
/// Scenario 3: rounds of concurrent requests that time out.
const TIMEOUT_ROUNDS: u64 = 5;
const TIMEOUTS_AT_ONCE: u64 = 200;
/// The intake error that gives an `invalid_request` the status 413.
const TOO_LARGE: &str = "PAYLOAD_TOO_LARGE";

fn submit(task_type: &str, fields: Value) -> Value {
    let mut submit = json!({"command": "task_submit", "task_type": task_type});
    submit
        .as_object_mut()
        .unwrap()
        .extend(fields.as_object().unwrap().clone());
    submit
}

fn decided(request: &Value) -> Value {
    let decision = json!({"provider_id": "scripted", "priority": 50, "expected_latency_ms": 1, "expected_cost": 0,
        "reason": "weighted", "policy_id": "default", "policy_version": "1"});
    json!({"ok": true, "decision": decision, "context": {"request_id": request["request_id"]}})
}

#[track_caller]
fn refused(outcome: Result<Value, Error>) -> ErrorDetail {
    match outcome {
        Err(Error::Refused(payload)) => payload.error,
        other => panic!("no refusal: {other:?}"),
    }
}

/// Returns the next request of a client to a router.
async fn captured(wire: &mut Subscription) -> (Message, Value) {
    loop {
        let next = tokio::time::timeout(PATIENCE, wire.next());
        let message = next.await.expect("a message on the wire").unwrap();
        if [subjects::DECIDE, subjects::GET_DECISION, subjects::CANCEL].contains(&&*message.subject) {
            let payload = serde_json::from_slice(&message.payload).unwrap();
            return (message, payload);
        }
    }
}

#[tokio::test]
async fn e2e_1_subjects_and_headers() {
    let stage = Stage::start().await;
    let mut wire = stage.bus.subscribe("beamline.router.v1.>", None, 4096).await.unwrap();
    let _parts = stage.part("router,worker").await;
    let client = stage.client().await;

    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("00-{trace}-b7ad6b7169203331-01");
    let answer = client
        .submit(&submit(
            "code_completion",
            json!({"request_id": "r-1", "tenant_id": "acme", "policy_id": "default", "traceparent": parent,
                "idempotency_key": "k", "file": "a\"}.rs", "line": 3, "context": ["ü"],
                "params": {"tenant_id": "evil"}}),
        ))
        .await
        .unwrap();
    assert_eq!(answer["context"], json!({"request_id": "r-1", "trace_id": trace}));

    let (message, payload) = captured(&mut wire).await;
    assert_eq!(&*message.subject, "beamline.router.v1.decide");
    assert!(message.reply.is_some_and(|reply| reply.starts_with("_INBOX.")));
    for (header, value) in [("traceparent", &*parent), ("trace_id", trace), ("tenant_id", "acme"), ("version", "1")] {
        assert_eq!(message.headers.get(header), Some(value), "{header}");
    }

    let task = json!({"type": "code_completion",
        "payload": {"file": "a\"}.rs", "line": 3, "context": ["ü"], "params": {"tenant_id": "evil"}}});
    let expected = json!({"version": "1", "request_id": "r-1", "tenant_id": "acme", "policy_id": "default",
        "trace_id": trace, "idempotency_key": "k", "task": task});
    assert_eq!(payload, expected);

    // A request without ids gets them from the gateway, the same in header and payload.
    let waits = json!({"wait": "result", "timeout_ms": 9000});
    assert_eq!(client.submit(&submit("echo", waits)).await.unwrap()["status"], "success");
    let (message, payload) = captured(&mut wire).await;
    assert_eq!(payload["trace_id"], generated_trace_id(&message));
    assert_eq!(message.headers.get("tenant_id"), Some("default"));
    assert_eq!((&payload["push_assignment"], &payload["options"]["deadline_ms"]), (&json!(true), &json!(9000)));

    let task = payload["request_id"].as_str().unwrap();
    client.query(task).await.unwrap();
    client.cancel(task).await.unwrap();
    client.subscribe(task).await.unwrap().next().await.unwrap();

    // The same over HTTP.
    let request = json!({"version": "1", "request_id": "r-2", "tenant_id": "acme", "policy_id": "default",
        "task": {"type": "echo", "payload": {}}});
    let (status, _, answer) = stage.post_decide(&stage.api_key().await, &request.to_string()).await;
    assert_eq!(status, 200, "{answer}");

    // The header names the tenant that the task belongs to.
    let mut asked = Vec::new();
    let (message, payload) = loop {
        let (message, payload) = captured(&mut wire).await;
        if &*message.subject == subjects::DECIDE {
            break (message, payload);
        }
        assert_eq!(payload["request_id"], task);
        assert_eq!((message.headers.get("version"), message.headers.get("tenant_id")), (Some("1"), Some("default")));
        generated_trace_id(&message);
        asked.push(message.subject);
    };
    // A cancel looks the task up first. Requests that wait longer than usual for a result look it up, too.
    let cancelled = asked.iter().position(|subject| &**subject == subjects::CANCEL).unwrap();
    assert!(cancelled >= 2 && asked.len() > cancelled + 1, "{asked:?}");
    assert_eq!(payload, request);
    assert_eq!((message.headers.get("version"), message.headers.get("tenant_id")), (Some("1"), Some("acme")));
    assert_eq!(answer["context"], json!({"request_id": "r-2", "trace_id": generated_trace_id(&message)}));
}

/// Returns the message's trace id, after checking that both headers carry it.
fn generated_trace_id(message: &Message) -> String {
    let trace = message.headers.get("trace_id").unwrap();
    let parent = message.headers.get("traceparent").unwrap();
    assert_eq!(trace.len(), 32);
    assert!(parent.starts_with(&format!("00-{trace}-")) && parent.ends_with("-01"), "{parent}");
    trace.into()
}

#[tokio::test]
async fn e2e_1_router_accepts_every_golden_request() {
    let stage = Stage::start().await;

    let mut wire = stage.bus.subscribe(subjects::DECIDE, None, 4096).await.unwrap();
    let _parts = stage.part("router,worker").await;

    let golden: Vec<Value> = serde_json::from_str(include_str!("../../../../fixtures/wire/ipc.json")).unwrap();
    let submits: Vec<&Value> = golden
        .iter()
        .filter(|case| case["type"] == FrameType::TaskSubmit as u8)
        .collect();
    assert!(submits.len() >= 2);
    for case in submits {
        let hex = case["hex"].as_str().unwrap();
        let bytes: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|n| u8::from_str_radix(&hex[n..n + 2], 16).unwrap())
            .collect();
        let mut raw = Raw::connect(&stage).await;
        raw.send(&bytes).await;
        let frame = raw.next().await;
        assert_eq!(frame.frame_type(), Some(FrameType::ResponseOk), "{case}: {frame:?}");
        let (_, sent) = captured(&mut wire).await;
        let golden: Value = serde_json::from_str(case["payload"].as_str().unwrap()).unwrap();
        assert_eq!(sent["task"]["type"], golden["task_type"], "{case}");
    }

    let key = stage.api_key().await;
    let golden: Vec<Value> = serde_json::from_str(include_str!("../../../../fixtures/wire/router.json")).unwrap();
    let requests: Vec<&Value> = golden.iter().filter(|case| case["type"] == "decide_request").collect();
    assert!(requests.len() >= 3);
    for case in requests {
        let text = case["text"].as_str().unwrap();
        let (status, _, answer) = stage.post_decide(&key, text).await;
        // A golden request may have constraints that no provider meets, or a deadline in the past. Both errors show
        // that the router has read it.
        let outcome = answer["error"]["code"].as_str().unwrap_or("ok");
        assert!(["ok", "no_provider_available", "deadline_exceeded"].contains(&outcome), "{case}: {answer}");
        assert_eq!(status == 200, outcome == "ok");
        let (message, _) = captured(&mut wire).await;
        assert_eq!(&message.payload[..], text.as_bytes(), "{case}");
    }
    let (status, _, answer) = stage
        .post_decide(&key, r#"{"version":"1","request_id":"r","tenant_id":"t"}"#)
        .await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (400, &json!("invalid_request")),
        "the router checks requests: {answer}"
    );
}

#[tokio::test]
async fn e2e_2_errors_that_the_router_causes() {
    let mut stage = Stage::start().await;
    let client = stage.client().await;
    let mut seen = BTreeSet::from([overloaded(&stage, &client).await]);

    let router = stage.part("router").await;
    write_policies(&router);
    policies_are_in_use(&client).await;

    seen.extend(errors_over_the_socket(&client).await);
    seen.extend(errors_over_http(&stage).await);
    seen.extend(causes::to_operators(&stage, &router).await);
    seen.insert(causes::broken_key(&stage, &client).await);
    seen.insert(causes::limited_provider(&stage, &client).await);
    // Last, because it opens the gateway's breaker: there are no streams.
    seen.insert(error_without_jetstream(&mut stage, &client).await);

    assert_eq!(
        seen.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        rows::BY_THE_ROUTER.iter().copied().collect()
    );
}

/// Once there are policy files, the built-in policy serves nobody: besides the weightless policy there is a default
/// one.
fn write_policies(router: &Process) {
    let directory = router.dir.path().join("policies/default");
    std::fs::create_dir_all(&directory).unwrap();
    // The weightless policy comes last: once it is in use, the others are.
    for (name, provider, weight) in [("default", "echo", 100), ("limited", "limited", 100), ("weightless", "echo", 0)] {
        let policy = json!({"version": "1.0", "providers": [{"name": provider, "weight": weight}]});
        // Renamed, so that the router does not read half of it.
        let written = directory.join(format!("{name}.new"));
        std::fs::write(&written, policy.to_string()).unwrap();
        std::fs::rename(written, directory.join(format!("{name}.json"))).unwrap();
    }
}

/// The task that [`policies_are_in_use`] submits; another task with the same id is a conflict.
fn submit_twice(n: u32) -> Value {
    submit("echo", json!({"request_id": "twice", "push_assignment": true, "params": {"n": n}}))
}

async fn policies_are_in_use(client: &Client) {
    eventually(PATIENCE, async || client.submit(&submit_twice(1)).await.is_ok()).await;
    eventually(PATIENCE, async || {
        let outcome = client.submit(&submit("echo", json!({"policy_id": "weightless"}))).await;
        refused(outcome).reason.as_deref() != Some("policy_not_found")
    })
    .await;
}

/// Returns the reasons that were seen.
async fn errors_over_the_socket(client: &Client) -> Vec<String> {
    let mut seen = Vec::new();
    let long_key = submit("echo", json!({"idempotency_key": "k".repeat(257)}));
    let too_large = submit("echo", json!({"context": "x".repeat(1_100_000)}));
    for (submit, status, reason, intake) in [
        (long_key, 400, "invalid_request", Some("SCHEMA_VALIDATION_FAILED")),
        (submit("echo", json!({"policy_id": "none"})), 404, "policy_not_found", None),
        (submit_twice(2), 409, "idempotency_conflict", None),
        (too_large, 413, "invalid_request", Some("PAYLOAD_TOO_LARGE")),
        (submit("echo", json!({"policy_id": "weightless"})), 500, "decision_failed", None),
    ] {
        let error = refused(client.submit(&submit).await);
        assert_eq!((error.code, error.status, error.reason.as_deref()), (12, Some(status), Some(reason)));
        assert_eq!(error.details.as_ref().and_then(|d| d["intake_error_code"].as_str()), intake, "{error:?}");
        seen.push(reason.to_string());
    }

    let error = refused(client.query("nobody's").await.map(|task| json!(task)));
    assert_eq!((error.code, error.status, error.reason.as_deref()), (12, Some(404), Some("not_found")));
    seen.extend(error.reason);
    seen
}

/// Returns the codes that were seen, except for `unauthorized`, which is the gateway's own.
async fn errors_over_http(stage: &Stage) -> Vec<String> {
    let key = stage.api_key().await;
    let request = |fields: Value| {
        let mut request = json!({"version": "1", "request_id": "r", "tenant_id": "default",
            "task": {"type": "echo", "payload": {}}});
        request
            .as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        request.to_string()
    };

    let unmet = json!({"constraints": {"max_latency_ms": 0.0, "max_cost": -1.0}});
    let mut seen = Vec::new();
    for (key, fields, expected, code) in [
        (&*key, json!({}), 200, None),
        (&*key, json!({"version": "7"}), 400, Some("invalid_request")),
        ("wrong", json!({}), 401, Some("unauthorized")),
        (&*key, json!({"policy_id": "none"}), 404, Some("policy_not_found")),
        (&*key, json!({"policy_id": "weightless"}), 500, Some("decision_failed")),
        (&*key, unmet, 503, Some("no_provider_available")),
        (&*key, json!({"deadline": 1}), 504, Some("deadline_exceeded")),
    ] {
        let (status, _, answer) = stage.post_decide(key, &request(fields)).await;
        assert_eq!((status, answer["error"]["code"].as_str()), (expected, code), "{answer}");
        seen.extend(code.filter(|code| *code != "unauthorized").map(String::from));
    }
    seen
}

async fn error_without_jetstream(stage: &mut Stage, client: &Client) -> String {
    stage.nats.restart_with_jetstream(false).await;
    let reason = std::cell::OnceCell::new();
    eventually(PATIENCE, async || {
        let error = refused(client.submit(&submit("echo", json!({"push_assignment": true}))).await);
        // Before the connections are back, the gateway has errors of its own.
        let by_router = error.message.contains("the assignment was not stored");
        if by_router {
            assert_eq!((error.code, error.status), (12, Some(503)), "{error:?}");
            let _ = reason.set(error.reason.unwrap());
        }
        by_router
    })
    .await;
    reason.into_inner().unwrap()
}

/// Overloads a router that stores one assignment at a time, and returns the reason for which it refuses others.
async fn overloaded(stage: &Stage, client: &Client) -> String {
    let url = stage.nats.url();
    let settings = format!("roles = \"router\"\n[nats]\nurl = \"{url}\"\n[router]\nmax_in_flight = 1\n");
    let _router = Process::start_with_settings(&settings).await;
    let error = std::cell::OnceCell::new();
    eventually(PATIENCE, async || {
        let pushed = submit("echo", json!({"push_assignment": true}));
        let outcomes = futures_util::future::join_all((0..20).map(|_| client.submit(&pushed))).await;
        if let Some(outcome) = outcomes.into_iter().find(Result::is_err) {
            let _ = error.set(refused(outcome));
        }
        error.get().is_some()
    })
    .await;
    let error = error.into_inner().unwrap();
    assert_eq!((error.code, error.status, error.retry_after_ms), (12, Some(429), Some(1000)), "{error:?}");
    error.reason.unwrap()
}

#[tokio::test]
async fn e2e_2_every_row_of_the_table_from_a_scripted_router() {
    let stage = Stage::start().await;
    // The responder refuses each task with the code that is the task's type.
    let _responder = stage
        .responder(async |request| {
            let code = request["task"]["type"].as_str().unwrap();
            if code == TOO_LARGE {
                let error = json!({"code": "invalid_request", "message": "large", "intake_error_code": code});
                return json!({"ok": false, "error": error, "context": {}});
            }
            let Some(known) = RouterCode::KNOWN.iter().find(|known| known.as_str() == code) else {
                return decided(&request);
            };
            let mut error = json!({"code": code, "message": format!("because {code}"), "details": {"what": code}});
            if known.status() == 429 {
                error["retry_after_seconds"] = json!(7);
            }
            json!({"ok": false, "error": error, "context": {"request_id": request["request_id"]}})
        })
        .await;

    let client = stage.client().await;
    let key = stage.api_key().await;
    let statuses: BTreeSet<u16> = RouterCode::KNOWN.iter().map(RouterCode::status).collect();
    assert_eq!(statuses, BTreeSet::from([400, 401, 403, 404, 409, 429, 500, 503, 504]));
    // The gateway retries a request whose router is unavailable, and such failures open the breaker: that row comes
    // last.
    let mut rows = RouterCode::KNOWN.to_vec();
    rows.sort_by_key(|code| *code == RouterCode::Unavailable);
    let rows = rows.iter().map(|code| (code.as_str(), code.status()));

    for (code, status) in rows.clone() {
        let outcome = client
            .submit(&submit(code, json!({"request_id": format!("r-{code}")})))
            .await;
        let error = refused(outcome);
        assert_eq!((error.code, error.status, error.reason.as_deref()), (12, Some(status), Some(code)), "{error:?}");
        assert_eq!(error.message, format!("because {code}"));
        assert_eq!(error.details, Some(json!({"what": code})));
        assert_eq!(error.retry_after_ms, (status == 429).then_some(7000), "{code}");
    }

    eventually(PATIENCE, async || client.submit(&submit("fine", json!({}))).await.is_ok()).await;
    let request = json!({"version": "1", "request_id": "r", "tenant_id": "default",
        "task": {"type": TOO_LARGE, "payload": {}}});
    let (status, _, answer) = stage.post_decide(&key, &request.to_string()).await;
    assert_eq!((status, &answer["error"]["intake_error_code"]), (413, &json!(TOO_LARGE)));

    for (code, status) in rows {
        let request = json!({"version": "1", "request_id": format!("h-{code}"), "tenant_id": "default",
            "task": {"type": code, "payload": {}}});
        let (answered, retry_after, answer) = stage.post_decide(&key, &request.to_string()).await;
        assert_eq!((answered, &answer["error"]["code"]), (status, &json!(code)), "{answer}");
        assert_eq!(answer["error"]["details"], json!({"what": code}));
        assert_eq!(answer["context"]["request_id"], format!("h-{code}"));
        assert_eq!(retry_after, (status == 429).then_some(7), "{code}");
    }
}

#[tokio::test]
async fn e2e_3_timeouts_and_late_replies() {
    let stage = Stage::start().await;
    let _responder = stage
        .responder(async |request| {
            let after = request["task"]["payload"]["params"]["after_ms"].as_u64().unwrap();
            tokio::time::sleep(Duration::from_millis(after)).await;
            decided(&request)
        })
        .await;
    let late = async || stage.metric("beamline_bus_late_replies_total").await;
    let after = |ms: u64| submit("slow", json!({"params": {"after_ms": ms}}));

    let mut raw = Raw::connect(&stage).await;
    let before = stage.holds().await;

    // A thousand timeouts, each of them answered too late. Their deadline is too short to count against the router.
    for round in 0..TIMEOUT_ROUNDS {
        let ids = 1000 * (round + 1)..1000 * (round + 1) + TIMEOUTS_AT_ONCE;
        for id in ids.clone() {
            raw.submit(id, Duration::from_millis(200), &after(900)).await;
        }
        let outcomes = raw.outcomes(ids).await;
        assert_eq!(outcomes.len() as u64, TIMEOUTS_AT_ONCE);
        for (id, outcome) in outcomes {
            let [(FrameType::ResponseError, answer)] = &outcome[..] else {
                panic!("{id}: {outcome:?}")
            };
            assert_eq!(answer["error"]["code"], 5, "{answer}");
        }
    }

    let all = (TIMEOUT_ROUNDS * TIMEOUTS_AT_ONCE) as f64;
    eventually(PATIENCE, async || late().await == all).await;

    // Replies around the deadline: each request has one outcome, which is certain except close to the deadline. The
    // deadline is shorter than those that count against the router.
    let deadline = Duration::from_millis(450);
    let (in_time, late_for_certain) = ([0, 20], [1500, 2000]);
    let delays: Vec<u64> = in_time.into_iter().chain(late_for_certain).chain(440..=460).collect();
    let ids = 1..1 + delays.len() as u64;
    for (id, delay) in ids.clone().zip(&delays) {
        raw.submit(id, deadline, &after(*delay)).await;
    }

    let outcomes = raw.outcomes(ids.clone()).await;
    let mut timeouts = 0.0;
    for (id, delay) in ids.zip(&delays) {
        let [(kind, answer)] = &outcomes[&id][..] else {
            panic!("{delay} ms: {:?}", outcomes[&id])
        };
        let answered = *kind == FrameType::ResponseOk;
        assert!(answered || answer["error"]["code"] == 5, "{delay} ms: {answer}");
        assert!(answered || !in_time.contains(delay), "{delay} ms: a reply in time became a timeout");
        assert!(!answered || !late_for_certain.contains(delay), "{delay} ms: a late reply became an answer");
        timeouts += f64::from(!answered);
    }

    // A reply at the very deadline may be neither a late reply nor an answer.
    eventually(PATIENCE, async || late().await >= all + 2.0).await;
    assert!(late().await <= all + timeouts);

    raw.submit(1, deadline, &after(0)).await;
    let mut outcomes = Outcomes::new();
    raw.take(&mut outcomes).await;
    assert_eq!(outcomes[&1][0].0, FrameType::ResponseOk, "the breaker should have stayed closed: {outcomes:?}");
    assert_eq!(stage.metric("beamline_gateway_breaker_open").await, 0.0);
    stage.settles_to(before).await;
}

#[tokio::test]
async fn e2e_4_happy_path() {
    let number = |text: std::ffi::OsString| {
        text.to_str()
            .and_then(|text| text.parse().ok())
            .expect("HAPPY is a number")
    };
    let happy_ones: usize = std::env::var_os("HAPPY").map_or(HAPPY, number);
    let stage = Stage::start().await;
    let (_router, _worker) = (stage.part("router").await, stage.part("worker").await);

    let mut clients = tokio::task::JoinSet::new();
    for number in 0..HAPPY_CLIENTS {
        let client = stage.client().await;
        clients.spawn(async move {
            let share = (0..happy_ones).skip(number).step_by(HAPPY_CLIENTS);
            let requests = share.map(|n| happy(client.clone(), format!("happy-{n}"), n / HAPPY_CLIENTS));
            futures_util::stream::iter(requests)
                .buffer_unordered(HAPPY_AT_ONCE)
                .collect::<Vec<String>>()
                .await
        });
    }

    let answered: Vec<String> = clients.join_all().await.into_iter().flatten().collect();
    assert_eq!(answered.len(), happy_ones);
    assert_eq!(answered.iter().collect::<BTreeSet<_>>().len(), happy_ones, "each request gets its own answer");

    eventually(PATIENCE, async || stage.metric("beamline_gateway_requests_total").await == happy_ones as f64).await;
    eventually(PATIENCE, async || stage.metric("beamline_gateway_in_flight").await == 0.0).await;
}

/// Submits one request, every second one for its result, and returns the request id of its answer.
async fn happy(client: Client, request_id: String, n: usize) -> String {
    let wait = ["decision", "result"][n % 2];
    let fields =
        json!({"request_id": request_id, "wait": wait, "timeout_ms": 20_000, "params": {"prompt": request_id}});
    let answer = client.submit(&submit("echo", fields)).await.unwrap();

    let answered = if wait == "decision" {
        assert_eq!((&answer["ok"], &answer["decision"]["provider_id"]), (&json!(true), &json!("echo")), "{answer}");
        &answer["context"]["request_id"]
    } else {
        assert_eq!(answer["status"], "success", "{answer}");
        &answer["request_id"]
    };
    assert_eq!(*answered, request_id);
    request_id
}

#[tokio::test]
async fn e2e_5_reconnect_storm() {
    let mut stage = Stage::start().await;
    let _router = stage.part("router").await;
    let fine = submit("echo", json!({}));
    let mut raw = Raw::connect(&stage).await;
    raw.submit(0, PATIENCE, &fine).await;
    let mut outcomes = Outcomes::new();
    raw.take(&mut outcomes).await;
    assert_eq!(outcomes[&0][0].0, FrameType::ResponseOk);
    let before = stage.holds().await;

    let sent = storm(&mut stage, &mut raw, &fine, &mut outcomes).await;
    while outcomes.len() < sent as usize {
        raw.take(&mut outcomes).await;
    }
    // A second answer to any of them arrives before the answer to this.
    for (id, again) in raw.outcomes(sent..sent).await {
        outcomes.entry(id).or_default().extend(again);
    }
    assert_eq!(outcomes.len(), sent as usize);
    let refused = single_outcomes(&outcomes);

    // The gateway has counted the same.
    eventually(PATIENCE, async || stage.metric("beamline_gateway_requests_total").await == sent as f64).await;
    assert_eq!(stage.metric("beamline_gateway_errors_total").await, refused as f64);

    recovers(&stage, &fine).await;
    stage.settles_to(before).await;
}

/// Sends 100 requests a second while NATS goes down and comes back, and returns the number of all requests so far. NATS
/// changes its state when enough requests have shown the present one.
async fn storm(stage: &mut Stage, raw: &mut Raw, fine: &Value, outcomes: &mut Outcomes) -> u64 {
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    let (mut sent, mut storms, mut down) = (1, 0, false);
    let (mut seen, mut in_this_state) = (0, 0);
    let give_up = tokio::time::Instant::now() + STORM_PATIENCE;

    while storms < STORMS || down {
        assert!(tokio::time::Instant::now() < give_up, "storm {storms}, down: {down}");
        tokio::select! {
            () = raw.take(outcomes) => {}
            _ = tick.tick() => {
                raw.submit(sent, Duration::from_secs(2), fine).await;
                sent += 1;
            }
        }
        let answers: usize = outcomes.values().map(Vec::len).sum();
        if answers == seen {
            continue;
        }
        seen = answers;

        let ok = outcomes
            .values()
            .filter(|outcome| outcome[0].0 == FrameType::ResponseOk)
            .count();
        let now = if down { outcomes.len() - ok } else { ok };
        in_this_state = if in_this_state == 0 { now } else { in_this_state };
        if now < in_this_state + STORM_REQUESTS {
            continue;
        }

        in_this_state = 0;
        if down {
            stage.nats.restart().await;
        } else {
            stage.nats.kill();
            storms += 1;
        }
        down = !down;
    }
    sent
}

/// Checks that each request had a single outcome, an answer or an explicit error, and returns the number of errors.
fn single_outcomes(outcomes: &Outcomes) -> u64 {
    let mut refused = 0;
    for (id, outcome) in outcomes {
        let [(kind, answer)] = &outcome[..] else {
            panic!("request {id} has {} outcomes: {outcome:?}", outcome.len())
        };
        let explicit = matches!(answer["error"]["code"].as_u64(), Some(5 | 10 | 11));
        assert!(*kind == FrameType::ResponseOk || explicit, "request {id}: {answer}");
        refused += u64::from(explicit);
    }
    refused
}

/// Waits until the breaker is closed, then checks that requests succeed.
async fn recovers(stage: &Stage, fine: &Value) {
    let client = stage.client().await;
    eventually(PATIENCE, async || {
        client.submit(fine).await.is_ok() && stage.metric("beamline_gateway_breaker_open").await == 0.0
    })
    .await;
    for _ in 0..100 {
        client.submit(fine).await.unwrap();
    }
}
