//! Drives a node with the unmodified npm client, in both encodings (tests/centrifuge).

use crate::node::{API_KEY, Node, token, user};
use bus::{Headers, Message};
use serde_json::json;
use std::time::Duration;
use testkit::Scripts;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

async fn drive(name: &str, node: &Node) {
    let mut calls = node
        .bus
        .subscribe(&wire::subjects::rpc("echo").unwrap(), None, 100)
        .await
        .unwrap();

    let bus = node.bus.clone();
    let done = CancellationToken::new();
    let end = done.clone();
    let echo = tokio::spawn(async move {
        while let Some(Some(call)) = end.run_until_cancelled(calls.next()).await {
            let Some(subject) = call.reply else { continue };
            let headers = match &call.payload[..] {
                b"\"fail\"" => Headers::new().with(wire::channels::RPC_ERROR_CODE, "418"),
                _ => Headers::new(),
            };
            let _ = bus
                .publish(Message { subject, headers, payload: call.payload, ..Message::default() })
                .await;
        }
    });

    Scripts::of("centrifuge").npm_ci().await;

    let private = |name: &str| token(&json!({"sub": name, "channel": "$vip", "info": {"role": "host"}}));
    Scripts::of("centrifuge")
        .run(
            Command::new("node")
                .arg(name)
                .env("ENDPOINT", format!("ws://{}/connection/websocket", node.address))
                .env("API", format!("http://{}/api", node.address))
                .env("API_KEY", API_KEY)
                .env("TOKEN_ANN", user("ann"))
                .env("TOKEN_BOB", user("bob"))
                .env("TOKEN_EXPIRED", token(&json!({"sub": "ann", "exp": 1})))
                .env("TOKEN_VIP", private("ann")),
        )
        .await;
    done.cancel();
    echo.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn npm_client_works() {
    let node = Node::start_with(|config| config.ping_interval = Duration::from_secs(1)).await;
    drive("client.test.mjs", &node).await;
}

/// Tests the harness: a failing script must fail its test.
#[tokio::test]
#[should_panic(expected = "deliberate")]
async fn failing_script_fails_the_test() {
    Scripts::of("centrifuge")
        .run(Command::new("node").args(["-e", "console.error('deliberate'); process.exit(1)"]))
        .await;
}
