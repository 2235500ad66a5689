//! Requests all the time while something happens, each with exactly one outcome.

use bus::{Bus, Error, Headers, Message};
use futures_util::future::join_all;
use std::cell::RefCell;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const SUBJECT: &str = "traffic";
/// At once; each asks again after its outcome, and a little later.
const LANES: usize = 8;
const PACE: Duration = Duration::from_millis(5);
/// An answer takes this long, so that some request is always in flight.
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

/// What has come of the requests until now.
#[derive(Default)]
pub struct Traffic(RefCell<Outcomes>);

impl Traffic {
    pub fn now(&self) -> Outcomes {
        *self.0.borrow()
    }

    /// `responder` answers what `asker` asks, for as long as `scene` plays.
    pub async fn during<T>(&self, asker: &Bus, responder: &Bus, scene: impl Future<Output = T>) -> T {
        // The last request is answered before the responders go.
        let (end, asked) = (CancellationToken::new(), CancellationToken::new());
        let mut served = Vec::new();
        for _ in 0..2 {
            served.push(responder.subscribe(SUBJECT, Some("responders"), 1024).await.unwrap());
        }
        let answering = join_all(served.into_iter().map(|mut served| {
            asked.clone().run_until_cancelled_owned(async move {
                let mut pace = tokio::time::interval(WORK);
                while let Some(request) = served.next().await {
                    pace.tick().await;
                    let reply = request.reply.expect("a request says where its answer goes");
                    // Without a connection the one who asks is told by its own.
                    let _ = responder
                        .publish(Message { subject: reply, payload: request.payload, ..Message::default() })
                        .await;
                }
            })
        }));
        let asking = async {
            join_all((0..LANES).map(|lane| self.lane(lane, asker, &end))).await;
            asked.cancel();
        };
        let scene = async {
            let seen = scene.await;
            end.cancel();
            seen
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
            self.0.borrow_mut().sent += 1;
            let payload = format!("{lane}-{number}");
            let asked = asker.request(SUBJECT, Headers::new(), payload.clone().into(), DEADLINE).await;
            let mut outcomes = self.0.borrow_mut();
            match asked {
                Ok(reply) => {
                    assert_eq!(reply.payload, payload, "each gets its own answer");
                    outcomes.answered += 1;
                }
                Err(Error::Disconnected(_)) => outcomes.disconnected += 1,
                Err(Error::NoResponders(_)) => outcomes.nobody += 1,
                Err(Error::Timeout(_)) => outcomes.late += 1,
                Err(other) => panic!("no outcome of a lost connection: {other}"),
            }
        }
    }
}
