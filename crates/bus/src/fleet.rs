//! The live workers, as their heartbeats describe them: who takes assignments from which provider's subject.

use crate::{Bus, Result, Subscription};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::status::Heartbeat;
use wire::subjects::{ASSIGN, HEARTBEAT, is_assign};

/// A worker is live for this long after a heartbeat: three intervals.
pub const LIVE_FOR: Duration = Duration::from_secs(15);
/// Heartbeats that wait here; one that is dropped comes again.
const QUEUE_MAX: usize = 1024;
/// Bounds of what heartbeats can make this process keep.
const SUBJECTS_MAX: usize = 1024;
const WORKERS_MAX: usize = 4096;

/// The fleet as one process hears it.
pub struct Fleet {
    /// Until when each worker that takes from a subject counts as live, by worker id.
    subjects: Mutex<HashMap<String, HashMap<String, Instant>>>,
    since: Instant,
}

impl Fleet {
    /// A fleet of which nothing was heard before `now`.
    pub fn new(now: Instant) -> Self {
        Self { subjects: Mutex::default(), since: now }
    }

    pub async fn subscribe(bus: &Bus) -> Result<Subscription> {
        bus.subscribe(HEARTBEAT, None, QUEUE_MAX).await
    }

    /// Listens to the heartbeats until cancelled.
    pub async fn listen(&self, mut heartbeats: Subscription, cancel: CancellationToken) {
        loop {
            let message = tokio::select! {
                () = cancel.cancelled() => return,
                message = heartbeats.next() => message,
            };
            let Some(message) = message else { return };
            if let Ok(heartbeat) = serde_json::from_slice(&message.payload) {
                self.hear(&heartbeat, Instant::now());
            }
        }
    }

    pub fn hear(&self, heartbeat: &Heartbeat, now: Instant) {
        let mut subjects = self.subjects.lock();
        let worker = &heartbeat.worker_id;
        let leaving = heartbeat.is_leaving();
        subjects.retain(|_, workers| {
            workers.retain(|id, until| *until > now && !(leaving && id == worker));
            !workers.is_empty()
        });
        if leaving {
            return;
        }

        let fits = |subject: &&String| *subject != ASSIGN && is_assign(subject);
        for subject in heartbeat.subjects.iter().filter(fits) {
            if subjects.len() >= SUBJECTS_MAX && !subjects.contains_key(subject) {
                continue;
            }
            let workers = subjects.entry(subject.clone()).or_default();
            if workers.len() < WORKERS_MAX || workers.contains_key(worker) {
                workers.insert(worker.clone(), now + LIVE_FOR);
            }
        }
    }

    /// Whether a live worker takes assignments from this provider's subject.
    pub fn listens(&self, subject: &str, now: Instant) -> bool {
        let subjects = self.subjects.lock();
        let workers = subjects.get(subject);
        workers.is_some_and(|workers| workers.values().any(|until| *until > now))
    }

    /// Whether every live worker has been heard by now, so that a silent one is gone.
    pub fn is_known(&self, now: Instant) -> bool {
        now.duration_since(self.since) > LIVE_FOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(worker: &str, status: &str, subjects: &[&str]) -> Heartbeat {
        Heartbeat {
            worker_id: worker.into(),
            status: status.into(),
            subjects: subjects.iter().map(|subject| subject.to_string()).collect(),
            ..Heartbeat::default()
        }
    }

    const GPU: &str = "caf.exec.assign.v1.gpu";

    #[test]
    fn worker_is_live_for_three_intervals_unless_it_leaves() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let fleet = Fleet::new(start);
        assert!(!fleet.listens(GPU, start));

        fleet.hear(&beat("a", "busy", &[GPU]), start);
        fleet.hear(&beat("b", "idle", &[GPU]), after(5));
        assert!(fleet.listens(GPU, after(19)));
        assert!(!fleet.listens(GPU, after(20)));

        fleet.hear(&beat("a", "idle", &[GPU]), after(6));
        fleet.hear(&beat("b", "draining", &[GPU]), after(7));
        assert!(fleet.listens(GPU, after(8)));
        fleet.hear(&beat("a", "stopped", &[GPU]), after(9));
        assert!(!fleet.listens(GPU, after(9)));
        assert!(!fleet.is_known(after(15)) && fleet.is_known(after(16)));
    }

    #[test]
    fn only_subjects_of_providers_count_and_older_workers_name_none() {
        let now = Instant::now();
        let fleet = Fleet::new(now);
        let others = [ASSIGN, "caf.exec.assign.v1.dlq", "caf.exec.result.v1", "caf.exec.assign.v1.*"];
        fleet.hear(&beat("a", "idle", &others), now);
        let older: Heartbeat = serde_json::from_str(r#"{"worker_id":"b","providers":[{"name":"gpu"}]}"#).unwrap();
        fleet.hear(&older, now);
        assert!(others.iter().chain([&GPU]).all(|subject| !fleet.listens(subject, now)));
    }

    #[test]
    fn table_is_bounded() {
        let now = Instant::now();
        let fleet = Fleet::new(now);
        for n in 0..2 * SUBJECTS_MAX {
            fleet.hear(&beat("a", "idle", &[&format!("{ASSIGN}.p{n}")]), now);
        }
        for n in 0..WORKERS_MAX + 10 {
            fleet.hear(&beat(&format!("w{n}"), "idle", &[&format!("{ASSIGN}.p0")]), now);
        }
        let subjects = fleet.subjects.lock();
        assert_eq!((subjects.len(), subjects[&format!("{ASSIGN}.p0")].len()), (SUBJECTS_MAX, WORKERS_MAX));
    }
}
