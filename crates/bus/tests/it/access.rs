//! NATS only: TLS and each kind of credentials, and the error messages of refused connections.

use crate::traffic::Traffic;
use crate::{SOON, message, soon, text};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bus::Bus;
use bus::nats::{Nats, NatsConfig};
use nkeys::KeyPair;
use std::path::PathBuf;
use testkit::{Authority, NatsServer, eventually};

fn config(server: &NatsServer) -> NatsConfig {
    NatsConfig {
        url: server.url(),
        name: "test".into(),
        connections: Some(2),
        ..NatsConfig::default()
    }
}

fn tls(server: &NatsServer, authority: &Authority) -> NatsConfig {
    let url = format!("tls://127.0.0.1:{}", server.port());
    NatsConfig { url, tls_ca: Some(authority.certificate()), ..config(server) }
}

async fn connect(config: NatsConfig) -> Bus {
    let bus = soon(Nats::connect(config)).await.unwrap();
    bus.health().await.unwrap();
    bus
}

/// Asserts that the connection is refused with an error that names each of `causes`.
async fn assert_refused(config: NatsConfig, causes: &[&str]) {
    let error = soon(Nats::connect(config))
        .await
        .err()
        .expect("the connection is refused")
        .to_string();
    assert!(causes.iter().all(|cause| error.contains(cause)), "{causes:?}: {error}");
}

/// A server with a certificate for `host`; `more` is added to its `tls` block.
async fn tls_server(authority: &Authority, host: &str, more: &str) -> NatsServer {
    let (certificate, key) = authority.issue(host);
    NatsServer::start_with(&format!("tls {{ cert_file: {certificate:?}, key_file: {key:?}, {more} }}")).await
}

fn file(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test]
async fn server_certificate_must_match_authority_and_host() {
    let (ours, foreign) = (Authority::new(), Authority::new());
    let server = tls_server(&ours, "127.0.0.1", "").await;
    let bus = connect(tls(&server, &ours)).await;
    let mut received = bus.subscribe("s", None, 8).await.unwrap();
    bus.publish(message("s", "over TLS")).await.unwrap();
    assert_eq!(text(&soon(received.next()).await.unwrap()), "over TLS");

    let foreign_ca = foreign.certificate();
    assert_refused(tls(&server, &foreign), &["nats.tls_ca", foreign_ca.to_str().unwrap()]).await;
    assert_refused(NatsConfig { tls_ca: None, ..tls(&server, &ours) }, &["nats.tls_ca"]).await;
    assert_refused(
        NatsConfig { tls_ca: Some("/nowhere.pem".into()), ..tls(&server, &ours) },
        &["nats.tls_ca", "/nowhere.pem"],
    )
    .await;

    let dir = tempfile::tempdir().unwrap();
    let empty = Some(file(&dir, "empty.pem", ""));
    assert_refused(
        NatsConfig { tls_ca: empty, ..tls(&server, &ours) },
        &["nats.tls_ca", "empty.pem", "no certificate"],
    )
    .await;

    let other = tls_server(&ours, "other.example", "").await;
    assert_refused(tls(&other, &ours), &["another name", "nats.url"]).await;

    let plain = NatsServer::start().await;
    assert_refused(tls(&plain, &ours), &["TLS"]).await;
    // With nats.tls_ca set, the client insists on TLS, whatever the URL's scheme and the server say.
    assert_refused(NatsConfig { url: plain.url(), ..tls(&plain, &ours) }, &["TLS"]).await;
}

#[tokio::test]
async fn client_certificate_is_presented_when_required() {
    let (ours, foreign) = (Authority::new(), Authority::new());
    let verify = format!("ca_file: {:?}, verify: true", ours.certificate());
    let server = tls_server(&ours, "127.0.0.1", &verify).await;
    let with = |(certificate, key): (PathBuf, PathBuf)| NatsConfig {
        tls_certificate: Some(certificate),
        tls_key: Some(key),
        ..tls(&server, &ours)
    };

    connect(with(ours.issue("client.example"))).await;
    assert_refused(tls(&server, &ours), &["nats.tls_certificate"]).await;
    assert_refused(with(foreign.issue("client.example")), &["nats.tls_certificate"]).await;

    let (certificate, key) = ours.issue("client.example");
    assert_refused(with((certificate.clone(), "/nowhere.pem".into())), &["nats.tls_key", "/nowhere.pem"]).await;
    assert_refused(with((key, certificate.clone())), &["nats.tls_certificate", "no certificate"]).await;
    assert_refused(with((certificate, ours.issue("other.example").1)), &["nats.tls_certificate", "nats.tls_key"]).await;
    assert_refused(NatsConfig { tls_key: None, ..with(ours.issue("client.example")) }, &["nats.tls_key"]).await;
}

