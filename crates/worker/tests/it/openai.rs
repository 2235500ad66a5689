//! The OpenAI provider with a chat endpoint that answers, refuses, stalls, breaks off or sends invalid data.

use crate::{Place, assignment, chunk, provider, within};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use testkit::{OpenAi, Reply};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use wire::json::Json;
use wire::router::{ExecResult, ResultStatus};
use wire::subjects;
use worker::{Config, Kind};

fn model(base_url: String) -> Config {
    let kind = Kind::OpenAi {
        base_url,
        api_key: Some("k".into()),
        model: "m".into(),
        system: Some("be brief".into()),
    };
    Config { providers: vec![provider("ai", kind)], ..Config::default() }
}

async fn ask(base_url: String, payload: Value, deadline_ms: u64) -> ExecResult {
    let place = Place::local().await;
    let mut results = place.results().await;
    let _worker = place.worker(model(base_url)).await;
    place
        .append(subjects::ASSIGN, within(assignment("r", "ai", payload), deadline_ms).to_string())
        .await;
    results.next().await
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.to_string()).collect()
}

#[tokio::test]
async fn answer_is_streamed_word_by_word() {
    let endpoint = OpenAi::start().await;
    endpoint.reply(Reply::text("one two three"));
    let place = Place::local().await;
    let (mut results, mut output) = (place.results().await, place.output("r").await);
    let _worker = place.worker(model(endpoint.url() + "/")).await;

    place.assign("r", "ai", json!({"prompt": "count"})).await;
    for (seq, word) in ["one ", "two ", "three"].into_iter().enumerate() {
        let chunk = chunk(&mut output).await;
        assert_eq!((chunk.seq, chunk.data.value()), (seq as u64, json!(word)));
    }
    let result = results.next().await;
    assert_eq!(
        (result.status, result.output),
        (ResultStatus::Success, Some(Json::of(&json!({"text": "one two three"}))))
    );

    let request = endpoint.requests().remove(0);
    assert_eq!(
        (request.path.as_str(), request.authorization.as_deref()),
        ("/v1/chat/completions", Some("Bearer k"))
    );
    let messages = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "count"}]);
    assert_eq!(request.body, json!({"model": "m", "messages": messages, "stream": true}));
}

#[tokio::test]
async fn messages_are_sent_unchanged_and_a_task_without_any_is_invalid() {
    let endpoint = OpenAi::start().await;
    let messages = json!([{"role": "assistant", "content": "hello"}, {"role": "user", "content": "again please"}]);
    let result = ask(endpoint.url(), json!({"params": {"messages": messages}}), 60_000).await;
    assert_eq!(result.output.map(|output| output.value()), Some(json!({"text": "again please"})));
    assert_eq!(endpoint.requests()[0].body["messages"][2], messages[1]);

    for payload in [json!({}), json!({"messages": []}), json!({"prompt": 7})] {
        let result = ask(endpoint.url(), payload, 60_000).await;
        assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Error, Some("invalid_task")));
    }
    assert_eq!(endpoint.requests().len(), 1, "an invalid task is not sent to the endpoint");
}

#[tokio::test]
async fn failed_request_reports_its_error_and_keeps_partial_output() {
    let endpoint = OpenAi::start().await;
    let error = |status: u16, message: &str| Reply::Error { status, message: message.into() };
    for (reply, code, message, kept) in [
        (error(400, "too long"), "invalid_task", "too long", None),
        (error(401, "bad key"), "refused", "bad key", None),
        (error(429, "slow down"), "rate_limited", "429", None),
        (error(500, &"x".repeat(100_000)), "refused", "500", None),
        (Reply::Break { words: words(&["half ", "an "]) }, "broken_stream", "", Some("half an ")),
        (
            Reply::ErrorInStream { words: words(&["some "]), message: "overloaded".into() },
            "refused",
            "overloaded",
            Some("some "),
        ),
    ] {
        endpoint.reply(reply);
        let result = ask(endpoint.url(), json!({"prompt": "p"}), 60_000).await;
        assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Error, Some(code)));
        let told = result.error_message.unwrap();
        assert!(told.contains(message) && told.len() < 1000, "{told}");
        assert!(!told.contains("127.0.0.1"), "the error message must not contain the endpoint's address: {told}");
        assert_eq!(result.output.map(|output| output.value()), kept.map(|text| json!({"text": text})));
    }

    let nobody = ask("http://127.0.0.1:1/v1".into(), json!({"prompt": "p"}), 60_000).await;
    assert_eq!(nobody.error_code.as_deref(), Some("unreachable"));
}

#[tokio::test]
async fn slow_or_silent_endpoint_runs_into_the_deadline() {
    let endpoint = OpenAi::start().await;
    endpoint.reply(Reply::Hang);
    endpoint.reply(Reply::Words { words: words(&["tick "; 1000]), delay: Duration::from_millis(50) });

    for kept in [false, true] {
        let started = Instant::now();
        let result = ask(endpoint.url(), json!({"prompt": "p"}), 400).await;
        assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Timeout, Some("deadline_exceeded")));
        assert_eq!(
            result
                .output
                .is_some_and(|o| o.value()["text"].as_str().unwrap().starts_with("tick ")),
            kept
        );
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}

