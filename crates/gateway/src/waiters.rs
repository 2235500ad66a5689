//! Waiting for results: one subscription serves all requests of the gateway.

use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use wire::router::{Awaited, ExecResult, ResultHead};

/// Capacity of the subscription's queue, in results. A result that does not fit is found later in the task's record.
pub const QUEUE_MAX: usize = 8192;

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
    /// The router has not answered, so the assignment is unknown. A result that may belong to the task is kept until
    /// the router answers.
    Undecided {
        early: Option<Received>,
        finished: oneshot::Sender<Finished>,
    },
    Decided {
        finished: oneshot::Sender<Finished>,
    },
    Ended,
}

/// A result as it was published, and the number of output pieces that it announces.
#[derive(Debug, Clone)]
pub struct Finished {
    pub result: Bytes,
    pub chunks: Option<u64>,
}

/// A received result and the task that it belongs to.
#[derive(Clone)]
struct Received {
    assignment_id: String,
    tenant_id: Option<String>,
    finished: Finished,
}

impl Finished {
    /// Decodes a result and its request id. The bytes are unchanged, except that an envelope is removed.
    fn decode(payload: &Bytes) -> Option<(String, Received)> {
        let head = serde_json::from_slice::<ResultHead>(payload).ok();
        let Some(head) = head.filter(|head| !head.is_envelope()) else {
            let result = ExecResult::decode(payload).ok()?;
            let finished = Self::from_result(&result);
            let ExecResult { request_id, assignment_id, tenant_id, .. } = result;
            return Some((request_id, Received { assignment_id, tenant_id, finished }));
        };

        let finished = Self { result: payload.clone(), chunks: head.chunks };
        let ResultHead { request_id, assignment_id, tenant_id, .. } = head;
        Some((request_id, Received { assignment_id, tenant_id, finished }))
    }

    pub fn from_result(result: &ExecResult) -> Self {
        let bytes = serde_json::to_vec(result).expect("a result is JSON");
        Self { result: bytes.into(), chunks: result.chunks }
    }
}

impl Waiting {
    fn receive(&mut self, received: &Received) {
        let owned = self.task.owns(&received.assignment_id, received.tenant_id.as_deref());
        self.phase = match std::mem::replace(&mut self.phase, Phase::Ended) {
            Phase::Undecided { early, finished } => {
                // Only one result is kept. If it is the wrong one, the next poll of the record finds the right one.
                let keeps = owned == Some(true) || (owned.is_none() && early.is_none());
                let early = if keeps { Some(received.clone()) } else { early };
                Phase::Undecided { early, finished }
            }

            // A router that does not name the assignment has only one task with this id, whatever its tenant.
            Phase::Decided { finished } if owned.unwrap_or(true) => {
                // Fails if the request has already ended.
                let _ = finished.send(received.finished.clone());
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
                    self.receive(&early);
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
    /// Registers a wait for the result of this tenant's request. Results published from now on are not missed.
    pub fn register(&self, request_id: &str, tenant_id: &str) -> Waiter {
        let (sender, finished) = oneshot::channel();
        let task = Awaited { tenant_id: tenant_id.into(), assignment_id: None };
        let phase = Phase::Undecided { early: None, finished: sender };

        // Several requests may wait for the same id, so each wait has its own number.
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
        // A request that has ended need not have its result decoded.
        if self.0.lock().by_request.is_empty() {
            return;
        }
        let Some((request_id, received)) = Finished::decode(payload) else {
            tracing::warn!("cannot decode a result; requests that wait for it will read it from the task's record");
            return;
        };

        let mut table = self.0.lock();
        for waiting in table.by_request.get_mut(&request_id).into_iter().flatten() {
            waiting.receive(&received);
        }
    }
}

impl Waiter {
    /// Sets the task that the router decided. Only its result ends this wait.
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

    fn received(assignment_id: &str, tenant_id: Option<&str>) -> Received {
        let finished = Finished { result: Bytes::copy_from_slice(assignment_id.as_bytes()), chunks: None };
        Received {
            assignment_id: assignment_id.into(),
            tenant_id: tenant_id.map(String::from),
            finished,
        }
    }

    fn decided(waiting: &mut Waiting, assignment_id: Option<&str>) {
        let assignment_id = assignment_id.map(String::from);
        waiting.decided(Awaited { tenant_id: "acme".into(), assignment_id });
    }

    /// Checks which result ends the wait, given the results that arrive before and after the router's answer.
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
            .for_each(|(assignment, tenant)| waiting.receive(&received(assignment, *tenant)));
        assert!(finished.try_recv().is_err(), "a result ended the wait before the router answered");

        decided(&mut waiting, answer);
        after
            .iter()
            .for_each(|(assignment, tenant)| waiting.receive(&received(assignment, *tenant)));

        let ended = finished.try_recv().ok().map(|finished| finished.result);
        assert_eq!(ended.as_deref(), expected.map(str::as_bytes));
    }

    #[test]
    fn only_the_result_of_its_own_assignment_ends_a_wait() {
        let (own, other, unnamed) = (Some("acme"), Some("beta"), None);
        check(&[], Some("a"), &[("b", own), ("b", unnamed), ("a", unnamed)], Some("a"));
        check(&[], Some("a"), &[("b", other)], None);
        check(&[("a", unnamed), ("b", other)], Some("a"), &[], Some("a"));
        check(&[("b", unnamed), ("a", own), ("c", unnamed)], Some("a"), &[], Some("a"));
        check(&[("b", other), ("b", unnamed)], Some("a"), &[], None);

        // The router does not name the assignment.
        check(&[("b", other)], None, &[("b", other), ("a", unnamed)], Some("a"));
        check(&[("a", unnamed)], None, &[], Some("a"));
    }
}
