//! Signing in over HTTP, and the files of the front end.

use crate::rig::{ADMIN_PASSWORD, Home, Kind, PATIENCE, Rig};
use axum::body::{Body, to_bytes};
use axum::extract::ConnectInfo;
use axum::http::{HeaderMap, Request, StatusCode, header};
use base64::Engine as _;
use rstest::rstest;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
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
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    }
}

fn post(path: &str) -> http::request::Builder {
    Request::post(path)
        .header("host", "chat.example")
        .header("content-type", "application/json")
}

async fn credentials(rig: &Rig, path: &str, name: &str, password: &str) -> Answer {
    let body = json!({"name": name, "password": password}).to_string();
    ask(rig, post(path).body(body.into()).unwrap()).await
}

async fn token(rig: &Rig, cookie: &str) -> Answer {
    ask(
        rig,
        Request::get("/auth/token")
            .header("cookie", cookie)
            .body(Body::empty())
            .unwrap(),
    )
    .await
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
async fn user_signs_up_in_and_out(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    let signed_up = credentials(&rig, "/auth/signup", "Ann", "correct horse").await;
    assert_eq!((signed_up.status, &signed_up.body["user"]), (StatusCode::OK, &json!("ann")));
    assert_eq!(credentials(&rig, "/auth/signup", "ann", "correct horse").await.status, StatusCode::CONFLICT);

    let wrong = credentials(&rig, "/auth/login", "ann", "wrong").await;
    assert_eq!(
        (wrong.status, &wrong.body["error"]),
        (StatusCode::UNAUTHORIZED, &json!("name or password is wrong"))
    );

    let signed_in = credentials(&rig, "/auth/login", "ann", "correct horse").await;
    let cookie = cookie(&signed_in);
    let who = token(&rig, &cookie).await;
    assert_eq!((who.status, &who.body["name"]), (StatusCode::OK, &json!("Ann")));
    assert_eq!(who.headers[header::CACHE_CONTROL], "no-store");
    let claims = who.body["token"].as_str().unwrap().split('.').nth(1).unwrap();
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    assert_eq!((&claims["sub"], &claims["info"]["name"]), (&json!("ann"), &json!("Ann")));

    ask(
        &rig,
        post("/auth/logout")
            .header("cookie", &cookie)
            .body(Body::empty())
            .unwrap(),
    )
    .await;
    let out = token(&rig, &cookie).await;
    assert_eq!((out.status, &out.body["signup"]), (StatusCode::UNAUTHORIZED, &json!(true)));
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn first_start_creates_an_admin_who_can_sign_in(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    assert!(rig.is_new);
    assert_eq!(credentials(&rig, "/auth/login", "admin", ADMIN_PASSWORD).await.status, StatusCode::OK);
    rig.stop().await;
    assert!(!home.start().await.is_new, "the admin is created once");
}

#[tokio::test]
async fn pages_of_other_sites_cannot_sign_in() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    let body = || json!({"name": "ann", "password": "correct horse"}).to_string();
    let from = |origin: &str| {
        post("/auth/signup")
            .header("origin", origin)
            .body(body().into())
            .unwrap()
    };

    for origin in ["https://evil.example", "null", "https://chat.example.evil.example"] {
        assert_eq!(ask(&rig, from(origin)).await.status, StatusCode::FORBIDDEN, "{origin}");
    }
    let ours = ask(&rig, from("https://chat.example")).await;
    assert_eq!(ours.status, StatusCode::OK);
    assert!(
        ours.headers[header::SET_COOKIE].to_str().unwrap().contains("Secure"),
        "a cookie set over TLS is sent over TLS only"
    );
}

/// Signs in from an address, with cookies.
async fn sign_in_from(rig: &Rig, address: [u8; 4], name: &str, password: &str, cookies: &str) -> Answer {
    let body = json!({"name": name, "password": password}).to_string();
    let peer = ConnectInfo(SocketAddr::from((address, 1)));
    let request = post("/auth/login")
        .header("cookie", cookies)
        .extension(peer)
        .body(body.into())
        .unwrap();
    ask(rig, request).await
}

fn cookies(answer: &Answer) -> String {
    let set = answer
        .headers
        .get_all(header::SET_COOKIE)
        .iter()
        .map(|cookie| cookie.to_str().unwrap());
    set.map(|cookie| cookie.split(';').next().unwrap())
        .collect::<Vec<_>>()
        .join("; ")
}

const PROXY: [u8; 4] = [10, 0, 0, 1];

/// Guesses until the wait is 2 s or more. A hash may take longer than the first wait, so that wait may go unnoticed.
async fn guess_until_refused(rig: &Rig, name: &str, cookies: &str) {
    testkit::eventually(6 * PATIENCE, async || {
        let answer = sign_in_from(rig, PROXY, name, "guess", cookies).await;
        let wait = answer
            .headers
            .get(header::RETRY_AFTER)
            .map_or(0, |wait| wait.to_str().unwrap().parse().unwrap());
        answer.status == StatusCode::TOO_MANY_REQUESTS && wait >= 2
    })
    .await;
}

#[tokio::test]
async fn wrong_passwords_for_one_name_do_not_lock_out_others() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    for name in ["ann", "bob"] {
        assert_eq!(credentials(&rig, "/auth/signup", name, "correct horse").await.status, StatusCode::OK);
    }
    let anns_browser = cookies(&sign_in_from(&rig, PROXY, "ann", "correct horse", "").await);

    let mut refused = 0;
    for _ in 0..70 {
        let answer = sign_in_from(&rig, PROXY, "ann", "guess", "").await;
        if answer.status == StatusCode::TOO_MANY_REQUESTS {
            refused += 1;
            let wait: u64 = answer.headers[header::RETRY_AFTER].to_str().unwrap().parse().unwrap();
            assert!((1..=60).contains(&wait), "{wait}");
        }
    }
    assert!(refused >= 50, "only {refused} of 70 guesses were refused");

    // Another user behind the same proxy can sign in, and so can the owner in her own browser.
    assert_eq!(sign_in_from(&rig, PROXY, "bob", "correct horse", "").await.status, StatusCode::OK);
    assert_eq!(
        sign_in_from(&rig, PROXY, "ann", "correct horse", &anns_browser)
            .await
            .status,
        StatusCode::OK
    );

    guess_until_refused(&rig, "ann", "").await;
    let stranger = sign_in_from(&rig, PROXY, "ann", "correct horse", "").await;
    assert_eq!(
        stranger.status,
        StatusCode::TOO_MANY_REQUESTS,
        "the correct password is refused too; otherwise a guesser would recognize it"
    );
    // The device cookie of one account does not help with another.
    guess_until_refused(&rig, "bob", &anns_browser).await;
}

