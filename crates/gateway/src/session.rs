//! The session of one connection, sans-IO: it takes events and the time, and returns effects.
//!
//! The session decodes frames, admits requests, and decides which replies may leave. The loop in
//! [`connection`](crate::connection) owns the socket, the clock and the requests that run.

mod held;
mod input;
mod outbox;
mod replies;
mod requests;
mod v1_order;

pub use crate::byte_budget::{Claim, Share};
pub use crate::reply::{Reply, Slot};
pub use crate::request::Request;

use crate::Shared;
use crate::deadline::Deadline;
use crate::in_flight::Permit;
use held::Held;
use input::Input;
use outbox::Outbox;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use v1_order::V1Order;
use wire::ipc::{ErrorCode, Version};

/// v1 replies that may wait for their turn, PONGs included; at the limit the socket is not read.
const V1_WAITING_MAX: usize = 1024;

/// An input of a session.
pub enum Event<'a> {
    /// The client has sent these bytes.
    Received(&'a [u8]),
    /// The client has closed its sending side. It may still read.
    EndOfFile,
    /// [`Effect::ReadOnce`] found no bytes.
    NothingToRead,
    /// This many bytes of [`Session::output`] were written to the socket.
    Written(usize),
    /// A request has sent a piece of output. Pieces must be held back while [`Session::has_room`] is false.
    Piece(Slot, Reply),
    Finished(Finished),
    /// The share that [`Effect::AwaitBudget`] waits for has been granted.
    Budget(Share),
    /// The gateway begins to drain.
    Drain,
    /// The time of [`Session::timer`] has come.
    Timer,
}

/// An action that the owner of the session must carry out.
pub enum Effect {
    /// Run the request.
    Start(Start),
    /// Wait for the share, then report [`Event::Budget`].
    AwaitBudget(Claim),
    /// Stop waiting for the share.
    StopAwaitingBudget,
    /// Drop all running requests: the session has answered them.
    Abandon,
    /// Read the bytes that the socket has now, without waiting. Report [`Event::Received`] or
    /// [`Event::NothingToRead`].
    ReadOnce,
    /// Close the connection.
    End(Exit),
}

/// A request to run. Its owner reports the end as [`Event::Finished`].
pub struct Start {
    pub slot: Slot,
    pub request: Request,
    pub deadline: Deadline,
    /// Dropped when the request ends.
    pub permit: Permit,
}

/// A request that has ended.
pub struct Finished {
    pub slot: Slot,
    /// The last frame of the answer.
    pub reply: Reply,
    /// How many pieces of output the request has sent. The last frame waits until all of them have arrived.
    pub pieces: u64,
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    ClientClosed,
    /// The socket failed.
    Broken,
    FramingLost,
    ReadTimeout,
    WriteTimeout,
    Drained,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Requests are read and started.
    Serving,
    /// New requests are refused. Those in flight may take until `until`.
    Draining {
        until: Instant,
    },
    /// Nothing more is read. The session ends when all replies have been written. `until` is set during a drain.
    Closing {
        exit: Exit,
        until: Option<Instant>,
    },
    Ended(Exit),
}

/// A v1 stream has the connection to itself: it starts once all requests before it are answered, and the requests
/// behind it are not read until it ends.
enum V1Stream {
    Waiting { request: Request, deadline: Deadline, permit: Permit },
    Running { position: u64, pieces: u64 },
}

pub struct Session {
    shared: Arc<Shared>,
    uid: u32,
    phase: Phase,
    input: Input,
    outbox: Outbox,
    v1_order: V1Order,
    /// v1 requests in flight.
    v1_open: usize,
    v1_stream: Option<V1Stream>,
    /// v2 requests in flight by their id, each with the number of pieces that have arrived.
    v2_open: HashMap<u64, u64>,
    /// Last frames that wait for room in the outbox, or for the pieces before them.
    ended: VecDeque<(Slot, Held, u64)>,
    ended_bytes: usize,
    effects: VecDeque<Effect>,
}

impl Session {
    pub fn new(shared: Arc<Shared>, uid: u32) -> Self {
        Self {
            shared,
            uid,
            phase: Phase::Serving,
            input: Input::default(),
            outbox: Outbox::default(),
            v1_order: V1Order::default(),
            v1_open: 0,
            v1_stream: None,
            v2_open: HashMap::new(),
            ended: VecDeque::new(),
            ended_bytes: 0,
            effects: VecDeque::new(),
        }
    }

    pub fn handle(&mut self, event: Event<'_>, now: Instant) {
        match event {
            Event::Received(bytes) => self.input.extend(bytes),
            Event::EndOfFile => self.input.end(),
            Event::NothingToRead => self.phase = Phase::Ended(Exit::Drained),
            Event::Written(bytes) => self.outbox.written(bytes, self.ended_bytes),
            Event::Piece(slot, piece) => self.piece(slot, piece),
            Event::Finished(finished) => self.finished(finished),
            Event::Budget(share) => self.input.granted(share),
            Event::Drain => self.drain(now),
            Event::Timer => self.timer_passed(now),
        }

        // Any event may make room for replies, and released replies make room for more frames.
        self.release();
        self.decode(now);
        self.outbox
            .start_clock(now, || self.shared.admission.settings().write_timeout);
    }

