//! The OpenAI-compatible entry of the real process, with the unmodified clients for Node and Python (tests/openai) and a
//! scripted endpoint behind it.

use crate::process::Process;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;
use testkit::{OpenAi, Reply, Scripts};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

const ACME_KEY: &str = "acme-0123456789abcdef0123456789abcdef";

/// A process whose models have the names of their policies: `small`, `busy`, `hasty`, `default` without a model, and `own`
/// of tenant `acme`.
async fn start(endpoint: &OpenAi, policies: &Path) -> Process {
    for (name, provider) in [
        ("default/default", "{name: echo, weight: 1}"),
        ("default/small", "{name: small, weight: 1, cost: 1, price: {input: 100, output: 1000}}"),
        ("default/busy", "{name: busy, weight: 1}"),
        ("default/hasty", "{name: hasty, weight: 1}"),
        ("acme/own", "{name: small, weight: 1}"),
    ] {
        let file = policies.join(format!("{name}.yaml"));
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        // None of the failures here may make a provider ineligible.
        let breaker = "circuit_breaker: {failure_threshold: 1000, error_rate_threshold: 1, min_calls: 1000}";
        std::fs::write(file, format!("version: \"1\"\nproviders: [{provider}]\n{breaker}\n")).unwrap();
    }

    let mut settings = format!(
        "[gateway]\napi_keys = [\"acme={ACME_KEY}\"]\n[router]\npolicies = {policies:?}\n\
         [router.circuit_breaker]\nfailure_threshold = 1000\nerror_rate_threshold = 1\nmin_calls = 1000\n"
    );
    for (name, more) in [("small", ""), ("busy", ""), ("hasty", "first_token_timeout = \"500ms\"")] {
        settings += &format!(
            "[[worker.providers]]\nname = \"{name}\"\nkind = \"openai\"\nbase_url = \"{}\"\nmodel = \"m\"\n{more}\n",
            endpoint.url()
        );
    }
    Process::start_with_settings(&settings).await
}

/// Answers by what the last message says.
fn choose(request: &testkit::Request) -> Option<Reply> {
    let call = |arguments: &str| json!({"name": "weather", "arguments": arguments});
    let piece = |call: Value| json!({"index": 0, "delta": {"tool_calls": [call]}});
    Some(match request.body["messages"][0]["content"].as_str()? {
        "tools" if request.body["stream"] == true => {
            let first = json!({"index": 0, "id": "call_1", "type": "function", "function": call("")});
            let rest =
                ["{\"city\":", "\"Ulm\"}"].map(|text| piece(json!({"index": 0, "function": {"arguments": text}})));
            let choices = [piece(first)].into_iter().chain(rest).collect();
            Reply::Choices { choices, finish_reason: "tool_calls".into() }
        }
        "tools" => {
            let call = json!({"id": "call_1", "type": "function", "function": call("{\"city\":\"Ulm\"}")});
            let message = json!({"role": "assistant", "content": null, "tool_calls": [call]});
            Reply::Body(json!({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}))
        }
        "too long" => Reply::Error { status: 400, message: "the context is too long".into() },
        "broken" => Reply::Error { status: 500, message: "broken".into() },
        "busy" => Reply::Busy { retry_after: 30 },
        "breaks" => Reply::Break { words: vec!["half ".into()] },
        "hang" => Reply::Hang,
        "slow" => Reply::Words { words: vec!["tick ".into(); 10_000], delay: Duration::from_millis(20) },
        _ => return None,
    })
}

/// Runs a client's script against a process, and checks that it left nothing running at the endpoint.
async fn drive(command: &mut Command) {
    let (endpoint, policies) = (OpenAi::start().await, tempfile::tempdir().unwrap());
    endpoint.choose(choose);
    let process = start(&endpoint, policies.path()).await;
    let key = process.run(&["api-key"]).await.success();
    Scripts::of("openai")
        .run(
            command
                .env("BASE_URL", format!("http://{}/v1", process.http()))
                .env("KEY", key.trim())
                .env("ACME_KEY", ACME_KEY),
        )
        .await;
    // A model goes on only while somebody waits for its answer.
    testkit::eventually(Duration::from_secs(20), async || endpoint.open() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn npm_client_works() {
    Scripts::of("openai").npm_ci().await;
    drive(Command::new("node").arg("client.test.mjs")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn python_client_works() {
    let arguments = ["install", "--quiet", "--target", "site-packages", "-r", "requirements.txt"];
    Scripts::of("openai")
        .install("site-packages", Command::new("pip3").args(arguments))
        .await;
    drive(
        Command::new("python3")
            .arg("client_test.py")
            .env("PYTHONPATH", "site-packages"),
    )
    .await;
}

/// Sends a request and returns the answer's head in lower case and its body.
async fn send(process: &Process, request: &str) -> (String, String) {
    let mut stream = tokio::net::TcpStream::connect(process.http()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_ascii_lowercase(), body.into())
}

#[tokio::test]
async fn answer_costs_what_its_tokens_cost() {
    let (endpoint, policies) = (OpenAi::start().await, tempfile::tempdir().unwrap());
    let process = start(&endpoint, policies.path()).await;
    let key = process.run(&["api-key"]).await.success();
    let body = json!({"model": "small", "messages": [{"role": "user", "content": "two words"}]}).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\
         Authorization: Bearer {}\r\n\r\n",
        body.len(),
        key.trim()
    );
    let (head, body) = send(&process, &(head + &body)).await;
    assert!(head.starts_with("http/1.1 200"), "{head}\n{body}");
    let id = head
        .lines()
        .find_map(|line| line.strip_prefix("x-request-id: "))
        .unwrap()
        .to_string();

    // 10 tokens at 100 and 2 at 1000 per million.
    let client = client::Client::connect(&process.socket()).await.unwrap();
    let recorded = OnceLock::new();
    testkit::eventually(Duration::from_secs(20), async || {
        let task = client.query(&id).await.unwrap();
        task.result.is_some_and(|result| recorded.set(result).is_ok())
    })
    .await;
    let result = recorded.into_inner().unwrap();
    assert!((result.cost - 0.003).abs() < 1e-12, "{result:?}");
    let seen = endpoint.requests().remove(0);
    assert_eq!((seen.authorization, &seen.body["model"]), (None, &json!("m")), "the client's key stays here");
}
