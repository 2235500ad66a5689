//! End-to-end tests in one process: the client, a gateway, a router and a worker on the embedded bus.

use bus::Bus;
use client::{Client, Error, StreamEvent};
use serde_json::{Value, json};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use wire::json::Json;
use wire::router::{ResultStatus, State};
use wire::subjects;
use worker::{Kind, ProviderConfig};

/// The deadline for every awaited condition.
const SOON: Duration = Duration::from_secs(20);

const POLICY: &str = r#"{"version": "e2e",
    "providers": [{"name": "echo", "weight": 1}, {"name": "sh", "weight": 0}, {"name": "nobody", "weight": 0}],
    "rules": [{"when": "task.type == 'program'", "to": "sh"}, {"when": "task.type == 'lost'", "to": "nobody"}]}"#;

/// All parts in one process. The provider `sh` prints "one", waits for the file `go` and prints "two".
struct Deployment {
    dir: TempDir,
    bus: Bus,
    parts: JoinSet<()>,
    gateway: CancellationToken,
    others: CancellationToken,
}

impl Deployment {
    async fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let policies = dir.path().join("policies");
        std::fs::create_dir_all(policies.join("default")).unwrap();
        std::fs::write(policies.join("default/default.json"), POLICY).unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();

        let script = format!("echo one; while [ ! -e {}/go ]; do sleep 0.02; done; echo two", dir.path().display());
        let args = vec!["-c".into(), script];
        let provider = |name: &str, kind| ProviderConfig { name: name.into(), kind, timeout: SOON };
        let providers = vec![
            provider("echo", Kind::Echo),
            provider("sh", Kind::Command { program: "sh".into(), args, env: Default::default(), output_max: 4096 }),
        ];

        let backoff = [Duration::from_millis(10); 3];
        let worker = worker::Config { providers, backoff, ..worker::Config::default() };
        let router = router::Config { policies, ..router::Config::default() };
        let gateway = gateway::Config { socket: dir.path().join("s"), ..gateway::Config::default() };

        let worker = worker::bind(worker, bus.clone()).await.unwrap();
        let router = router::bind(router, bus.clone()).await.unwrap();
        let bound = gateway::bind(gateway, bus.clone()).await.unwrap();

        let (gateway, others) = (CancellationToken::new(), CancellationToken::new());
        let mut parts = JoinSet::new();
        let (one, two, three) = (gateway.clone(), others.clone(), others.clone());
        parts.spawn(async move { bound.run(one).await.unwrap() });
        parts.spawn(async move { router.run(two).await.unwrap() });
        parts.spawn(async move { worker.run(three).await.unwrap() });
        Self { dir, bus, parts, gateway, others }
    }

    async fn client(&self) -> Client {
        Client::connect(&self.dir.path().join("s")).await.unwrap()
    }

    /// Lets `sh` print "two" and end.
    fn go(&self) {
        std::fs::write(self.dir.path().join("go"), "").unwrap();
    }

    /// Waits until the task is in the expected state.
    async fn state(&self, client: &Client, id: &str, expected: State) {
        testkit::eventually(SOON, || async { client.query(id).await.is_ok_and(|task| task.state == expected) }).await;
    }

    async fn count(&self, stream: &str) -> u64 {
        self.bus.stream_info(stream).await.unwrap().messages
    }
}

fn submit(id: &str, task_type: &str, wait: &str) -> Value {
    json!({
        "command": "task_submit", "task_type": task_type, "request_id": id, "wait": wait,
        "params": {"prompt": "say it again"},
    })
}