#[tokio::test]
async fn abandoned_sign_in_does_not_count_as_a_wrong_password() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    assert_eq!(credentials(&rig, "/auth/signup", "ann", "correct horse").await.status, StatusCode::OK);
    for _ in 0..10 {
        // Poll once, so that the attempt begins, then drop it as if the client disconnected.
        let sign_in = sign_in_from(&rig, PROXY, "ann", "correct horse", "");
        assert!(tokio::time::timeout(Duration::ZERO, sign_in).await.is_err());
    }
    assert_eq!(sign_in_from(&rig, PROXY, "ann", "correct horse", "").await.status, StatusCode::OK);
}

#[tokio::test]
async fn name_of_an_operator_cannot_be_registered_on_the_page() {
    let dir = tempfile::tempdir().unwrap();
    let config = webapp::Config { operators: vec!["olga".into()], ..crate::rig::config(dir.path()) };
    let bus = bus::local::Local::open(dir.path()).await.unwrap();
    let rig = Rig::on(bus, config).await;
    let answer = credentials(&rig, "/auth/signup", " Olga ", "correct horse").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.body);
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn sign_out_ends_the_connections_of_that_browser_only(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    let phone = cookies(&credentials(&rig, "/auth/signup", "ann", "correct horse").await);
    let laptop = cookies(&credentials(&rig, "/auth/login", "ann", "correct horse").await);

    let mut sessions = Vec::new();
    for cookie in [&phone, &laptop] {
        let token = token(&rig, cookie).await.body["token"].as_str().unwrap().to_string();
        let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD
            .decode(token.split('.').nth(1).unwrap())
            .unwrap();
        let claims: Value = serde_json::from_slice(&claims).unwrap();
        sessions.push(claims["sid"].as_str().unwrap().to_string());
        assert!(!cookie.contains(&sessions[0]), "no token contains the secret of the cookie");
    }
    assert_ne!(sessions[0], sessions[1]);

    ask(
        &rig,
        post("/auth/logout")
            .header("cookie", &laptop)
            .body(Body::empty())
            .unwrap(),
    )
    .await;
    assert_eq!(rig.disconnected(), [("ann".to_string(), sessions[1].clone())]);
    assert_eq!(token(&rig, &phone).await.status, StatusCode::OK, "the other browser is still signed in");

    ask(
        &rig,
        post("/auth/logout")
            .header("cookie", &laptop)
            .body(Body::empty())
            .unwrap(),
    )
    .await;
    assert_eq!(rig.disconnected().len(), 1, "a repeated sign-out does nothing");

    // Another user who signs in with the same browser signs the previous one out.
    let body = json!({"name": "bob", "password": "correct horse"}).to_string();
    ask(&rig, post("/auth/signup").header("cookie", &phone).body(body.into()).unwrap()).await;
    assert_eq!(rig.disconnected()[1..], [("ann".to_string(), sessions[0].clone())]);
    assert_eq!(token(&rig, &phone).await.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn invalid_bodies_are_refused() {
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
async fn app_paths_serve_the_page_and_missing_files_are_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    for (path, status) in
        [("/rooms/general", 200), ("/console", 200), ("/assets/none.js", 404), ("/../etc/passwd", 200)]
    {
        let answer = ask(&rig, Request::get(path).body(Body::empty()).unwrap()).await;
        // A binary without the front end answers 503 for the page.
        let status = if status == 200 && answer.status == 503 {
            503
        } else {
            status
        };
        assert_eq!(answer.status, status, "{path}");
        assert!(
            answer.headers["content-security-policy"]
                .to_str()
                .unwrap()
                .contains("default-src 'none'")
        );
    }
}
