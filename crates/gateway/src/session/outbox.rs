//! Bytes on their way to the client, and the clock that ends a client that does not read.

use crate::reply::Reply;
use bytes::{Buf, BytesMut};
use std::time::{Duration, Instant};
use wire::ipc::{Frame, HEADER_V1, Version};
use wire::limits::IPC_FRAME_MAX;

/// Once this many bytes wait for the client, no more of its requests are read. A client that has more than this waiting
/// must read as much within each [`crate::Config::write_timeout`], or it is disconnected.
const HIGH: usize = 256 * 1024;

#[derive(Default)]
pub struct Outbox {
    bytes: BytesMut,
    /// When the client must have read something. Set while there are bytes.
    due: Option<Instant>,
    /// Bytes that the client has read since `due` was set.
    read: usize,
}

impl Outbox {
    pub fn put(&mut self, version: Version, Reply { kind, payload }: Reply) {
        debug_assert!(payload.len() + HEADER_V1 <= IPC_FRAME_MAX);
        Frame::new(version, kind, payload).encode(&mut self.bytes);
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn has_room(&self) -> bool {
        self.bytes.len() < HIGH
    }

    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Starts the clock if bytes wait and it does not run yet.
    pub fn start_clock(&mut self, now: Instant, timeout: impl FnOnce() -> Duration) {
        if self.due.is_none() && !self.is_empty() {
            self.due = Some(now + timeout());
        }
    }

    /// The socket took `written` bytes. `behind` is the size of the replies that wait for room in the outbox.
    pub fn written(&mut self, written: usize, behind: usize) {
        self.bytes.advance(written);
        self.read += written;

        // A client that has little to read may take all its time for it, as long as it reads at all.
        let little_waits = self.bytes.len() + behind <= HIGH;
        if self.is_empty() || little_waits || self.read >= HIGH {
            self.read = 0;
            self.due = None;
        }
        // A connection keeps a small buffer for its next replies, but not one that a burst has grown.
        // Its capacity does not tell: that leaves out the part that was written.
        if self.is_empty() && self.bytes.try_reclaim(HIGH + 1) {
            self.bytes = BytesMut::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_that_a_burst_has_grown_is_released() {
        let held = |size: usize, part: usize| {
            let mut outbox = Outbox::default();
            outbox.put(Version::V1, Reply::ok(vec![b'x'; size]));
            while !outbox.is_empty() {
                outbox.written(part.min(outbox.bytes().len()), 0);
            }
            outbox.bytes.try_reclaim(size)
        };
        assert!(held(1024, 1000), "a small buffer is kept");
        assert!(!held(4 * HIGH, 4 * HIGH + HEADER_V1), "written at once");
        assert!(!held(4 * HIGH, HIGH / 2), "written in parts");
    }
}