#[tokio::test]
async fn tls_first_handshake_is_supported() {
    let ours = Authority::new();
    let server = tls_server(&ours, "127.0.0.1", "handshake_first: true").await;
    connect(NatsConfig { tls_first: true, ..tls(&server, &ours) }).await;
}

#[tokio::test]
async fn user_and_token_are_read_from_settings_or_url() {
    let users = NatsServer::start_with("authorization { user: \"me\", password: \"s@cret\" }").await;
    let user = |user: &str, password: &str| NatsConfig {
        user: Some(user.into()),
        password: Some(password.into()),
        ..config(&users)
    };
    connect(user("me", "s@cret")).await;
    assert_refused(user("me", "wrong"), &["nats.user", "\"me\"", "nats.password"]).await;
    assert_refused(config(&users), &["nats.user", "nats.nkey"]).await;

    let in_url = |who: &str| NatsConfig {
        url: format!("nats://{who}@127.0.0.1:{}", users.port()),
        ..config(&users)
    };
    connect(in_url("me:s%40cret")).await;
    assert_refused(in_url("me:wrong"), &["nats.user"]).await;

    let tokens = NatsServer::start_with("authorization { token: \"t\" }").await;
    let token = |token: &str| NatsConfig { token: Some(token.into()), ..config(&tokens) };
    connect(token("t")).await;
    assert_refused(token("wrong"), &["nats.token"]).await;
    connect(NatsConfig { url: format!("nats://t@127.0.0.1:{}", tokens.port()), ..config(&tokens) }).await;
}

#[tokio::test]
async fn nkey_seed_file_authenticates() {
    let (known, unknown) = (KeyPair::new_user(), KeyPair::new_user());
    let server =
        NatsServer::start_with(&format!("authorization {{ users: [ {{ nkey: {} }} ] }}", known.public_key())).await;
    let dir = tempfile::tempdir().unwrap();
    let with = |path: PathBuf| NatsConfig { nkey: Some(path), ..config(&server) };

    connect(with(file(&dir, "known.nk", &format!("{}\n", known.seed().unwrap())))).await;
    assert_refused(with(file(&dir, "unknown.nk", &unknown.seed().unwrap())), &["nats.nkey", "unknown.nk"]).await;
    assert_refused(with(file(&dir, "bad.nk", "SUNOSEED")), &["nats.nkey", "bad.nk", "seed"]).await;
    assert_refused(with("/nowhere.nk".into()), &["nats.nkey", "/nowhere.nk"]).await;
}

/// A JWT as `nsc` creates it.
fn jwt(issuer: &KeyPair, subject: &str, claims: serde_json::Value) -> String {
    let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = serde_json::json!({"typ": "JWT", "alg": "ed25519-nkey"});
    let payload = serde_json::json!({
        "jti": "test", "iat": 1_700_000_000, "iss": issuer.public_key(), "sub": subject, "name": "test", "nats": claims,
    });
    let signed = format!("{}.{}", part(&header), part(&payload));
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes()).unwrap()))
}

fn creds(account: &KeyPair, user: &KeyPair) -> String {
    let limits = serde_json::json!({"subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2});
    format!(
        "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
         ************************* IMPORTANT *************************\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        jwt(account, &user.public_key(), limits),
        user.seed().unwrap()
    )
}

#[tokio::test]
async fn creds_file_authenticates_at_a_server_of_its_operator() {
    let (operator, account, foreign) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
    let system = KeyPair::new_account();
    let limits = serde_json::json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
    });
    let account_entry = |account: &KeyPair| {
        let claims = serde_json::json!({"limits": limits, "type": "account", "version": 2});
        format!("{}: {}", account.public_key(), jwt(&operator, &account.public_key(), claims))
    };
    let operator_jwt = jwt(&operator, &operator.public_key(), serde_json::json!({"type": "operator", "version": 2}));
    let server = NatsServer::start_with(&format!(
        "operator: {operator_jwt}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {}, {} }}",
        system.public_key(),
        account_entry(&system),
        account_entry(&account)
    ))
    .await;

    let dir = tempfile::tempdir().unwrap();
    let with = |path: PathBuf| NatsConfig { credentials: Some(path), ..config(&server) };
    let user = KeyPair::new_user();
    let bus = connect(with(file(&dir, "user.creds", &creds(&account, &user)))).await;
    let mut received = bus.subscribe("s", None, 8).await.unwrap();
    bus.publish(message("s", "signed")).await.unwrap();
    assert_eq!(text(&soon(received.next()).await.unwrap()), "signed");

    assert_refused(with(file(&dir, "foreign.creds", &creds(&foreign, &user))), &["nats.credentials", "foreign.creds"])
        .await;
    let stolen = creds(&account, &user).replace(&user.seed().unwrap(), &KeyPair::new_user().seed().unwrap());
    assert_refused(with(file(&dir, "stolen.creds", &stolen)), &["nats.credentials", "stolen.creds"]).await;
    assert_refused(with(file(&dir, "bad.creds", "hello")), &["nats.credentials", "bad.creds", "JWT"]).await;
    assert_refused(with("/nowhere.creds".into()), &["nats.credentials", "/nowhere.creds"]).await;
}

