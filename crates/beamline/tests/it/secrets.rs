//! Secrets of the process and of its users stay out of programs and out of the log.

use crate::process::{Manager, Process};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use testkit::{OpenAi, Reply};

/// Starts a process with these settings and variables.
async fn start(settings: &str, environment: Vec<(&'static str, String)>) -> Process {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("beamline.toml"), settings).unwrap();
    Process::start_under(Manager { environment, ..Manager::default() }, dir).await
}

#[tokio::test]
async fn program_sees_only_the_variables_that_the_settings_list() {
    let settings = r#"
        [[worker.providers]]
        name = "echo"
        kind = "command"
        program = "/usr/bin/env"
        env = ["PASSED", "SET=a,b=c", "NOT_SET_HERE"]
    "#;
    let variable = |name, value: &str| (name, value.to_string());
    let environment = vec![
        variable("PASSED", "on"),
        variable("DATABASE_URL", "sqlite://data/webapp.db?mode=rwc"),
        variable("BEAMLINE_LOG_LEVEL", "debug"),
        variable("BEAMLINE_X", "a secret"),
        variable("AWS_SECRET_ACCESS_KEY", "another"),
    ];

    let process = start(settings, environment).await;
    let result = process
        .run(&["submit", "--type", "echo", "--wait", "result", "{}"])
        .await
        .success();

    let result: Value = serde_json::from_str(&result).unwrap();
    let mut seen: BTreeSet<&str> = result["output"]["text"].as_str().unwrap().lines().collect();
    let run = seen.iter().find(|variable| variable.starts_with("BEAMLINE_RUN_ID="));
    seen.remove(*run.expect("the run has an id"));
    let request = format!("BEAMLINE_REQUEST_ID={}", result["request_id"].as_str().unwrap());
    assert_eq!(seen, BTreeSet::from(["PASSED=on", "SET=a,b=c", "BEAMLINE_TENANT_ID=default", &request]));
    // A variable that cannot be passed on is a warning.
    process.logged("NOT_SET_HERE").await;
}

const SECRET: &str = "xyzzy-4711";

/// Settings with a program that repeats its task on standard error, and with a model endpoint.
fn leaking_providers(endpoint: &OpenAi) -> String {
    format!(
        r#"
        [[worker.providers]]
        name = "echo"
        kind = "command"
        program = "/bin/sh"
        args = ["-c", "cat >&2; exit 3"]

        [[worker.providers]]
        name = "ops"
        kind = "openai"
        base_url = "{}"
        model = "m"

        [log]
        level = "trace"
        "#,
        endpoint.url()
    )
}

/// The secret is in prompts, in errors of endpoints and programs, and in invalid requests.
#[tokio::test]
async fn texts_of_users_stay_out_of_the_log() {
    let endpoint = OpenAi::start().await;
    let process = start(&leaking_providers(&endpoint), Vec::new()).await;
    let prompt = json!({"prompt": format!("my secret is {SECRET}")}).to_string();
    let submit = async |kind: &str, wait: &str| {
        let output = process.run(&["submit", "--type", kind, "--wait", wait, &prompt]).await;
        output.stdout + &output.stderr
    };

    let message = format!("the prompt {SECRET} is refused");
    let replies = [
        (Reply::Error { status: 400, message: message.clone() }, "400"),
        (Reply::Error { status: 500, message: message.clone() }, "500"),
        (Reply::ErrorInStream { words: vec!["some ".into()], message: message.clone() }, SECRET),
        (Reply::Break { words: vec![format!("{SECRET} ")] }, "broken_stream"),
        (Reply::Echo, SECRET),
    ];
    for (reply, expected) in replies {
        endpoint.reply(reply);
        let answer = submit("ops", "result").await;
        assert!(answer.contains(expected), "the sender gets the details: {answer}");
    }

    let last_words = submit("x", "result").await;
    assert!(
        last_words.contains(SECRET) && last_words.contains("exit_status"),
        "the sender gets the details: {last_words}"
    );

    // The gateway or the router refuses an invalid task.
    let client = client::Client::connect(&process.socket()).await.unwrap();
    let task = json!({"version": "1", "command": "task_submit", "request_id": "r", "task_type": "x", "params": {}});
    for field in ["command", "wait", "timeout_ms", "params"] {
        let mut task = task.clone();
        task[field] = SECRET.into();
        client.submit(&task).await.expect_err("an invalid task was accepted");
    }

    let key = process.run(&["api-key"]).await.success();
    let decide = json!({"version": "1", "request_id": "r", "tenant_id": "default", "task": {"type": "x", "payload": {}},
        "deadline": SECRET});
    let answer = crate::process::post(process.http(), "/api/v1/routes/decide", key.trim(), &decide.to_string()).await;
    assert!(
        answer.contains("SCHEMA_VALIDATION_FAILED") && answer.contains(SECRET),
        "the sender gets the details: {answer}"
    );

    // The log says what went wrong.
    for expected in ["status=500", "exit_status", "invalid_request"] {
        process.logged(expected).await;
    }
    let log = process.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(SECRET)).collect();
    assert!(lines.is_empty(), "{}", lines.join("\n"));
}
