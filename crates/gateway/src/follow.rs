//! Follows a task to its result: waits for the published result, forwards the task's output, and looks at its record.
//!
//! The record has the result even if the message with it was missed: while the bus was away, because a queue was full,
//! or because the task had already ended. The pauses between looks grow, and a look follows soon after the bus was away.

use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::output::{OutputReader, Pieces, Unsent};
use crate::reply::Reply;
use crate::waiters::{Finished, Waiter};
use serde_json::value::RawValue;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::mpsc;
use wire::ipc::{ErrorCode, FrameType, StreamComplete, Wait};
use wire::router::{Awaited, TaskState};
use wire::subjects;

/// The pause before the first look at a task's record. Each further pause is twice as long, up to the longest; all of
/// them are jittered, so that requests that began together do not look together.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
const LOOK_PAUSE_MAX: Duration = Duration::from_secs(8);
/// The longest pause if no copy of the result will come: a router of the previous version sends none, and the task may
/// have ended already.
const LOOK_PAUSE_MAX_UNTOLD: Duration = Duration::from_secs(2);
/// After the bus was away, the waiting requests look within this time.
const LOOK_SPREAD: Duration = Duration::from_secs(1);
/// Looks of all waiting requests of a gateway that are under way at the same time; the others queue.
pub const LOOKS_MAX: usize = 32;
/// How long to wait, once the result is there, for the rest of the output; after that it counts as lost.
const OUTPUT_GRACE: Duration = Duration::from_millis(500);
/// Capacity of the queue of one output subscription, in messages.
const OUTPUT_QUEUE: usize = 4096;

/// A wait for one task's result. It begins before the request is sent to the router, so that no message is missed.
pub struct Follow {
    waiter: Waiter,
    /// Present if the client wants the output too.
    output: Option<bus::Subscription>,
}

impl Follow {
    /// What a submit waits for; `None` if that is the decision alone.
    pub async fn new(exchange: &Exchange, wait: Wait) -> Result<Option<Self>, Failure> {
        Ok(match wait {
            Wait::Decision => None,
            Wait::Result => Some(Self::result(exchange)),
            Wait::Stream => Some(Self::stream(exchange).await?),
        })
    }

    /// Waits for the result alone.
    pub fn result(exchange: &Exchange) -> Self {
        let waiter = exchange
            .gateway
            .waiters
            .register(&exchange.request_id, &exchange.tenant_id);
        Self { waiter, output: None }
    }

    /// Waits for the output and the result.
    pub async fn stream(exchange: &Exchange) -> Result<Self, Failure> {
        let follow = Self::result(exchange);
        let subject = subjects::output(&exchange.request_id);
        let output = exchange.gateway.bus.subscribe(&subject, None, OUTPUT_QUEUE).await?;
        Ok(Self { output: Some(output), ..follow })
    }

    /// Waits until the task has ended; forwards its output if the client wants it. `assignment_id` is the one that the
    /// router decided, if it named one; `copied_to` is where it said that a copy of the result will go.
    pub async fn run(
        self,
        exchange: &Exchange,
        assignment_id: Option<String>,
        copied_to: Option<String>,
        pieces: &mut Pieces,
    ) -> Result<Reply, Failure> {
        let task = Awaited { tenant_id: exchange.tenant_id.clone(), assignment_id };
        self.waiter.decided(&task);

        let streams = self.output.is_some();
        let is_told = copied_to.is_some_and(|subject| subject == exchange.gateway.result_subject);
        let following = Following {
            exchange,
            look_pause_max: if is_told { LOOK_PAUSE_MAX } else { LOOK_PAUSE_MAX_UNTOLD },
            waiter: self.waiter,
            output: self.output,
            reader: OutputReader::new(task),
            pieces,
        };

        if streams {
            following.until_complete().await.map_err(Failure::in_stream)
        } else {
            following.until_result().await
        }
    }
}

struct Following<'a> {
    exchange: &'a Exchange,
    look_pause_max: Duration,
    waiter: Waiter,
    output: Option<bus::Subscription>,
    reader: OutputReader,
    pieces: &'a mut Pieces,
}

