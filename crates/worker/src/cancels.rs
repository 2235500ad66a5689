//! The cancellations that this worker has heard of. It hears them from its start on, so the record of a task that was
//! made later need not be read before the run to learn whether the task was cancelled. A cancellation that is lost on
//! its way is found soon after: the record is read when the run makes it `running`.

use parking_lot::Mutex;
use std::collections::{HashSet, VecDeque};
use wire::router::CancelRun;

/// Cancellations remembered at most.
const HEARD_MAX: usize = 10_000;

pub struct Cancels(Mutex<Heard>);

struct Heard {
    /// All cancellations of tasks that were stored after this time are in the table; milliseconds of the stream's clock.
    since_ms: u64,
    request_ids: HashSet<String>,
    /// Oldest first, with the time when each was heard.
    order: VecDeque<(u64, String)>,
}

impl Cancels {
    /// `now_ms` is the time of the stream's clock, read after the subscription to cancellations.
    pub fn since(now_ms: u64) -> Self {
        let heard = Heard { since_ms: now_ms, request_ids: HashSet::new(), order: VecDeque::new() };
        Self(Mutex::new(heard))
    }

    pub fn hear(&self, cancel: &CancelRun, now_ms: u64) {
        let mut heard = self.0.lock();
        if !heard.request_ids.insert(cancel.request_id.clone()) {
            return;
        }
        heard.order.push_back((now_ms, cancel.request_id.clone()));
        if heard.order.len() > HEARD_MAX
            && let Some((at_ms, forgotten)) = heard.order.pop_front()
        {
            heard.request_ids.remove(&forgotten);
            heard.since_ms = heard.since_ms.max(at_ms);
        }
    }

    /// Whether a task of this id whose assignment was stored at this time may have been cancelled.
    pub fn may_include(&self, request_id: &str, stored_ms: u64) -> bool {
        let heard = self.0.lock();
        stored_ms <= heard.since_ms || heard.request_ids.contains(request_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cancel(id: usize) -> CancelRun {
        CancelRun { request_id: id.to_string(), tenant_id: None, assignment_id: None }
    }

    #[test]
    fn only_tasks_made_later_and_not_named_are_surely_wanted() {
        let cancels = Cancels::since(100);
        cancels.hear(&cancel(1), 150);
        assert!(cancels.may_include("2", 100), "its cancellation may have come before the subscription");
        assert!(!cancels.may_include("2", 101));
        assert!(cancels.may_include("1", 120));
    }

    #[test]
    fn what_is_forgotten_may_have_been_cancelled() {
        let cancels = Cancels::since(0);
        for id in 0..=HEARD_MAX {
            cancels.hear(&cancel(id), 1000 + id as u64);
            cancels.hear(&cancel(id), 1000 + id as u64);
        }
        assert!(cancels.may_include("0", 1000), "it was forgotten");
        assert!(cancels.may_include("1", 1001), "it is remembered");
        assert!(!cancels.may_include("other", 1001), "later ones are all remembered");
        assert_eq!(cancels.0.lock().order.len(), HEARD_MAX);
    }
}
