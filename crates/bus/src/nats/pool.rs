//! A pool of connections, so that cores do not contend for one: how a connection is chosen, and which order that keeps.

use super::access::Access;
use super::link::Link;
use crate::Result;
use futures_util::future::{join_all, try_join_all};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// More connections than this do not increase throughput.
const LINKS_MAX: usize = 8;
/// How long a publish waits for its subject's lost connection to return while others are up. It does not use another
/// one, because it would overtake messages that are queued in its own.
const RETURN_DEADLINE: Duration = Duration::from_secs(1);

pub struct Pool {
    links: Vec<Arc<Link>>,
    turn: AtomicUsize,
}

impl Pool {
    /// Opens `size` connections, or one per core if `None`; at most [`LINKS_MAX`]. Each reconnect counts as one of the
    /// `interruptions`.
    pub async fn open(
        access: &Arc<Access>,
        size: Option<usize>,
        interruptions: &Arc<watch::Sender<u64>>,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let size = size.unwrap_or_else(cores).clamp(1, LINKS_MAX);
        let links =
            try_join_all((0..size).map(|number| Link::open(number, access, interruptions, tasks, cancel))).await?;
        Ok(Self {
            links: links.into_iter().map(Arc::new).collect(),
            turn: AtomicUsize::new(0),
        })
    }

    /// The calling thread's connection, so that the threads of a runtime do not contend. A connection that is lost or
    /// about to reconnect is skipped while another is up.
    pub fn mine(&self) -> &Arc<Link> {
        self.live(thread())
    }

    /// Round robin, for subscriptions and consumers, which stay on their connection.
    pub fn next(&self) -> &Arc<Link> {
        self.live(self.turn.fetch_add(1, Ordering::Relaxed))
    }

    /// The subject's connection, always the same one, so that messages published on one subject stay in order.
    pub async fn of(&self, subject: &str) -> Result<&Arc<Link>> {
        let mut hasher = DefaultHasher::new();
        subject.hash(&mut hasher);
        let index = hasher.finish() % self.links.len() as u64;
        let link = &self.links[usize::try_from(index).expect("the index is less than the number of connections")];

        if link.connected().is_err() && self.links.iter().any(|other| other.connected().is_ok()) {
            link.returned(RETURN_DEADLINE).await?;
        }
        Ok(link)
    }

    /// The number of connects so far, over all connections.
    pub fn connects(&self) -> u64 {
        self.links.iter().map(|link| *link.connects().borrow()).sum()
    }

    /// Waits until what was subscribed over `link` receives messages published on any connection.
    ///
    /// In a cluster of servers the subscription has to propagate to each of them. A message sent over `link` takes the
    /// same route after it; so once that message arrives on a connection to another server, the server knows the
    /// subscription.
    pub async fn known(&self, link: &Link, deadline: Duration) -> Result<()> {
        link.round_trip(deadline).await?;
        if self.links.len() == 1 {
            return Ok(());
        }

        let mut confirmed = vec![link.server()];
        for other in &self.links {
            let server = other.server();
            if other.connected().is_err() || confirmed.contains(&server) {
                continue;
            }
            match link.reach(other, deadline).await {
                Err(error) if other.connected().is_ok() => return Err(error),
                // A connection that was lost meanwhile learns of the subscription when it reconnects.
                _ => confirmed.push(server),
            }
        }
        Ok(())
    }

    /// A round trip on each connection.
    pub async fn health(&self, deadline: Duration) -> Result<()> {
        let trips = join_all(self.links.iter().map(|link| link.round_trip(deadline))).await;
        trips.into_iter().collect()
    }

    /// Reconnects one connection after the other, so that requests can use the others meanwhile.
    pub async fn renew(&self) -> Result<()> {
        for link in &self.links {
            link.renew().await?;
        }
        Ok(())
    }

    /// The first connection from `start` on that is up, preferably one that is not about to reconnect. If none is up,
    /// the one at `start`.
    fn live(&self, start: usize) -> &Arc<Link> {
        let at = |offset: usize| &self.links[(start % self.links.len() + offset) % self.links.len()];
        let all = || (0..self.links.len()).map(at);
        let connected = |link: &&Arc<Link>| link.connected().is_ok();

        all()
            .find(|link| connected(link) && !link.renewing())
            .or_else(|| all().find(connected))
            .unwrap_or_else(|| at(0))
    }
}

/// A number for the calling thread, unique in the process.
fn thread() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: usize = THREADS.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}
