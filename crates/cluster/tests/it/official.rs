//! Drives a node with the unmodified npm client, in both encodings (tests/centrifuge).

use crate::node::{API_KEY, Node, token, user};
use bus::{Headers, Message};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(120);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/centrifuge")
}

async fn run(command: &mut Command) {
    let child = command
        .current_dir(folder())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(DEADLINE, child)
        .await
        .expect("the command ends in time")
        .expect("node and npm must be installed");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}\n{}\n{}", text(&output.stdout), text(&output.stderr));
}

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

    if !folder().join("node_modules").is_dir() {
        run(Command::new("npm").args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])).await;
    }

    let private = |name: &str| token(&json!({"sub": name, "channel": "$vip", "info": {"role": "host"}}));
    run(Command::new("node")
        .arg(name)
        .env("ENDPOINT", format!("ws://{}/connection/websocket", node.address))
        .env("API", format!("http://{}/api", node.address))
        .env("API_KEY", API_KEY)
        .env("TOKEN_ANN", user("ann"))
        .env("TOKEN_BOB", user("bob"))
        .env("TOKEN_EXPIRED", token(&json!({"sub": "ann", "exp": 1})))
        .env("TOKEN_VIP", private("ann")))
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
    run(Command::new("node").args(["-e", "console.error('deliberate'); process.exit(1)"])).await;
}
