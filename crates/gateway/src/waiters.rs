//! Who waits for which result: one subscription to the results for all requests of the gateway.

use crate::Gateway;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use wire::router::ExecResult;

/// Results that may wait to be handed out; one that is dropped is found by the next look at the task's state.
pub const QUEUE_MAX: usize = 65_536;

#[derive(Default)]
pub struct Waiters(Mutex<Table>);

#[derive(Default)]
struct Table {
    next: u64,
    by_request: HashMap<String, Vec<(u64, oneshot::Sender<Finished>)>>,
}

/// A result as it was published, and what of it the gateway reads.
#[derive(Debug, Clone)]
pub struct Finished {
    pub result: Bytes,
    pub chunks: Option<u64>,
}

impl Finished {
    /// The plain result: as it came, or taken out of its envelope.
    fn new(payload: &Bytes) -> Option<(String, Self)> {
        let result = ExecResult::decode(payload).ok()?;
        let enveloped = serde_json::from_slice::<Envelope>(payload).is_ok_and(|e| e.kind.is_some());
        let bytes = if enveloped { serde_json::to_vec(&result).ok()?.into() } else { payload.clone() };
        Some((result.request_id, Self { result: bytes, chunks: result.chunks }))
    }

    pub fn from_result(result: &ExecResult) -> Self {
        let bytes = serde_json::to_vec(result).expect("a result is JSON");
        Self { result: bytes.into(), chunks: result.chunks }
    }
}

#[derive(serde::Deserialize)]
struct Envelope {
    kind: Option<serde::de::IgnoredAny>,
}

/// One wait; dropping it takes it off the table.
pub struct Waiter {
    gateway: Arc<Gateway>,
    request_id: String,
    number: u64,
    pub finished: oneshot::Receiver<Finished>,
}

impl Waiter {
    /// From now on the result of this request is not missed.
    pub fn register(gateway: &Arc<Gateway>, request_id: &str) -> Self {
        let (sender, finished) = oneshot::channel();
        let mut table = gateway.waiters.0.lock();
        table.next += 1;
        let number = table.next;
        table.by_request.entry(request_id.into()).or_default().push((number, sender));
        drop(table);
        Self { gateway: gateway.clone(), request_id: request_id.into(), number, finished }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut table = self.gateway.waiters.0.lock();
        if let Some(waiting) = table.by_request.get_mut(&self.request_id) {
            waiting.retain(|(number, _)| *number != self.number);
            if waiting.is_empty() {
                table.by_request.remove(&self.request_id);
            }
        }
    }
}

pub async fn run(gateway: Arc<Gateway>, mut results: bus::Subscription, cancel: CancellationToken) {
    loop {
        let message = tokio::select! {
            () = cancel.cancelled() => return,
            message = results.next() => message,
        };
        let Some(message) = message else { return };
        if gateway.waiters.0.lock().by_request.is_empty() {
            continue;
        }
        let Some((request_id, finished)) = Finished::new(&message.payload) else {
            tracing::warn!("a result could not be read; whoever waits for it will find it by the task's state");
            continue;
        };
        let waiting = gateway.waiters.0.lock().by_request.remove(&request_id);
        for (_, sender) in waiting.into_iter().flatten() {
            let _ = sender.send(finished.clone());
        }
    }
}
