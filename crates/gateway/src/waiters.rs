//! Who waits for which result: one subscription to the results for all requests of the gateway.

use crate::Gateway;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use wire::router::{Awaited, ExecResult};

/// Results that may wait to be handed out; one that is dropped is found by the next look at the task's state.
pub const QUEUE_MAX: usize = 65_536;

#[derive(Default)]
pub struct Waiters(Mutex<Table>);

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
    /// The router has not answered, so the assignment is not known: a result that may be the task's is kept until it is.
    Undecided {
        early: Option<Heard>,
        finished: oneshot::Sender<Finished>,
    },
    Decided {
        finished: oneshot::Sender<Finished>,
    },
    Ended,
}

/// A result as it was published, and what of it the gateway reads.
#[derive(Debug, Clone)]
pub struct Finished {
    pub result: Bytes,
    pub chunks: Option<u64>,
}

/// A result and whose it is.
#[derive(Clone)]
struct Heard {
    assignment_id: String,
    tenant_id: Option<String>,
    finished: Finished,
}

impl Finished {
    /// The plain result, with its request id: as it came, or taken out of its envelope.
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
                // One kept at most: a wrong one costs no more than the time until the next look at the record.
                let keeps = owned == Some(true) || owned.is_none() && early.is_none();
                Phase::Undecided { early: if keeps { Some(heard.clone()) } else { early }, finished }
            }
            // A router that does not say the assignment knows one task of an id, whoever's it is.
            Phase::Decided { finished } if owned.unwrap_or(true) => {
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

/// One wait; dropping it takes it off the table.
pub struct Waiter {
    gateway: Arc<Gateway>,
    request_id: String,
    number: u64,
    pub finished: oneshot::Receiver<Finished>,
}

impl Waiter {
    /// From now on the result of this tenant's request is not missed.
    pub fn register(gateway: &Arc<Gateway>, request_id: &str, tenant_id: &str) -> Self {
        let (sender, finished) = oneshot::channel();
        let task = Awaited { tenant_id: tenant_id.into(), assignment_id: None };
        let mut table = gateway.waiters.0.lock();
        table.next += 1;
        let number = table.next;
        let phase = Phase::Undecided { early: None, finished: sender };
        table
            .by_request
            .entry(request_id.into())
            .or_default()
            .push(Waiting { number, task, phase });
        drop(table);
        Self {
            gateway: gateway.clone(),
            request_id: request_id.into(),
            number,
            finished,
        }
    }

    /// The router has answered, so it is known which result ends this wait.
    pub fn decided(&self, task: &Awaited) {
        let mut table = self.gateway.waiters.0.lock();
        let waiting = table.by_request.get_mut(&self.request_id).into_iter().flatten();
        for waiting in waiting.filter(|waiting| waiting.number == self.number) {
            waiting.decided(task.clone());
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut table = self.gateway.waiters.0.lock();
        if let Some(waiting) = table.by_request.get_mut(&self.request_id) {
            waiting.retain(|waiting| waiting.number != self.number);
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
        let Some((request_id, heard)) = Finished::decode(&message.payload) else {
            tracing::warn!("a result could not be read; whoever waits for it will find it by the task's state");
            continue;
        };
        let mut table = gateway.waiters.0.lock();
        for waiting in table.by_request.get_mut(&request_id).into_iter().flatten() {
            waiting.hear(&heard);
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

    /// What ends the wait, of these results before and after the router's answer.
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
        assert!(finished.try_recv().is_err(), "nothing ends it before the router's answer");
        decided(&mut waiting, answer);
        after
            .iter()
            .for_each(|(assignment, tenant)| waiting.hear(&heard(assignment, *tenant)));
        let ended = finished.try_recv().ok().map(|finished| finished.result);
        assert_eq!(ended.as_deref(), expected.map(str::as_bytes));
    }

    #[test]
    fn only_the_result_of_its_own_assignment_ends_a_wait() {
        let (ours, other, nobody) = (Some("acme"), Some("beta"), None);
        check(&[], Some("a"), &[("b", ours), ("b", nobody), ("a", nobody)], Some("a"));
        check(&[], Some("a"), &[("b", other)], None);
        check(&[("a", nobody), ("b", other)], Some("a"), &[], Some("a"));
        check(&[("b", nobody), ("a", ours), ("c", nobody)], Some("a"), &[], Some("a"));
        check(&[("b", other), ("b", nobody)], Some("a"), &[], None);
        // A router that does not say the assignment.
        check(&[("b", other)], None, &[("b", other), ("a", nobody)], Some("a"));
        check(&[("a", nobody)], None, &[], Some("a"));
    }
}