#[tokio::test]
async fn reload_applies_new_files_and_rejects_bad_ones() {
    let (low, high, watcher) = (KeyPair::new_user(), KeyPair::new_user(), KeyPair::new_user());
    let server = NatsServer::start_with(&format!(
        "authorization {{ users: [ {{ nkey: {}, permissions: {{ publish: {{ deny: \"high.>\" }} }} }}, \
         {{ nkey: {} }}, {{ nkey: {} }} ] }}",
        low.public_key(),
        high.public_key(),
        watcher.public_key()
    ))
    .await;

    let dir = tempfile::tempdir().unwrap();
    let with = |path: PathBuf| NatsConfig { nkey: Some(path), connections: Some(3), ..config(&server) };
    let seed = file(&dir, "ours.nk", &low.seed().unwrap());
    let bus = connect(with(seed.clone())).await;
    let observer = connect(with(file(&dir, "watcher.nk", &watcher.seed().unwrap()))).await;
    let mut observed = observer.subscribe("*.word", None, 64).await.unwrap();
    let mut kept = bus.subscribe("kept", None, 8).await.unwrap();
    // Returns the first subject that gets through; only the high key may publish on `high.>`.
    let mut publish = async |word: &str| {
        bus.publish(message("high.word", word)).await.unwrap();
        bus.health().await.unwrap();
        bus.publish(message("any.word", word)).await.unwrap();
        let first = soon(observed.next()).await.unwrap();
        first.subject.to_string()
    };
    assert_eq!(publish("first").await, "any.word", "the low key is not allowed to publish on high.>");

    for bad in ["", &KeyPair::new_user().seed().unwrap()] {
        std::fs::write(&seed, bad).unwrap();
        let error = soon(bus.reload())
            .await
            .expect_err("the server does not know this key")
            .to_string();
        assert!(error.contains("nats.nkey"), "{error}");
        assert_eq!(publish("still").await, "any.word", "a failed reload keeps the existing connections");
    }

    std::fs::write(&seed, high.seed().unwrap()).unwrap();
    soon(bus.reload()).await.unwrap();
    assert_eq!(publish("second").await, "high.word", "the high key is allowed to publish on high.>");
    observer.publish(message("kept", "subscribed")).await.unwrap();
    assert_eq!(text(&soon(kept.next()).await.unwrap()), "subscribed");
}

#[tokio::test]
async fn reload_applies_new_certificates_without_losing_requests() {
    let (ours, foreign) = (Authority::new(), Authority::new());
    let verify = format!("ca_file: {:?}, verify: true", ours.certificate());
    let server = tls_server(&ours, "127.0.0.1", &verify).await;
    let (certificate, key) = ours.issue("client.example");
    let with = NatsConfig {
        tls_certificate: Some(certificate.clone()),
        tls_key: Some(key.clone()),
        connections: Some(3),
        ..tls(&server, &ours)
    };
    let (bus, responder) = (connect(with.clone()).await, connect(with).await);
    let traffic = Traffic::default();
    let copy = |(from_certificate, from_key): (PathBuf, PathBuf)| {
        std::fs::copy(from_certificate, &certificate).unwrap();
        std::fs::copy(from_key, &key).unwrap();
    };

    let scene = async {
        eventually(SOON, || async { traffic.now().answered > 50 }).await;

        copy(foreign.issue("client.example"));
        let error = soon(bus.reload())
            .await
            .expect_err("the authority is unknown to the server")
            .to_string();
        assert!(error.contains("nats.tls_certificate"), "{error}");

        copy(ours.issue("next.example"));
        soon(bus.reload()).await.unwrap();
        let renewed = traffic.now().answered;
        eventually(SOON, || async { traffic.now().answered > renewed + 50 }).await;
    };
    traffic.during(&bus, &responder, scene).await;

    let outcomes = traffic.now();
    assert_eq!((outcomes.answered, outcomes.failed()), (outcomes.sent, 0), "{outcomes:?}");
}
