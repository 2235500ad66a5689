//! The OpenAI-compatible entry, with a scripted router and worker.

use crate::Fixture;
use axum::body::{Body, to_bytes};
use axum::http::{Request, Response, StatusCode};
use bus::{Bus, Message};
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::mpsc::{Receiver, channel};
use tower::ServiceExt;
use wire::subjects;

const OWN: &str = "the server's own key";
const ACME: &str = "a key of acme";
const SOON: Duration = Duration::from_secs(20);

async fn fixture(change: impl FnOnce(&mut gateway::Config)) -> Fixture {
    Fixture::start(|config| {
        config.api_key = OWN.into();
        config.tenant_keys = [(ACME.into(), "acme".into())].into();
        change(config);
    })
    .await
}

/// A router and worker. What a task does is in its model's name: `silent` never ends, `talks` sends pieces without end,
/// `fails` fails at once, `breaks` after a piece; all others say "hello world". Decide requests are sent to the receiver.
async fn serve(bus: &Bus) -> Receiver<Value> {
    let mut requests = bus.subscribe(subjects::DECIDE, None, 64).await.unwrap();
    let (sender, receiver) = channel(64);
    let bus = bus.clone();
    tokio::spawn(async move {
        while let Some(message) = requests.next().await {
            let request: Value = serde_json::from_slice(&message.payload).unwrap();
            sender.send(request.clone()).await.unwrap();
            let answer = match request["policy_id"].as_str().unwrap() {
                "unknown" => refusal("policy_not_found"),
                "busy" => refusal("rate_limited"),
                _ => accepted(&request),
            };
            publish(&bus, &message.reply.unwrap(), &answer).await;
            if answer["ok"] == true {
                tokio::spawn(work(bus.clone(), request));
            }
        }
    });
    receiver
}

fn refusal(code: &str) -> Value {
    let retry_after = (code == "rate_limited").then_some(7);
    json!({"ok": false, "context": {}, "error": {"code": code, "message": "m", "retry_after_seconds": retry_after}})
}

fn accepted(request: &Value) -> Value {
    let assignment_id = format!("a-{}", request["request_id"].as_str().unwrap());
    json!({"ok": true, "decision": {"provider_id": "p"}, "context": {}, "assignment_id": assignment_id,
        "result_subject": request["result_subject"]})
}

async fn work(bus: Bus, request: Value) {
    let id = request["request_id"].as_str().unwrap().to_string();
    let model = request["policy_id"].as_str().unwrap();
    let pieces: &[&str] = match model {
        "silent" => return std::future::pending().await,
        "talks" => &["tick"; 1000],
        "fails" => &[],
        _ => &["hello ", "world"],
    };
    for (seq, piece) in pieces.iter().enumerate() {
        let chunk = json!({"request_id": id, "tenant_id": request["tenant_id"], "attempt": 1, "seq": seq,
            "assignment_id": format!("a-{id}"), "data": piece});
        publish(&bus, &subjects::output(&id), &chunk).await;
    }
    let (status, error) = match model {
        "talks" => return std::future::pending().await,
        "fails" | "breaks" => ("error", json!("refused")),
        _ => ("success", Value::Null),
    };
    let output = json!({"text": "hello world", "usage": {"prompt_tokens": 3, "completion_tokens": 2}});
    let result = json!({"version": "1", "assignment_id": format!("a-{id}"), "request_id": id, "status": status,
        "provider_id": "p", "job": {"type": "t"}, "tenant_id": request["tenant_id"], "output": output,
        "error_code": error, "error_message": error, "chunks": pieces.len()});
    publish(&bus, request["result_subject"].as_str().unwrap(), &result).await;
}

async fn publish(bus: &Bus, subject: &str, message: &Value) {
    let payload = message.to_string().into();
    bus.publish(Message { subject: subject.into(), payload, ..Message::default() })
        .await
        .unwrap();
}

