//! Signing in over HTTP, and the pages' files.

use crate::rig::{ADMIN_PASSWORD, Home, Kind, Rig};
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode, header};
use base64::Engine as _;
use rstest::rstest;
use serde_json::{Value, json};
use tower::ServiceExt;

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
}

async fn ask(rig: &Rig, request: Request<Body>) -> Answer {
    let response = rig.routes.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    Answer { status: parts.status, headers: parts.headers, body: serde_json::from_slice(&body).unwrap_or(Value::Null) }
}

fn post(path: &str) -> http::request::Builder {
    Request::post(path).header("host", "chat.example").header("content-type", "application/json")
}

async fn credentials(rig: &Rig, path: &str, name: &str, password: &str) -> Answer {
    let body = json!({"name": name, "password": password}).to_string();
    ask(rig, post(path).body(body.into()).unwrap()).await
}

async fn token(rig: &Rig, cookie: &str) -> Answer {
    ask(rig, Request::get("/auth/token").header("cookie", cookie).body(Body::empty()).unwrap()).await
}

fn cookie(answer: &Answer) -> String {
    let cookie = answer.headers[header::SET_COOKIE].to_str().unwrap();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Lax"), "{cookie}");
    cookie.split(';').next().unwrap().to_string()
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn people_sign_up_in_and_out(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    let signed_up = credentials(&rig, "/auth/signup", "Ann", "correct horse").await;
    assert_eq!((signed_up.status, &signed_up.body["user"]), (StatusCode::OK, &json!("ann")));
    assert_eq!(credentials(&rig, "/auth/signup", "ann", "correct horse").await.status, StatusCode::CONFLICT);
    let wrong = credentials(&rig, "/auth/login", "ann", "wrong").await;
    assert_eq!((wrong.status, &wrong.body["error"]), (StatusCode::UNAUTHORIZED, &json!("name or password is wrong")));
    let signed_in = credentials(&rig, "/auth/login", "ann", "correct horse").await;
    let cookie = cookie(&signed_in);
    let who = token(&rig, &cookie).await;
    assert_eq!((who.status, &who.body["name"]), (StatusCode::OK, &json!("Ann")));
    assert_eq!(who.headers[header::CACHE_CONTROL], "no-store");
    let claims = who.body["token"].as_str().unwrap().split('.').nth(1).unwrap();
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    assert_eq!((&claims["sub"], &claims["info"]["name"]), (&json!("ann"), &json!("Ann")));
    ask(&rig, post("/auth/logout").header("cookie", &cookie).body(Body::empty()).unwrap()).await;
    let out = token(&rig, &cookie).await;
    assert_eq!((out.status, &out.body["signup"]), (StatusCode::UNAUTHORIZED, &json!(true)));
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn the_first_start_makes_an_administrator_whose_password_works(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    assert!(rig.is_new);
    assert_eq!(credentials(&rig, "/auth/login", "admin", ADMIN_PASSWORD).await.status, StatusCode::OK);
    rig.stop().await;
    assert!(!home.start().await.is_new, "only once");
}

#[tokio::test]
async fn another_site_cannot_sign_anybody_in() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    let body = || json!({"name": "ann", "password": "correct horse"}).to_string();
    let from = |origin: &str| post("/auth/signup").header("origin", origin).body(body().into()).unwrap();
    for origin in ["https://evil.example", "null", "https://chat.example.evil.example"] {
        assert_eq!(ask(&rig, from(origin)).await.status, StatusCode::FORBIDDEN, "{origin}");
    }
    let ours = ask(&rig, from("https://chat.example")).await;
    assert_eq!(ours.status, StatusCode::OK);
    assert!(ours.headers[header::SET_COOKIE].to_str().unwrap().contains("Secure"), "behind TLS it stays there");
}

#[tokio::test]
async fn guessing_is_slowed_down() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    let mut last = StatusCode::OK;
    for _ in 0..11 {
        last = credentials(&rig, "/auth/login", "nobody", "guess").await.status;
    }
    assert_eq!(last, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn bad_bodies_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    for body in ["", "{", "[]", r#"{"name":1,"password":2}"#, r#"{"name":"ann"}"#] {
        let answer = ask(&rig, post("/auth/login").body(body.into()).unwrap()).await;
        assert!(answer.status.is_client_error() && answer.body["error"].is_string(), "{body}: {}", answer.status);
    }
    let large = ask(&rig, post("/auth/login").body("x".repeat(10_000).into()).unwrap()).await;
    assert_eq!(large.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(credentials(&rig, "/auth/signup", "a b", "correct horse").await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_place_inside_an_app_is_the_page_and_a_missing_file_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    for (path, status) in
        [("/rooms/general", 200), ("/console", 200), ("/assets/none.js", 404), ("/../etc/passwd", 200)]
    {
        let answer = ask(&rig, Request::get(path).body(Body::empty()).unwrap()).await;
        // Without a built page a place says how to build it.
        let status = if status == 200 && answer.status == 503 { 503 } else { status };
        assert_eq!(answer.status, status, "{path}");
        assert!(answer.headers["content-security-policy"].to_str().unwrap().contains("default-src 'none'"));
    }
}
