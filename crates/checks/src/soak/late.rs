//! Stands in for the router: takes decide requests from NATS and answers each one after its deadline.

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

/// Requests that may be queued for their late answer; further ones wait in the subscription.
const QUEUE: usize = 65_536;
/// How long past the deadline an answer is sent, so that even a busy gateway has given up by then.
const AFTER: Duration = Duration::from_secs(1);
/// How long to wait for a real router to answer the probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

pub struct LateRouter {
    bus: Bus,
    requests: Subscription,
    delay: Duration,
}

impl LateRouter {
    /// Fails with [`Error::RouterThere`] if a real router is running on this NATS server, whose requests it would take.
    pub async fn start(url: &str, deadline: Duration) -> Result<Self, Error> {
        let config = NatsConfig { url: url.into(), name: "late-router".into(), ..NatsConfig::default() };
        let bus = Nats::connect(config).await?;

        match bus
            .request(subjects::BACKPRESSURE, Headers::new(), Bytes::new(), PROBE_TIMEOUT)
            .await
        {
            Err(bus::Error::NoResponders(_)) => {}
            Err(bus::Error::Timeout(_)) | Ok(_) => return Err(Error::RouterThere),
            Err(error) => return Err(error.into()),
        }

        let requests = bus
            .subscribe(subjects::DECIDE, Some(subjects::DECIDE_GROUP), QUEUE)
            .await?;
        bus.health().await?;
        Ok(Self { bus, requests, delay: deadline + AFTER })
    }

    /// Answers until `end` is cancelled and no reply is outstanding. Returns the number of published replies.
    pub async fn run(mut self, end: CancellationToken) -> u64 {
        let mut owed: VecDeque<(Instant, Arc<str>)> = VecDeque::new();
        let mut answered = 0;
        loop {
            let due = owed.front().map(|(due, _)| *due);
            tokio::select! {
                // Due answers come first, so the queue holds no more than one delay's worth of requests.
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

        // Wait until the published replies have reached NATS. A failure shows up in the count of late replies.
        let _ = self.bus.health().await;
        answered
    }
}