/// Answers queries and cancellations of tasks; the first query as if the task were not known yet. Cancellations are sent
/// to the receiver, as tenant and request id.
async fn cancellations(bus: &Bus) -> Receiver<(String, String)> {
    let mut queries = bus.subscribe(subjects::GET_DECISION, None, 64).await.unwrap();
    let mut cancels = bus.subscribe(subjects::CANCEL, None, 64).await.unwrap();
    let (sender, receiver) = channel(64);
    let bus = bus.clone();
    tokio::spawn(async move {
        let mut is_known = false;
        loop {
            let (message, state) = tokio::select! {
                Some(message) = queries.next() => (message, "running"),
                Some(message) = cancels.next() => (message, "cancelled"),
                else => return,
            };
            let query: Value = serde_json::from_slice(&message.payload).unwrap();
            let tenant = message.headers.get("tenant_id").unwrap().to_string();
            let id = query["request_id"].as_str().unwrap().to_string();
            if state == "cancelled" {
                sender.send((tenant.clone(), id.clone())).await.unwrap();
            }
            let task = json!({"task_id": id, "state": state, "tenant_id": tenant});
            let answer = if is_known {
                json!({"ok": true, "task": task})
            } else {
                refusal("not_found")
            };
            is_known = true;
            publish(&bus, &message.reply.unwrap(), &answer).await;
        }
    });
    receiver
}

fn post(path: &str, key: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path)
        .header("authorization", format!("Bearer {key}"))
        .body(body.into())
        .unwrap()
}

fn chat(key: &str, model: &str, stream: bool) -> Request<Body> {
    let messages = json!([{"role": "user", "content": "?"}]);
    let body = json!({"model": model, "messages": messages, "stream": stream, "temperature": 0.5,
        "tenant_id": "beta", "policy_id": "x", "stream_options": {"include_usage": true}});
    post("/v1/chat/completions", key, body.to_string())
}

async fn send(fixture: &Fixture, request: Request<Body>) -> Response<Body> {
    let answer = fixture.routes.clone().oneshot(request);
    tokio::time::timeout(SOON, answer)
        .await
        .expect("an answer in time")
        .unwrap()
}

async fn ask(fixture: &Fixture, request: Request<Body>) -> (Response<()>, Value) {
    let (parts, body) = send(fixture, request).await.into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    (Response::from_parts(parts, ()), serde_json::from_slice(&body).unwrap())
}

/// Status, type, code and param of a refusal.
async fn refused(fixture: &Fixture, request: Request<Body>) -> (u16, Value, Value, Value) {
    let (head, body) = ask(fixture, request).await;
    let error = &body["error"];
    assert!(error["message"].is_string() && head.headers()["content-type"] == "application/json", "{body}");
    (head.status().as_u16(), error["type"].clone(), error["code"].clone(), error["param"].clone())
}

async fn next<T>(receiver: &mut Receiver<T>) -> T {
    tokio::time::timeout(SOON, receiver.recv())
        .await
        .expect("in time")
        .unwrap()
}

#[tokio::test]
async fn key_names_the_tenant_and_the_model_the_policy() {
    let fixture = fixture(|_| {}).await;
    let mut requests = serve(&fixture.bus).await;
    for (key, tenant) in [(OWN, "default"), (ACME, "acme")] {
        let (head, body) = ask(&fixture, chat(key, "big", false)).await;
        let request = next(&mut requests).await;
        assert_eq!((&request["tenant_id"], &request["policy_id"]), (&json!(tenant), &json!("big")));
        assert_eq!((&request["task"]["type"], &request["push_assignment"]), (&json!("chat.completions"), &json!(true)));
        assert_eq!(request["task"]["payload"]["params"]["temperature"], 0.5);
        assert_eq!(request["options"]["deadline_ms"], 600_000);

        assert_eq!((head.status(), &body["object"]), (StatusCode::OK, &json!("chat.completion")));
        assert_eq!(head.headers()["x-request-id"], request["request_id"].as_str().unwrap());
        let message = json!({"role": "assistant", "content": "hello world"});
        assert_eq!((&body["choices"][0]["message"], &body["model"]), (&message, &json!("big")));
        assert_eq!(body["usage"]["completion_tokens"], 2);
    }

    for authorization in [None, Some("Bearer "), Some("Bearer a key of acm"), Some("Basic x"), Some(ACME)] {
        let mut request = chat("x", "big", false);
        request.headers_mut().remove("authorization");
        request.headers_mut().insert("x-api-key", OWN.parse().unwrap());
        if let Some(authorization) = authorization {
            request
                .headers_mut()
                .insert("authorization", authorization.parse().unwrap());
        }
        let expected = (401, json!("invalid_request_error"), json!("invalid_api_key"), json!(null));
        assert_eq!(refused(&fixture, request).await, expected, "{authorization:?}");
    }
    assert!(requests.try_recv().is_err(), "a refused request reaches no router");
}

