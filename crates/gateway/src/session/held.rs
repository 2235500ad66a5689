//! Finished answers that wait for their reader, and their share of the gateway's budget for them.

use crate::Gateway;
use crate::failure::RETRY_AFTER_MS;
use crate::forward::Reply;
use tokio::sync::OwnedSemaphorePermit;
use wire::ipc::{ErrorCode, ErrorPayload, FrameType};

/// An answer up to this size is free of the budget; the limits of requests in flight bound their number.
const FREE_REPLY: usize = 4 * 1024;

#[derive(Debug)]
pub struct Held {
    pub reply: Reply,
    /// Returned when the answer goes on to its client or ends with its session.
    _budget: Option<OwnedSemaphorePermit>,
}

impl From<Reply> for Held {
    fn from(reply: Reply) -> Self {
        Self { reply, _budget: None }
    }
}

impl Held {
    /// The answer, or code 10 in its place if [`crate::Config::reply_budget`] has no room for it.
    pub fn within_budget(gateway: &Gateway, reply: Reply) -> Self {
        if reply.1.len() <= FREE_REPLY {
            return reply.into();
        }
        let live = gateway.config();
        // One that is larger than the whole budget takes all of it.
        let kib = reply.1.len().div_ceil(1024).min(live.reply_budget / 1024);
        let permits = u32::try_from(kib).expect("frames are at most 4 MiB");
        match live.replies.clone().try_acquire_many_owned(permits) {
            Ok(permit) => Self { reply, _budget: Some(permit) },
            Err(_) => overloaded(gateway, reply.0).into(),
        }
    }
}

fn overloaded(gateway: &Gateway, kind: FrameType) -> Reply {
    gateway.stats.failed(ErrorCode::Overloaded);
    let text = "The request was carried out, but too many answers wait for clients that do not read \
                (gateway.reply_budget); read what is there, then query the task";
    let mut error = ErrorPayload::new(ErrorCode::Overloaded, text);
    error.error.retry_after_ms = Some(RETRY_AFTER_MS);
    let in_stream = matches!(kind, FrameType::StreamComplete | FrameType::StreamError);
    (
        if in_stream {
            FrameType::StreamError
        } else {
            FrameType::ResponseError
        },
        error.encode().into(),
    )
}

#[cfg(test)]
mod tests {
    use crate::{Config, Gateway, Peer, bind, session};
    use bus::{Bus, Message};
    use bytes::BytesMut;
    use serde_json::{Value, json};
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio_util::sync::CancellationToken;
    use wire::ipc::{Decoder, ErrorCode, Frame, FrameType, Version};

    const PATIENCE: Duration = Duration::from_secs(20);
    const BUDGET: usize = 2 * 1024 * 1024;
    const LARGE: usize = 256 * 1024;

    async fn start(dir: &std::path::Path, max_in_flight: usize) -> (Arc<Gateway>, Bus) {
        let bus = bus::local::Local::open(dir).await.unwrap();
        let minute = Duration::from_secs(60);
        let (write_timeout, request_timeout) = (minute, minute);
        let config = Config {
            socket: dir.join("s"),
            reply_budget: BUDGET,
            max_in_flight,
            ..Config::default()
        };
        let bound = bind(Config { write_timeout, request_timeout, ..config }, bus.clone())
            .await
            .unwrap();
        (bound.gateway, bus)
    }

    /// Decides with large answers, except about the task `held`: its reply subject comes back.
    async fn large_answers(bus: &Bus) -> tokio::sync::mpsc::Receiver<Arc<str>> {
        let mut requests = bus.subscribe(wire::subjects::DECIDE, None, 4096).await.unwrap();
        let (bus, (tell, held)) = (bus.clone(), tokio::sync::mpsc::channel(1));
        tokio::spawn(async move {
            while let Some(message) = requests.next().await {
                let request: Value = serde_json::from_slice(&message.payload).unwrap();
                let subject = message.reply.unwrap();
                if request["request_id"] == "held" {
                    tell.send(subject).await.unwrap();
                } else {
                    decide(&bus, subject, &request["request_id"]).await;
                }
            }
        });
        held
    }

    async fn decide(bus: &Bus, subject: Arc<str>, id: &Value) {
        let metadata = json!({"large": "x".repeat(LARGE)});
        let answer = json!({"ok": true, "decision": {"metadata": metadata}, "context": {"request_id": id}});
        let payload = answer.to_string().into();
        bus.publish(Message { subject, payload, ..Message::default() })
            .await
            .unwrap();
    }

