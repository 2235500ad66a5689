//! NATS only: who is let in, over TLS and with each kind of credentials, and what one who is not is told.

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
    NatsConfig { url: server.url(), name: "test".into(), connections: Some(2), ..NatsConfig::default() }
}

fn tls(server: &NatsServer, authority: &Authority) -> NatsConfig {
    let url = format!("tls://127.0.0.1:{}", server.port());
    NatsConfig { url, tls_ca: Some(authority.certificate()), ..config(server) }
}

async fn let_in(config: NatsConfig) -> Bus {
    let bus = soon(Nats::connect(config)).await.unwrap();
    bus.health().await.unwrap();
    bus
}

/// What the error says must name each of `causes`.
async fn refused(config: NatsConfig, causes: &[&str]) {
    let error = soon(Nats::connect(config)).await.err().expect("it is refused").to_string();
    assert!(causes.iter().all(|cause| error.contains(cause)), "{causes:?}: {error}");
}

/// The server's side: its certificate, and `more` within the block.
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
async fn a_server_is_trusted_by_its_authority_and_its_name() {
    let (ours, foreign) = (Authority::new(), Authority::new());
    let server = tls_server(&ours, "127.0.0.1", "").await;
    let bus = let_in(tls(&server, &ours)).await;
    let mut heard = bus.subscribe("s", None, 8).await.unwrap();
    bus.publish(message("s", "over TLS")).await.unwrap();
    assert_eq!(text(&soon(heard.next()).await.unwrap()), "over TLS");

    let foreign_ca = foreign.certificate();
    refused(tls(&server, &foreign), &["nats.tls_ca", foreign_ca.to_str().unwrap()]).await;
    refused(NatsConfig { tls_ca: None, ..tls(&server, &ours) }, &["nats.tls_ca"]).await;
    refused(
        NatsConfig { tls_ca: Some("/nowhere.pem".into()), ..tls(&server, &ours) },
        &["nats.tls_ca", "/nowhere.pem"],
    )
    .await;
    let dir = tempfile::tempdir().unwrap();
    let empty = Some(file(&dir, "empty.pem", ""));
    refused(NatsConfig { tls_ca: empty, ..tls(&server, &ours) }, &["nats.tls_ca", "empty.pem", "no certificate"]).await;

    let other = tls_server(&ours, "other.example", "").await;
    refused(tls(&other, &ours), &["another name", "nats.url"]).await;

    let plain = NatsServer::start().await;
    refused(tls(&plain, &ours), &["TLS"]).await;
    // Whoever set nats.tls_ca does not want to talk without TLS, whatever the url's scheme and the server say.
    refused(NatsConfig { url: plain.url(), ..tls(&plain, &ours) }, &["TLS"]).await;
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_a_server_that_asks() {
    let (ours, foreign) = (Authority::new(), Authority::new());
    let verify = format!("ca_file: {:?}, verify: true", ours.certificate());
    let server = tls_server(&ours, "127.0.0.1", &verify).await;
    let with = |(certificate, key): (PathBuf, PathBuf)| NatsConfig {
        tls_certificate: Some(certificate),
        tls_key: Some(key),
        ..tls(&server, &ours)
    };
    let_in(with(ours.issue("client.example"))).await;
    refused(tls(&server, &ours), &["nats.tls_certificate"]).await;
    refused(with(foreign.issue("client.example")), &["nats.tls_certificate"]).await;
    let (certificate, key) = ours.issue("client.example");
    refused(with((certificate.clone(), "/nowhere.pem".into())), &["nats.tls_key", "/nowhere.pem"]).await;
    refused(with((key, certificate.clone())), &["nats.tls_certificate", "no certificate"]).await;
    refused(with((certificate, ours.issue("other.example").1)), &["nats.tls_certificate", "nats.tls_key"]).await;
    refused(NatsConfig { tls_key: None, ..with(ours.issue("client.example")) }, &["nats.tls_key"]).await;
}

#[tokio::test]
async fn a_server_may_want_the_handshake_first() {
    let ours = Authority::new();
    let server = tls_server(&ours, "127.0.0.1", "handshake_first: true").await;
    let_in(NatsConfig { tls_first: true, ..tls(&server, &ours) }).await;
}

#[tokio::test]
async fn a_user_or_token_is_taken_from_settings_or_the_url() {
    let users = NatsServer::start_with("authorization { user: \"me\", password: \"s@cret\" }").await;
    let user = |user: &str, password: &str| NatsConfig {
        user: Some(user.into()),
        password: Some(password.into()),
        ..config(&users)
    };
    let_in(user("me", "s@cret")).await;
    refused(user("me", "wrong"), &["nats.user", "\"me\"", "nats.password"]).await;
    refused(config(&users), &["nats.user", "nats.nkey"]).await;
    let in_url = |who: &str| NatsConfig { url: format!("nats://{who}@127.0.0.1:{}", users.port()), ..config(&users) };
    let_in(in_url("me:s%40cret")).await;
    refused(in_url("me:wrong"), &["nats.user"]).await;

    let tokens = NatsServer::start_with("authorization { token: \"t\" }").await;
    let token = |token: &str| NatsConfig { token: Some(token.into()), ..config(&tokens) };
    let_in(token("t")).await;
    refused(token("wrong"), &["nats.token"]).await;
    let_in(NatsConfig { url: format!("nats://t@127.0.0.1:{}", tokens.port()), ..config(&tokens) }).await;
}

#[tokio::test]
async fn an_nkey_is_known_by_its_seed_file() {
    let (known, unknown) = (KeyPair::new_user(), KeyPair::new_user());
    let server =
        NatsServer::start_with(&format!("authorization {{ users: [ {{ nkey: {} }} ] }}", known.public_key())).await;
    let dir = tempfile::tempdir().unwrap();
    let with = |path: PathBuf| NatsConfig { nkey: Some(path), ..config(&server) };
    let_in(with(file(&dir, "known.nk", &format!("{}\n", known.seed().unwrap())))).await;
    refused(with(file(&dir, "unknown.nk", &unknown.seed().unwrap())), &["nats.nkey", "unknown.nk"]).await;
    refused(with(file(&dir, "bad.nk", "SUNOSEED")), &["nats.nkey", "bad.nk", "seed"]).await;
    refused(with("/nowhere.nk".into()), &["nats.nkey", "/nowhere.nk"]).await;
}

/// A JWT as `nsc` makes it.
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
async fn a_creds_file_is_taken_by_a_server_of_its_operator() {
    let (operator, account, foreign) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
    let limits = serde_json::json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
    });
    let of_operator = |account: &KeyPair| {
        let claims = serde_json::json!({"limits": limits, "type": "account", "version": 2});
        format!("{}: {}", account.public_key(), jwt(&operator, &account.public_key(), claims))
    };
    let itself = jwt(&operator, &operator.public_key(), serde_json::json!({"type": "operator", "version": 2}));
    let system = KeyPair::new_account();
    let server = NatsServer::start_with(&format!(
        "operator: {itself}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {}, {} }}",
        system.public_key(),
        of_operator(&system),
        of_operator(&account)
    ))
    .await;
    let dir = tempfile::tempdir().unwrap();
    let with = |path: PathBuf| NatsConfig { credentials: Some(path), ..config(&server) };
    let user = KeyPair::new_user();
    let bus = let_in(with(file(&dir, "user.creds", &creds(&account, &user)))).await;
    let mut heard = bus.subscribe("s", None, 8).await.unwrap();
    bus.publish(message("s", "signed")).await.unwrap();
    assert_eq!(text(&soon(heard.next()).await.unwrap()), "signed");

    refused(with(file(&dir, "foreign.creds", &creds(&foreign, &user))), &["nats.credentials", "foreign.creds"]).await;
    let stolen = creds(&account, &user).replace(&user.seed().unwrap(), &KeyPair::new_user().seed().unwrap());
    refused(with(file(&dir, "stolen.creds", &stolen)), &["nats.credentials", "stolen.creds"]).await;
    refused(with(file(&dir, "bad.creds", "hello")), &["nats.credentials", "bad.creds", "JWT"]).await;
    refused(with("/nowhere.creds".into()), &["nats.credentials", "/nowhere.creds"]).await;
}