    /// The next action; `None` until another event is handled. Write [`Session::output`] before calling this.
    pub fn effect(&mut self) -> Option<Effect> {
        if let Some(effect) = self.effects.pop_front() {
            return Some(effect);
        }

        let idle = self.in_flight() == 0 && self.outbox.is_empty();
        match self.phase {
            Phase::Ended(exit) => Some(Effect::End(exit)),
            _ if !idle => None,
            // All replies are written, and nothing more is read.
            Phase::Closing { exit, .. } => Some(Effect::End(exit)),
            _ if self.input.has_ended() => Some(Effect::End(Exit::ClientClosed)),
            // Requests that the client sent before it could notice the drain are still answered.
            Phase::Draining { .. } if self.input.is_empty() => Some(Effect::ReadOnce),
            Phase::Draining { .. } | Phase::Serving => None,
        }
    }

    /// Bytes to write to the socket.
    pub fn output(&self) -> &[u8] {
        self.outbox.bytes()
    }

    /// Whether the socket may be read.
    pub fn reads(&self) -> bool {
        self.takes_frames() && !self.input.has_ended() && !self.input.awaits_budget()
    }

    /// Whether the session accepts pieces of output.
    pub fn has_room(&self) -> bool {
        self.outbox.has_room()
    }

    /// When [`Event::Timer`] is due.
    pub fn timer(&self) -> Option<Instant> {
        [self.outbox.due(), self.drain_due(), self.input.due(), self.stream_due()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Requests in flight.
    fn in_flight(&self) -> usize {
        self.v1_open + self.v2_open.len()
    }

    /// Whether frames may be decoded: not while the outbox is full, and not during a v1 stream.
    fn takes_frames(&self) -> bool {
        matches!(self.phase, Phase::Serving | Phase::Draining { .. })
            && self.v1_stream.is_none()
            && self.has_room()
            && self.v1_order.len() < V1_WAITING_MAX
    }

    fn is_draining(&self) -> bool {
        matches!(self.phase, Phase::Draining { .. })
    }

    fn close(&mut self, exit: Exit) {
        let until = self.drain_due();
        self.phase = Phase::Closing { exit, until };
    }

    fn timer_passed(&mut self, now: Instant) {
        let passed = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        if passed(self.outbox.due()) {
            self.phase = Phase::Ended(Exit::WriteTimeout);
        } else if passed(self.drain_due()) {
            self.drain_expired(now);
        } else if passed(self.input.due()) {
            self.frame_timed_out();
        } else if passed(self.stream_due()) {
            // The stream is started although its deadline has passed: it is answered with a timeout and releases its
            // permit.
            self.start_waiting_stream();
        }
    }

    /// The deadline of a stream that waits for its turn.
    fn stream_due(&self) -> Option<Instant> {
        match &self.v1_stream {
            Some(V1Stream::Waiting { deadline, .. }) => Some(deadline.at),
            _ => None,
        }
    }

    /// Closes a session whose frame is incomplete at its deadline: the client is slow, or other connections hold the
    /// receive budget.
    fn frame_timed_out(&mut self) {
        if self.input.stop_awaiting_budget() {
            self.effects.push_back(Effect::StopAwaitingBudget);
            self.overloaded(Version::V1, "Too many bytes of unfinished frames");
        } else {
            self.refuse(Version::V1, ErrorCode::Timeout, "The frame was not complete in time");
        }
        self.close(Exit::ReadTimeout);
    }

    fn drain(&mut self, now: Instant) {
        let until = now + self.shared.admission.settings().drain_timeout;
        self.phase = match self.phase {
            Phase::Serving => Phase::Draining { until },
            Phase::Closing { exit, until: None } => Phase::Closing { exit, until: Some(until) },
            unchanged => unchanged,
        };
        // An incomplete frame may take until the end of the drain.
        self.input.stop_clock();
    }

    fn drain_due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Draining { until } => Some(until),
            Phase::Closing { until, .. } => until,
            Phase::Serving | Phase::Ended(_) => None,
        }
    }

    fn drain_expired(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Closing { exit: Exit::Drained, .. }) {
            // Every request was answered, but the client has not read all answers.
            self.phase = Phase::Ended(Exit::WriteTimeout);
            return;
        }

        self.abandon(now);
        let until = now + self.shared.admission.settings().drain_timeout / 4;
        self.phase = Phase::Closing { exit: Exit::Drained, until: Some(until) };
    }

    /// Answers every request in flight with `CONNECTION_CLOSED`.
    fn abandon(&mut self, now: Instant) {
        // Finished requests keep their own answers, even if the outbox is full.
        for (slot, held, pieces) in std::mem::take(&mut self.ended) {
            if self.pieces_of(slot) >= pieces {
                self.settle(slot, held);
            }
        }

        self.ended_bytes = 0;
        let open = self.in_flight();
        if open == 0 {
            return;
        }

        // Queued behind the pending starts, so that those requests are dropped too.
        self.effects.push_back(Effect::Abandon);
        if let Some(V1Stream::Waiting { .. }) = self.v1_stream.take() {
            // A waiting stream has no position in the order yet.
            self.v1_order.join();
        }

        let error = || {
            let text = "The gateway shut down before the answer arrived; the task may still run";
            Reply::error(ErrorCode::ConnectionClosed, text)
        };

        self.v1_open = 0;
        self.v1_order.insert_missing(error);
        for (request_id, _) in std::mem::take(&mut self.v2_open) {
            self.outbox.put(Version::V2 { request_id, deadline_ms: 0 }, error());
        }
        for _ in 0..open {
            self.shared.stats.failed(ErrorCode::ConnectionClosed);
        }

        // Requests behind a v1 stream are still in the input buffer: they are refused now.
        self.release();
        self.decode(now);
    }
}
