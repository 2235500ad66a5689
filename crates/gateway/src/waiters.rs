//! Waits for results: one subscription serves all requests of the gateway.

use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use wire::router::{Awaited, ExecResult};

/// Results that may wait in the subscription. One that is dropped is found by the next look at the task's record.
pub const QUEUE_MAX: usize = 65_536;

#[derive(Clone, Default)]
pub struct Waiters(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    next: u64,
    by_request: HashMap<String, Vec<Waiting>>,
}

struct Waiting {
    number: u64,
    task: Awaited,
    phase: Phase,
}

enum Phase {
    /// The router has not answered, so the assignment is unknown. A result that may be the task's is kept until then.
    Undecided {
        early: Option<Heard>,
        finished: oneshot::Sender<Finished>,
    },
    Decided {
        finished: oneshot::Sender<Finished>,
    },
    Ended,
}

/// A result as it was published, and the field of it that the gateway reads.
#[derive(Debug, Clone)]
pub struct Finished {
    pub result: Bytes,
    pub chunks: Option<u64>,
}

/// A result, and the task that it belongs to.
#[derive(Clone)]
struct Heard {
    assignment_id: String,
    tenant_id: Option<String>,
    finished: Finished,
}

impl Finished {
    /// Reads a result and its request id. The bytes stay as they came, unless an envelope has to be removed.
    fn decode(payload: &Bytes) -> Option<(String, Heard)> {
        let result = ExecResult::decode(payload).ok()?;
        let enveloped = serde_json::from_slice::<Envelope>(payload).is_ok_and(|e| e.kind.is_some());

        let bytes = if enveloped {
            serde_json::to_vec(&result).ok()?.into()
        } else {
            payload.clone()
        };

        let finished = Self { result: bytes, chunks: result.chunks };
        let ExecResult { request_id, assignment_id, tenant_id, .. } = result;
        Some((request_id, Heard { assignment_id, tenant_id, finished }))
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

impl Waiting {
    fn hear(&mut self, heard: &Heard) {
        let owned = self.task.owns(&heard.assignment_id, heard.tenant_id.as_deref());
        self.phase = match std::mem::replace(&mut self.phase, Phase::Ended) {
            Phase::Undecided { early, finished } => {
                // Only one is kept: keeping the wrong one costs no more than the time until the next look at the
                // record.
                let keeps = owned == Some(true) || (owned.is_none() && early.is_none());
                let early = if keeps { Some(heard.clone()) } else { early };
                Phase::Undecided { early, finished }
            }

            // A router that does not name the assignment knows only one task with this id, whatever its tenant.
            Phase::Decided { finished } if owned.unwrap_or(true) => {
                // Fails if the request has ended meanwhile.
                let _ = finished.send(heard.finished.clone());
                Phase::Ended
            }
            unchanged => unchanged,
        };
    }

    fn decided(&mut self, task: Awaited) {
        self.task = task;
        match std::mem::replace(&mut self.phase, Phase::Ended) {
            Phase::Undecided { early, finished } => {
                self.phase = Phase::Decided { finished };
                if let Some(early) = early {
                    self.hear(&early);
                }
            }
            unchanged => self.phase = unchanged,
        }
    }
}

/// One wait for a result; dropping it ends the wait.
pub struct Waiter {
    waiters: Waiters,
    request_id: String,
    number: u64,
    pub finished: oneshot::Receiver<Finished>,
}

impl Waiters {
    /// Waits for the result of this tenant's request: from now on it is not missed.
    pub fn register(&self, request_id: &str, tenant_id: &str) -> Waiter {
        let (sender, finished) = oneshot::channel();
        let task = Awaited { tenant_id: tenant_id.into(), assignment_id: None };
        let phase = Phase::Undecided { early: None, finished: sender };

        // Several requests may wait for the same id, so each wait has a number of its own.
        let mut table = self.0.lock();
        table.next += 1;
        let number = table.next;
        table
            .by_request
            .entry(request_id.into())
            .or_default()
            .push(Waiting { number, task, phase });
        drop(table);

        Waiter { waiters: self.clone(), request_id: request_id.into(), number, finished }
    }

    /// Hands each result to the requests that wait for it, until cancelled.
    pub async fn run(self, mut results: bus::Subscription, cancel: CancellationToken) {
        loop {
            let message = tokio::select! {
                () = cancel.cancelled() => return,
                message = results.next() => message,
            };
            let Some(message) = message else { return };
            self.publish(&message.payload);
        }
    }

    fn publish(&self, payload: &Bytes) {
        // Every gateway receives every result: most concern no request of this one.
        if self.0.lock().by_request.is_empty() {
            return;
        }
        let Some((request_id, heard)) = Finished::decode(payload) else {
            tracing::warn!("cannot read a result; requests that wait for it find it in the task's record");
            return;
        };

        let mut table = self.0.lock();
        for waiting in table.by_request.get_mut(&request_id).into_iter().flatten() {
            waiting.hear(&heard);
        }
    }
}

impl Waiter {
    /// Tells which task the router decided, and so which result ends this wait.
    pub fn decided(&self, task: &Awaited) {
        let mut table = self.waiters.0.lock();
        let waiting = table.by_request.get_mut(&self.request_id).into_iter().flatten();
        for waiting in waiting.filter(|waiting| waiting.number == self.number) {
            waiting.decided(task.clone());
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut table = self.waiters.0.lock();
        if let Some(waiting) = table.by_request.get_mut(&self.request_id) {
            waiting.retain(|waiting| waiting.number != self.number);
            if waiting.is_empty() {
                table.by_request.remove(&self.request_id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting() -> (Waiting, oneshot::Receiver<Finished>) {
        let (sender, finished) = oneshot::channel();
        let task = Awaited { tenant_id: "acme".into(), assignment_id: None };
        (
            Waiting {
                number: 1,
                task,
                phase: Phase::Undecided { early: None, finished: sender },
            },
            finished,
        )
    }

    fn heard(assignment_id: &str, tenant_id: Option<&str>) -> Heard {
        let finished = Finished { result: Bytes::copy_from_slice(assignment_id.as_bytes()), chunks: None };
        Heard {
            assignment_id: assignment_id.into(),
            tenant_id: tenant_id.map(String::from),
            finished,
        }
    }

    fn decided(waiting: &mut Waiting, assignment_id: Option<&str>) {
        let assignment_id = assignment_id.map(String::from);
        waiting.decided(Awaited { tenant_id: "acme".into(), assignment_id });
    }

    /// Checks which result ends the wait, given those that arrive before and after the router's answer.
    #[track_caller]
    fn check(
        before: &[(&str, Option<&str>)],
        answer: Option<&str>,
        after: &[(&str, Option<&str>)],
        expected: Option<&str>,
    ) {
        let (mut waiting, mut finished) = waiting();
        before
            .iter()
            .for_each(|(assignment, tenant)| waiting.hear(&heard(assignment, *tenant)));
        assert!(finished.try_recv().is_err(), "no result ends the wait before the router has answered");

        decided(&mut waiting, answer);
        after
            .iter()
            .for_each(|(assignment, tenant)| waiting.hear(&heard(assignment, *tenant)));

        let ended = finished.try_recv().ok().map(|finished| finished.result);
        assert_eq!(ended.as_deref(), expected.map(str::as_bytes));
    }

    #[test]
    fn only_the_result_of_the_own_assignment_ends_a_wait() {
        let (ours, other, unnamed) = (Some("acme"), Some("beta"), None);
        check(&[], Some("a"), &[("b", ours), ("b", unnamed), ("a", unnamed)], Some("a"));
        check(&[], Some("a"), &[("b", other)], None);
        check(&[("a", unnamed), ("b", other)], Some("a"), &[], Some("a"));
        check(&[("b", unnamed), ("a", ours), ("c", unnamed)], Some("a"), &[], Some("a"));
        check(&[("b", other), ("b", unnamed)], Some("a"), &[], None);

        // The router does not name the assignment.
        check(&[("b", other)], None, &[("b", other), ("a", unnamed)], Some("a"));
        check(&[("a", unnamed)], None, &[], Some("a"));
    }
}