impl Following<'_> {
    async fn until_result(mut self) -> Result<Reply, Failure> {
        Ok(Reply::ok(self.finished().await?.result))
    }

    async fn until_complete(mut self) -> Result<Reply, Failure> {
        let finished = self.finished().await?;
        self.rest_of_output(&finished).await?;
        complete(&self.exchange.request_id, &finished)
    }

    async fn finished(&mut self) -> Result<Finished, Failure> {
        // Looks are concurrent, so that a slow router delays no output, and a slow client leaves no call
        // to the router unfinished.
        let (exchange, longest, (sender, records)) = (self.exchange, self.look_pause_max, mpsc::channel(1));
        tokio::select! {
            finished = self.ended(records) => finished,
            never = look_at_records(exchange, longest, sender) => match never {},
        }
    }

    async fn ended(&mut self, mut records: mpsc::Receiver<Box<TaskState>>) -> Result<Finished, Failure> {
        loop {
            tokio::select! {
                // Output that has arrived is forwarded before the result.
                biased;
                Some(message) = next(&mut self.output) => self.forward(&message).await?,

                finished = &mut self.waiter.finished => {
                    let closed = |_| Failure::new(ErrorCode::Internal, "The result channel closed unexpectedly");
                    return finished.map_err(closed);
                }

                Some(record) = records.recv() => {
                    if let Some(finished) = self.apply_record(*record) {
                        return Ok(finished);
                    }
                }

                () = tokio::time::sleep_until(self.exchange.deadline.at.into()) => {
                    let text = "The deadline passed before the result arrived; the task goes on and can be queried";
                    return Err(Failure::new(ErrorCode::Timeout, text));
                }
            }
        }
    }

    /// Takes the result from the task's record, if the task has ended.
    fn apply_record(&mut self, record: TaskState) -> Option<Finished> {
        let TaskState { result, assignment_id, .. } = record;
        if let Some(result) = result {
            return Some(Finished::from_result(&result));
        }

        // A router of the previous version names the assignment only in the record, not in its decision.
        if self.reader.task.assignment_id.is_none() {
            self.reader.task.assignment_id = assignment_id;
            self.waiter.decided(&self.reader.task);
        }
        None
    }

    async fn rest_of_output(&mut self, finished: &Finished) -> Result<(), Failure> {
        let mut grace = std::pin::pin!(tokio::time::sleep(OUTPUT_GRACE));
        while finished.chunks.is_some_and(|all| self.reader.next < all) {
            tokio::select! {
                // Output that has arrived is forwarded even if a slow client has used up the grace period.
                biased;
                Some(message) = next(&mut self.output) => self.forward(&message).await?,
                () = &mut grace => break,
            }
        }
        Ok(())
    }

    /// Forwards a piece of output to the client, which takes pieces only as fast as it reads them.
    async fn forward(&mut self, message: &bus::Message) -> Result<(), Failure> {
        let Some(chunk) = self.reader.take(&message.payload) else {
            return Ok(());
        };
        let late = |_| Failure::new(ErrorCode::Timeout, "The deadline passed before the client read the output");
        let sent = tokio::time::timeout_at(self.exchange.deadline.at.into(), self.pieces.send(chunk))
            .await
            .map_err(late)?;

        sent.map_err(|unsent| match unsent {
            Unsent::TooLarge(size) => {
                let text = format!("A piece of output has {size} bytes, more than a frame holds; the task goes on");
                Failure::new(ErrorCode::FrameTooLarge, text)
            }
            Unsent::Stalled => Failure::new(ErrorCode::Timeout, "The client has not read its answer for too long"),
        })
    }
}

/// The last frame of a stream whose task has ended.
pub fn complete(request_id: &str, finished: &Finished) -> Result<Reply, Failure> {
    let text = std::str::from_utf8(&finished.result).ok();
    let result = text.and_then(|text| RawValue::from_string(text.into()).ok());
    let result = result.ok_or_else(|| Failure::new(ErrorCode::Internal, "The result is not JSON"))?;

    let complete = StreamComplete { task_id: request_id.into(), result };
    let payload = serde_json::to_vec(&complete).expect("a completion is JSON");
    Ok(Reply::new(FrameType::StreamComplete, payload))
}

/// Looks at the task's record until it is dropped. Errors are ignored: the next look or the deadline settles the wait.
async fn look_at_records(exchange: &Exchange, longest: Duration, records: mpsc::Sender<Box<TaskState>>) -> Infallible {
    let gateway = &exchange.gateway;
    let mut interruptions = gateway.bus.interruptions();
    let mut pauses = Pauses::up_to(longest);
    loop {
        tokio::select! {
            () = tokio::time::sleep(pauses.next(rand::random())) => {}
            Ok(()) = interruptions.changed() => {
                tokio::time::sleep(LOOK_SPREAD.mul_f64(rand::random())).await;
                pauses = Pauses::up_to(longest);
            }
        }

        let turn = gateway.looks.acquire().await;
        let record = exchange.record().await;
        drop(turn);
        if let Ok(record) = record {
            // Fails only once the receiver is dropped, which ends this future too.
            let _ = records.send(Box::new(record)).await;
        }
    }
}

/// The pauses between looks.
struct Pauses {
    next: Duration,
    longest: Duration,
}

impl Pauses {
    fn up_to(longest: Duration) -> Self {
        Self { next: LOOK_PAUSE, longest }
    }

    /// `random` is from 0 to 1; jitter makes the pause up to half as long again.
    fn next(&mut self, random: f64) -> Duration {
        let pause = self.next.mul_f64(1.0 + random / 2.0);
        self.next = self.longest.min(2 * self.next);
        pause
    }
}

async fn next(output: &mut Option<bus::Subscription>) -> Option<bus::Message> {
    match output {
        Some(output) => output.next().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_are_jittered() {
        let ms = |random: f64| {
            let mut pauses = Pauses::up_to(LOOK_PAUSE_MAX);
            [(); 8].map(|()| pauses.next(random).as_millis())
        };
        assert_eq!(ms(0.0), [250, 500, 1000, 2000, 4000, 8000, 8000, 8000]);
        assert_eq!(ms(1.0)[..2], [375, 750]);
        assert_eq!(ms(1.0)[6..], [12_000, 12_000]);
    }
}