#[tokio::test]
async fn reload_takes_what_the_files_now_hold_and_bad_files_change_nothing() {
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
    let bus = let_in(with(seed.clone())).await;
    let others = let_in(with(file(&dir, "watcher.nk", &watcher.seed().unwrap()))).await;
    let mut heard = others.subscribe("*.word", None, 64).await.unwrap();
    let mut stays = bus.subscribe("stays", None, 8).await.unwrap();
    let mut say = async |word: &str| {
        bus.publish(message("high.word", word)).await.unwrap();
        bus.health().await.unwrap();
        bus.publish(message("any.word", word)).await.unwrap();
        let first = soon(heard.next()).await.unwrap();
        first.subject.to_string()
    };
    assert_eq!(say("first").await, "any.word", "the first key may not");

    for bad in ["", &KeyPair::new_user().seed().unwrap()] {
        std::fs::write(&seed, bad).unwrap();
        let told = soon(bus.reload()).await.expect_err("such a key is not known").to_string();
        assert!(told.contains("nats.nkey"), "{told}");
        assert_eq!(say("still").await, "any.word", "and what is connected stays so");
    }
    std::fs::write(&seed, high.seed().unwrap()).unwrap();
    soon(bus.reload()).await.unwrap();
    assert_eq!(say("second").await, "high.word", "the new key may");
    others.publish(message("stays", "subscribed")).await.unwrap();
    assert_eq!(text(&soon(stays.next()).await.unwrap()), "subscribed");
}

#[tokio::test]
async fn reload_takes_new_certificates_and_loses_no_request() {
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
    let (bus, responder) = (let_in(with.clone()).await, let_in(with).await);
    let traffic = Traffic::default();
    let copy = |(from_certificate, from_key): (PathBuf, PathBuf)| {
        std::fs::copy(from_certificate, &certificate).unwrap();
        std::fs::copy(from_key, &key).unwrap();
    };
    let scene = async {
        eventually(SOON, || async { traffic.now().answered > 50 }).await;
        copy(foreign.issue("client.example"));
        let told = soon(bus.reload()).await.expect_err("nobody here has signed it").to_string();
        assert!(told.contains("nats.tls_certificate"), "{told}");
        copy(ours.issue("next.example"));
        soon(bus.reload()).await.unwrap();
        let renewed = traffic.now().answered;
        eventually(SOON, || async { traffic.now().answered > renewed + 50 }).await;
    };
    traffic.during(&bus, &responder, scene).await;
    let outcomes = traffic.now();
    assert_eq!((outcomes.answered, outcomes.failed()), (outcomes.sent, 0), "{outcomes:?}");
}
