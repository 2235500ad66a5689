//! Serves queries concurrently, so that a slow one holds up no other. Their number is bounded: a query that gets no turn
//! in time is refused, and none waits forever.

use bus::{Message, Subscription};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Queries that wait for their turn, and how long. Beyond either, a query is refused.
const WAITING_MAX: usize = 1024;
const WAIT_MAX: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Answer,
    /// Too many queries are under way.
    Refuse,
}

/// The bound that several kinds of queries share.
pub struct Desk {
    /// One for each query that waits or is answered.
    places: Arc<Semaphore>,
    /// One for each query that is answered.
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl Desk {
    pub fn new(concurrent: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(WAITING_MAX + concurrent)),
            slots: Arc::new(Semaphore::new(concurrent)),
            tasks: TaskTracker::new(),
        }
    }

    /// Takes queries until cancelled, then those that the bus has delivered. `handle` runs in a task for each.
    pub async fn serve<F>(
        &self,
        mut queries: Subscription,
        stop: &CancellationToken,
        handle: impl Fn(Message, Turn) -> F + Clone + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        while let Some(query) = queries.next_until(stop).await {
            let Ok(place) = self.places.clone().try_acquire_owned() else {
                handle(query, Turn::Refuse).await;
                continue;
            };

            let (slots, handle) = (self.slots.clone(), handle.clone());
            self.tasks.spawn(async move {
                let slot = tokio::time::timeout(WAIT_MAX, slots.acquire()).await;
                let turn = if slot.is_ok() { Turn::Answer } else { Turn::Refuse };
                handle(query, turn).await;
                drop(place);
            });
        }
    }

    /// The queries under way.
    pub fn into_tasks(self) -> TaskTracker {
        self.tasks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::Bus;

    /// A desk with two slots. It never answers `slow`, and answers others with their turn.
    async fn desk(bus: &Bus, stop: &CancellationToken) -> tokio::task::JoinHandle<TaskTracker> {
        let queries = bus.subscribe("ask", Some("group"), 4096).await.unwrap();
        let (bus, stop) = (bus.clone(), stop.clone());
        tokio::spawn(async move {
            let desk = Desk::new(2);
            let handle = move |query: Message, turn: Turn| {
                let bus = bus.clone();
                async move {
                    if (&query.payload[..], turn) == (b"slow", Turn::Answer) {
                        std::future::pending().await
                    }
                    let (subject, payload) = (query.reply.unwrap(), format!("{turn:?}").into());
                    bus.publish(Message { subject, payload, ..Message::default() })
                        .await
                        .unwrap();
                }
            };
            desk.serve(queries, &stop, handle).await;
            desk.into_tasks()
        })
    }

    async fn ask(bus: &Bus, query: &'static str) -> Option<String> {
        let asked = bus.request("ask", bus::Headers::new(), query.into(), Duration::from_secs(5));
        Some(String::from_utf8_lossy(&asked.await.ok()?.payload).into_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn slow_query_holds_up_no_other_and_none_waits_forever() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let stop = CancellationToken::new();
        let served = desk(&bus, &stop).await;

        let (slow, quick) = tokio::join!(ask(&bus, "slow"), ask(&bus, "quick"));
        assert_eq!((slow, quick.as_deref()), (None, Some("Answer")));

        // The second slow query takes the last slot.
        let (slow, late) = tokio::join!(ask(&bus, "slow"), ask(&bus, "late"));
        assert_eq!((slow, late.as_deref()), (None, Some("Refuse")));

        let many = (0..WAITING_MAX + 10).map(|_| ask(&bus, "many"));
        let began = tokio::time::Instant::now();
        let answers = futures_util::future::join_all(many).await;
        assert!(answers.iter().all(|answer| answer.as_deref() == Some("Refuse")));
        assert!(began.elapsed() < 2 * WAIT_MAX, "they wait beside each other");

        stop.cancel();
        assert_eq!(served.await.unwrap().len(), 2, "only the slow ones are still under way");
    }
}
