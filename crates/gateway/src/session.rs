//! One connection's session, sans-IO: it takes events and the time, and returns effects.
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
use crate::in_flight::Place;
use held::Held;
use input::Input;
use outbox::Outbox;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use v1_order::V1Order;
use wire::ipc::{ErrorCode, Version};

/// v1 replies that may wait for their turn, PONGs included; beyond it the socket is not read.
const V1_WAITING_MAX: usize = 1024;

/// What happens to a session.
pub enum Event<'a> {
    /// The client has sent these bytes.
    Received(&'a [u8]),
    /// The client sends no more. It may still read.
    EndOfFile,
    /// [`Effect::ReadOnce`] found nothing.
    NothingToRead,
    /// The socket has taken this many bytes of [`Session::output`].
    Written(usize),
    /// A request has a piece of output. Pieces are kept back while [`Session::has_room`] is false.
    Piece(Slot, Reply),
    Finished(Finished),
    /// The budget has the share that [`Effect::AwaitBudget`] asked for.
    Budget(Share),
    /// The gateway shuts down.
    Drain,
    /// The time of [`Session::timer`] has come.
    Timer,
}

/// What the owner of the session has to do.
pub enum Effect {
    Start(Start),
    /// Wait for the share, then report [`Event::Budget`].
    AwaitBudget(Claim),
    /// Stop waiting for the share.
    LeaveBudget,
    /// Drop all requests that run: they have been answered.
    Abandon,
    /// Read what the socket has now, without waiting. Report [`Event::Received`] or [`Event::NothingToRead`].
    ReadOnce,
    /// Close the connection.
    End(Exit),
}

/// A request to run. Its end is reported as [`Event::Finished`].
pub struct Start {
    pub slot: Slot,
    pub request: Request,
    pub deadline: Deadline,
    /// Dropped when the request ends.
    pub place: Place,
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
    /// New requests are refused. Those in flight may take until then.
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

/// A v1 stream has the connection to itself: it starts when all requests before it are answered, and those behind it
/// are not read before it ends.
enum V1Stream {
    Waiting { request: Request, deadline: Deadline, place: Place },
    Running { place: u64, pieces: u64 },
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

        // Any event may make room for replies, and replies that leave make room for frames.
        self.release();
        self.decode(now);
        self.outbox
            .start_clock(now, || self.shared.admission.settings().write_timeout);
    }

    /// The next thing to do; `None` while only an event can change anything. Write [`Session::output`] before asking.
    pub fn effect(&mut self) -> Option<Effect> {
        if let Some(effect) = self.effects.pop_front() {
            return Some(effect);
        }

        let idle = self.open() == 0 && self.outbox.is_empty();
        match self.phase {
            Phase::Ended(exit) => Some(Effect::End(exit)),
            _ if !idle => None,
            // All replies are written, and nothing more is read.
            Phase::Closing { exit, .. } => Some(Effect::End(exit)),
            _ if self.input.has_ended() => Some(Effect::End(Exit::ClientClosed)),
            // What the client sent before it could know of the drain still gets an answer.
            Phase::Draining { .. } if self.input.is_empty() => Some(Effect::ReadOnce),
            Phase::Draining { .. } | Phase::Serving => None,
        }
    }

    /// Bytes to write to the socket.
    pub fn output(&self) -> &[u8] {
        self.outbox.bytes()
    }

    /// Whether the socket is to be read.
    pub fn reads(&self) -> bool {
        self.takes_frames() && !self.input.has_ended() && !self.input.awaits_budget()
    }

    /// Whether pieces of output may arrive.
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
    fn open(&self) -> usize {
        self.v1_open + self.v2_open.len()
    }

    /// Frames are not decoded while their answers have no room, nor during a v1 stream.
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
            self.drain_over(now);
        } else if passed(self.input.due()) {
            self.frame_late();
        } else if passed(self.stream_due()) {
            // It is started after its deadline only to be answered with a timeout, so that its place is released.
            self.start_waiting_stream();
        }
    }

    /// When the stream that waits for its turn has no time left.
    fn stream_due(&self) -> Option<Instant> {
        match &self.v1_stream {
            Some(V1Stream::Waiting { deadline, .. }) => Some(deadline.at),
            _ => None,
        }
    }

    /// The frame that has begun is not complete in time: the client is slow, or others hold the receive budget.
    fn frame_late(&mut self) {
        if self.input.leave_budget() {
            self.effects.push_back(Effect::LeaveBudget);
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
        // A frame that has begun may take until the end of the drain.
        self.input.stop_clock();
    }

    fn drain_due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Draining { until } => Some(until),
            Phase::Closing { until, .. } => until,
            Phase::Serving | Phase::Ended(_) => None,
        }
    }

    fn drain_over(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Closing { exit: Exit::Drained, .. }) {
            // Everything was answered, but the client has not read it.
            self.phase = Phase::Ended(Exit::WriteTimeout);
            return;
        }

        self.abandon(now);
        let until = now + self.shared.admission.settings().drain_timeout / 4;
        self.phase = Phase::Closing { exit: Exit::Drained, until: Some(until) };
    }

    /// Answers every request in flight with code 6.
    fn abandon(&mut self, now: Instant) {
        // Whatever has ended keeps its own answer, whether or not there is room for it.
        for (slot, held, pieces) in std::mem::take(&mut self.ended) {
            if self.pieces_of(slot) >= pieces {
                self.settle(slot, held);
            }
        }

        self.ended_bytes = 0;
        let open = self.open();
        if open == 0 {
            return;
        }

        // Queued behind the starts of requests that are abandoned here, so that none of them runs on.
        self.effects.push_back(Effect::Abandon);
        if let Some(V1Stream::Waiting { .. }) = self.v1_stream.take() {
            // It has no place in the order yet.
            self.v1_order.join();
        }

        let error = || {
            let text = "The gateway shut down before the answer came; the task may still run";
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

        // Requests behind a v1 stream are still in the input.
        self.release();
        self.decode(now);
    }
}
