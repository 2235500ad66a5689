//! Processes that run only some of the parts, on the embedded bus.

use crate::journey::get;
use crate::process::{Process, post, run_in};
use crate::realtime::Client;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

async fn drains(mut process: Process) {
    process.signal(Signal::SIGTERM);
    assert_eq!(process.ended().await, Some(0), "{}", process.log());
}

#[tokio::test]
async fn cluster_alone_is_a_real_time_server() {
    let process = Process::start_with(&["--roles", "cluster"]).await;
    for (address, paths) in
        [(process.http(), ["health", "ready", "metrics"]), (process.ops(), ["healthz", "readyz", "metrics"])]
    {
        for path in paths {
            let (status, body) = get(&format!("http://{address}/{path}")).await;
            assert_eq!(status, 200, "{path}: {body}");
        }
    }
    assert!(process.ready["socket"].is_null(), "a process without a gateway has no socket");

    let token = process.run(&["token", "--user", "ann"]).await.success();
    let mut client = Client::connect(process.http(), token.trim()).await.unwrap();
    client.call("subscribe", json!({"channel": "news"})).await.unwrap();
    let key = process.run(&["api-key"]).await.success();
    let publication = json!({"channel": "news", "data": {"text": "hello"}}).to_string();
    let answer = post(process.http(), "/api/publish", key.trim(), &publication).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let push = client.push(|push| push["channel"] == "news").await.unwrap();
    assert_eq!(push["pub"]["data"], json!({"text": "hello"}));
    // No web app runs that could answer an RPC.
    client.rpc("chat.rooms", json!({})).await.unwrap_err();

    let other = ["up", "--roles", "cluster", "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let second = process.run(&other).await;
    assert_eq!(second.code, Some(1), "a data directory serves one process: {}", second.stderr);
    drains(process).await;
}

#[tokio::test]
async fn gateway_router_and_worker_alone_run_tasks() {
    let process = Process::start_with(&["--roles", "gateway,router,worker"]).await;
    assert_eq!(get(&format!("http://{}/ready", process.http())).await.0, 200);
    let result = process
        .run(&["submit", "--type", "echo", "--wait", "result", r#"{"prompt":"hi"}"#])
        .await
        .success();
    assert_eq!(serde_json::from_str::<Value>(&result).unwrap()["output"]["text"], "hi", "{result}");
    let key = process.run(&["api-key"]).await.success();
    let decide = json!({"version": "1", "request_id": "r-1", "tenant_id": "default",
        "task": {"type": "echo", "payload": {"prompt": "hi"}}});
    let decided = post(process.http(), "/api/v1/routes/decide", key.trim(), &decide.to_string()).await;
    assert!(decided.contains("\"provider_id\":\"echo\""), "{decided}");
    assert_eq!(get(&format!("http://{}/connection/websocket", process.http())).await.0, 404);
    drains(process).await;
}

#[tokio::test]
async fn assistant_answers_without_a_gateway() {
    let process = Process::start_with(&["--roles", "router,worker,cluster,webapp"]).await;
    let token = process.run(&["token", "--user", "ann"]).await.success();
    let mut client = Client::connect(process.http(), token.trim()).await.unwrap();
    let rooms = client.rpc("chat.rooms", json!({})).await.unwrap();
    let room = rooms["rooms"][0]["id"].as_str().unwrap().to_string();
    client
        .call("subscribe", json!({"channel": format!("chat:{room}")}))
        .await
        .unwrap();
    client
        .rpc("chat.send", json!({"room": room, "text": "@assistant help", "nonce": "n1"}))
        .await
        .unwrap();
    let answered = |push: &Value| {
        push["pub"]["data"]["message"]["state"] == "done" && push["pub"]["data"]["message"]["user"] == "assistant"
    };
    client.push(answered).await.expect("the assistant answers");
    drains(process).await;
}

#[tokio::test]
async fn roles_that_cannot_work_alone_are_refused_at_the_start() {
    for (roles, expected) in [
        ("gateway", "the gateway finds no router to ask"),
        ("worker", "the worker gets no task"),
        ("router,worker", "the router receives no requests"),
        ("webapp", "the webapp has no node"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let output = run_in(dir.path(), &["up", "--roles", roles]).await;
        assert_eq!(output.code, Some(64), "{roles}: {}", output.stderr);
        assert!(output.stderr.contains(expected) && output.stderr.contains("set nats.url"), "{}", output.stderr);
    }
    // A router without a worker still decides; the missing worker is a warning.
    let process = Process::start_with(&["--roles", "gateway,router"]).await;
    process.logged("assignments wait in the stream").await;
    process.run(&["submit", "--type", "echo", "{}"]).await.success();
    drains(process).await;
}
