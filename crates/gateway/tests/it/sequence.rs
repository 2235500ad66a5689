//! Plays a sequence of client and router actions against a real gateway, then checks the invariants: each request has
//! exactly one answer, v1 in order and v2 by its id, and nothing is left in flight.

use crate::script::{Case, Fate, SHORT, Script, task_id};
use bytes::BytesMut;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use wire::ipc::{Decoder, Frame, FrameType, Version};
use wire::status::GatewayStatus;

/// A case that takes longer is considered hung.
const PATIENCE: Duration = Duration::from_secs(10);
/// Actions played per sequence; further ones are ignored.
const ACTIONS_MAX: usize = 64;
const LONG_MS: u32 = 8_000;

#[derive(Debug, Clone)]
pub enum Action {
    /// The client makes a request: v2 with this id, or v1.
    Ask { v2: Option<u8>, what: What },
    /// The client writes all pending requests, `cut` bytes at a time (0: at once).
    Write { cut: u8 },
    /// The router releases this many held replies.
    Release { replies: u8 },
    /// The gateway begins to drain.
    Drain,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum What {
    Ping,
    Capabilities,
    Task {
        kind: Kind,
        fate: Fate,
        chunks: u8,
        size: u16,
    },
    Unfit(Unfit),
    /// Bytes that are not a frame, from [`End::Violation`], with the expected error code.
    Broken(u16),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Decision,
    Result,
    Stream,
    Query,
    Cancel,
    Subscribe,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    Type,
    ServerType,
    Json,
    Field,
    /// In v2 unknown flags, in v1 a submit with an empty task type.
    Flags,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client closes its sending side and keeps reading.
    HalfClose,
    /// The client closes its sending side in the middle of a frame.
    Cut,
    Close,
    /// The client sends bytes that are not a frame; the expected error code.
    Violation(u16),
}

#[derive(Debug, Clone)]
pub struct Sequence {
    pub actions: Vec<Action>,
    pub end: End,
    /// The client reads nothing before it has written everything.
    pub reads_late: bool,
}

struct Asked {
    version: Version,
    what: What,
    id: String,
}

/// A gateway, its scripted router, and the number of requests that the gateway must have admitted.
pub struct World {
    dir: tempfile::TempDir,
    bus: bus::Bus,
    script: Script,
    /// Stops the router.
    _stop: DropGuard,
    cancel: CancellationToken,
    running: tokio::task::JoinHandle<Result<(), gateway::Error>>,
    number: u64,
    /// Requests whose answers show that they were admitted.
    answered: u64,
    /// Requests without an answer, which may have been admitted.
    unknown: u64,
}

/// All frames that answer one request.
#[derive(Debug)]
struct Answer {
    output: Vec<Frame>,
    last: Frame,
}

impl World {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let breaker = gateway::BreakerConfig {
            consecutive_failures: u32::MAX,
            failure_rate: 2.0,
            ..gateway::BreakerConfig::default()
        };
        let config = gateway::Config {
            socket: dir.path().join("s"),
            max_in_flight: 24,
            max_in_flight_v1: 4,
            max_in_flight_v2: 8,
            request_timeout: Duration::from_millis(LONG_MS.into()),
            read_timeout: PATIENCE,
            drain_timeout: Duration::from_millis(100),
            receive_budget: 64 * 1024,
            breaker,
            ..gateway::Config::default()
        };

        let stop = CancellationToken::new();
        let script = Script::start(&bus, &stop).await;
        let bound = gateway::bind(config, bus.clone()).await.unwrap();
        let cancel = CancellationToken::new();
        let running = tokio::spawn(bound.run(cancel.clone()));
        Self {
            dir,
            bus,
            script,
            _stop: stop.drop_guard(),
            cancel,
            running,
            number: 0,
            answered: 0,
            unknown: 0,
        }
    }

