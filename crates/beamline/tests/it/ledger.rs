//! The ledger of a test: what clients were promised, compared with what the bus holds in the end.

use bus::{Bus, ConsumerConfig};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use testkit::eventually;
use tokio::time::Instant;
use wire::router::{ResultStatus, TaskState, Usage};
use wire::subjects;

/// Longer than the 30 s after which a stream delivers again what a dead process had taken, twice over.
const PATIENCE: Duration = Duration::from_secs(90);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
const TENANT: &str = "default";

/// The accepted tasks, by request id; with the answer, if the client has got one.
#[derive(Default)]
pub struct Ledger(Mutex<BTreeMap<String, Option<Value>>>);

impl Ledger {
    /// A router has accepted the task.
    pub fn accepted(&self, request_id: &str) {
        self.0.lock().entry(request_id.into()).or_default();
    }

    /// The client has the task's result.
    pub fn answered(&self, request_id: &str, answer: Value) {
        self.0.lock().insert(request_id.into(), Some(answer));
    }

    pub fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// Checks that every accepted task ended once: its record is final and agrees with the client's answer, it was
    /// billed once, and nothing of it is left in the streams or among the dead letters.
    pub async fn check(&self, bus: &Bus, seed: u64) {
        let tasks = self.0.lock().clone();
        assert!(!tasks.is_empty(), "seed {seed}: nothing was accepted, so the test shows nothing");
        bus::streams::declare(bus).await.unwrap();

        for (request_id, answer) in &tasks {
            let task = settled(bus, request_id, seed).await;
            let result = task.result.expect("a settled task has a result");
            assert_eq!(task.assignment_id.as_ref(), Some(&result.assignment_id), "seed {seed}: {request_id}");
            if let Some(answer) = answer {
                let output = serde_json::to_value(&result.output).unwrap();
                assert_eq!(answer["output"], output, "seed {seed}: {request_id}");
            }
            assert_eq!(result.status, ResultStatus::Success, "seed {seed}: {request_id}: {:?}", result.error_message);
        }

        let mut bills = BTreeMap::<String, usize>::new();
        for usage in stored::<Usage>(bus, subjects::STREAM_USAGE).await {
            *bills.entry(usage.request_id).or_default() += 1;
        }
        let unbilled: Vec<_> = tasks.keys().filter(|id| !bills.contains_key(*id)).collect();
        assert!(unbilled.is_empty(), "seed {seed}: not billed: {unbilled:?}");
        // Also of a task whose client was cut off before its answer.
        bills.retain(|_, bills| *bills > 1);
        assert!(bills.is_empty(), "seed {seed}: billed more than once: {bills:?}");

        let letters = stored::<Value>(bus, subjects::STREAM_DLQ).await;
        assert!(letters.is_empty(), "seed {seed}: {letters:?}");
        for (stream, consumer) in [(subjects::STREAM_ASSIGN, None), (subjects::STREAM_RESULT, Some("router"))] {
            eventually(PATIENCE, async || left(bus, stream, consumer).await == Some(0)).await;
        }
    }
}

/// The task's record once it has a result.
async fn settled(bus: &Bus, request_id: &str, seed: u64) -> TaskState {
    let end = Instant::now() + PATIENCE;
    loop {
        let found = bus::tasks::load(bus, TENANT, request_id)
            .await
            .map(|record| record.map(|record| record.task));
        if let Ok(Some(task)) = &found
            && task.state.is_final()
            && task.result.is_some()
        {
            return task.clone();
        }
        assert!(Instant::now() < end, "seed {seed}: {request_id} was accepted and did not end: {found:?}");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// The messages that a stream holds, or that its consumer has not settled.
async fn left(bus: &Bus, stream: &str, consumer: Option<&str>) -> Option<u64> {
    let info = bus.stream_info(stream).await.ok()?;
    let Some(consumer) = consumer else {
        return Some(info.messages);
    };
    let backlog = info.consumers.iter().find(|(name, _)| name.starts_with(consumer));
    backlog.map(|(_, backlog)| *backlog)
}

/// All messages of a stream.
async fn stored<T: DeserializeOwned>(bus: &Bus, stream: &'static str) -> Vec<T> {
    static READERS: AtomicU64 = AtomicU64::new(0);
    let count = bus.stream_info(stream).await.unwrap().messages;
    let config = ConsumerConfig {
        stream,
        name: format!("ledger-{}", READERS.fetch_add(1, Relaxed)),
        filter: None,
        ack_wait: PATIENCE,
        max_ack_pending: 100_000,
        max_in_hand: 1000,
        from_start: true,
    };
    let mut consumer = bus.consume(config).await.unwrap();
    let mut found = Vec::new();
    for _ in 0..count {
        let delivery = tokio::time::timeout(PATIENCE, consumer.next())
            .await
            .expect("a stored message")
            .unwrap();
        found.push(serde_json::from_slice(&delivery.message.payload).unwrap());
    }
    found
}
