//! The OpenAI provider with a chat endpoint that answers, refuses, stalls, breaks off or sends invalid data.

use crate::{Place, assignment, chunk, provider, within};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use testkit::{OpenAi, Reply};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use wire::json::Json;
use wire::openai::{CHAT, EMBEDDINGS};
use wire::router::{ExecResult, ResultStatus};
use wire::subjects;
use worker::{Config, Kind, Model};

fn model(base_url: String) -> Config {
    let model = Model {
        api_key: Some("k".into()),
        system: Some("be brief".into()),
        ..Model::new(base_url, "m")
    };
    with(model)
}

fn with(model: Model) -> Config {
    Config {
        providers: vec![provider("ai", Kind::OpenAi(model))],
        ..Config::default()
    }
}

async fn ask(base_url: String, payload: Value, deadline_ms: u64) -> ExecResult {
    run(model(base_url), within(assignment("r", "ai", payload), deadline_ms)).await
}

async fn run(config: Config, assignment: Value) -> ExecResult {
    let place = Place::local().await;
    let mut results = place.results().await;
    let _worker = place.worker(config).await;
    place.append(subjects::ASSIGN, assignment.to_string()).await;
    results.next().await
}

/// An assignment as the OpenAI-compatible entry submits it.
fn asked(task_type: &str, body: Value) -> Value {
    let mut assignment = assignment("r", "ai", json!({"params": body}));
    assignment["job"]["type"] = task_type.into();
    assignment["decision"]["price"] = json!({"input": 2.0, "output": 8.0});
    assignment
}

fn output(result: &ExecResult) -> Value {
    result.output.as_ref().map_or(Value::Null, Json::value)
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
    let usage = json!({"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13});
    let answer = json!({"text": "one two three", "finish_reason": "stop", "usage": usage});
    assert_eq!((result.status, result.output), (ResultStatus::Success, Some(Json::of(&answer))));
    assert_eq!(result.cost, 0.25, "without a price, a task costs what the policy says");

    let request = endpoint.requests().remove(0);
    assert_eq!(
        (request.path.as_str(), request.authorization.as_deref()),
        ("/v1/chat/completions", Some("Bearer k"))
    );
    let messages = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "count"}]);
    let expected =
        json!({"model": "m", "messages": messages, "stream": true, "stream_options": {"include_usage": true}});
    assert_eq!(request.body, expected);
}

#[tokio::test]
async fn messages_are_sent_unchanged_and_a_task_without_any_is_invalid() {
    let endpoint = OpenAi::start().await;
    let messages = json!([{"role": "assistant", "content": "hello"}, {"role": "user", "content": "again please"}]);
    let result = ask(endpoint.url(), json!({"params": {"messages": messages}}), 60_000).await;
    assert_eq!(output(&result)["text"], "again please");
    assert_eq!(endpoint.requests()[0].body["messages"][2], messages[1]);

    for payload in [json!({}), json!({"messages": []}), json!({"prompt": 7})] {
        let result = ask(endpoint.url(), payload, 60_000).await;
        assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Error, Some("invalid_task")));
    }
    assert_eq!(endpoint.requests().len(), 1, "an invalid task is not sent to the endpoint");
}