    /// Panics if an invariant is violated. A sequence with a drain needs a world of its own.
    pub async fn play(&mut self, sequence: &Sequence) {
        let case = self.script.next_case();
        let stream = UnixStream::connect(self.dir.path().join("s")).await.unwrap();
        let (reader, writer) = stream.into_split();
        let (may_read, hang_up) = (CancellationToken::new(), CancellationToken::new());
        if !sequence.reads_late {
            may_read.cancel();
        }

        let reading = tokio::spawn(read(reader, may_read.clone(), hang_up.clone()));
        // Written concurrently, because the gateway may stop reading until its answers are read.
        let (writes, taken) = mpsc::channel(ACTIONS_MAX + 1);
        let half_close = matches!(sequence.end, End::HalfClose | End::Cut);
        let writing = tokio::spawn(write(writer, taken, half_close, hang_up.clone()));

        let mut asked = Vec::new();
        let mut drained = false;
        let mut unwritten = BytesMut::new();
        for action in sequence.actions.iter().take(ACTIONS_MAX) {
            match action {
                Action::Ask { v2, what } => {
                    self.number += 1;
                    asked.push(ask(*v2, *what, self.number, &mut unwritten));
                }
                Action::Write { cut } => {
                    writes
                        .try_send((unwritten.split(), *cut))
                        .expect("the channel has room for every action");
                    yields().await;
                }
                Action::Release { replies } => case.replies.add_permits((*replies).into()),
                Action::Drain => {
                    drained = true;
                    self.cancel.cancel();
                }
            }
        }

        match sequence.end {
            End::Cut => unwritten.extend_from_slice(&[0, 0, 0x40, 0, 1, 1, b'{']),
            End::Violation(code) => {
                let bytes: &[u8] = match code {
                    1 => &[0, 0, 0, 6, 9, 0xf0],
                    3 => &[0, 0x40, 0, 1],
                    _ => &[0, 0, 0, 5],
                };
                unwritten.extend_from_slice(bytes);
                asked.push(Asked { version: Version::V1, what: What::Broken(code), id: String::new() });
            }
            End::HalfClose | End::Close => {}
        }
        writes
            .try_send((unwritten, 0))
            .expect("the channel has room for every action");
        drop(writes);
        may_read.cancel();
        if sequence.end == End::Close {
            yields().await;
            hang_up.cancel();
        }

        case.replies.add_permits(10_000);
        let received = tokio::time::timeout(PATIENCE, reading)
            .await
            .expect("the connection ends")
            .unwrap();
        drop(writing.await.unwrap());
        let gone = sequence.end == End::Close;
        self.judge(asked, received, gone, drained, &case);
    }

    fn judge(&mut self, asked: Vec<Asked>, received: BytesMut, gone: bool, drained: bool, case: &Case) {
        let mut answers = answers(received, gone);
        let mut requests: BTreeMap<Option<u64>, Vec<Asked>> = BTreeMap::new();
        for asked in asked {
            requests.entry(key(asked.version)).or_default().push(asked);
        }

        for (key, asked) in requests {
            let answers = answers.remove(&key).unwrap_or_default();
            let missing = asked
                .len()
                .checked_sub(answers.len())
                .expect("no more answers than requests");
            assert!(missing == 0 || gone || drained, "{missing} without an answer, {key:?}: {answers:?}");
            for (position, answer) in answers.iter().enumerate() {
                let fits = match key {
                    None => fits(&asked[position], answer, drained),
                    // An answer does not show which request with a reused id it belongs to. An early reuse gets code 4.
                    Some(_) if asked.len() > 1 && error(answer) == Some(4) => true,
                    Some(_) => asked.iter().any(|asked| fits(asked, answer, drained)),
                };
                let what: Vec<What> = asked.iter().map(|asked| asked.what).collect();
                assert!(fits, "{key:?}, {position} of {what:?} got {answer:?}");
                self.answered += u64::from(was_admitted(answer));
            }
            // A disconnected client cannot tell whether its requests were admitted.
            self.unknown += missing as u64;
            if !gone {
                let arrived = case.arrived.lock();
                let seen = (1..)
                    .zip(&asked)
                    .filter(|(_, asked)| arrived.contains(&asked.id))
                    .map(|(position, _)| position);
                let due = if key.is_none() {
                    seen.last().unwrap_or(0)
                } else {
                    seen.count()
                };
                assert!(
                    answers.len() >= due,
                    "the router received {due} requests of {key:?}, but only these were answered: {answers:?}"
                );
            }
        }
        assert!(answers.is_empty(), "answers without a request: {answers:?}");
    }

    /// Waits until nothing is in flight, and checks the number of admitted requests.
    pub async fn settle(&self) {
        let mut statuses = self
            .bus
            .subscribe(wire::subjects::GATEWAY_STATUS, None, 16)
            .await
            .unwrap();

        let idle = async {
            loop {
                let message = statuses.next().await.unwrap();
                let status: GatewayStatus = serde_json::from_slice(&message.payload).unwrap();
                if status.connections == 0 && status.in_flight == 0 {
                    return status.requests_total;
                }
            }
        };

        let taken = tokio::time::timeout(PATIENCE, idle)
            .await
            .expect("nothing is left in flight");
        let known = self.answered..=self.answered + self.unknown;
        assert!(
            known.contains(&taken),
            "the gateway admitted {taken} requests, but its clients account for {known:?}"
        );
    }

