//! Clients that do not finish their frames, or do not read their answers, cost the gateway a bounded amount of memory
//! and do not delay others. The tests read the peak memory of the real process from the kernel.

use crate::process::Process;
use bus::nats::{Nats, NatsConfig};
use bus::{Bus, Message};
use bytes::BytesMut;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use testkit::{NatsServer, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use wire::ipc::{Decoder, Frame, FrameType, Version};
use wire::limits::IPC_FRAME_MAX;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1024 * 1024;
/// Size of a large answer: close to the default limit of NATS.
const LARGE: usize = 900 * 1024;

struct Stage {
    _nats: NatsServer,
    gateway: Process,
    _responder: JoinSet<()>,
}

impl Stage {
    /// Starts a gateway with these settings, and a scripted router that returns large decisions on request.
    async fn start(settings: &str) -> Self {
        let nats = NatsServer::start().await;
        let bus = Nats::connect(NatsConfig { url: nats.url(), ..NatsConfig::default() })
            .await
            .unwrap();
        let responder = responder(bus).await;
        let url = nats.url();
        let settings = format!("roles = \"gateway\"\n[nats]\nurl = \"{url}\"\n[gateway]\n{settings}");
        let gateway = Process::start_with_settings(&settings).await;
        Self { _nats: nats, gateway, _responder: responder }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.gateway.socket()).await.unwrap()
    }

    /// The peak resident memory, in bytes. The kernel counts in steps, so a later reading may be a little lower.
    fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.gateway.ready["pid"])).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    fn descriptors(&self) -> u64 {
        let pid = self.gateway.ready["pid"].as_u64().unwrap();
        checks::process::look(u32::try_from(pid).unwrap()).unwrap().descriptors
    }

    async fn metric(&self, name: &str) -> f64 {
        let (status, metrics) = crate::journey::get(&format!("http://{}/metrics", self.gateway.ops())).await;
        assert_eq!(status, 200);
        let value = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value
            .unwrap_or_else(|| panic!("no {name} in {metrics}"))
            .parse()
            .unwrap()
    }
}

async fn responder(bus: Bus) -> JoinSet<()> {
    let mut requests = bus.subscribe(wire::subjects::DECIDE, None, 4096).await.unwrap();
    bus.health().await.unwrap();

    let mut running = JoinSet::new();
    running.spawn(async move {
        while let Some(message) = requests.next().await {
            let request: Value = serde_json::from_slice(&message.payload).unwrap();
            if request["task"]["type"] == "never" {
                continue;
            }
            let blob = if request["task"]["type"] == "large" {
                "x".repeat(LARGE)
            } else {
                String::new()
            };

            let answer = json!({"ok": true, "decision": {"blob": blob}, "context": {}});
            let subject = message.reply.unwrap();
            bus.publish(Message { subject, payload: answer.to_string().into(), ..Message::default() })
                .await
                .unwrap();
        }
    });
    running
}

fn frame(version: Version, kind: FrameType, payload: String) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    Frame::new(version, kind, payload).encode(&mut bytes);
    bytes.to_vec()
}

fn submit(version: Version, task_type: &str) -> Vec<u8> {
    let submit = json!({"command": "task_submit", "task_type": task_type});
    frame(version, FrameType::TaskSubmit, submit.to_string())
}

