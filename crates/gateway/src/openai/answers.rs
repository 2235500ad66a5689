//! Carries out the entry's requests, each in a task of its own: a client that does not read its answer must not keep the
//! request from its deadline, and the task of a client that has gone away is cancelled.

use super::Permits;
use super::refusal::Refusal;
use super::request::Asks;
use crate::Gateway;
use crate::deadline::Deadline;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::forward;
use crate::output::{Pieces, Unsent};
use crate::reply::Reply;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::ipc::{ErrorCode, TaskSubmit, Wait};
use wire::router::OutputChunk;

/// Events that wait for the client to read them.
const EVENTS: usize = 16;
/// Pauses between attempts to cancel the task of a client that has gone away: the router may not know the task yet.
const CANCEL_PAUSES_MS: [u64; 5] = [50, 100, 250, 500, 1000];

/// The entry's requests in flight.
#[derive(Default)]
pub struct Answers {
    tasks: TaskTracker,
    /// No request is accepted any more.
    closed: CancellationToken,
    /// The requests in flight end.
    ended: CancellationToken,
}

/// One request, and on whose behalf.
pub struct Asked {
    pub tenant: Arc<str>,
    pub request_id: String,
    pub traceparent: Option<String>,
    pub asks: Asks,
}

/// What happens to a request, in this order: pieces of output, if it is streamed, then its end.
pub enum Event {
    Piece(OutputChunk),
    /// The last frame of the answer, which holds the result.
    Ended(Result<Reply, Failure>),
}

/// The HTTP side of a request.
#[derive(Clone)]
pub struct Client {
    events: Sender<Event>,
    /// How long the client may read nothing while events wait for it.
    patience: Duration,
}

impl Client {
    pub async fn send_piece(&self, chunk: OutputChunk) -> Result<(), Unsent> {
        self.send(Event::Piece(chunk)).await
    }

    async fn send(&self, event: Event) -> Result<(), Unsent> {
        match tokio::time::timeout(self.patience, self.events.send(event)).await {
            // A client that has gone away is noticed by its own signal.
            Ok(_) => Ok(()),
            Err(_) => Err(Unsent::Stalled),
        }
    }
}

impl Answers {
    /// Starts a request. Its task ends early once the receiver is dropped.
    pub fn start(&self, gateway: &Arc<Gateway>, asked: Asked, permits: Permits) -> Result<Receiver<Event>, Refusal> {
        // Taken before the look, so that a drain waits for every request that passes it.
        let _begins = self.tasks.token();
        if self.closed.is_cancelled() {
            let failure = Failure::new(ErrorCode::Unavailable, "the server is shutting down; try again");
            return Err(failure.retry_after(Duration::from_secs(1)).into());
        }

        let (events, receiver) = mpsc::channel(EVENTS);
        let patience = gateway.shared.admission.settings().write_timeout;
        let client = Client { events, patience };
        self.tasks.spawn(run(gateway.clone(), asked, client, permits));
        Ok(receiver)
    }

    /// Accepts no more requests, and waits for those in flight; after the timeout they end.
    pub async fn drain(&self, timeout: Duration) {
        self.closed.cancel();
        self.tasks.close();
        if tokio::time::timeout(timeout, self.tasks.wait()).await.is_err() {
            self.ended.cancel();
            self.tasks.wait().await;
        }
    }
}

async fn run(gateway: Arc<Gateway>, asked: Asked, client: Client, permits: Permits) {
    let started = Instant::now();
    let submit = submit(asked);
    // The connection says whether the client still waits, so only the longest deadline applies. It is the task's, too:
    // the router's own is meant for short tasks.
    let own = gateway.shared.admission.settings().max_deadline;
    let deadline = Deadline { at: started + own, own: Some(own) };
    let mut exchange = Exchange::of_submit(gateway.clone(), None, &submit, deadline);

    let mut pieces = Pieces::over_http(client.clone());
    let outcome = {
        let work = Box::pin(forward::submit(&mut exchange, Box::new(submit), &mut pieces));
        tokio::select! {
            outcome = work => Some(outcome),
            () = client.events.closed() => None,
            () = gateway.answers.ended.cancelled() => {
                let failure = Failure::new(ErrorCode::Unavailable, "the server is shutting down; try again");
                Some(Err(failure.retry_after(Duration::from_secs(1)).in_stream()))
            }
        }
    };
    drop(permits);

    let Some(outcome) = outcome else {
        return cancel(&mut exchange).await;
    };
    let outcome = exchange.settle(outcome, started);
    let is_left = outcome
        .as_ref()
        .is_err_and(|failure| failure.in_stream || failure.code == ErrorCode::Timeout);
    // A client that does not read is disconnected when its events end without the last one.
    let _ = client.send(Event::Ended(outcome)).await;
    drop((client, pieces));
    if is_left {
        cancel(&mut exchange).await;
    }
}

fn submit(asked: Asked) -> TaskSubmit {
    let Asked { tenant, request_id, traceparent, asks } = asked;
    TaskSubmit {
        params: Some(asks.body),
        tenant_id: Some(tenant.to_string()),
        policy_id: Some(asks.model),
        request_id: Some(request_id),
        traceparent,
        wait: if asks.streams { Wait::Stream } else { Wait::Result },
        ..TaskSubmit::new(asks.kind.task_type())
    }
}

/// Cancels a task for which nobody waits any more.
async fn cancel(exchange: &mut Exchange) {
    metrics::counter!("beamline_gateway_openai_abandoned_total").increment(1);
    let timeout = exchange.gateway.shared.admission.settings().request_timeout;
    let tenant = exchange.tenant_id.clone();
    for pause_ms in CANCEL_PAUSES_MS {
        exchange.deadline = Deadline { at: Instant::now() + timeout, own: None };
        match exchange.cancel(Some(tenant.clone())).await {
            Err(failure) if failure.is_not_found() => tokio::time::sleep(Duration::from_millis(pause_ms)).await,
            Err(failure) => {
                let (request_id, why) = (&exchange.request_id, &failure.body().message);
                return tracing::warn!(request_id, "cannot cancel a task whose client has gone away: {why}");
            }
            Ok(_) => return tracing::debug!(request_id = exchange.request_id, "client gone; task cancelled"),
        }
    }
}
