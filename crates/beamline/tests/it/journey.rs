//! End to end: messages from a program on the socket and from a person in a room.

use crate::process::Process;
use crate::realtime::Client;
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test]
async fn program_gets_decision_result_and_stream_of_its_tasks() {
    let process = Process::start().await;
    assert_eq!(process.run(&["ping"]).await.success().trim(), "pong");

    let decision = process
        .run(&["submit", "--type", "echo", r#"{"prompt":"hi"}"#])
        .await
        .success();
    let decision: Value = serde_json::from_str(&decision).unwrap();
    assert_eq!(decision["decision"]["provider_id"], "echo", "{decision}");

    let result = process
        .run(&["submit", "--type", "echo", "--wait", "result", r#"{"prompt":"one two three"}"#])
        .await
        .success();
    let result: Value = serde_json::from_str(&result).unwrap();
    assert_eq!(result["status"], "success", "{result}");

    let streamed = process
        .run(&["submit", "--type", "ops", "--wait", "stream", r#"{"prompt":"help"}"#])
        .await
        .success();
    assert!(streamed.contains("status") && streamed.contains("nodes"), "{streamed}");

    let whole = process
        .run(&["submit", "--type", "echo", "--wait", "stream", r#"{"number":7}"#])
        .await
        .success();
    let whole: Value =
        serde_json::from_str(&whole).expect("the output of a provider that does not stream is printed whole");
    assert_eq!(whole["params"]["number"], 7, "{whole}");

    let bad = process.run(&["submit", "--type", "echo", "{not json"]).await;
    assert_eq!(bad.code, Some(1));
    assert!(bad.stderr.contains("JSON"), "{}", bad.stderr);
}

#[tokio::test]
async fn answer_streams_to_everyone_in_the_room() {
    let process = Process::start().await;
    let mut people = Vec::new();
    for name in ["ann", "bob"] {
        let token = process.run(&["token", "--user", name]).await.success();
        let mut client = Client::connect(process.http(), token.trim()).await.unwrap();
        let channel = format!("chat:{}", first_room(&mut client).await);
        client.call("subscribe", json!({"channel": channel})).await.unwrap();
        people.push(client);
    }
    let room = first_room(&mut people[0]).await;
    let sent = people[0]
        .rpc("chat.send", json!({"room": room, "text": "@assistant help", "nonce": "n1"}))
        .await
        .unwrap();
    assert_eq!(sent["message"]["user"], "ann", "{sent}");
    let again = people[0]
        .rpc("chat.send", json!({"room": room, "text": "@assistant help", "nonce": "n1"}))
        .await
        .unwrap();
    assert_eq!(again["message"]["id"], sent["message"]["id"], "a repeated nonce returns the same message");

    for client in &mut people {
        let event = |kind: &'static str| move |push: &Value| push["pub"]["data"]["type"] == kind;
        client.push(event("delta")).await.expect("the answer streams");
        let done = |push: &Value| {
            event("message")(push)
                && push["pub"]["data"]["message"]["state"] == "done"
                && push["pub"]["data"]["message"]["user"] == "assistant"
        };
        let push = client.push(done).await.expect("the answer ends");
        let text = push["pub"]["data"]["message"]["text"].as_str().unwrap();
        assert!(text.contains("status"), "{text}");
    }
    let history = people[1].rpc("chat.history", json!({"room": room})).await.unwrap();
    let texts: Vec<_> = history["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["user"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["ann", "assistant"]);
}

#[tokio::test]
async fn health_readiness_and_metrics_answer_on_both_ports() {
    let process = Process::start().await;
    for url in [
        format!("http://{}/health", process.http()),
        format!("http://{}/ready", process.http()),
        format!("http://{}/healthz", process.ops()),
        format!("http://{}/readyz", process.ops()),
    ] {
        let (status, body) = get(&url).await;
        assert_eq!(status, 200, "{url}: {body}");
    }
    process
        .run(&["submit", "--type", "echo", "--wait", "result", "{}"])
        .await
        .success();
    for url in [format!("http://{}/metrics", process.http()), format!("http://{}/metrics", process.ops())] {
        let (_, body) = get(&url).await;
        for name in ["beamline_gateway_", "beamline_router_", "beamline_worker_", "beamline_cluster_"] {
            assert!(body.contains(name), "{name} is missing in\n{body}");
        }
    }
}

#[tokio::test]
async fn gateway_router_and_worker_log_the_same_trace_id() {
    let settings = "[log]\nformat = \"json\"\nlevel = \"info,gateway=debug,router=debug,worker=debug\"\n";
    let process = Process::start_with_settings(settings).await;
    process
        .run(&["submit", "--type", "echo", "--wait", "result", "{}"])
        .await
        .success();

    let trace_of = |part: &str| {
        let log = process.log();
        let mut lines = log
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("every line is JSON"));
        let line = lines
            .find(|line| line["target"].as_str().is_some_and(|t| t.starts_with(part)) && line["trace_id"].is_string());
        line.map(|line| line["trace_id"].clone())
    };
    let parts = ["gateway", "router", "worker", "access"];
    testkit::eventually(Duration::from_secs(10), async || parts.iter().all(|part| trace_of(part).is_some())).await;
    for part in parts {
        assert_eq!(trace_of(part), trace_of("gateway"), "{part}");
    }
}

async fn first_room(client: &mut Client) -> String {
    let rooms = client.rpc("chat.rooms", json!({})).await.unwrap();
    rooms["rooms"][0]["id"].as_str().unwrap().to_string()
}

pub async fn get(url: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    let status = response.split(' ').nth(1).unwrap().parse().unwrap();
    let body = response.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_string();
    (status, body)
}