/// Returns the error code of the next answer: 0 if it is no error, `None` if the gateway has closed the connection.
async fn code(stream: &mut UnixStream, input: &mut BytesMut) -> Option<u64> {
    let next = async {
        loop {
            if let Some(frame) = Decoder.decode(input).unwrap() {
                let value: Value = serde_json::from_slice(&frame.payload).unwrap_or_default();
                return Some(value["error"]["code"].as_u64().unwrap_or(0));
            }
            if stream.read_buf(input).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    };
    tokio::time::timeout(PATIENCE, next).await.expect("an answer in time")
}

#[tokio::test]
async fn unfinished_frames_cost_no_more_than_the_receive_budget() {
    const CLIENTS: usize = 60;
    /// The receive budget is 64 MiB.
    const FIT: usize = 16;
    let stage = Stage::start("read_timeout = \"8s\"\n").await;
    let mut input = BytesMut::new();
    let mut other = stage.connect().await;
    other.write_all(&submit(Version::V1, "small")).await.unwrap();
    assert_eq!(code(&mut other, &mut input).await, Some(0));

    let before = stage.peak();

    let filler = frame(Version::V1, FrameType::TaskSubmit, "x".repeat(IPC_FRAME_MAX - 6));
    let filler: Arc<[u8]> = filler.into();
    let sent = Arc::new(AtomicUsize::new(0));
    let last = Arc::new(tokio::sync::Semaphore::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (mut stream, filler, sent, last) = (stage.connect().await, filler.clone(), sent.clone(), last.clone());
        clients.spawn(async move {
            let (mut reader, mut writer) = stream.split();
            let all_but_one_byte = async {
                if writer.write_all(&filler[..IPC_FRAME_MAX - 1]).await.is_ok() {
                    sent.fetch_add(1, SeqCst);
                    last.acquire().await.unwrap().forget();
                    let _ = writer.write_all(&filler[IPC_FRAME_MAX - 1..]).await;
                }
                std::future::pending::<()>().await;
            };
            let mut received = BytesMut::new();
            tokio::select! {
                () = all_but_one_byte => {}
                _ = reader.read_buf(&mut received) => {}
            }
            code(&mut stream, &mut received).await
        });
    }
    // The frames that fit into the budget are read up to their last byte; the others wait unread.
    eventually(PATIENCE, async || sent.load(SeqCst) >= FIT).await;
    // Other clients do not wait.
    for _ in 0..20 {
        other.write_all(&submit(Version::V1, "small")).await.unwrap();
        assert_eq!(code(&mut other, &mut input).await, Some(0));
    }
    assert_eq!(sent.load(SeqCst), FIT, "the gateway read more frames than fit into the budget");
    // Frames that become complete make room for as many others.
    last.add_permits(3);
    eventually(PATIENCE, async || sent.load(SeqCst) >= FIT + 3).await;
    assert_eq!(sent.load(SeqCst), FIT + 3);
    // The others never become complete: a frame that was being read is too slow, one that was not gets no budget.
    let mut codes = [0; 3];
    while let Some(ended) = clients.join_next().await {
        let code = ended.unwrap();
        let place = [4, 5, 10].iter().position(|known| Some(*known) == code);
        codes[place.unwrap_or_else(|| panic!("ended with {code:?}"))] += 1;
    }
    let [complete, slow, no_room] = codes;
    assert_eq!((complete, complete + slow + no_room), (3, CLIENTS), "{codes:?}");
    assert!(slow >= FIT - 3, "{codes:?}");
    eventually(PATIENCE, async || stage.metric("beamline_gateway_connections").await == 1.0).await;

    let cost = stage.peak().saturating_sub(before);
    eprintln!("{CLIENTS} unfinished frames cost {:.1} MiB at most: {codes:?}", cost as f64 / MIB as f64);
    // Add the buffers of the 44 others, and what the allocator keeps of buffers that have grown.
    assert!(cost < 64 * MIB + 40 * MIB, "{} MiB", cost / MIB);
}

/// Returns the bytes that `clients` cost which send `questions` and do not read. Meanwhile others get answers, and in
/// the end the write timeout disconnects the clients.
async fn unread(settings: &str, clients: usize, questions: &[u8]) -> u64 {
    let stage = Stage::start(&format!("write_timeout = \"3s\"\n{settings}")).await;
    let mut input = BytesMut::new();
    let mut other = stage.connect().await;
    other.write_all(&submit(Version::V1, "large")).await.unwrap();
    assert_eq!(code(&mut other, &mut input).await, Some(0));
    let before = stage.peak();
    let mut slow = Vec::new();
    for _ in 0..clients {
        let mut stream = stage.connect().await;
        stream.write_all(questions).await.unwrap();
        slow.push(stream);
    }
    eventually(PATIENCE, async || stage.metric("beamline_gateway_connections").await == 1.0 + clients as f64).await;

    for _ in 0..50 {
        other.write_all(&submit(Version::V1, "small")).await.unwrap();
        assert_eq!(code(&mut other, &mut input).await, Some(0));
    }
    eventually(PATIENCE, async || stage.metric("beamline_gateway_connections").await == 1.0).await;
    eventually(PATIENCE, async || stage.metric("beamline_gateway_in_flight").await == 0.0).await;

    for mut stream in slow {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        assert!(rest.len() < MIB as usize, "{} bytes were written to one that did not read", rest.len());
    }
    let cost = stage.peak().saturating_sub(before);
    eprintln!("{clients} clients that do not read cost {:.1} MiB at most", cost as f64 / MIB as f64);
    cost
}

#[tokio::test]
async fn unread_small_answers_are_not_produced() {
    // Each client asks for four megabytes of answers with sixty kilobytes of requests.
    let questions = frame(Version::V1, FrameType::Capabilities, String::new()).repeat(10_000);
    let cost = unread("", 50, &questions).await;
    assert!(cost < 70 * MIB, "{} MiB", cost / MIB);
}

#[tokio::test]
async fn unread_large_answers_are_bounded_by_the_in_flight_limit() {
    let mut questions = Vec::new();
    for request_id in 0..20 {
        questions.extend(submit(Version::V2 { request_id, deadline_ms: 0 }, "large"));
    }
    // Of 200 requests 40 are in flight, with 35 MiB; the others are refused.
    let cost = unread("max_in_flight = 64\nmax_in_flight_v2 = 4\n", 10, &questions).await;
    // Each answer exists twice, as it came from the bus and as it is written. The allocator may keep half of that
    // again.
    assert!(cost < 3 * 40 * LARGE as u64 + 20 * MIB, "{} MiB", cost / MIB);
}

#[tokio::test]
async fn clients_that_leave_with_replies_pending_leave_nothing_behind() {
    const ROUNDS: usize = 5;
    const AT_ONCE: usize = 600;
    let stage = Stage::start("max_in_flight = 2000\n").await;
    let mut input = BytesMut::new();
    let mut other = stage.connect().await;
    other.write_all(&submit(Version::V1, "small")).await.unwrap();
    assert_eq!(code(&mut other, &mut input).await, Some(0));

    let descriptors = stage.descriptors();
    let never = [submit(Version::V2 { request_id: 1, deadline_ms: u32::MAX }, "never"), submit(Version::V1, "never")];
    let never = [&never.concat()[..], &frame(Version::V1, FrameType::TaskSubmit, stream())].concat();

    let mut after_the_first = 0;
    for round in 0..ROUNDS {
        let mut clients = Vec::new();
        for _ in 0..AT_ONCE {
            let mut stream = stage.connect().await;
            stream.write_all(&never).await.unwrap();
            clients.push(stream);
        }

        eventually(PATIENCE, async || stage.metric("beamline_gateway_in_flight").await >= AT_ONCE as f64).await;
        drop(clients);
        eventually(PATIENCE, async || stage.metric("beamline_gateway_in_flight").await == 0.0).await;
        eventually(PATIENCE, async || stage.descriptors() == descriptors).await;
        if round == 0 {
            after_the_first = stage.peak();
        }
    }

    // All slots are free again.
    other.write_all(&submit(Version::V1, "small")).await.unwrap();
    assert_eq!(code(&mut other, &mut input).await, Some(0));

    let grown = stage.peak().saturating_sub(after_the_first);
    eprintln!(
        "{} that left cost {:.1} MiB after the first {AT_ONCE}",
        (ROUNDS - 1) * AT_ONCE,
        grown as f64 / MIB as f64
    );
    assert!(grown < 20 * MIB, "{} MiB", grown / MIB);
}

fn stream() -> String {
    json!({"command": "task_submit", "task_type": "never", "wait": "stream"}).to_string()
}