    /// Drains the gateway if it is not draining yet, and waits for its end.
    pub async fn end(self) {
        self.cancel.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.running)
            .await
            .expect("all sessions end");
        ended.unwrap().unwrap();
        assert!(!self.dir.path().join("s").exists());
    }
}

fn ask(v2: Option<u8>, what: What, number: u64, bytes: &mut BytesMut) -> Asked {
    let mut what = what;
    if let What::Task { kind: Kind::Query | Kind::Cancel | Kind::Subscribe, fate, .. } = &mut what
        && v2.is_none()
        && fate.runs_out()
    {
        // In v1 these requests carry no deadline.
        *fate = Fate::Answered;
    }

    let (mut id, mut deadline_ms) = (String::new(), LONG_MS);
    let (kind, payload) = match what {
        What::Ping => (FrameType::Ping as u8, String::new()),
        What::Capabilities => (FrameType::Capabilities as u8, String::new()),
        What::Task { kind, fate, chunks, size } => {
            id = task_id(fate, chunks, number);
            if fate.runs_out() {
                deadline_ms = u32::try_from(SHORT.as_millis()).unwrap();
            }
            let submit = |wait: &str| {
                let context = "x".repeat(size.into());
                let submit = json!({"command": "task_submit", "task_type": "t", "request_id": id, "wait": wait,
                    "timeout_ms": deadline_ms, "context": context});
                (FrameType::TaskSubmit as u8, submit.to_string())
            };
            let task = |kind: FrameType| (kind as u8, json!({"task_id": id}).to_string());
            match kind {
                Kind::Decision => submit("decision"),
                Kind::Result => submit("result"),
                Kind::Stream => submit("stream"),
                Kind::Query => task(FrameType::TaskQuery),
                Kind::Cancel => task(FrameType::TaskCancel),
                Kind::Subscribe => task(FrameType::StreamSubscribe),
            }
        }
        What::Unfit(Unfit::Type) => (0x7f, "{}".into()),
        What::Unfit(Unfit::ServerType) => (FrameType::ResponseOk as u8, "{}".into()),
        What::Unfit(Unfit::Json) => (FrameType::TaskSubmit as u8, "{".into()),
        What::Unfit(Unfit::Field | Unfit::Flags) => {
            (FrameType::TaskSubmit as u8, r#"{"command":"task_submit","task_type":""}"#.into())
        }
        What::Broken(_) => unreachable!("only the end of a sequence breaks the framing"),
    };

    let version = v2.map_or(Version::V1, |id| Version::V2 { request_id: id.into(), deadline_ms });
    let flags = if v2.is_some() && what == What::Unfit(Unfit::Flags) {
        1
    } else {
        0
    };
    Frame { version, kind, flags, payload: payload.into() }.encode(bytes);
    Asked { version, what, id }
}

/// Lets the other tasks run.
async fn yields() {
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
}

async fn read(mut reader: OwnedReadHalf, may_read: CancellationToken, hang_up: CancellationToken) -> BytesMut {
    let mut received = BytesMut::new();
    let all = async {
        may_read.cancelled().await;
        while reader.read_buf(&mut received).await.unwrap_or(0) > 0 {}
    };

    tokio::select! {
        () = hang_up.cancelled() => {}
        () = all => {}
    }
    received
}

/// Returns the writing half, so that it stays open.
async fn write(
    mut writer: OwnedWriteHalf,
    mut taken: mpsc::Receiver<(BytesMut, u8)>,
    half_close: bool,
    hang_up: CancellationToken,
) -> OwnedWriteHalf {
    let all = async {
        while let Some((bytes, cut)) = taken.recv().await {
            // Large inputs are written in larger pieces, to bound the time of a case.
            let piece = usize::from(cut) * (1 + bytes.len() / 2048);
            for piece in bytes.chunks(if cut == 0 { bytes.len().max(1) } else { piece }) {
                // The gateway may have closed the connection, by a drain or after a framing error.
                if writer.write_all(piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        if half_close {
            writer.shutdown().await.unwrap_or_default();
        }
    };

    tokio::select! {
        () = hang_up.cancelled() => {}
        () = all => {}
    }
    writer
}

fn key(version: Version) -> Option<u64> {
    match version {
        Version::V1 => None,
        Version::V2 { request_id, .. } => Some(request_id),
    }
}

/// The answers by id (none: v1), in order of arrival.
fn answers(mut received: BytesMut, gone: bool) -> BTreeMap<Option<u64>, Vec<Answer>> {
    let mut answers: BTreeMap<Option<u64>, Vec<Answer>> = BTreeMap::new();
    let mut output: BTreeMap<Option<u64>, Vec<Frame>> = BTreeMap::new();
    while let Some(frame) = Decoder.decode(&mut received).expect("the gateway sends whole frames") {
        let key = key(frame.version);
        if frame.frame_type() == Some(FrameType::StreamData) {
            output.entry(key).or_default().push(frame);
            continue;
        }
        // A refused payload has no output: pieces with its id belong to the request still in flight.
        let refused = json(&frame)["error"]["code"] == 4;
        let output = if refused {
            Vec::new()
        } else {
            output.remove(&key).unwrap_or_default()
        };
        answers.entry(key).or_default().push(Answer { output, last: frame });
    }
    assert!(
        gone || (received.is_empty() && output.is_empty()),
        "the answers end within a stream or a frame: {output:?}, {received:?}"
    );
    answers
}

fn json(frame: &Frame) -> Value {
    serde_json::from_slice(&frame.payload).unwrap_or_default()
}

fn error(answer: &Answer) -> Option<u64> {
    json(&answer.last)["error"]["code"].as_u64()
}

/// Whether the answer shows that the request was admitted.
fn was_admitted(answer: &Answer) -> bool {
    let value = json(&answer.last);
    match answer.last.frame_type() {
        Some(FrameType::ResponseOk) => value.get("protocol_versions").is_none(),
        Some(FrameType::StreamComplete | FrameType::StreamError) => true,
        _ => value.get("context").is_some(),
    }
}

fn fits(asked: &Asked, answer: &Answer, drained: bool) -> bool {
    let (kind, value, code) = (answer.last.frame_type().unwrap(), json(&answer.last), error(answer));
    let What::Task { kind: asked_kind, fate, chunks, .. } = asked.what else {
        return answer.output.is_empty()
            && match asked.what {
                What::Ping => kind == FrameType::Pong,
                What::Capabilities => kind == FrameType::ResponseOk && value["protocol_versions"] == json!([1, 2]),
                What::Unfit(Unfit::Type | Unfit::ServerType) => code == Some(2),
                What::Unfit(_) => code == Some(4) || drained && code == Some(6),
                What::Broken(expected) => code == Some(expected.into()),
                What::Task { .. } => unreachable!(),
            };
    };

    let streams = matches!(asked_kind, Kind::Stream | Kind::Subscribe);
    match code {
        Some(10) => return answer.output.is_empty(),
        Some(6) => return drained,
        _ => {}
    }
    let answered = match asked_kind {
        Kind::Decision => kind == FrameType::ResponseOk && value["context"]["request_id"] == asked.id,
        Kind::Query | Kind::Cancel => kind == FrameType::ResponseOk && value["task_id"] == asked.id,
        Kind::Result => kind == FrameType::ResponseOk && value["request_id"] == asked.id,
        Kind::Stream | Kind::Subscribe => kind == FrameType::StreamComplete && value["task_id"] == asked.id,
    };
    let all_output = (0..chunks).map(|seq| json!({"task_id": asked.id, "seq": seq, "data": seq}));
    let output = answer.output.iter().map(json);
    let whole = if streams {
        output.eq(all_output)
    } else {
        answer.output.is_empty()
    };

    let ran_out = code == Some(5) && answer.output.is_empty();
    match fate {
        Fate::Answered | Fate::Held => answered && whole,
        Fate::Refused => code == Some(12) && answer.output.is_empty(),
        Fate::Nonsense => code == Some(99) && answer.output.is_empty(),
        Fate::Silent => ran_out,
        // If the machine stalls, the answer and the deadline may both have come before the gateway runs again.
        Fate::Late => ran_out || answered,
        Fate::Forgotten if matches!(asked_kind, Kind::Result | Kind::Stream | Kind::Subscribe) => ran_out,
        Fate::Forgotten => answered || ran_out,
    }
}
