//! The receive buffer of a session, the timer of its unfinished frame, and that frame's share of the receive budget.

use crate::byte_budget::{Budget, Claim, Share};
use bytes::BytesMut;
use std::time::{Duration, Instant};
use wire::ipc::{Decoder, Frame, Violation};

/// An unfinished frame up to this size is not charged against the receive budget.
const FREE_RECEIVE: usize = 16 * 1024;

#[derive(Default)]
pub struct Input {
    bytes: BytesMut,
    /// When the unfinished frame must be complete.
    due: Option<Instant>,
    share: FrameShare,
    /// The client has closed its sending side.
    ended: bool,
}

/// The unfinished frame's share of the receive budget.
#[derive(Default)]
enum FrameShare {
    /// The frame is small, or its length has not arrived.
    #[default]
    None,
    /// The budget is exhausted: nothing is read until the share is granted.
    Awaited,
    Granted {
        _share: Share,
    },
}

impl Input {
    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub fn end(&mut self) {
        self.ended = true;
        self.due = None;
    }

    pub fn has_ended(&self) -> bool {
        self.ended
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    pub fn awaits_budget(&self) -> bool {
        matches!(self.share, FrameShare::Awaited)
    }

    /// Removes the first frame, if it is complete.
    pub fn frame(&mut self) -> Result<Option<Frame>, Violation> {
        let frame = Decoder.decode(&mut self.bytes)?;
        if frame.is_some() {
            self.share = FrameShare::None;
            self.due = None;
        }
        Ok(frame)
    }

    /// Releases the buffer once all its frames are decoded, so that an idle connection holds no memory for input.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            self.bytes = BytesMut::new();
        }
    }

    /// Starts the timer of the unfinished frame, unless it is already running.
    pub fn start_clock(&mut self, now: Instant, timeout: impl FnOnce() -> Duration) {
        if self.due.is_none() && !self.is_empty() && !self.ended {
            self.due = Some(now + timeout());
        }
    }

    pub fn stop_clock(&mut self) {
        self.due = None;
    }

    /// Charges a large unfinished frame against the budget. Returns the claim if the frame has to wait for it.
    pub fn charge(&mut self, budget: impl FnOnce() -> Budget) -> Option<Claim> {
        let length = Decoder::peek_length(&self.bytes).ok().flatten()?;
        // After the end of the input the frame can never be completed, so it needs no budget.
        if length <= FREE_RECEIVE || self.ended || !matches!(self.share, FrameShare::None) {
            return None;
        }

        let claim = budget().claim(length);
        match claim.try_take() {
            Some(share) => {
                self.grant(share);
                None
            }
            None => {
                self.share = FrameShare::Awaited;
                Some(claim)
            }
        }
    }

    /// Accepts the awaited share: the frame may be received, and its timer starts anew.
    pub fn granted(&mut self, share: Share) {
        if self.awaits_budget() {
            self.grant(share);
            // The client could not send while the frame was not read, so that time does not count.
            self.due = None;
        }
    }

    /// Gives up waiting for the budget. Returns whether the frame was waiting.
    pub fn stop_awaiting_budget(&mut self) -> bool {
        let awaited = self.awaits_budget();
        if awaited {
            self.share = FrameShare::None;
        }
        awaited
    }

    fn grant(&mut self, share: Share) {
        self.share = FrameShare::Granted { _share: share };
        if let Ok(Some(length)) = Decoder::peek_length(&self.bytes) {
            // Reserved at once: a buffer that doubles as it grows could exceed the share.
            self.bytes.reserve(length.saturating_sub(self.bytes.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::{Effect, Event, Session};
    use crate::{Config, Shared};
    use std::sync::Arc;
    use wire::ipc::{FrameType, Version};

    #[test]
    fn frame_that_starts_a_v1_stream_leaves_no_buffer_behind() {
        const LARGE: usize = 1024 * 1024;
        let mut session = Session::new(Arc::new(Shared::new(Config::default(), 0)), 0);
        let submit = serde_json::json!({"command": "task_submit", "task_type": "t", "wait": "stream",
            "context": "x".repeat(LARGE)});
        let mut frame = BytesMut::new();
        Frame::new(Version::V1, FrameType::TaskSubmit, submit.to_string()).encode(&mut frame);
        for part in frame.chunks(64 * 1024) {
            session.handle(Event::Received(part), Instant::now());
        }

        assert!(matches!(session.effect(), Some(Effect::Start(_))));
        assert!(!session.reads(), "the stream has the connection to itself");
        assert!(!session.input.bytes.try_reclaim(LARGE), "the frame's buffer is held while the stream lasts");
    }
}
