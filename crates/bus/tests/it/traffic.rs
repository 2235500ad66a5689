//! Continuous requests during a scenario; each request has exactly one outcome.

use bus::{Bus, Error, Headers, Message};
use futures_util::future::join_all;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const SUBJECT: &str = "traffic";
/// Requests in flight at once. A lane sends its next request after the outcome of the last, at most one per [`PACE`].
const LANES: usize = 8;
const PACE: Duration = Duration::from_millis(5);
/// A responder takes this long per request, so that some request is always in flight.
const WORK: Duration = Duration::from_millis(3);
const DEADLINE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcomes {
    pub sent: u64,
    pub answered: u64,
    pub disconnected: u64,
    pub nobody: u64,
    pub late: u64,
}

impl Outcomes {
    pub fn failed(self) -> u64 {
        self.disconnected + self.nobody + self.late
    }
}

/// The outcomes of all requests so far.
#[derive(Default)]
pub struct Traffic {
    outcomes: RefCell<Outcomes>,
    /// The numbers of the requests that have none yet.
    in_flight: RefCell<BTreeSet<u64>>,
}

impl Traffic {
    pub fn now(&self) -> Outcomes {
        *self.outcomes.borrow()
    }

    /// Whether the first `sent` requests have their outcomes.
    pub fn has_outcomes_of(&self, sent: u64) -> bool {
        self.in_flight.borrow().first().is_none_or(|first| *first > sent)
    }

    /// Sends requests from `asker` to `responder` until `scene` completes; returns its output.
    pub async fn during<T>(&self, asker: &Bus, responder: &Bus, scene: impl Future<Output = T>) -> T {
        // The responders stop only after the last request has its outcome.
        let (end, finished) = (CancellationToken::new(), CancellationToken::new());
        let mut served = Vec::new();
        for _ in 0..2 {
            served.push(responder.subscribe(SUBJECT, Some("responders"), 1024).await.unwrap());
        }

        let answering = join_all(served.into_iter().map(|mut served| {
            finished.clone().run_until_cancelled_owned(async move {
                let mut pace = tokio::time::interval(WORK);
                while let Some(request) = served.next().await {
                    pace.tick().await;
                    let reply = request.reply.expect("a request has a reply subject");
                    // If this connection is lost, the request fails on the asker's side; the outcome is counted there.
                    let _ = responder
                        .publish(Message { subject: reply, payload: request.payload, ..Message::default() })
                        .await;
                }
            })
        }));
        let asking = async {
            join_all((0..LANES).map(|lane| self.lane(lane, asker, &end))).await;
            finished.cancel();
        };
        let scene = async {
            let output = scene.await;
            end.cancel();
            output
        };
        tokio::join!(scene, answering, asking).0
    }

    async fn lane(&self, lane: usize, asker: &Bus, end: &CancellationToken) {
        let mut pace = tokio::time::interval(PACE);
        for number in 0_u64.. {
            if end.is_cancelled() {
                break;
            }

            pace.tick().await;
            self.outcomes.borrow_mut().sent += 1;
            let sent = self.now().sent;
            self.in_flight.borrow_mut().insert(sent);
            let payload = format!("{lane}-{number}");
            let outcome = asker
                .request(SUBJECT, Headers::new(), payload.clone().into(), DEADLINE)
                .await;

            self.in_flight.borrow_mut().remove(&sent);
            let mut outcomes = self.outcomes.borrow_mut();
            match outcome {
                Ok(reply) => {
                    assert_eq!(reply.payload, payload, "each request receives its own reply");
                    outcomes.answered += 1;
                }
                Err(Error::Disconnected(_)) => outcomes.disconnected += 1,
                Err(Error::NoResponders(_)) => outcomes.nobody += 1,
                Err(Error::Timeout(_)) => outcomes.late += 1,
                Err(other) => panic!("not an outcome of a lost connection: {other}"),
            }
        }
    }
}