#[tokio::test]
async fn stream_has_its_pieces_usage_and_end() {
    let fixture = fixture(|_| {}).await;
    let _requests = serve(&fixture.bus).await;
    let response = send(&fixture, chat(ACME, "big", true)).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    let text = String::from_utf8(body.to_vec()).unwrap();
    let events: Vec<&str> = text.split_terminator("\n\n").collect();
    let said: String = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(&event[6..]).ok())
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(String::from))
        .collect();
    assert_eq!((said.as_str(), events.last()), ("hello world", Some(&"data: [DONE]")));
    assert!(events[events.len() - 2].contains(r#""choices":[],"usage":{"#), "{text}");
}

#[tokio::test]
async fn failure_has_a_status_before_the_first_piece_and_an_event_after_it() {
    let fixture = fixture(|_| {}).await;
    let _requests = serve(&fixture.bus).await;
    for stream in [false, true] {
        let expected = (502, json!("server_error"), json!("refused"), json!(null));
        assert_eq!(refused(&fixture, chat(OWN, "fails", stream)).await, expected);
        let expected = (404, json!("invalid_request_error"), json!("model_not_found"), json!("model"));
        assert_eq!(refused(&fixture, chat(OWN, "unknown", stream)).await, expected);
        let (head, body) = ask(&fixture, chat(OWN, "busy", stream)).await;
        assert_eq!((head.status().as_u16(), &head.headers()["retry-after"]), (429, &"7".parse().unwrap()));
        assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    }

    let response = send(&fixture, chat(OWN, "breaks", true)).await;
    assert_eq!(response.status(), StatusCode::OK);
    let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    let text = String::from_utf8(body.to_vec()).unwrap();
    let last = text.split_terminator("\n\n").last().unwrap();
    let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "refused", "{text}");
    assert!(text.contains("hello "), "{text}");
}

#[tokio::test]
async fn requests_that_are_not_served_are_refused_clearly() {
    let fixture = fixture(|_| {}).await;
    let mut requests = serve(&fixture.bus).await;
    let invalid = |status: u16, code: &str, param: Value| (status, json!("invalid_request_error"), json!(code), param);
    let completions = "/v1/chat/completions";

    let large = json!({"model": "big", "messages": [{"content": "x".repeat(10 << 20)}]}).to_string();
    let expected = invalid(413, "request_too_large", json!(null));
    assert_eq!(refused(&fixture, post(completions, OWN, large)).await, expected);
    let deep = format!(r#"{{"model":"big","messages":{}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(refused(&fixture, post(completions, OWN, deep)).await, invalid(400, "invalid_request", json!(null)));
    let several = r#"{"model":"big","messages":[1],"n":2}"#;
    assert_eq!(
        refused(&fixture, post(completions, OWN, several)).await,
        invalid(400, "invalid_request", json!("n"))
    );

    let get = Request::get(completions).body(Body::empty()).unwrap();
    assert_eq!(refused(&fixture, get).await, invalid(405, "method_not_allowed", json!(null)));
    let other = post("/v1/completions", OWN, "{}");
    assert_eq!(refused(&fixture, other).await, invalid(404, "unknown_url", json!(null)));
    let embeddings = post("/v1/embeddings", OWN, r#"{"model":"big","input":"x"}"#);
    assert_eq!(refused(&fixture, embeddings).await, invalid(400, "unsupported_model", json!(null)));
    assert_eq!(next(&mut requests).await["task"]["type"], "embeddings");
    assert!(requests.try_recv().is_err(), "a refused request reaches no router");
}

#[tokio::test]
async fn task_of_a_client_that_goes_away_is_cancelled() {
    let fixture = fixture(|_| {}).await;
    let (mut requests, mut cancelled) = (serve(&fixture.bus).await, cancellations(&fixture.bus).await);

    let waiting = fixture.routes.clone().oneshot(chat(ACME, "silent", false));
    let request = tokio::select! {
        answered = waiting => panic!("{answered:?}"),
        request = next(&mut requests) => request,
    };
    let id = request["request_id"].as_str().unwrap().to_string();
    assert_eq!(next(&mut cancelled).await, ("acme".to_string(), id));

    let response = send(&fixture, chat(ACME, "talks", true)).await;
    let mut body = response.into_body().into_data_stream();
    let first = body.next().await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&first).contains("tick"));
    drop(body);
    let id = next(&mut requests).await["request_id"].as_str().unwrap().to_string();
    assert_eq!(next(&mut cancelled).await, ("acme".to_string(), id));
}

