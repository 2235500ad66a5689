//! The results of answers: received live by the web app that asked, or found in the task's record.
//!
//! A live copy can be missed: while the bus was away, or because the web app that asked has ended. So the web apps look
//! at the records of the answers that they know, with growing pauses, and soon after the bus was away.

use super::{ASK_TIMEOUT, Answers, is_of, task, text_of};
use crate::chat::prompt::{ANSWER_MAX_MS, TENANT};
use crate::chat::publish::publish_ended;
use crate::db::now_ms;
use bus::{Headers, Subscription};
use futures_util::StreamExt;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::chat::State;
use wire::router::{ExecResult, ResultStatus, TaskAnswer, TaskQuery};
use wire::subjects;

/// How often due looks are begun.
const TICK: Duration = Duration::from_millis(250);
/// The pause before the first look at the record of an answer that this web app asked for. Each further pause is twice
/// as long, up to the longest; all are jittered.
const PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(8);
/// The longest pause if no copy of the result will come.
const PAUSE_MAX_UNTOLD: Duration = Duration::from_secs(2);
/// The pause before the first look for an answer that another web app asked for and follows.
const PAUSE_OF_OTHERS: Duration = Duration::from_secs(15);
/// After the bus was away, all looks are due within this time.
const SPREAD: Duration = Duration::from_secs(1);
/// Looks under way at the same time.
const LOOKS_MAX: usize = 16;
/// When a failed notification of a room is repeated, and how often.
const NOTIFY_AGAIN: Duration = Duration::from_secs(1);
const NOTIFICATIONS_MAX: u32 = 20;
/// At a start, the rooms of answers that were asked for in this time are notified again of their end.
const RECENT_MS: i64 = ANSWER_MAX_MS.cast_signed() + 60_000;

/// When the record of an answer is looked at.
#[derive(Clone)]
pub struct Looks {
    due: Instant,
    pause: Duration,
    longest: Duration,
}

impl Looks {
    /// For an answer that this web app asks for. The router will send a copy of its result if the web app `is_told`.
    pub fn of_ours(is_told: bool) -> Self {
        let longest = if is_told { PAUSE_MAX } else { PAUSE_MAX_UNTOLD };
        Self { due: Instant::now() + PAUSE, pause: 2 * PAUSE, longest }
    }

    pub fn of_others() -> Self {
        let due = Instant::now() + jittered(PAUSE_OF_OTHERS);
        Self { due, pause: PAUSE_MAX, longest: PAUSE_MAX }
    }

    /// Whether a look is due. If so, the next one is after the pause.
    fn take(&mut self, now: Instant) -> bool {
        if now < self.due {
            return false;
        }
        self.due = now + jittered(self.pause);
        self.pause = self.longest.min(2 * self.pause);
        true
    }
}

/// The pause, or up to half as long again.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(1.0..1.5))
}

/// Ended answers whose rooms have not been notified: when to try again, and how many attempts are left.
pub type Unnotified = HashMap<String, (Instant, u32)>;

impl Answers {
    /// Notifies the rooms of answers that ended lately: a crash may have come between an end and its notification.
    pub(super) async fn notify_of_recent(&self) -> crate::db::Result<()> {
        for request_id in self.store.ended_since(now_ms() - RECENT_MS).await? {
            self.notify_later(request_id);
        }
        Ok(())
    }

    pub(super) fn notify_later(&self, request_id: String) {
        self.unnotified
            .lock()
            .entry(request_id)
            .or_insert((Instant::now(), NOTIFICATIONS_MAX));
    }

    pub(super) async fn take_results(&self, mut results: Subscription, cancel: CancellationToken) {
        while let Some(message) = results.next_until(&cancel).await {
            // The router moves unreadable results to the DLQ.
            if let Ok(result) = ExecResult::decode(&message.payload) {
                self.take_result(&result).await;
            }
        }
    }

