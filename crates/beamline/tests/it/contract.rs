//! The router accepts every golden message and every field as the gateway sends it. The real gateway, router and worker
//! run on one bus, and the tests decode the messages between them with the contract's types.

use bus::{Bus, Subscription};
use bytes::BytesMut;
use serde_json::{Map, Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wire::ipc::{Decoder, Frame, FrameType, StreamComplete, TaskAnswer, Version};
use wire::router::{DecideRequest, DecideResponse, ExecResult, TaskQuery};
use wire::subjects;

const PATIENCE: Duration = Duration::from_secs(30);

struct Parts {
    dir: tempfile::TempDir,
    bus: Bus,
    cancel: CancellationToken,
    running: Vec<JoinHandle<()>>,
}

impl Parts {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let cancel = CancellationToken::new();
        let policies = dir.path().join("policies");
        let router = router::bind(router::Config { policies, ..router::Config::default() }, bus.clone())
            .await
            .unwrap();
        let worker = worker::bind(worker::Config::default(), bus.clone()).await.unwrap();

        let config = gateway::Config { socket: dir.path().join("s"), ..gateway::Config::default() };
        let gateway = gateway::bind(config, bus.clone()).await.unwrap();

        let [of_router, of_worker, of_gateway] = std::array::from_fn(|_| cancel.clone());
        let running = vec![
            tokio::spawn(async { router.run(of_router).await.unwrap() }),
            tokio::spawn(async { worker.run(of_worker).await.unwrap() }),
            tokio::spawn(async { gateway.run(of_gateway).await.unwrap() }),
        ];
        Self { dir, bus, cancel, running }
    }

    async fn connect(&self) -> Raw {
        Raw {
            stream: UnixStream::connect(self.dir.path().join("s")).await.unwrap(),
            input: BytesMut::new(),
        }
    }

    async fn end(self) {
        self.cancel.cancel();
        for part in self.running {
            part.await.unwrap();
        }
    }
}

struct Raw {
    stream: UnixStream,
    input: BytesMut,
}

impl Raw {
    async fn send(&mut self, version: Version, kind: FrameType, payload: &str) {
        let mut bytes = BytesMut::new();
        Frame::new(version, kind, payload.as_bytes().to_vec()).encode(&mut bytes);
        self.stream.write_all(&bytes).await.unwrap();
    }

