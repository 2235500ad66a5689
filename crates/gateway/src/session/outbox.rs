//! Bytes that wait to be written to the client, and the timer that disconnects a client that does not read.

use crate::reply::Reply;
use bytes::{Buf, BytesMut};
use std::time::{Duration, Instant};
use wire::ipc::{Frame, HEADER_V1, Version};
use wire::limits::IPC_FRAME_MAX;

/// Once this many bytes wait for the client, none of its requests are read. A client with more than this waiting must
/// read this many bytes within each [`crate::Config::write_timeout`], or it is disconnected.
const HIGH: usize = 256 * 1024;

#[derive(Default)]
pub struct Outbox {
    bytes: BytesMut,
    /// When the write timeout expires. Set while there are bytes.
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

    /// Starts the timer if bytes wait and it is not running.
    pub fn start_clock(&mut self, now: Instant, timeout: impl FnOnce() -> Duration) {
        if self.due.is_none() && !self.is_empty() {
            self.due = Some(now + timeout());
        }
    }

    /// Removes bytes that were written to the socket. `behind` is the size of the replies that wait for room in the
    /// outbox, in bytes.
    pub fn written(&mut self, written: usize, behind: usize) {
        self.bytes.advance(written);
        self.read += written;

        // With little waiting, reading any bytes at all restarts the timer.
        let little_waits = self.bytes.len() + behind <= HIGH;
        if self.is_empty() || little_waits || self.read >= HIGH {
            self.read = 0;
            self.due = None;
        }
        // A small buffer is kept for the next replies; one that a burst has grown is released. `capacity` leaves out
        // the part that was written, so it cannot tell.
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
