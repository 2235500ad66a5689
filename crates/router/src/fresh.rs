//! The records of the tasks that this router has just pushed, as it wrote them. When the result of one arrives here, its
//! record need not be read again; if somebody else has changed it, writing it fails, and then it is read.

use bus::tasks::Record;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use wire::router::ExecResult;

/// Records kept at most. Most have about 1.5 KB.
const RECORDS_MAX: usize = 8192;

#[derive(Default)]
pub struct Fresh(Mutex<Table>);

#[derive(Default)]
struct Table {
    by_assignment: HashMap<String, Record>,
    /// Oldest first; has entries of records that were taken.
    order: VecDeque<String>,
}

impl Fresh {
    pub fn add(&self, record: Record) {
        let Some(assignment_id) = record.task.assignment_id.clone() else {
            return;
        };
        let mut table = self.0.lock();
        table.order.push_back(assignment_id.clone());
        table.by_assignment.insert(assignment_id, record);
        if table.order.len() > RECORDS_MAX
            && let Some(oldest) = table.order.pop_front()
        {
            table.by_assignment.remove(&oldest);
        }
    }

    /// The record of the task whose assignment this result is of.
    pub fn take(&self, result: &ExecResult) -> Option<Record> {
        let record = self.0.lock().by_assignment.remove(&result.assignment_id)?;
        let tenant_id = result.tenant_id.as_deref();
        let is_its = record.task.task_id == result.request_id
            && tenant_id.is_none_or(|tenant_id| tenant_id == record.task.tenant());
        is_its.then_some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::router::TaskState;

    fn record(assignment_id: &str) -> Record {
        let task = serde_json::json!({"task_id": "r", "state": "assigned", "assignment_id": assignment_id,
            "tenant_id": "acme"});
        let task: TaskState = serde_json::from_value(task).unwrap();
        Record::written(task, 1)
    }

    fn result(assignment_id: &str, request_id: &str, tenant_id: Option<&str>) -> ExecResult {
        let result = serde_json::json!({"assignment_id": assignment_id, "request_id": request_id, "status": "success",
            "provider_id": "p", "job": {"type": "t"}, "tenant_id": tenant_id});
        serde_json::from_value(result).unwrap()
    }

    #[test]
    fn record_is_that_of_the_result_and_taken_once() {
        let fresh = Fresh::default();
        for id in ["a", "b", "c", "d"] {
            fresh.add(record(id));
        }
        assert!(fresh.take(&result("a", "r", Some("acme"))).is_some());
        assert!(fresh.take(&result("a", "r", Some("acme"))).is_none());
        assert!(fresh.take(&result("b", "r", None)).is_some());
        assert!(fresh.take(&result("c", "other", None)).is_none());
        assert!(fresh.take(&result("d", "r", Some("beta"))).is_none());
    }

    #[test]
    fn oldest_records_make_room() {
        let fresh = Fresh::default();
        for n in 0..RECORDS_MAX + 1 {
            fresh.add(record(&n.to_string()));
        }
        assert!(fresh.take(&result("0", "r", None)).is_none());
        assert!(fresh.take(&result("1", "r", None)).is_some());
        let table = fresh.0.lock();
        assert_eq!((table.by_assignment.len(), table.order.len()), (RECORDS_MAX - 1, RECORDS_MAX));
    }
}
