//! Decide requests over HTTP.

use crate::{Fixture, decision};
use axum::body::{Body, to_bytes};
use axum::http::{Request, Response, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt;
use wire::router::RouterCode;

const KEY: &str = "the key";

async fn fixture() -> Fixture {
    Fixture::start(|config| config.api_key = KEY.into()).await
}

fn request(body: impl Into<Body>) -> Request<Body> {
    Request::post("/api/v1/routes/decide")
        .header("x-api-key", KEY)
        .body(body.into())
        .unwrap()
}

async fn ask(fixture: &Fixture, request: Request<Body>) -> (Response<()>, Value) {
    let response = fixture.routes.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();

    let body = to_bytes(body, 1 << 20).await.unwrap();
    (Response::from_parts(parts, ()), serde_json::from_slice(&body).unwrap())
}

fn task(kind: &str) -> String {
    json!({"version": "1", "request_id": "r", "tenant_id": "default", "task": {"type": kind}}).to_string()
}

#[tokio::test]
async fn traceparent_reaches_the_router_and_the_decision_comes_back() {
    let fixture = fixture().await;
    fixture
        .router(|request, headers| async move {
            assert_eq!(headers.get("trace_id"), Some("0af7651916cd43dd8448eb211c80319c"));
            Some(decision(&request))
        })
        .await;

    let mut request = request(task("t"));
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.headers_mut().insert("traceparent", parent.parse().unwrap());
    let (head, body) = ask(&fixture, request).await;
    assert_eq!((head.status(), &body["decision"]["provider_id"]), (StatusCode::OK, &json!("t")));
}

/// Rows: traceparent, tenant and trace id of a request, and the expected trace id on the bus; "" means a new one.
#[tokio::test]
async fn request_carries_only_valid_headers() {
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let fixture = fixture().await;
    let (sent, mut seen) = tokio::sync::mpsc::channel(1);
    fixture
        .router(move |request, headers| {
            let sent = sent.clone();
            async move {
                sent.send(headers).await.unwrap();
                Some(decision(&request))
            }
        })
        .await;

    for (given, tenant, trace, expected) in [
        (Some(parent), "acme", "mine", "0af7651916cd43dd8448eb211c80319c"),
        (None, "acme", "mine", "mine"),
        (None, "acme", "", ""),
        (Some("00-bad"), "acme", "mine", "mine"),
        (None, "no tenant", "mine", "mine"),
    ] {
        let mut body = json!({"version": "1", "request_id": "r", "tenant_id": tenant, "task": {"type": "t"}});
        if !trace.is_empty() {
            body["trace_id"] = trace.into();
        }

        let mut request = request(body.to_string());
        if let Some(given) = given {
            request.headers_mut().insert("traceparent", given.parse().unwrap());
        }
        assert_eq!(ask(&fixture, request).await.0.status(), StatusCode::OK);

        let headers = seen.recv().await.unwrap();
        let on_bus = headers.get("trace_id").unwrap();
        assert!(on_bus == expected || (expected.is_empty() && on_bus.len() == 32), "{headers:?}");
        assert_eq!(headers.get("version"), Some("1"));
        // An invalid tenant is not sent as a header; the router refuses the request.
        assert_eq!(headers.get("tenant_id"), (tenant == "acme").then_some("acme"), "{headers:?}");
        // Only a trace id of 32 hex digits fits a trace context.
        let context = headers.get("traceparent").map(|parent| &parent[3..35]);
        assert_eq!(context, (on_bus.len() == 32).then_some(on_bus), "{headers:?}");
        assert!(given != Some(parent) || headers.get("traceparent") == given);
    }
}

#[tokio::test]
async fn every_router_error_has_its_status_and_retry_after() {
    let fixture = fixture().await;
    fixture
        .router(|request, _| async move {
            let code = request["task"]["type"].as_str().unwrap();
            let mut error = json!({"code": code, "message": "m"});
            if RouterCode::KNOWN
                .iter()
                .any(|known| known.as_str() == code && known.status() == 429)
            {
                error["retry_after_seconds"] = json!(7);
            }
            Some(json!({"ok": false, "error": error, "context": {}}))
        })
        .await;

    for known in RouterCode::KNOWN
        .iter()
        .filter(|known| !matches!(known, RouterCode::Internal | RouterCode::Unavailable))
    {
        let (code, status) = (known.as_str(), known.status());
        let (head, body) = ask(&fixture, request(task(code))).await;
        assert_eq!((head.status().as_u16(), &body["error"]["code"]), (status, &json!(code)));
        let retry_after = head.headers().get("retry-after").map(|value| value.to_str().unwrap());
        assert_eq!(retry_after, (status == 429).then_some("7"), "{code}");
    }
}

#[tokio::test]
async fn missing_router_wrong_key_and_large_body_have_their_errors() {
    let fixture = fixture().await;
    let (head, body) = ask(&fixture, request(task("t"))).await;
    assert_eq!((head.status(), &body["error"]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("unavailable")));
    assert_eq!(
        (head.headers()["retry-after"].to_str().unwrap(), &body["context"]["request_id"]),
        ("1", &json!("r"))
    );

    for key in ["", "the kez", "the key and more"] {
        let mut request = request(task("t"));
        request.headers_mut().insert("x-api-key", key.parse().unwrap());
        assert_eq!(ask(&fixture, request).await.0.status(), StatusCode::UNAUTHORIZED, "{key}");
    }
    let (head, body) = ask(&fixture, request("x".repeat(1024 * 1024 + 1))).await;
    assert_eq!(head.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(body["error"]["intake_error_code"], "PAYLOAD_TOO_LARGE");
    let closed = Fixture::start(|_| {}).await;
    assert_eq!(
        ask(&closed, request(task("t"))).await.0.status(),
        StatusCode::UNAUTHORIZED,
        "without a configured key every request is refused"
    );
}

#[tokio::test]
async fn slow_body_holds_no_permit() {
    let fixture = Fixture::start(|config| {
        config.api_key = KEY.into();
        config.max_in_flight = 1;
    })
    .await;
    fixture.echo_router().await;
    let (waits, mut waiting) = tokio::sync::mpsc::channel(1);
    let never = futures_util::stream::poll_fn(move |_| {
        let _ = waits.try_send(());
        std::task::Poll::Pending::<Option<std::io::Result<bytes::Bytes>>>
    });

    let other = async {
        waiting.recv().await.unwrap();
        ask(&fixture, request(task("t"))).await.0.status()
    };

    let slow = fixture.routes.clone().oneshot(request(Body::from_stream(never)));
    tokio::select! {
        early = slow => panic!("the body has not arrived: {early:?}"),
        status = other => assert_eq!(status, StatusCode::OK),
    }
}

#[tokio::test]
async fn invalid_trace_id_is_left_for_the_router_to_refuse() {
    let fixture = fixture().await;
    let (sent, mut seen) = tokio::sync::mpsc::channel(1);
    fixture
        .router(move |request, headers| {
            let sent = sent.clone();
            async move {
                sent.send((request["trace_id"].clone(), headers)).await.unwrap();
                Some(decision(&request))
            }
        })
        .await;

    let body =
        json!({"version": "1", "request_id": "r", "tenant_id": "acme", "trace_id": "a\0b", "task": {"type": "t"}});
    ask(&fixture, request(body.to_string())).await;
    let (in_body, headers) = seen.recv().await.unwrap();
    assert_eq!(
        (in_body, headers.get("trace_id")),
        (json!("a\0b"), None),
        "an invalid trace id is not sent as a header"
    );
}