/// The IPC error code, and the router's code and HTTP status if the router refused the request.
fn refused(error: Error) -> (u16, Option<String>, Option<u16>) {
    match error {
        Error::Refused(payload) => (payload.error.code, payload.error.reason, payload.error.status),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn submit_returns_a_decision_a_result_or_a_stream() {
    let deployment = Deployment::start().await;
    let client = deployment.client().await;

    let decided = client.submit(&submit("d", "t", "decision")).await.unwrap();
    assert_eq!(
        (&decided["decision"]["provider_id"], &decided["decision"]["policy_version"]),
        (&json!("echo"), &json!("e2e"))
    );
    assert_eq!(
        refused(client.query("d").await.unwrap_err()),
        (12, Some("not_found".into()), Some(404)),
        "a decision creates no task"
    );

    let result = client.submit(&submit("r", "t", "result")).await.unwrap();
    assert_eq!((&result["status"], &result["output"]), (&json!("success"), &json!({"text": "say it again"})));
    deployment.state(&client, "r", State::Completed).await;
    let again = client.submit(&submit("r", "t", "result")).await.unwrap();
    assert_eq!(again["assignment_id"], result["assignment_id"], "the same request is the same task");

    let mut stream = client.stream(&submit("s", "t", "stream")).await.unwrap();
    for (seq, word) in ["say ", "it ", "again"].into_iter().enumerate() {
        let Some(StreamEvent::Data(data)) = stream.next().await.unwrap() else {
            panic!("expected output")
        };
        assert_eq!((data.task_id.as_str(), data.seq, data.data.value()), ("s", seq as u64, json!(word)));
    }
    let Some(StreamEvent::Complete(last)) = stream.next().await.unwrap() else {
        panic!("expected the result")
    };
    let last: Value = serde_json::from_str(last.result.get()).unwrap();
    assert_eq!((&last["output"]["text"], &last["chunks"]), (&json!("say it again"), &json!(3)));
    assert!(stream.next().await.unwrap().is_none());

    testkit::eventually(SOON, || async { deployment.count(subjects::STREAM_USAGE).await == 2 }).await;
    assert_eq!(deployment.count(subjects::STREAM_ASSIGN).await, 0);
}

#[tokio::test]
async fn running_task_can_be_followed_queried_and_cancelled() {
    let deployment = Deployment::start().await;
    let client = deployment.client().await;

    let mut stream = client.stream(&submit("r", "program", "stream")).await.unwrap();
    let Some(StreamEvent::Data(first)) = stream.next().await.unwrap() else {
        panic!("expected output")
    };
    assert_eq!(first.data.value(), "one\n");
    // The record says so once the work has taken a moment.
    testkit::eventually(SOON, || async { client.query("r").await.unwrap().state == State::Running }).await;
    let task = client.query("r").await.unwrap();
    assert_eq!(task.decision.unwrap().provider_id, "sh");
    assert!(task.result.is_none());

    let mut other = client.subscribe("r").await.unwrap();
    assert_eq!(client.cancel("r").await.unwrap().state, State::Cancelled);
    for stream in [&mut stream, &mut other] {
        let Some(StreamEvent::Complete(last)) = stream.next().await.unwrap() else {
            panic!("expected the result")
        };
        let last: Value = serde_json::from_str(last.result.get()).unwrap();
        assert_eq!((&last["status"], &last["output"]["text"]), (&json!("cancelled"), &json!("one\n")));
    }

    let task = client.query("r").await.unwrap();
    assert_eq!((task.state, task.result.unwrap().status), (State::Cancelled, ResultStatus::Cancelled));
}

#[tokio::test]
async fn each_tenant_has_its_own_task_of_the_same_id() {
    let deployment = Deployment::start().await;
    let client = deployment.client().await;
    let streamed = async |tenant: &str| {
        let mut asked = submit("r", "t", "stream");
        (asked["tenant_id"], asked["params"]["prompt"]) = (json!(tenant), json!(format!("words of {tenant}")));
        let (mut stream, mut text) = (client.stream(&asked).await.unwrap(), String::new());
        while let Some(event) = stream.next().await.unwrap() {
            if let StreamEvent::Data(piece) = event {
                text += &piece.data.string().unwrap();
            }
        }
        text
    };
    let tenants = ["acme", "beta", "default"];
    let texts = tokio::join!(streamed(tenants[0]), streamed(tenants[1]), streamed(tenants[2]));
    assert_eq!(<[String; 3]>::from(texts), tenants.map(|tenant| format!("words of {tenant}")));
    for tenant in tenants {
        testkit::eventually(SOON, || async {
            let task = client.of_tenant(tenant).query("r").await.unwrap();
            task.result
                .is_some_and(|result| result.output == Some(Json::of(&json!({"text": format!("words of {tenant}")}))))
        })
        .await;
    }
    assert_eq!(refused(client.of_tenant("gamma").cancel("r").await.unwrap_err()).2, Some(404));
}

#[tokio::test]
async fn refusals_carry_the_routers_code_and_status() {
    let deployment = Deployment::start().await;
    let client = deployment.client().await;
    let with = |field: &str, value: Value| {
        let mut submit = submit("x", "t", "result");
        submit[field] = value;
        submit
    };

    let policy = client.submit(&with("policy_id", json!("none"))).await.unwrap_err();
    assert_eq!(refused(policy), (12, Some("policy_not_found".into()), Some(404)));
    let key = client
        .submit(&with("idempotency_key", json!("k".repeat(257))))
        .await
        .unwrap_err();
    assert_eq!(refused(key), (12, Some("invalid_request".into()), Some(400)));
    let control = client.submit(&with("request_id", json!("a\0b"))).await.unwrap_err();
    assert_eq!(refused(control).0, 4, "a request id must not hold control characters");
    let large = client
        .submit(&with("context", json!("x".repeat(1 << 20))))
        .await
        .unwrap_err();
    assert_eq!(refused(large), (12, Some("invalid_request".into()), Some(413)));

    client.submit(&submit("x", "t", "result")).await.unwrap();
    let conflict = client.submit(&with("task_type", json!("other"))).await.unwrap_err();
    assert_eq!(refused(conflict), (12, Some("idempotency_conflict".into()), Some(409)));

    for unknown in [client.query("no").await.err(), client.cancel("no").await.err()] {
        assert_eq!(refused(unknown.unwrap()), (12, Some("not_found".into()), Some(404)));
    }
    let mut stream = client.subscribe("no").await.unwrap();
    assert_eq!(refused(stream.next().await.unwrap_err()), (12, Some("not_found".into()), Some(404)));

    let slow = json!({"command": "task_submit", "task_type": "program", "wait": "result", "timeout_ms": 200});
    // The gateway and the worker have the same deadline, so either of them may report the timeout.
    match client.submit(&slow).await {
        Ok(result) => assert_eq!(result["status"], "timeout"),
        Err(error) => assert_eq!(refused(error).0, 5),
    }

    let lost = client.submit(&submit("l", "lost", "result")).await.unwrap();
    assert_eq!((&lost["status"], &lost["error_code"]), (&json!("error"), &json!("unknown_provider")));
}

/// Five failures in a row would open the provider's breaker for all tenants and for a minute.
#[tokio::test]
async fn short_client_deadlines_do_not_open_the_breaker() {
    let deployment = Deployment::start().await;
    let client = deployment.client().await;

    for n in 0..5 {
        let id = format!("late{n}");
        let mut late = submit(&id, "program", "result");
        late["timeout_ms"] = json!(50);
        // Either the gateway or the worker reports the timeout first, so the outcome is not checked.
        let _ = client.submit(&late).await;
        deployment.state(&client, &id, State::Failed).await;
    }

    deployment.go();
    let done = client.submit(&submit("patient", "program", "result")).await.unwrap();
    assert_eq!(done["status"], "success");
}

#[tokio::test]
async fn disconnecting_does_not_cancel_tasks() {
    let deployment = Deployment::start().await;
    let leaving = deployment.client().await;
    let mut stream = leaving.stream(&submit("r", "program", "stream")).await.unwrap();
    stream.next().await.unwrap();

    // A raw v1 connection with five requests in flight, so that the test can close the socket itself.
    let mut raw = UnixStream::connect(deployment.dir.path().join("s")).await.unwrap();
    for n in 0..5_u8 {
        let payload = submit(&format!("q{n}"), "program", "result").to_string();
        raw.write_all(&u32::to_be_bytes(payload.len() as u32 + 6))
            .await
            .unwrap();
        raw.write_all(&[1, 1]).await.unwrap();
        raw.write_all(payload.as_bytes()).await.unwrap();
    }
    let client = deployment.client().await;
    for n in 0..5 {
        deployment.state(&client, &format!("q{n}"), State::Running).await;
    }
    drop((raw, stream, leaving));

    let mut follower = client.subscribe("r").await.unwrap();
    deployment.go();
    while let StreamEvent::Data(data) = follower.next().await.unwrap().expect("the stream has not ended") {
        assert_eq!(data.data.value(), "two\n");
    }

    for id in ["r", "q0", "q1", "q2", "q3", "q4"] {
        deployment.state(&client, id, State::Completed).await;
        assert_eq!(
            client.query(id).await.unwrap().result.unwrap().output,
            Some(Json::of(&json!({"text": "one\ntwo\n"})))
        );
    }
    testkit::eventually(SOON, || async { deployment.count(subjects::STREAM_USAGE).await == 6 }).await;
}

#[tokio::test]
async fn concurrent_requests_receive_their_own_results() {
    let deployment = Deployment::start().await;
    let client = deployment.client().await;

    let many = (0..100).map(|n| {
        let client = client.clone();
        async move {
            let params = json!({"prompt": format!("p{n}")});
            let task = json!({"command": "task_submit", "task_type": "t", "wait": "result", "params": params});
            assert_eq!(client.submit(&task).await.unwrap()["output"]["text"], format!("p{n}"));
        }
    });
    tokio::time::timeout(SOON, futures_util::future::join_all(many))
        .await
        .unwrap();
    testkit::eventually(SOON, || async { deployment.count(subjects::STREAM_USAGE).await == 100 }).await;
}

#[tokio::test]
async fn draining_gateway_finishes_streams_and_refuses_new_requests() {
    let mut deployment = Deployment::start().await;
    let client = deployment.client().await;
    let mut stream = client.stream(&submit("r", "program", "stream")).await.unwrap();
    stream.next().await.unwrap();

    deployment.gateway.cancel();
    testkit::eventually(SOON, || async { client.query("r").await.is_err_and(|e| refused(e).0 == 6) }).await;
    deployment.go();
    let mut ends = 0;
    while let Some(event) = stream.next().await.unwrap() {
        ends += usize::from(matches!(event, StreamEvent::Complete(_)));
    }
    assert_eq!(ends, 1);

    tokio::time::timeout(SOON, deployment.parts.join_next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    deployment.others.cancel();
    while let Some(part) = tokio::time::timeout(SOON, deployment.parts.join_next()).await.unwrap() {
        part.unwrap();
    }
    assert!(matches!(client.ping().await, Err(Error::Closed)));
}

/// A client of a fake gateway, which accepts one connection, reads a few bytes, sends `answer` and closes.
async fn scripted(answer: Vec<u8>) -> (TempDir, Client) {
    let dir = TempDir::new().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let client = Client::connect(&dir.path().join("s")).await.unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 20]).await;
        let _ = stream.write_all(&answer).await;
    });
    (dir, client)
}