#[tokio::test]
async fn cancel_ends_the_request() {
    let endpoint = OpenAi::start().await;
    endpoint.reply(Reply::Words { words: words(&["tick "; 10_000]), delay: Duration::from_millis(20) });
    let place = Place::local().await;
    let (mut results, mut output) = (place.results().await, place.output("r").await);
    let _worker = place.worker(model(endpoint.url())).await;
    place.assign("r", "ai", json!({"prompt": "p"})).await;
    chunk(&mut output).await;

    place.cancel("r").await;
    let result = results.next().await;
    assert_eq!(result.status, ResultStatus::Cancelled);
    assert!(
        result.output.unwrap().value()["text"]
            .as_str()
            .unwrap()
            .starts_with("tick ")
    );
}

/// Answers every connection with these bytes and closes it.
async fn raw(answer: Vec<u8>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());

    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 8192];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(&answer).await;
            let _ = stream.shutdown().await;
        }
    });
    url
}

#[tokio::test]
async fn busy_endpoint_reports_rate_limited_with_retry_after() {
    for (answer, code, retry_after_seconds) in [
        ("429 Too Many Requests\r\nretry-after: 7", "rate_limited", Some(7)),
        ("429 Too Many Requests", "rate_limited", Some(wire::limits::COOL_DOWN_DEFAULT_S)),
        (
            "503 Service Unavailable\r\nretry-after: 9999999",
            "rate_limited",
            Some(wire::limits::COOL_DOWN_MAX_S),
        ),
        ("503 Service Unavailable", "refused", None),
    ] {
        let url = raw(format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\n\r\n").into_bytes()).await;
        let result = ask(url, json!({"prompt": "p"}), 60_000).await;

        assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Error, Some(code)), "{answer}");
        assert_eq!(result.retry_after_seconds, retry_after_seconds, "{answer}");
    }
}

#[tokio::test]
async fn invalid_streams_are_errors_and_unusual_endings_are_not() {
    let ok = |body: &str| format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n{body}").into_bytes();
    let delta = r#"data: {"choices":[{"delta":{"content":"hi"}}]}"#;
    let stop = r#"data: {"choices":[{"delta":{},"finish_reason":"stop"}]}"#;
    let tool = r#"data: {"choices":[{"delta":{"content":null,"tool_calls":[{"function":{"name":"f"}}]}}]}"#;

    for (name, answer, code, text) in [
        ("no HTTP", b"\x16\x03\x01garbage\r\n\r\n".to_vec(), Some("unreachable"), None),
        ("nothing", vec![], Some("unreachable"), None),
        ("no events", ok("<html>hello</html>"), Some("broken_stream"), None),
        ("no JSON", ok(&format!("{delta}\n\ndata: {{\n\n")), Some("broken_stream"), Some("hi")),
        (
            "other JSON",
            ok("data: [1,2]\n\ndata: \"x\"\n\ndata: {\"choices\":7}\n\ndata: [DONE]\n\n"),
            None,
            Some(""),
        ),
        ("no UTF-8", [ok("data: "), vec![0xff, 0xfe], b"\n\n".to_vec()].concat(), Some("broken_stream"), None),
        ("a line without end", ok(&format!("data: {}", "x".repeat(600_000))), Some("broken_stream"), None),
        (
            "too much",
            ok(&format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n", "y".repeat(100_000))
                .repeat(11)),
            Some("output"),
            Some("y"),
        ),
        (
            "carriage returns, comments, no space",
            ok(&format!(
                ": hello\r\n\r\nevent: x\r\n{}\r\n\r\ndata:[DONE]\r\n\r\n",
                delta.replace("data: ", "data:")
            )),
            None,
            Some("hi"),
        ),
        ("a finish_reason and no [DONE]", ok(&format!("{delta}\n\n{stop}\n\n")), None, Some("hi")),
        (
            "an explicit null as the error",
            ok(&format!("{}\n\ndata: [DONE]\n\n", delta.replace("}]}", "}],\"error\":null}"))),
            None,
            Some("hi"),
        ),
        ("only a tool call", ok(&format!("{tool}\n\n{stop}\n\ndata: [DONE]\n\n")), None, Some("")),
    ] {
        let result = ask(raw(answer).await, json!({"prompt": "p"}), 60_000).await;
        assert_eq!(result.error_code.as_deref(), code, "{name}: {:?}", result.error_message);
        let said = result
            .output
            .as_ref()
            .map(|output| output.value()["text"].as_str().unwrap().to_string());
        match text {
            Some("y") => assert_eq!(said.map(|text| text.len()), Some(1_000_000), "{name}"),
            text => assert_eq!(said.as_deref(), text, "{name}"),
        }
    }
}