#[tokio::test]
async fn client_that_does_not_read_loses_its_task_and_its_permit() {
    let fixture = fixture(|config| {
        config.write_timeout = Duration::from_millis(100);
        config.max_in_flight_per_tenant = Some(1);
    })
    .await;
    let (mut requests, mut cancelled) = (serve(&fixture.bus).await, cancellations(&fixture.bus).await);
    let unread = send(&fixture, chat(ACME, "talks", true)).await;
    let id = next(&mut requests).await["request_id"].as_str().unwrap().to_string();
    assert_eq!(next(&mut cancelled).await, ("acme".to_string(), id));
    assert_eq!(ask(&fixture, chat(ACME, "big", false)).await.0.status(), StatusCode::OK);
    drop(unread);
}

#[tokio::test]
async fn tenant_at_its_share_leaves_the_rest_to_others() {
    let fixture = fixture(|config| config.max_in_flight = 2).await;
    let (mut requests, _cancelled) = (serve(&fixture.bus).await, cancellations(&fixture.bus).await);
    let waiting = fixture.routes.clone().oneshot(chat(ACME, "silent", false));
    let others = async {
        next(&mut requests).await;
        let (head, body) = ask(&fixture, chat(ACME, "big", false)).await;
        assert_eq!((head.status().as_u16(), &head.headers()["retry-after"]), (429, &"1".parse().unwrap()));
        assert!(
            body["error"]["message"]
                .as_str()
                .unwrap()
                .contains("max_in_flight_per_tenant"),
            "{body}"
        );
        assert_eq!(ask(&fixture, chat(OWN, "big", false)).await.0.status(), StatusCode::OK);
    };
    tokio::select! {
        answered = waiting => panic!("{answered:?}"),
        () = others => {}
    }
}

#[tokio::test]
async fn drain_ends_requests_in_flight_and_refuses_new_ones() {
    let mut fixture = fixture(|config| config.drain_timeout = Duration::from_millis(200)).await;
    let (mut requests, mut cancelled) = (serve(&fixture.bus).await, cancellations(&fixture.bus).await);
    let waiting = send(&fixture, chat(ACME, "silent", false));
    let draining = async {
        next(&mut requests).await;
        fixture.cancel.cancel();
    };
    let (answer, ()) = tokio::join!(waiting, draining);
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    next(&mut cancelled).await;
    let (head, body) = ask(&fixture, chat(ACME, "big", false)).await;
    assert_eq!((head.status().as_u16(), &body["error"]["code"]), (503, &json!("unavailable")));
    tokio::time::timeout(SOON, &mut fixture.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn models_are_the_policies_of_the_index() {
    let fixture = fixture(|_| {}).await;
    let get = |path: &str, key: &str| {
        let request = Request::get(path).header("authorization", format!("Bearer {key}"));
        request.body(Body::empty()).unwrap()
    };
    let (_, body) = ask(&fixture, get("/v1/models", ACME)).await;
    assert_eq!((&body["object"], &body["data"][0]["id"]), (&json!("list"), &json!("default")));

    let entry = json!({"hash": "1", "at_ms": 5000});
    let index = json!({"policies": {"acme/big": entry, "beta/theirs": entry}})
        .to_string()
        .into();
    fixture
        .bus
        .kv_put(subjects::BUCKET_POLICIES, subjects::POLICIES_INDEX, index, None)
        .await
        .unwrap();
    let (_, body) = ask(&fixture, get("/v1/models/big", ACME)).await;
    assert_eq!(body, json!({"id": "big", "object": "model", "created": 5, "owned_by": "acme"}));
    for (path, key) in [("/v1/models/theirs", ACME), ("/v1/models/big", OWN), ("/v1/models/a/b", ACME)] {
        let expected = (404, json!("invalid_request_error"), json!("model_not_found"), json!("model"));
        assert_eq!(refused(&fixture, get(path, key)).await, expected, "{path}");
    }
    assert_eq!(refused(&fixture, get("/v1/models", "x")).await.0, 401);
}
