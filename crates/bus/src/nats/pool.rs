//! Several connections, so that no core waits for another's: who uses which, and what that keeps in order.

use super::access::Access;
use super::link::Link;
use crate::Result;
use futures_util::future::{join_all, try_join_all};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// More bring nothing that a server would notice.
const LINKS_MAX: usize = 8;
/// A publish whose connection is being sought again while others live waits this long: another one would overtake what
/// waits in its own.
const RETURN_DEADLINE: Duration = Duration::from_secs(1);

pub struct Pool {
    links: Vec<Arc<Link>>,
    turn: AtomicUsize,
}

impl Pool {
    /// `None`: as many as there are cores.
    pub async fn open(
        access: &Arc<Access>,
        size: Option<usize>,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let size = size.unwrap_or_else(cores).clamp(1, LINKS_MAX);
        let links = try_join_all((0..size).map(|number| Link::open(number, access, tasks, cancel))).await?;
        Ok(Self { links: links.into_iter().map(Arc::new).collect(), turn: AtomicUsize::new(0) })
    }

    /// The calling thread's: threads of a runtime stay apart. A connection that is lost or about to be is passed over
    /// while another lives.
    pub fn mine(&self) -> &Arc<Link> {
        self.live(thread())
    }

    /// One after the other, for what stays on its connection.
    pub fn next(&self) -> &Arc<Link> {
        self.live(self.turn.fetch_add(1, Ordering::Relaxed))
    }

    /// The subject's, always the same, so that what is published on one subject stays in order.
    pub async fn of(&self, subject: &str) -> Result<&Arc<Link>> {
        let mut hasher = DefaultHasher::new();
        subject.hash(&mut hasher);
        let place = hasher.finish() % self.links.len() as u64;
        let link = &self.links[usize::try_from(place).expect("less than the number of connections")];
        if link.connected().is_err() && self.links.iter().any(|other| other.connected().is_ok()) {
            link.returned(RETURN_DEADLINE).await?;
        }
        Ok(link)
    }

    /// By its number.
    pub fn links(&self) -> &[Arc<Link>] {
        &self.links
    }

    /// Returns once whoever publishes, on whatever connection of ours or of others, reaches what was subscribed over
    /// `link` before. In a cluster of servers each must have heard of it: what came to one over the same way as the
    /// news of the subscription came after it.
    pub async fn known(&self, link: &Link, deadline: Duration) -> Result<()> {
        link.round_trip(deadline).await?;
        if self.links.len() == 1 {
            return Ok(());
        }
        let mut told = vec![link.server()];
        for other in &self.links {
            let server = other.server();
            if other.connected().is_err() || told.contains(&server) {
                continue;
            }
            match link.reach(other, deadline).await {
                Err(error) if other.connected().is_ok() => return Err(error),
                _ => told.push(server),
            }
        }
        Ok(())
    }

    /// A round trip on each.
    pub async fn health(&self, deadline: Duration) -> Result<()> {
        let trips = join_all(self.links.iter().map(|link| link.round_trip(deadline))).await;
        trips.into_iter().collect()
    }

    /// Connects each anew, one after the other, so that requests find another meanwhile.
    pub async fn renew(&self) -> Result<()> {
        for link in &self.links {
            link.renew().await?;
        }
        Ok(())
    }

    fn live(&self, start: usize) -> &Arc<Link> {
        let at = |offset: usize| &self.links[(start % self.links.len() + offset) % self.links.len()];
        let all = || (0..self.links.len()).map(at);
        let connected = |link: &&Arc<Link>| link.connected().is_ok();
        all().find(|link| connected(link) && !link.leaving()).or_else(|| all().find(connected)).unwrap_or_else(|| at(0))
    }
}

/// A number of the calling thread's own.
fn thread() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: usize = THREADS.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}