    async fn take_result(&self, result: &ExecResult) {
        let request_id = &result.request_id;
        // The result also ends an answer that another web app requested and this one does not know.
        let known = self.partial.lock().get(request_id).map(|partial| partial.task.clone());
        let awaited = known.unwrap_or_else(|| task(None));
        if !is_of(&awaited, &result.assignment_id, result.tenant_id.as_deref()) {
            return;
        }

        let error = result.error_message.clone().or(result.error_code.clone());
        let (state, error) = match result.status {
            ResultStatus::Success => (State::Done, None),
            ResultStatus::Cancelled => (State::Stopped, None),
            ResultStatus::Timeout => (State::Failed, Some(error.unwrap_or_else(|| "no answer in time".into()))),
            ResultStatus::Error => (State::Failed, Some(error.unwrap_or_else(|| "the answer failed".into()))),
        };
        let text = result.output.as_ref().map(text_of);

        let trace_id = result.trace_id.as_deref().unwrap_or_default();
        match self.end(request_id, state, text, error).await {
            Ok(()) => tracing::info!(trace_id, request_id, state = state.as_str(), "an answer ended"),
            // The answer is still known, so its record is looked at again.
            Err(error) => tracing::warn!(%error, trace_id, request_id, "cannot end an answer; retrying"),
        }
    }

    /// Looks at the records that are due and repeats notifications, until cancelled.
    pub(super) async fn look_for_results(&self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut interruptions = self.bus.interruptions();
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                Ok(()) = interruptions.changed() => self.look_soon(),
                _ = ticks.tick() => {}
            }

            let looks = futures_util::stream::iter(self.due()).for_each_concurrent(LOOKS_MAX, |id| self.look(id));
            let turn = async {
                looks.await;
                self.notify_unnotified().await;
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = turn => {}
            }
        }
    }

    fn due(&self) -> Vec<String> {
        let now = Instant::now();
        let mut partial = self.partial.lock();
        let due = partial
            .iter_mut()
            .filter(|(_, partial)| partial.looks.clone().take(now));
        due.map(|(id, partial)| {
            partial.looks.take(now);
            id.clone()
        })
        .collect()
    }

    fn look_soon(&self) {
        let now = Instant::now();
        for partial in self.partial.lock().values_mut() {
            partial.looks.due = partial.looks.due.min(now + SPREAD.mul_f64(rand::random()));
        }
    }

    async fn look(&self, request_id: String) {
        let query = TaskQuery { request_id, tenant_id: Some(TENANT.into()), result_subject: None };
        let query = serde_json::to_vec(&query).expect("a query serializes to JSON");
        let found = self
            .bus
            .request(subjects::GET_DECISION, Headers::new(), query.into(), ASK_TIMEOUT)
            .await;

        // Without a router, or without the task, there is nothing to take; the answer's deadline settles it.
        let answer = found
            .ok()
            .and_then(|reply| serde_json::from_slice::<TaskAnswer>(&reply.payload).ok());
        if let Some(result) = answer
            .filter(|answer| answer.task.tenant() == TENANT)
            .and_then(|answer| answer.task.result)
        {
            self.take_result(&result).await;
        }
    }

    async fn notify_unnotified(&self) {
        let now = Instant::now();
        let due: Vec<String> = {
            let mut unnotified = self.unnotified.lock();
            unnotified.retain(|_, (_, left)| *left > 0);
            let due = unnotified.iter_mut().filter(|(_, (due, _))| *due <= now);
            due.map(|(id, (due, left))| {
                (*due, *left) = (now + NOTIFY_AGAIN, *left - 1);
                id.clone()
            })
            .collect()
        };
        for request_id in due {
            match self.store.answer_of(&request_id).await {
                Err(error) => tracing::warn!(request_id, %error, "cannot read an answer; retrying"),
                Ok(answer) => {
                    let ended = answer.filter(|answer| answer.message.state != State::Streaming);
                    let notified = match ended {
                        Some(answer) => publish_ended(&self.channels, &request_id, &answer.message).await,
                        None => Ok(()),
                    };
                    match notified {
                        Ok(()) => _ = self.unnotified.lock().remove(&request_id),
                        Err(error) => tracing::warn!(request_id, error, "cannot notify a room that an answer ended"),
                    }
                }
            }
        }
    }
}
