//! Tasks that this router pushed and that have not ended, on a bus without atomic batches. The record of one that stays
//! open is committed after a while, so that a late repeat of its request finds that its assignment is stored.

use crate::Router;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::router::{State, TaskState};

/// Most tasks end before this, and cost no further write.
const COMMIT_AFTER: Duration = Duration::from_secs(60);
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Bounds the table. A task beyond it is not committed here, and a late repeat of its request is refused.
const OPEN_MAX: usize = 100_000;

#[derive(Default)]
pub struct Open(Mutex<Table>);

#[derive(Default)]
struct Table {
    /// By assignment id.
    tasks: HashMap<String, Task>,
    /// Oldest first; has entries of tasks that have ended since.
    order: VecDeque<(Instant, String)>,
}

struct Task {
    tenant_id: String,
    request_id: String,
}

impl Open {
    pub fn add(&self, task: &TaskState, now: Instant) {
        let Some(assignment_id) = &task.assignment_id else {
            return;
        };
        let mut table = self.0.lock();
        if table.order.len() >= OPEN_MAX {
            table.sweep();
        }
        if table.order.len() >= OPEN_MAX {
            return;
        }

        let (tenant_id, request_id) = (task.tenant().into(), task.task_id.clone());
        table
            .tasks
            .insert(assignment_id.clone(), Task { tenant_id, request_id });
        table.order.push_back((now, assignment_id.clone()));
    }

    /// The assignment has a result.
    pub fn ended(&self, assignment_id: &str) {
        self.0.lock().tasks.remove(assignment_id);
    }

    /// Removes and returns the tasks that were added [`COMMIT_AFTER`] before `now` and have not ended.
    fn due(&self, now: Instant) -> Vec<Task> {
        let mut table = self.0.lock();
        let mut due = Vec::new();
        while let Some((added, _)) = table.order.front()
            && *added + COMMIT_AFTER <= now
        {
            let (_, assignment_id) = table.order.pop_front().expect("there is a front");
            due.extend(table.tasks.remove(&assignment_id));
        }
        due
    }
}

impl Table {
    /// Forgets the order of tasks that have ended.
    fn sweep(&mut self) {
        let Self { tasks, order } = self;
        order.retain(|(_, assignment_id)| tasks.contains_key(assignment_id));
    }
}

/// Commits the records of tasks that stay open, until cancelled.
pub async fn run(router: Arc<Router>, cancel: CancellationToken) {
    let mut ticks = tokio::time::interval(COMMIT_EVERY);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }

        for Task { tenant_id, request_id } in router.open.due(Instant::now()) {
            let committed = bus::tasks::update(&router.bus, &tenant_id, &request_id, |task| {
                task.committed |= matches!(task.state, State::Queued | State::Assigned);
            });
            if let Err(error) = committed.await {
                tracing::warn!(%error, request_id, "cannot commit the record of an open task");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(id: &str) -> TaskState {
        let task = serde_json::json!({"task_id": "r", "state": "assigned", "assignment_id": id, "tenant_id": "acme"});
        serde_json::from_value(task).unwrap()
    }

    #[test]
    fn only_tasks_that_stay_open_are_due() {
        let (open, start) = (Open::default(), Instant::now());
        open.add(&task("a"), start);
        open.add(&task("b"), start);
        open.ended("a");
        assert!(open.due(start + COMMIT_AFTER - Duration::from_millis(1)).is_empty());
        assert_eq!(open.due(start + COMMIT_AFTER).len(), 1);
        assert!(open.due(start + 2 * COMMIT_AFTER).is_empty());
    }

    #[test]
    fn table_is_bounded_and_ended_tasks_make_room() {
        let (open, now) = (Open::default(), Instant::now());
        for n in 0..OPEN_MAX + 10 {
            open.add(&task(&n.to_string()), now);
        }
        assert_eq!(open.0.lock().order.len(), OPEN_MAX);

        open.ended("7");
        open.add(&task("new"), now);
        assert!(open.0.lock().tasks.contains_key("new"));
        assert_eq!(open.0.lock().order.len(), OPEN_MAX);
    }
}
