//! In the router's place: takes decide requests from NATS and answers each when its deadline is over.

use super::Error;
use bus::nats::{Nats, NatsConfig};
use bus::{Bus, Headers, Message, Subscription};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::subjects;

/// Requests that may wait for their late answer.
const QUEUE: usize = 65_536;
/// After the deadline: so that also a gateway that has no time has given up.
const AFTER: Duration = Duration::from_secs(1);
const ANYBODY: Duration = Duration::from_secs(1);

pub struct LateRouter {
    bus: Bus,
    requests: Subscription,
    delay: Duration,
}

impl LateRouter {
    /// Refuses to take a real router's requests away from it.
    pub async fn start(url: &str, deadline: Duration) -> Result<Self, Error> {
        let config = NatsConfig { url: url.into(), name: "late-router".into(), ..NatsConfig::default() };
        let bus = Nats::connect(config).await?;
        match bus.request(subjects::BACKPRESSURE, Headers::new(), Bytes::new(), ANYBODY).await {
            Err(bus::Error::NoResponders(_)) => {}
            Err(bus::Error::Timeout(_)) | Ok(_) => return Err(Error::RouterThere),
            Err(error) => return Err(error.into()),
        }
        let requests = bus.subscribe(subjects::DECIDE, Some(subjects::DECIDE_GROUP), QUEUE).await?;
        bus.health().await?;
        Ok(Self { bus, requests, delay: deadline + AFTER })
    }

    /// Until it is told to end and has answered all; how many that were.
    pub async fn run(mut self, end: CancellationToken) -> u64 {
        let mut owed: VecDeque<(Instant, Arc<str>)> = VecDeque::new();
        let mut answered = 0;
        loop {
            let due = owed.front().map(|(due, _)| *due);
            tokio::select! {
                // What is due goes first: so the queue is as long as the delay lets it be, and no longer.
                biased;
                () = super::at(due) => {
                    let Some((_, subject)) = owed.pop_front() else { continue };
                    let payload = Bytes::from_static(br#"{"ok":true}"#);
                    let message = Message { subject, payload, ..Message::default() };
                    answered += u64::from(self.bus.publish(message).await.is_ok());
                }
                Some(message) = self.requests.next(), if owed.len() < QUEUE => {
                    owed.extend(message.reply.map(|reply| (Instant::now() + self.delay, reply)));
                }
                () = end.cancelled(), if owed.is_empty() => break,
            }
        }
        // What was published has reached the server; if NATS is away, the count of late replies tells.
        let _ = self.bus.health().await;
        answered
    }
}