    fn connect(gateway: &Arc<Gateway>) -> UnixStream {
        let (client, stream) = UnixStream::pair().unwrap();
        let peer = Peer { uid: gateway.uid };
        tokio::spawn(session::run(gateway.clone(), stream, peer, CancellationToken::new()));
        client
    }

    async fn submit(client: &mut UnixStream, version: Version, id: &str) {
        let submit = json!({"command": "task_submit", "task_type": "t", "request_id": id}).to_string();
        let mut bytes = BytesMut::new();
        Frame::new(version, FrameType::TaskSubmit, submit).encode(&mut bytes);
        client.write_all(&bytes).await.unwrap();
    }

    async fn answer(client: &mut UnixStream, input: &mut BytesMut) -> (FrameType, Value) {
        loop {
            if let Some(frame) = Decoder.decode(input).unwrap() {
                return (frame.frame_type().unwrap(), serde_json::from_slice(&frame.payload).unwrap());
            }
            let read = tokio::time::timeout(PATIENCE, client.read_buf(input))
                .await
                .expect("an answer in time");
            assert_ne!(read.unwrap(), 0);
        }
    }

    fn is_overload((kind, answer): &(FrameType, Value)) -> bool {
        let overload = *kind == FrameType::ResponseError;
        assert!(overload || *kind == FrameType::ResponseOk, "{answer}");
        if overload {
            assert_eq!(answer["error"]["code"], ErrorCode::Overloaded as u64, "{answer}");
            assert!(answer["error"]["retry_after_ms"].as_u64().is_some_and(|ms| ms > 0), "{answer}");
        }
        overload
    }

    #[tokio::test]
    async fn answers_that_nobody_reads_stay_within_the_reply_budget() {
        const CLIENTS: usize = 3;
        const EACH: usize = 20;
        let dir = tempfile::tempdir().unwrap();
        let (gateway, bus) = start(dir.path(), CLIENTS * EACH).await;
        let _held = large_answers(&bus).await;
        let mut silent: Vec<UnixStream> = (0..CLIENTS).map(|_| connect(&gateway)).collect();
        for (at, client) in silent.iter_mut().enumerate() {
            for id in 0..EACH {
                let version = Version::V2 { request_id: id as u64, deadline_ms: 60_000 };
                submit(client, version, &format!("{at}-{id}")).await;
            }
        }
        let budget = || gateway.config().replies.available_permits();
        testkit::eventually(PATIENCE, async || gateway.in_flight.held() == 0 && budget() < BUDGET / 1024).await;

        // Who reads is served, also with what has no room in the budget.
        let (mut reader, mut input) = (connect(&gateway), BytesMut::new());
        submit(&mut reader, Version::V1, "read").await;
        assert!(!is_overload(&answer(&mut reader, &mut input).await));

        let mut whole = 0;
        for client in &mut silent {
            let mut input = BytesMut::new();
            for _ in 0..EACH {
                whole += usize::from(!is_overload(&answer(client, &mut input).await));
            }
        }
        // Beside the budget: what each socket and output have taken.
        let most = BUDGET / LARGE + CLIENTS * 4;
        assert!((BUDGET / LARGE / 2..=most).contains(&whole), "{whole} of {most}");
        testkit::eventually(PATIENCE, async || budget() == BUDGET / 1024).await;
    }

    #[tokio::test]
    async fn answers_behind_a_slow_one_stay_within_the_reply_budget_and_in_order() {
        const BEHIND: usize = 40;
        let dir = tempfile::tempdir().unwrap();
        let (gateway, bus) = start(dir.path(), 100).await;
        let mut held = large_answers(&bus).await;
        let (mut client, mut input) = (connect(&gateway), BytesMut::new());
        submit(&mut client, Version::V1, "held").await;
        let slow = held.recv().await.unwrap();
        for id in 0..BEHIND {
            submit(&mut client, Version::V1, &id.to_string()).await;
            testkit::eventually(PATIENCE, async || gateway.in_flight.held() == 1).await;
        }
        decide(&bus, slow, &json!("held")).await;
        let first = answer(&mut client, &mut input).await;
        assert_eq!(first.1["context"]["request_id"], "held");
        let mut whole = Vec::new();
        for _ in 0..BEHIND {
            let next = answer(&mut client, &mut input).await;
            if !is_overload(&next) {
                whole.push(
                    next.1["context"]["request_id"]
                        .as_str()
                        .unwrap()
                        .parse::<usize>()
                        .unwrap(),
                );
            }
        }
        assert!(whole.is_sorted() && (1..=BUDGET / LARGE).contains(&whole.len()), "{whole:?}");
    }
}
