//! Replies to the client: which may be sent, and in which order.

use super::held::Held;
use super::{Finished, Session, V1Stream};
use crate::reply::{Reply, Slot};
use wire::ipc::{ErrorCode, Version};

impl Session {
    pub(super) fn piece(&mut self, slot: Slot, piece: Reply) {
        match (slot, &mut self.v1_stream) {
            (Slot::V1(position), Some(V1Stream::Running { position: running, pieces })) if position == *running => {
                *pieces += 1;
                self.outbox.put(Version::V1, piece);
            }
            // The request was abandoned.
            (Slot::V1(_), _) => {}
            (Slot::V2(request_id), _) => {
                if let Some(pieces) = self.v2_open.get_mut(&request_id) {
                    *pieces += 1;
                    self.outbox.put(Version::V2 { request_id, deadline_ms: 0 }, piece);
                }
            }
        }
    }

    /// Queues the last frame of a request. A frame that can be sent at once is not charged against the reply budget,
    /// so that clients that read are served even while others exhaust the budget.
    pub(super) fn finished(&mut self, Finished { slot, reply, pieces }: Finished) {
        let its_turn = match slot {
            Slot::V1(position) => self.v1_order.is_first(position),
            Slot::V2(_) => true,
        };
        let leaves = its_turn && self.ended.is_empty() && self.has_room();
        let held = if leaves {
            reply.into()
        } else {
            Held::within_budget(&self.shared, reply)
        };

        self.ended_bytes += held.reply.payload.len();
        self.ended.push_back((slot, held, pieces));
    }

    /// Moves replies whose turn has come to the outbox while it has room. Starts a waiting v1 stream when its turn
    /// comes.
    pub(super) fn release(&mut self) {
        loop {
            while self.has_room()
                && let Some(reply) = self.v1_order.pop()
            {
                self.outbox.put(Version::V1, reply);
            }

            // A v1 stream's turn comes once all replies before it are in the outbox.
            if self.v1_order.is_empty() {
                self.start_waiting_stream();
            }

            let ready = |(slot, _, pieces): &(Slot, Held, u64)| self.pieces_of(*slot) >= *pieces;
            if !self.has_room() || !self.ended.front().is_some_and(ready) {
                return;
            }

            let (slot, held, _) = self.ended.pop_front().expect("the queue has a ready reply");
            self.settle(slot, held);
        }
    }

    /// How many pieces of this request's output have arrived.
    pub(super) fn pieces_of(&self, slot: Slot) -> u64 {
        match (slot, &self.v1_stream) {
            (Slot::V1(position), Some(V1Stream::Running { position: running, pieces })) if position == *running => {
                *pieces
            }
            (Slot::V1(_), _) => 0,
            (Slot::V2(request_id), _) => self.v2_open.get(&request_id).copied().unwrap_or(0),
        }
    }

    /// Ends the request. A v2 reply moves to the outbox, a v1 reply waits for those before it.
    pub(super) fn settle(&mut self, slot: Slot, held: Held) {
        self.ended_bytes -= held.reply.payload.len();
        match slot {
            Slot::V1(position) => {
                self.v1_open -= 1;
                self.v1_stream.take_if(
                    |stream| matches!(stream, V1Stream::Running { position: running, .. } if *running == position),
                );
                self.v1_order.insert(position, held);
            }
            Slot::V2(request_id) => {
                self.v2_open.remove(&request_id);
                self.outbox.put(Version::V2 { request_id, deadline_ms: 0 }, held.reply);
            }
        }
    }

    pub(super) fn start_waiting_stream(&mut self) {
        let waiting = |stream: &mut V1Stream| matches!(stream, V1Stream::Waiting { .. });
        if let Some(V1Stream::Waiting { request, deadline, permit }) = self.v1_stream.take_if(waiting) {
            self.start_v1(request, deadline, permit);
        }
    }

    /// Answers at once, except that a v1 reply waits for those before it.
    pub(super) fn answer(&mut self, version: Version, reply: Reply) {
        match version {
            Version::V1 if self.v1_order.is_empty() => self.outbox.put(version, reply),
            Version::V1 => {
                let position = self.v1_order.join();
                self.v1_order.insert(position, reply);
            }
            Version::V2 { request_id, .. } => self.outbox.put(Version::V2 { request_id, deadline_ms: 0 }, reply),
        }
    }

    pub(super) fn refuse(&mut self, version: Version, code: ErrorCode, text: &str) {
        self.shared.stats.failed(code);
        self.answer(version, Reply::error(code, text));
    }

    pub(super) fn overloaded(&mut self, version: Version, text: &str) {
        self.shared.stats.failed(ErrorCode::Overloaded);
        self.answer(version, Reply::overloaded(text));
    }
}
