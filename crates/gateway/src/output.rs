//! A task's output on its way from the bus to a client.

use crate::forward::Reply;
use wire::ipc::{FrameType, StreamData};
use wire::router::{Awaited, OutputChunk};

/// Output in order, of the newest attempt: when a worker starts again, `seq` starts at 0 again.
pub struct OutputReader {
    pub task: Awaited,
    attempt: u32,
    /// The number that the next piece has; so many have come.
    pub next: u64,
}

impl OutputReader {
    pub fn new(task: Awaited) -> Self {
        Self { task, attempt: 0, next: 0 }
    }

    /// The frame for a message on the subject of the request, unless it has come before or is of another task.
    pub fn take(&mut self, payload: &[u8]) -> Option<Reply> {
        let chunk: OutputChunk = serde_json::from_slice(payload).ok()?;
        // A router that does not say the assignment knows one task of an id, whoever's it is.
        if !self
            .task
            .owns(&chunk.assignment_id, chunk.tenant_id.as_deref())
            .unwrap_or(true)
        {
            return None;
        }
        if chunk.attempt < self.attempt || (chunk.attempt == self.attempt && chunk.seq < self.next) {
            return None;
        }
        (self.attempt, self.next) = (chunk.attempt, chunk.seq + 1);
        let data = StreamData { task_id: chunk.request_id, seq: chunk.seq, data: chunk.data };
        Some((FrameType::StreamData, serde_json::to_vec(&data).expect("JSON").into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_another_task_with_the_same_request_id_is_left_out() {
        let chunk = |assignment: &str, tenant: Option<&str>, seq: u64| {
            let mut chunk = serde_json::json!({"request_id": "r", "assignment_id": assignment, "attempt": 1, "seq": seq,
                "data": assignment});
            if let Some(tenant) = tenant {
                chunk["tenant_id"] = tenant.into();
            }
            chunk.to_string()
        };
        let task = |assignment: Option<&str>| Awaited {
            tenant_id: "acme".into(),
            assignment_id: assignment.map(String::from),
        };
        let mut reader = OutputReader::new(task(Some("a")));
        assert!(reader.take(chunk("b", Some("beta"), 0).as_bytes()).is_none());
        assert!(reader.take(chunk("b", None, 7).as_bytes()).is_none());
        assert!(reader.take(chunk("a", None, 0).as_bytes()).is_some());
        assert_eq!(reader.next, 1, "another's numbers are not counted");

        let mut reader = OutputReader::new(task(None));
        assert!(reader.take(chunk("b", Some("beta"), 0).as_bytes()).is_none());
        assert!(reader.take(chunk("a", Some("acme"), 0).as_bytes()).is_some());
        assert!(reader.take(chunk("a", None, 1).as_bytes()).is_some(), "a v1 worker names no tenant");
    }
}