    async fn next(&mut self) -> (FrameType, Value) {
        let next = async {
            loop {
                if let Some(frame) = Decoder.decode(&mut self.input).unwrap() {
                    return (frame.frame_type().unwrap(), serde_json::from_slice(&frame.payload).unwrap_or_default());
                }
                assert_ne!(self.stream.read_buf(&mut self.input).await.unwrap(), 0, "the gateway closed");
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("an answer in time")
    }

    /// Returns the last frame of an answer.
    async fn last(&mut self) -> (FrameType, Value) {
        loop {
            match self.next().await {
                (FrameType::StreamData, piece) => assert!(piece["seq"].is_u64() && piece.get("data").is_some()),
                last => return last,
            }
        }
    }
}

/// Returns the next decide request on the bus. Its type loses and adds nothing, and its headers agree with it.
async fn sent(wire: &mut Subscription) -> DecideRequest {
    let message = tokio::time::timeout(PATIENCE, wire.next())
        .await
        .expect("a request on the wire")
        .unwrap();
    let request: DecideRequest = serde_json::from_slice(&message.payload).unwrap();
    let payload: Value = serde_json::from_slice(&message.payload).unwrap();
    assert_eq!(serde_json::to_value(&request).unwrap(), payload);

    let header = |name| message.headers.get(name);
    assert_eq!(header("tenant_id"), Some(&*request.tenant_id));
    assert_eq!(header("version"), Some(&*request.version));
    assert_eq!(header("trace_id"), request.trace_id.as_deref());
    request
}

/// Sends a submit, and checks the decide request, the router's acceptance and the client's answer.
async fn accepted(raw: &mut Raw, wire: &mut Subscription, version: Version, payload: &str) {
    let submit: Value = serde_json::from_str(payload).unwrap();
    raw.send(version, FrameType::TaskSubmit, payload).await;

    let (kind, answer) = raw.last().await;
    let request = sent(wire).await;
    assert_eq!(request.task.task_type, submit["task_type"]);

    let task = Value::Object(request.task.payload.unwrap().map());
    let of_task = ["file", "line", "context", "params"];
    let given = of_task
        .iter()
        .filter_map(|name| Some((name.to_string(), submit.get(name)?.clone())));
    assert_eq!(task, Value::Object(given.filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>()), "{payload}");

    for (name, value) in [
        ("tenant_id", Some(request.tenant_id.as_str())),
        ("request_id", Some(&request.request_id)),
        ("policy_id", request.policy_id.as_deref()),
        ("idempotency_key", request.idempotency_key.as_deref()),
    ] {
        assert!(
            submit
                .get(name)
                .is_none_or(|given| Some(given.as_str().unwrap()) == value),
            "{name} of {payload}"
        );
    }

    match submit["wait"].as_str() {
        None | Some("decision") => {
            assert_eq!(kind, FrameType::ResponseOk, "{payload}: {answer}");
            let decided: DecideResponse = serde_json::from_value(answer).unwrap();
            assert!(decided.ok && decided.context.request_id == Some(request.request_id), "{payload}");
        }
        Some("result") => {
            assert_eq!(kind, FrameType::ResponseOk, "{payload}: {answer}");
            let result: ExecResult = serde_json::from_value(answer).unwrap();
            assert_eq!(result.request_id, request.request_id);
        }
        Some(_) => {
            assert_eq!(kind, FrameType::StreamComplete, "{payload}: {answer}");
            let complete: StreamComplete = serde_json::from_str(&answer.to_string()).unwrap();
            assert_eq!(complete.task_id, request.request_id);
        }
    }
}

#[tokio::test]
async fn router_understands_every_golden_client_message() {
    let parts = Parts::start().await;
    let mut wire = parts.bus.subscribe(subjects::DECIDE, None, 64).await.unwrap();
    let mut raw = parts.connect().await;

    // The golden messages refer to this task.
    let task = json!({"command": "task_submit", "task_type": "echo", "request_id": "t-1", "wait": "result"});
    accepted(&mut raw, &mut wire, Version::V1, &task.to_string()).await;
    testkit::eventually(PATIENCE, async || {
        let mut raw = parts.connect().await;
        raw.send(Version::V1, FrameType::TaskQuery, r#"{"task_id":"t-1"}"#)
            .await;
        raw.last().await.1["state"] == "completed"
    })
    .await;

    let mut queries = parts.bus.subscribe(subjects::GET_DECISION, None, 64).await.unwrap();
    let golden: Vec<Value> = serde_json::from_str(include_str!("../../../../fixtures/wire/ipc.json")).unwrap();
    for case in &golden {
        let payload = case["payload"].as_str().unwrap();
        let kind = FrameType::from_byte(u8::try_from(case["type"].as_u64().unwrap()).unwrap()).unwrap();
        let version = case["request_id"]
            .as_u64()
            .map_or(Version::V1, |request_id| Version::V2 {
                request_id,
                deadline_ms: u32::try_from(case["deadline_ms"].as_u64().unwrap()).unwrap(),
            });
        let mut raw = parts.connect().await;
        if kind == FrameType::TaskSubmit {
            accepted(&mut raw, &mut wire, version, payload).await;
            continue;
        }

        raw.send(version, kind, payload).await;
        let (answered, answer) = raw.last().await;
        match kind {
            FrameType::TaskQuery | FrameType::TaskCancel => {
                assert_eq!(answered, FrameType::ResponseOk, "{case}: {answer}");
                let task: TaskAnswer = serde_json::from_value(answer).unwrap();
                assert!(task.task_id == "t-1" && task.result.is_some());
            }
            FrameType::StreamSubscribe => assert_eq!(answered, FrameType::StreamComplete, "{case}: {answer}"),
            FrameType::Ping => assert_eq!(answered, FrameType::Pong),
            FrameType::Capabilities => assert_eq!(answer["protocol_versions"], json!([1, 2])),
            // Only the gateway sends the other types; from a client they are refused.
            _ => assert_eq!(answer["error"]["code"], 2, "{case}"),
        }

        if matches!(kind, FrameType::TaskQuery | FrameType::TaskCancel | FrameType::StreamSubscribe) {
            let message = tokio::time::timeout(PATIENCE, queries.next()).await.unwrap().unwrap();
            let query: TaskQuery = serde_json::from_slice(&message.payload).unwrap();
            assert_eq!(query.request_id, "t-1");
            // Whoever waits for the result also says where.
            let waits = kind == FrameType::StreamSubscribe;
            assert_eq!(query.result_subject.is_some(), waits, "{case}");
            if !waits {
                assert_eq!(&*message.payload, br#"{"request_id":"t-1"}"#);
            }
        }
    }
    parts.end().await;
}

#[tokio::test]
async fn router_understands_every_field_of_a_submit() {
    let parts = Parts::start().await;
    let mut wire = parts.bus.subscribe(subjects::DECIDE, None, 64).await.unwrap();
    let (mut v1, mut v2) = (parts.connect().await, parts.connect().await);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let long = "i".repeat(128);
    let fields = [
        json!({}),
        json!({"file": "src/a.rs", "line": 3, "context": ["ü", {"a": [1.5, null]}], "params": {"b": {"c": true}}}),
        json!({"file": null, "line": null, "context": null, "params": null}),
        json!({"file": "", "line": i64::MIN, "context": "", "params": {}}),
        json!({"line": i64::MAX, "context": [u64::MAX, 1e308, 5e-324, -0.0]}),
        json!({"tenant_id": "acme"}),
        json!({"tenant_id": "t".repeat(128), "policy_id": "default"}),
        json!({"trace_id": trace}),
        json!({"trace_id": "not a trace of W3C"}),
        json!({"trace_id": long}),
        json!({"trace_id": "ein Ü", "traceparent": "no parent"}),
        json!({"traceparent": format!("00-{trace}-b7ad6b7169203331-01")}),
        json!({"idempotency_key": "k".repeat(256)}),
        json!({"push_assignment": true}),
        json!({"timeout_ms": 20_000}),
        // No clock may overflow.
        json!({"timeout_ms": u64::MAX}),
        json!({"an unknown one": {"tenant_id": "x"}}),
    ];

    let mut number = 0_u32;
    for fields in &fields {
        for wait in [None, Some("decision"), Some("result"), Some("stream")] {
            for deadline_ms in [None, Some(0), Some(20_000), Some(u32::MAX)] {
                number += 1;
                let mut submit = json!({"command": "task_submit", "task_type": "echo"});
                let object = submit.as_object_mut().unwrap();
                object.extend(fields.as_object().unwrap().clone());
                object.extend(wait.map(|wait| ("wait".into(), wait.into())));
                // Each task has its own id, made of characters that need escaping somewhere.
                let id = format!("{number} ü/.*>\"\\{}", "i".repeat(100));
                object.insert("request_id".into(), id.into());
                // The same key would make them one task.
                if let Some(key) = object.get_mut("idempotency_key") {
                    *key = format!("{number:0>256}").into();
                }

                let (raw, version) = match deadline_ms {
                    None => (&mut v1, Version::V1),
                    Some(deadline_ms) => (&mut v2, Version::V2 { request_id: number.into(), deadline_ms }),
                };
                accepted(raw, &mut wire, version, &submit.to_string()).await;
            }
        }
    }
    parts.end().await;
}

/// A decide request nests the submit more deeply, so that the router refuses some submits that the gateway accepts.
#[tokio::test]
async fn deep_nesting_is_refused_by_the_router_before_the_gateway() {
    let parts = Parts::start().await;
    let mut raw = parts.connect().await;
    let nested = |depth: usize| {
        let context = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        format!(r#"{{"command":"task_submit","task_type":"echo","context":{context}}}"#)
    };
    let mut last = 0;
    for depth in 1..200 {
        raw.send(Version::V1, FrameType::TaskSubmit, &nested(depth)).await;
        let (_, answer) = raw.last().await;

        let code = answer["error"]["code"].as_u64().unwrap_or(0);
        if code == 12 {
            assert_eq!(
                (&answer["error"]["status"], &answer["error"]["reason"]),
                (&json!(400), &json!("invalid_request"))
            );
        }

        let order = [0, 12, 4].iter().position(|known| *known == code);
        let order = order.unwrap_or_else(|| panic!("{depth}: {answer}"));
        assert!(order >= last, "{depth}: {answer}");
        last = order;
    }
    assert_eq!(last, 2);
    parts.end().await;
}

/// Programs that repeat a submit with its key, without a request id of their own, get the first task's result.
#[tokio::test]
async fn repeat_with_a_key_waits_for_the_first_task() {
    let parts = Parts::start().await;
    let mut raw = parts.connect().await;
    let submit = |wait: &str, key: &str| {
        json!({"command": "task_submit", "task_type": "echo", "wait": wait, "idempotency_key": key}).to_string()
    };

    for (wait, kind) in [("result", FrameType::ResponseOk), ("stream", FrameType::StreamComplete)] {
        let mut tasks = Vec::new();
        for _ in 0..3 {
            raw.send(Version::V1, FrameType::TaskSubmit, &submit(wait, wait)).await;
            let (answered, answer) = raw.last().await;
            assert_eq!(answered, kind, "{answer}");
            let result = if wait == "stream" {
                answer["result"].clone()
            } else {
                answer
            };
            tasks.push((result["request_id"].clone(), result["assignment_id"].clone()));
        }
        assert!(tasks[0].0.is_string() && tasks.iter().all(|task| *task == tasks[0]), "{tasks:?}");
    }

    // What is waited for is not part of the task, but a decision alone pushes none.
    raw.send(Version::V1, FrameType::TaskSubmit, &submit("decision", "result"))
        .await;
    let (_, answer) = raw.last().await;
    assert_eq!(answer["error"]["reason"], "idempotency_conflict", "{answer}");
    parts.end().await;
}
