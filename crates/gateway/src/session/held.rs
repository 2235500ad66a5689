//! Replies that wait for their client to read, and their shares of the reply budget.

use crate::Shared;
use crate::byte_budget;
use crate::reply::Reply;
use wire::ipc::ErrorCode;

/// A reply up to this size is not charged against the budget; the limits on requests in flight bound their number.
const FREE_REPLY: usize = 4 * 1024;

#[derive(Debug)]
pub struct Held {
    pub reply: Reply,
    /// Returned when the reply moves to the outbox, or when the session ends.
    _budget: Option<byte_budget::Share>,
}

impl From<Reply> for Held {
    fn from(reply: Reply) -> Self {
        Self { reply, _budget: None }
    }
}

impl Held {
    /// Holds the reply, or replaces it with `OVERLOADED` if [`crate::Config::reply_budget`] is exhausted.
    pub fn within_budget(shared: &Shared, reply: Reply) -> Self {
        if reply.payload.len() <= FREE_REPLY {
            return reply.into();
        }
        let claim = shared.admission.settings().replies.claim(reply.payload.len());
        match claim.try_take() {
            Some(share) => Self { reply, _budget: Some(share) },
            None => overloaded(shared, reply).into(),
        }
    }
}

fn overloaded(shared: &Shared, reply: Reply) -> Reply {
    shared.stats.failed(ErrorCode::Overloaded);
    let text = "The request was carried out, but its answer was dropped: unread answers have exhausted \
                gateway.reply_budget; read the answers that are waiting, then query the task";
    let error = Reply::overloaded(text);
    if reply.ends_stream() { error.in_stream() } else { error }
}

#[cfg(test)]
mod tests {
    use crate::{Config, Gateway, bind, connection};
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

    /// Answers decide requests with large decisions. The reply subject of the task `held` goes to the channel instead.
    async fn large_answers(bus: &Bus) -> tokio::sync::mpsc::Receiver<Arc<str>> {
        let mut requests = bus.subscribe(wire::subjects::DECIDE, None, 4096).await.unwrap();

        let (bus, (sender, held)) = (bus.clone(), tokio::sync::mpsc::channel(1));
        tokio::spawn(async move {
            while let Some(message) = requests.next().await {
                let request: Value = serde_json::from_slice(&message.payload).unwrap();
                let subject = message.reply.unwrap();
                if request["request_id"] == "held" {
                    sender.send(subject).await.unwrap();
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
        let uid = gateway.shared.admission.uid();
        tokio::spawn(connection::run(gateway.clone(), stream, uid, CancellationToken::new()));
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
                .expect("an answer arrives in time");
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
    async fn unread_replies_stay_within_the_reply_budget() {
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

        let budget = || gateway.shared.admission.settings().replies.left();
        testkit::eventually(PATIENCE, async || gateway.shared.admission.requests_held() == 0 && budget() < BUDGET)
            .await;

        // A client that reads is served, even though the budget is exhausted.
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

        // Each socket and outbox holds some replies in addition to the budget.
        let most = BUDGET / LARGE + CLIENTS * 4;
        assert!((BUDGET / LARGE / 2..=most).contains(&whole), "{whole} of {most}");

        testkit::eventually(PATIENCE, async || budget() == BUDGET).await;
    }

    #[tokio::test]
    async fn replies_behind_a_slow_one_stay_within_the_reply_budget_and_in_order() {
        const BEHIND: usize = 40;
        let dir = tempfile::tempdir().unwrap();
        let (gateway, bus) = start(dir.path(), 100).await;
        let mut held = large_answers(&bus).await;

        let (mut client, mut input) = (connect(&gateway), BytesMut::new());
        submit(&mut client, Version::V1, "held").await;
        let slow = held.recv().await.unwrap();

        for id in 0..BEHIND {
            submit(&mut client, Version::V1, &id.to_string()).await;
            testkit::eventually(PATIENCE, async || gateway.shared.admission.requests_held() == 1).await;
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
