//! The parts in separate processes, on NATS and Redis, also while these are down.

use crate::process::Process;
use crate::realtime::Client;
use bus::nats::{Nats, NatsConfig};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::Duration;
use testkit::{Authority, NatsServer, RedisServer, eventually};
use tokio::io::AsyncWriteExt;

const PATIENCE: Duration = Duration::from_secs(30);

async fn follow(process: &Process, user: &str) -> Client {
    let token = process.run(&["token", "--user", user]).await.success();
    let mut client = Client::connect(process.http(), token.trim()).await.unwrap();
    client
        .call("subscribe", json!({"channel": "chat:general"}))
        .await
        .unwrap();
    client
}

fn answered(push: &Value) -> bool {
    let message = &push["pub"]["data"]["message"];
    message["user"] == "assistant" && message["state"] == "done"
}

#[tokio::test]
async fn separate_parts_work_together_through_an_outage_of_nats() {
    let (mut nats, redis) = (NatsServer::start().await, RedisServer::start().await);
    let (nats_url, redis_url) = (nats.url(), redis.url());
    let part = async |roles: &str| {
        Process::start_with(&["--roles", roles, "--nats-url", &nats_url, "--redis-url", &redis_url]).await
    };
    let gateway = part("gateway").await;
    let _router = part("router").await;
    let _worker = part("worker").await;
    let near = part("cluster,webapp").await;
    let far = part("cluster").await;

    let result = gateway
        .run(&["submit", "--type", "echo", "--wait", "result", r#"{"n":1}"#])
        .await
        .success();
    assert_eq!(serde_json::from_str::<Value>(&result).unwrap()["status"], "success");

    let (mut ann, mut bob) = (follow(&near, "ann").await, follow(&far, "bob").await);
    let question = |nonce: &str| json!({"room": "general", "text": "@assistant nodes", "nonce": nonce});
    ann.rpc("chat.send", question("1")).await.unwrap();
    for client in [&mut ann, &mut bob] {
        client.push(answered).await.expect("the answer reaches every node");
    }

    nats.kill();
    let down = gateway
        .run(&["submit", "--type", "echo", "--timeout", "20s", "{}"])
        .await;
    assert_eq!(down.code, Some(1), "an error, not silence: {}", down.stdout);
    eventually(PATIENCE, async || crate::journey::get(&format!("http://{}/ready", near.http())).await.0 == 503).await;

    nats.restart().await;
    eventually(PATIENCE, async || {
        gateway
            .run(&["submit", "--type", "echo", "--wait", "result", "--timeout", "10s", "{}"])
            .await
            .code
            == Some(0)
    })
    .await;
    eventually(PATIENCE, async || crate::journey::get(&format!("http://{}/ready", near.http())).await.0 == 200).await;

    ann.rpc("chat.send", question("2")).await.unwrap();
    bob.push(answered)
        .await
        .expect("an answer arrives after the bus came back");
}

#[tokio::test]
async fn sighup_reloads_the_certificates_for_nats() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("127.0.0.1");
    let nats = NatsServer::start_with(&format!(
        "authorization {{ user: \"me\", password: \"pw\" }}\ntls {{ cert_file: {certificate:?}, key_file: {key:?}, \
         ca_file: {:?}, verify: true, handshake_first: true }}",
        authority.certificate()
    ))
    .await;
    let (ours, key) = authority.issue("client.example");
    let process = Process::start_with_settings(&format!(
        "roles = [\"gateway\"]\n[nats]\nurl = {:?}\nuser = \"me\"\npassword = \"pw\"\n\
         tls_ca = {:?}\ntls_certificate = {ours:?}\n\
         tls_key = {key:?}\ntls_first = true\nconnections = 3\n",
        nats.url(),
        authority.certificate()
    ))
    .await;

    let metrics = async || {
        crate::journey::get(&format!("http://{}/metrics", process.ops()))
            .await
            .1
    };
    let reloaded = async |outcome: &str| {
        process.signal(Signal::SIGHUP);
        let line = format!("beamline_reloads_total{{outcome=\"{outcome}\"}} 1");
        eventually(PATIENCE, async || metrics().await.contains(&line)).await;
    };

    let connected = || process.log().matches("connected to NATS").count();
    // The number of connections is nats.connections.
    eventually(PATIENCE, async || connected() == 3).await;

    let good = std::fs::read(&ours).unwrap();
    std::fs::write(&ours, "no certificate").unwrap();
    reloaded("refused").await;
    process.logged("nats.tls_certificate").await;
    assert_eq!(crate::journey::get(&format!("http://{}/readyz", process.ops())).await.0, 200);

    std::fs::write(&ours, good).unwrap();
    reloaded("done").await;
    eventually(PATIENCE, async || connected() == 6).await;
    assert_eq!(crate::journey::get(&format!("http://{}/readyz", process.ops())).await.0, 200);
}

#[tokio::test]
async fn drain_reports_abandoned_requests_and_does_not_wait_for_slow_readers() {
    let nats = NatsServer::start().await;
    let url = nats.url();
    let bus = Nats::connect(NatsConfig { url: url.clone(), ..NatsConfig::default() })
        .await
        .unwrap();
    // This router subscribes, and never answers.
    let mut router = bus.subscribe(wire::subjects::DECIDE, None, 8).await.unwrap();

    let settings = format!("roles = \"gateway\"\n[nats]\nurl = \"{url}\"\n[shutdown]\ndeadline = \"2s\"\n");
    let mut process = Process::start_with_settings(&settings).await;
    let waits = client::Client::connect(&process.socket()).await.unwrap();
    let submit = json!({"command": "task_submit", "task_type": "t"});
    let waiting = tokio::spawn(async move { waits.submit(&submit).await });
    router.next().await.unwrap();

    // This client asks for more than the socket holds, and reads nothing.
    let mut deaf = tokio::net::UnixStream::connect(process.socket()).await.unwrap();
    let question = [0, 0, 0, 6, 1, 0xf2].repeat(1000);
    while tokio::time::timeout(Duration::from_millis(500), deaf.write_all(&question))
        .await
        .is_ok()
    {}

    process.signal(Signal::SIGTERM);
    let client::Error::Refused(refusal) = waiting.await.unwrap().unwrap_err() else {
        panic!("the abandoned request got no error")
    };
    assert_eq!(refusal.error.code, 6, "{refusal:?}");
    assert_eq!(process.ended().await, Some(0), "{}", process.log());
}

#[tokio::test]
async fn result_reaches_only_the_gateway_that_waits_for_it() {
    let nats = NatsServer::start().await;
    let url = nats.url();
    let part = async |roles: &str| Process::start_with(&["--roles", roles, "--nats-url", &url]).await;
    let gateways = [part("gateway").await, part("gateway").await];
    let _router = part("router").await;
    let _worker = part("worker").await;

    let bus = Nats::connect(NatsConfig { url: url.clone(), ..NatsConfig::default() })
        .await
        .unwrap();
    let mut copies = bus.subscribe("beamline.result.v1.*", None, 1024).await.unwrap();
    for gateway in &gateways {
        let client = client::Client::connect(&gateway.socket()).await.unwrap();
        for _ in 0..20 {
            let submit = json!({"command": "task_submit", "task_type": "echo", "wait": "result"});
            assert_eq!(client.submit(&submit).await.unwrap()["status"], "success");
        }
    }

    copies.close();
    let mut received = std::collections::BTreeMap::new();
    while let Some(copy) = copies.next().await {
        *received.entry(copy.subject.to_string()).or_insert(0) += 1;
    }
    assert_eq!(received.into_values().collect::<Vec<_>>(), [20, 20]);
}