fn frame(version: wire::ipc::Version, kind: u8, payload: &str) -> Vec<u8> {
    let mut bytes = bytes::BytesMut::new();
    wire::ipc::Frame { version, kind, flags: 0, payload: payload.as_bytes().to_vec().into() }.encode(&mut bytes);
    bytes.to_vec()
}

#[tokio::test]
async fn closed_connection_fails_all_requests_in_flight() {
    use wire::ipc::Version::{V1, V2};
    let first = V2 { request_id: 1, deadline_ms: 0 };
    let overloaded = r#"{"ok":false,"error":{"code":10,"message":"Too many connections","retry_after_ms":100}}"#;
    let data = frame(first, 0x05, r#"{"task_id":"t","seq":0,"data":"half"}"#);

    let (_dir, client) = scripted(frame(V1, 0x11, overloaded)).await;
    let both = futures_util::future::join(client.ping(), client.ping()).await;
    for outcome in [both.0, both.1] {
        assert_eq!(refused(outcome.unwrap_err()).0, 10, "every request fails with the gateway's reason");
    }

    for (name, answer) in [("nothing", vec![]), ("half a frame", vec![0, 0, 0, 50, 2])] {
        let (_dir, client) = scripted(answer).await;
        assert!(matches!(client.ping().await, Err(Error::Closed)), "{name}");
    }

    for (name, answer) in [
        ("no frame", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("an unknown frame type", frame(first, 0x7f, "")),
        ("v1 without an error", frame(V1, 0x10, "?")),
    ] {
        let (_dir, client) = scripted(answer).await;
        assert!(matches!(client.ping().await, Err(Error::Protocol(_))), "{name}");
    }

    let (_dir, client) = scripted(data).await;
    let mut stream = client.subscribe("t").await.unwrap();
    assert!(matches!(stream.next().await, Ok(Some(StreamEvent::Data(_)))));
    assert!(matches!(stream.next().await, Err(Error::Closed)), "an interrupted stream is not complete");
    assert!(matches!(stream.next().await, Ok(None)));
}