#[tokio::test]
async fn request_of_the_api_is_passed_on_and_its_answer_kept() {
    let endpoint = OpenAi::start().await;
    let call = json!({"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}});
    let message = json!({"role": "assistant", "content": null, "tool_calls": [call]});
    let usage = json!({"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500});
    let choice = json!({"index": 0, "message": message, "finish_reason": "tool_calls"});
    endpoint.reply(Reply::Body(json!({"model": "m-2026", "choices": [choice], "usage": usage})));

    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
    let messages = json!([{"role": "user", "content": "?"}]);
    let parameters = json!({"temperature": 0.25, "tools": tools, "tool_choice": "auto", "vendor_option": [1.50]});
    let mut body = json!({"model": "a policy", "messages": messages, "stream": false});
    let mut expected = json!({"model": "m", "messages": messages});
    for object in [&mut body, &mut expected] {
        object
            .as_object_mut()
            .unwrap()
            .extend(parameters.as_object().unwrap().clone());
    }

    let result = run(with(Model::new(endpoint.url(), "m")), asked(CHAT, body)).await;
    assert_eq!(endpoint.requests()[0].body, expected);
    let kept = json!({"text": "", "finish_reason": "tool_calls", "message": {"tool_calls": [call]}, "usage": usage,
        "model": "m-2026"});
    assert_eq!(output(&result), kept);
    assert_eq!(result.cost, 0.006, "1000 tokens at 2 and 500 at 8 per million");
}

#[tokio::test]
async fn streamed_tool_call_reaches_readers_piece_by_piece() {
    let endpoint = OpenAi::start().await;
    let delta = |delta: Value| json!({"index": 0, "delta": delta});
    let first = json!({"role": "assistant", "tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}]});
    let second = json!({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]});
    let choices = vec![delta(json!({"content": "let me see"})), delta(first.clone()), delta(second.clone())];

    for (task_type, pieces) in [
        (CHAT, vec![json!("let me see"), json!({"delta": first}), json!({"delta": second})]),
        ("chat", vec![json!("let me see")]),
    ] {
        endpoint.reply(Reply::Choices { choices: choices.clone(), finish_reason: "tool_calls".into() });
        let place = Place::local().await;
        let (mut results, mut chunks) = (place.results().await, place.output("r").await);
        let _worker = place.worker(with(Model::new(endpoint.url(), "m"))).await;
        let body = json!({"messages": [{"role": "user", "content": "?"}], "stream": true, "room": "general"});
        place.append(subjects::ASSIGN, asked(task_type, body).to_string()).await;

        for piece in &pieces {
            assert_eq!(chunk(&mut chunks).await.data.value(), *piece);
        }
        let result = results.next().await;
        let call = json!({"id": "c", "function": {"name": "f", "arguments": "{}"}});
        assert_eq!(output(&result)["message"], json!({"tool_calls": [call]}));
        assert_eq!((result.chunks, &output(&result)["text"]), (Some(pieces.len() as u64), &json!("let me see")));
    }
    let sent: Vec<bool> = endpoint
        .requests()
        .iter()
        .map(|request| request.body.get("room").is_some())
        .collect();
    assert_eq!(sent, [true, false], "only a request of the API passes on fields that are not known");
}

#[tokio::test]
async fn embeddings_are_passed_on_and_an_endpoint_without_them_is_not_blamed() {
    let endpoint = OpenAi::start().await;
    let config = || with(Model::new(endpoint.url(), "embedder"));
    let body = json!({"model": "x", "input": ["a", "b"], "encoding_format": "float"});
    let result = run(config(), asked(EMBEDDINGS, body)).await;
    let request = endpoint.requests().remove(0);
    assert_eq!(request.path, "/v1/embeddings");
    assert_eq!(request.body, json!({"model": "embedder", "input": ["a", "b"], "encoding_format": "float"}));
    assert_eq!(output(&result)["data"].as_array().map(Vec::len), Some(2));
    assert_eq!(result.cost, 4e-6);

    for (status, code) in [(404, "invalid_task"), (405, "invalid_task"), (401, "refused"), (500, "refused")] {
        endpoint.reply(Reply::Error { status, message: "no".into() });
        let result = run(config(), asked(EMBEDDINGS, json!({"input": "a"}))).await;
        assert_eq!(result.error_code.as_deref(), Some(code), "{status}");
    }
    let empty = run(config(), asked(EMBEDDINGS, json!({}))).await;
    assert_eq!((empty.error_code.as_deref(), endpoint.requests().len()), (Some("invalid_task"), 5));
}

#[tokio::test]
async fn answer_without_a_first_token_in_time_ends_with_a_code_of_its_own() {
    let endpoint = OpenAi::start().await;
    let limited = || {
        with(Model {
            first_token_timeout: Some(Duration::from_millis(300)),
            ..Model::new(endpoint.url(), "m")
        })
    };
    endpoint.reply(Reply::Hang);
    endpoint.reply(Reply::Words { words: words(&["late"]), delay: Duration::from_secs(2) });
    for _ in 0..2 {
        let result = run(limited(), asked(CHAT, json!({"messages": [{"role": "user", "content": "?"}]}))).await;
        assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Timeout, Some("first_token_timeout")));
    }
    testkit::eventually(Duration::from_secs(10), async || endpoint.open() == 0).await;

    // What follows the first token may take longer.
    endpoint.reply(Reply::Words { words: words(&["a ", "b ", "c "]), delay: Duration::from_millis(200) });
    let result = run(limited(), asked(CHAT, json!({"messages": [{"role": "user", "content": "?"}]}))).await;
    assert_eq!(output(&result)["text"], "a b c ");
    assert_eq!(endpoint.requests()[0].body["stream"], true, "a limit of the first token needs a stream");
}

#[tokio::test]
async fn limits_of_a_minute_are_cool_downs() {
    for limited in [
        |model: Model| Model { requests_per_minute: Some(1), ..model },
        |model: Model| Model { tokens_per_minute: Some(5), ..model },
    ] {
        let endpoint = OpenAi::start().await;
        let place = Place::local().await;
        let mut results = place.results().await;
        let _worker = place.worker(with(limited(Model::new(endpoint.url(), "m")))).await;
        for (n, expected) in [(1, None), (2, Some("rate_limited"))] {
            place.assign(&format!("r{n}"), "ai", json!({"prompt": "hi"})).await;
            let result = results.next().await;
            assert_eq!(result.error_code.as_deref(), expected);
            assert_eq!(result.retry_after_seconds.is_some_and(|seconds| seconds > 1), expected.is_some());
        }
        assert_eq!(endpoint.requests().len(), 1);
    }
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
