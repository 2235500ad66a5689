//! A task's output: reading it from the bus and sending it to the client, through its session or as events of an HTTP
//! answer.

use crate::openai::Client;
use crate::reply::{PAYLOAD_MAX, Reply, Slot};
use tokio::sync::mpsc;
use wire::ipc::{FrameType, StreamData};
use wire::router::{Awaited, OutputChunk};

/// Filters the output of one task: only its own pieces, each once, and only those of the newest attempt. A worker that
/// restarts a task begins again at `seq` 0.
pub struct OutputReader {
    pub task: Awaited,
    attempt: u32,
    /// The `seq` of the next piece.
    pub next: u64,
}

impl OutputReader {
    pub fn new(task: Awaited) -> Self {
        Self { task, attempt: 0, next: 0 }
    }

    /// Reads a message on the request's output subject. `None` if the message is malformed, repeats an earlier one, or
    /// belongs to another task.
    pub fn take(&mut self, payload: &[u8]) -> Option<OutputChunk> {
        let chunk: OutputChunk = serde_json::from_slice(payload).ok()?;
        // A router that does not name the assignment has only one task with this id, whatever its tenant.
        let owned = self.task.owns(&chunk.assignment_id, chunk.tenant_id.as_deref());
        let repeated = chunk.attempt < self.attempt || (chunk.attempt == self.attempt && chunk.seq < self.next);
        if !owned.unwrap_or(true) || repeated {
            return None;
        }

        (self.attempt, self.next) = (chunk.attempt, chunk.seq + 1);
        Some(chunk)
    }
}

/// Sends the pieces of one stream to its client, ahead of the stream's end.
pub struct Pieces {
    to: Destination,
    sent: u64,
}

enum Destination {
    Session(Slot, mpsc::Sender<(Slot, Reply)>),
    Http(Client),
}

/// Why a piece could not be sent.
pub enum Unsent {
    /// It has this many bytes, more than a frame holds.
    TooLarge(usize),
    /// The client has not read for too long.
    Stalled,
}

impl Pieces {
    pub fn new(slot: Slot, session: mpsc::Sender<(Slot, Reply)>) -> Self {
        Self { to: Destination::Session(slot, session), sent: 0 }
    }

    pub fn over_http(client: Client) -> Self {
        Self { to: Destination::Http(client), sent: 0 }
    }

    /// Sends one piece; waits while the client does not read. If it is cancelled, nothing is sent.
    pub async fn send(&mut self, chunk: OutputChunk) -> Result<(), Unsent> {
        match &self.to {
            Destination::Session(slot, session) => {
                let data = StreamData { task_id: chunk.request_id, seq: chunk.seq, data: chunk.data };
                let payload = serde_json::to_vec(&data).expect("output is JSON");
                if payload.len() > PAYLOAD_MAX {
                    return Err(Unsent::TooLarge(payload.len()));
                }
                // Sending fails only once the session has ended, and the session's own task runs this request.
                let _ = session.send((*slot, Reply::new(FrameType::StreamData, payload))).await;
            }
            Destination::Http(client) => client.send_piece(chunk).await?,
        }
        self.sent += 1;
        Ok(())
    }

    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Pieces that no session receives.
    #[cfg(test)]
    pub fn disconnected() -> Self {
        Self::new(Slot::V2(1), mpsc::channel(1).0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_another_task_with_the_same_request_id_is_dropped() {
        let chunk = |assignment: &str, tenant: Option<&str>, seq: u64| {
            let mut chunk = serde_json::json!({
                "request_id": "r", "assignment_id": assignment, "attempt": 1, "seq": seq, "data": assignment,
            });
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
        assert_eq!(reader.next, 1, "pieces of other tasks are not counted");

        let mut reader = OutputReader::new(task(None));
        assert!(reader.take(chunk("b", Some("beta"), 0).as_bytes()).is_none());
        assert!(reader.take(chunk("a", Some("acme"), 0).as_bytes()).is_some());
        assert!(reader.take(chunk("a", None, 1).as_bytes()).is_some(), "a v1 worker names no tenant");
    }
}
