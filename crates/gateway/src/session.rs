//! One connection: reads frames, runs its requests, writes answers. Everything happens in its one task.

mod held;
mod io;
mod line;

use crate::deadline::Deadline;
use crate::failure::RETRY_AFTER_MS;
use crate::forward::{self, Reply, Request};
use crate::in_flight::{Full, Place};
use crate::{Gateway, Peer};
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use held::Held;
use io::{at, gone, receive};
use line::Line;
use std::collections::{HashSet, VecDeque};
use std::io::ErrorKind;
use std::sync::Arc;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::ipc::{Capabilities, Decoder, ErrorCode, ErrorPayload, Frame, FrameType, HEADER_V1, Limits, Version};
use wire::limits::IPC_FRAME_MAX;

/// An unfinished frame up to this size is free of the receive budget.
const FREE_RECEIVE: usize = 16 * 1024;
/// Bytes of answers that may wait for a client for as long as it reads at all. With more, no request of it is read, and
/// it is cut off unless it reads as much within each [`crate::Config::write_timeout`].
const OUTPUT_HIGH: usize = 256 * 1024;
/// Answers of v1 requests that may stand in line, PONGs included; beyond it the socket is not read.
const LINE_MAX: usize = 1024;
const READ_CHUNK: usize = 16 * 1024;
/// Stream pieces between a request and its session.
const PIECES: usize = 16;

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    ClientClosed,
    Broken,
    FramingLost,
    ReadTimeout,
    WriteTimeout,
    Drained,
}

/// Which answer a frame belongs to.
#[derive(Debug, Clone, Copy)]
enum Slot {
    /// Its place in the line.
    V1(u64),
    V2(u64),
}

pub async fn run(gateway: Arc<Gateway>, stream: UnixStream, peer: Peer, cancel: CancellationToken) {
    let exit = Session::new(gateway, stream, peer).serve(cancel).await;
    tracing::debug!(uid = peer.uid, ?exit, "IPC connection ended");
}

struct Session {
    gateway: Arc<Gateway>,
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    peer: Peer,
    input: BytesMut,
    output: BytesMut,
    requests: FuturesUnordered<BoxFuture<'static, (Slot, Reply)>>,
    /// Last frames of requests that have ended, while `output` has no room for them.
    ended: VecDeque<(Slot, Held)>,
    ended_bytes: usize,
    pieces: (mpsc::Sender<(Slot, Reply)>, mpsc::Receiver<(Slot, Reply)>),
    v1_line: Line,
    v1_open: usize,
    /// v1: a stream has the connection to itself; it starts when all before it are answered.
    v1_stream: Option<V1Stream>,
    v2_open: HashSet<u64>,
    /// When the frame that has begun must be complete.
    frame_due: Option<Instant>,
    write_due: Option<Instant>,
    /// Bytes that the client has taken since `write_due` was set.
    taken: usize,
    /// Its share of the receive budget, while a large frame is incomplete.
    budget: Option<OwnedSemaphorePermit>,
    budget_wait: Option<BoxFuture<'static, Option<OwnedSemaphorePermit>>>,
    /// The client sends no more; it may still read.
    half_closed: bool,
    /// Bytes were left unlooked at, for want of room or because a stream has the connection.
    left: bool,
    /// No more is read; it ends when all that was asked before is answered.
    closing: Option<Exit>,
}

/// Where a stream's pieces go before its last frame.
pub struct Pieces {
    slot: Slot,
    out: mpsc::Sender<(Slot, Reply)>,
}

impl Pieces {
    /// Waits while the client does not read.
    pub async fn send(&self, piece: Reply) {
        // Fails only when the session has ended, and this request with it.
        let _ = self.out.send((self.slot, piece)).await;
    }

    #[cfg(test)]
    pub fn nowhere() -> Self {
        Self { slot: Slot::V2(1), out: mpsc::channel(1).0 }
    }
}

enum V1Stream {
    Waiting(Request, Deadline, Place),
    Running(u64),
}

impl Session {
    fn new(gateway: Arc<Gateway>, stream: UnixStream, peer: Peer) -> Self {
        let (reader, writer) = stream.into_split();
        Self {
            gateway,
            reader,
            writer,
            peer,
            input: BytesMut::new(),
            output: BytesMut::new(),
            requests: FuturesUnordered::new(),
            ended: VecDeque::new(),
            ended_bytes: 0,
            pieces: mpsc::channel(PIECES),
            v1_line: Line::default(),
            v1_open: 0,
            v1_stream: None,
            v2_open: HashSet::new(),
            frame_due: None,
            write_due: None,
            taken: 0,
            budget: None,
            budget_wait: None,
            half_closed: false,
            left: false,
            closing: None,
        }
    }

    async fn serve(&mut self, cancel: CancellationToken) -> Exit {
        // Set once a drain has begun: when whatever is in flight gets code 6.
        let mut give_up: Option<Instant> = None;
        loop {
            if let Err(exit) = self.flush() {
                return exit;
            }
            self.advance();
            if self.has_room()
                && let Some((slot, held)) = self.ended.pop_front()
            {
                self.ended_bytes -= held.reply.1.len();
                self.finished(slot, held);
                continue;
            }
            // Whatever has ended is in `output` by now, unless that is full.
            if let Some(exit) = self.closing
                && self.output.is_empty()
                && self.requests.is_empty()
            {
                return exit;
            }
            let takes = self.takes();
            if takes && self.left {
                self.left = false;
                self.decode(give_up.is_some());
                continue;
            }
            if !takes && !self.input.is_empty() {
                // A frame is not late while it is not read.
                self.left = true;
                self.frame_due = None;
            }
            let idle = self.requests.is_empty() && self.v1_stream.is_none() && self.output.is_empty();
            if self.half_closed && idle {
                return Exit::ClientClosed;
            }
            if give_up.is_some() && idle && self.input.is_empty() {
                // What the client sent before it could know still gets an answer.
                match self.read() {
                    Ok(0) => return Exit::Drained,
                    Ok(_) => {
                        self.decode(true);
                        continue;
                    }
                    Err(_) => return Exit::Drained,
                }
            }
            let (room, stream_due) = (self.has_room(), self.stream_due());
            let reads = takes && !self.half_closed && self.budget_wait.is_none();
            tokio::select! {
                ready = self.writer.writable(), if !self.output.is_empty() => {
                    if ready.is_err() { return Exit::Broken; }
                }
                Some((slot, reply)) = self.pieces.1.recv(), if room => self.piece(slot, reply),
                // Also while the client does not read: deadlines fire, and places are given back.
                Some((slot, reply)) = self.requests.next(), if !self.requests.is_empty() => self.keep(slot, reply),
                received = receive(&mut self.reader, &mut self.input), if reads => match received {
                    Ok(0) => self.half_close(),
                    Ok(_) => self.decode(give_up.is_some()),
                    Err(_) => return Exit::Broken,
                },
                permit = wait(&mut self.budget_wait) => {
                    self.budget_wait = None;
                    self.granted(permit);
                    // It was not read until now.
                    self.frame_due = self.frame_due.map(|_| Instant::now() + self.gateway.config().read_timeout);
                }
                () = at(self.frame_due) => self.late(),
                () = at(self.write_due) => return Exit::WriteTimeout,
                () = at(stream_due) => self.stream_late(),
                () = cancel.cancelled(), if give_up.is_none() => {
                    give_up = Some(Instant::now() + self.gateway.config().drain_timeout);
                    self.frame_due = None;
                }
                () = at(give_up) => {
                    if self.closing == Some(Exit::Drained) {
                        return Exit::WriteTimeout;
                    }
                    self.abandon();
                    give_up = Some(Instant::now() + self.gateway.config().drain_timeout / 4);
                }
                () = gone(&self.writer), if !reads && !self.requests.is_empty() => return Exit::ClientClosed,
            }
        }
    }

    /// Writes what the socket takes now.
    fn flush(&mut self) -> Result<(), Exit> {
        while !self.output.is_empty() {
            let timeout = self.gateway.config().write_timeout;
            match self.writer.try_write(&self.output) {
                Ok(written) => {
                    bytes::Buf::advance(&mut self.output, written);
                    self.taken += written;
                    let little_waits = self.output.len() + self.ended_bytes <= OUTPUT_HIGH;
                    if little_waits || self.taken >= OUTPUT_HIGH {
                        self.taken = 0;
                        self.write_due = Some(Instant::now() + timeout);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.write_due.get_or_insert_with(|| Instant::now() + timeout);
                    return Ok(());
                }
                Err(_) => return Err(Exit::Broken),
            }
        }
        self.write_due = None;
        self.taken = 0;
        if self.output.capacity() > OUTPUT_HIGH {
            self.output = BytesMut::new();
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.output.len() < OUTPUT_HIGH
    }

    /// Reads what is there, `Ok(0)` if that is nothing.
    fn read(&mut self) -> Result<usize, Exit> {
        self.input.reserve(READ_CHUNK);
        match self.reader.try_read_buf(&mut self.input) {
            Ok(0) => {
                self.half_close();
                Ok(0)
            }
            Ok(read) => Ok(read),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(0),
            Err(_) => Err(Exit::Broken),
        }
    }

    fn half_close(&mut self) {
        self.half_closed = true;
        self.frame_due = None;
    }

    /// Whether frames are taken: not while their answers have no room, nor while a v1 stream goes on.
    fn takes(&self) -> bool {
        self.closing.is_none() && self.v1_stream.is_none() && self.has_room() && self.v1_line.len() < LINE_MAX
    }

    fn decode(&mut self, draining: bool) {
        while self.takes() {
            match Decoder.decode(&mut self.input) {
                Ok(Some(frame)) => {
                    self.budget = None;
                    self.frame_due = None;
                    self.frame(frame, draining);
                }
                Ok(None) => break,
                Err(violation) => {
                    self.refuse(Version::V1, violation.code(), &violation.to_string());
                    self.closing = Some(Exit::FramingLost);
                    return;
                }
            }
        }
        if self.input.is_empty() {
            self.frame_due = None;
            self.input = BytesMut::new();
            return;
        }
        if !self.takes() {
            // Remembered here: a flush may make room before anybody looks again.
            self.left = true;
            return;
        }
        if self.frame_due.is_none() && !draining {
            self.frame_due = Some(Instant::now() + self.gateway.config().read_timeout);
        }
        if self.budget.is_none()
            && self.budget_wait.is_none()
            && let Ok(Some(length)) = Decoder::peek_length(&self.input)
            && length > FREE_RECEIVE
        {
            // One that is larger than the whole budget takes all of it.
            let config = self.gateway.config();
            let kib = length.min(config.receive_budget) / 1024;
            let permits = u32::try_from(kib).expect("frames are at most 4 MiB");
            let budget = config.receive.clone();
            match budget.clone().try_acquire_many_owned(permits) {
                Ok(permit) => self.granted(Some(permit)),
                Err(_) => {
                    self.budget_wait = Some(Box::pin(async move { budget.acquire_many_owned(permits).await.ok() }))
                }
            }
        }
    }

    /// The frame that has begun may be received.
    fn granted(&mut self, permit: Option<OwnedSemaphorePermit>) {
        self.budget = permit;
        if let Ok(Some(length)) = Decoder::peek_length(&self.input) {
            // At once, so that it takes what was granted and not the half of it again each time it grows.
            self.input.reserve(length.saturating_sub(self.input.len()));
        }
    }

    /// The frame that has begun did not come in time: by the client's fault, or for want of budget, which others hold.
    fn late(&mut self) {
        self.frame_due = None;
        if self.budget_wait.take().is_some() {
            self.overloaded(Version::V1, "Too many bytes of unfinished frames");
        } else {
            self.refuse(Version::V1, ErrorCode::Timeout, "The frame was not complete in time");
        }
        self.closing = Some(Exit::ReadTimeout);
    }

    fn frame(&mut self, frame: Frame, draining: bool) {
        let version = frame.version;
        let Some(kind) = frame.frame_type().filter(|kind| kind.is_request()) else {
            return self.refuse(version, ErrorCode::InvalidType, "Unsupported message type");
        };
        if frame.flags != 0 {
            let text = format!("Unknown flags {:#06x}; they must be 0", frame.flags);
            return self.refuse(version, ErrorCode::InvalidPayload, &text);
        }
        if let Version::V2 { request_id, .. } = version
            && self.v2_open.contains(&request_id)
        {
            let text = format!("request_id {request_id} is still in flight on this connection");
            return self.refuse(version, ErrorCode::InvalidPayload, &text);
        }
        match kind {
            FrameType::Ping => self.answer(version, (FrameType::Pong, Bytes::new())),
            FrameType::Capabilities => {
                let capabilities = serde_json::to_vec(&self.capabilities()).expect("capabilities are JSON");
                self.answer(version, (FrameType::ResponseOk, capabilities.into()));
            }
            _ if draining => self.refuse(version, ErrorCode::ConnectionClosed, "The gateway is shutting down"),
            _ => match Request::parse(kind, &frame.payload) {
                Ok(request) => self.start(version, request),
                Err(text) => self.refuse(version, ErrorCode::InvalidPayload, &text),
            },
        }
    }

    fn start(&mut self, version: Version, request: Request) {
        let config = self.gateway.config();
        if !self.gateway.admits(self.peer.uid) {
            return self.refuse(version, ErrorCode::Forbidden, crate::NOT_ADMITTED);
        }
        let full = match version {
            Version::V1 => self.v1_open >= config.max_in_flight_v1,
            Version::V2 { .. } => self.v2_open.len() >= config.max_in_flight_v2,
        };
        if full {
            return self.overloaded(version, "Too many requests in flight on this connection");
        }
        let place = match self.gateway.take_place(self.peer.uid) {
            Ok(place) => place,
            Err(Full::All) => return self.overloaded(version, "Too many requests in flight"),
            Err(Full::User) => {
                let text = format!(
                    "User {} has its share of the requests in flight; gateway.max_in_flight_per_user sets it",
                    self.peer.uid
                );
                return self.overloaded(version, &text);
            }
        };
        self.gateway.stats.taken();
        match version {
            Version::V1 => {
                self.v1_open += 1;
                let deadline = Deadline::of(&request, 0, &config);
                if request.is_stream() && !self.v1_line.is_empty() {
                    self.v1_stream = Some(V1Stream::Waiting(request, deadline, place));
                } else {
                    self.start_v1(request, deadline, place);
                }
            }
            Version::V2 { request_id, deadline_ms } => {
                self.v2_open.insert(request_id);
                let deadline = Deadline::of(&request, deadline_ms, &config);
                self.spawn(Slot::V2(request_id), request, deadline, place);
            }
        }
    }

    fn start_v1(&mut self, request: Request, deadline: Deadline, place: Place) {
        let place_in_line = self.v1_line.join();
        if request.is_stream() {
            self.v1_stream = Some(V1Stream::Running(place_in_line));
        }
        self.spawn(Slot::V1(place_in_line), request, deadline, place);
    }

    fn spawn(&mut self, slot: Slot, request: Request, deadline: Deadline, place: Place) {
        let (gateway, peer) = (self.gateway.clone(), self.peer);
        let pieces = Pieces { slot, out: self.pieces.0.clone() };
        self.requests.push(Box::pin(async move {
            let reply = forward::run(gateway, peer, request, deadline, pieces).await;
            drop(place);
            (slot, reply)
        }));
    }

    /// When the stream that waits for its turn has no time left.
    fn stream_due(&self) -> Option<Instant> {
        match &self.v1_stream {
            Some(V1Stream::Waiting(_, deadline, _)) => Some(deadline.at.into()),
            _ => None,
        }
    }

    /// Starts the request after its deadline only to answer it with a timeout, so that its place in flight is released.
    fn stream_late(&mut self) {
        if let Some(V1Stream::Waiting(request, deadline, place)) = self.v1_stream.take() {
            self.start_v1(request, deadline, place);
        }
    }

    fn piece(&mut self, slot: Slot, reply: Reply) {
        match slot {
            // Only a stream has pieces, and in v1 it is alone: its turn has come.
            Slot::V1(_) => self.put(Version::V1, reply),
            Slot::V2(request_id) => self.put(Version::V2 { request_id, deadline_ms: 0 }, reply),
        }
    }

    /// Keeps the last frame of a request until `output` has room for it. What can leave at once is free of the budget,
    /// so that clients that read are served whatever others leave unread.
    fn keep(&mut self, slot: Slot, reply: Reply) {
        let its_turn = match slot {
            Slot::V1(place) => self.v1_line.is_first(place),
            Slot::V2(_) => true,
        };
        let leaves = its_turn && self.ended.is_empty() && self.has_room();
        let held = if leaves {
            reply.into()
        } else {
            Held::within_budget(&self.gateway, reply)
        };
        self.ended_bytes += held.reply.1.len();
        self.ended.push_back((slot, held));
    }

    fn finished(&mut self, slot: Slot, held: Held) {
        // Its pieces were sent before.
        while let Ok((slot, piece)) = self.pieces.1.try_recv() {
            self.piece(slot, piece);
        }
        match slot {
            Slot::V1(place) => {
                self.v1_open -= 1;
                if matches!(self.v1_stream, Some(V1Stream::Running(running)) if running == place) {
                    self.v1_stream = None;
                }
                self.v1_line.answer(place, held);
                self.advance();
            }
            Slot::V2(request_id) => {
                self.v2_open.remove(&request_id);
                self.put(Version::V2 { request_id, deadline_ms: 0 }, held.reply);
            }
        }
    }

    /// Puts an answer that needs no waiting; in v1 behind those before it.
    fn answer(&mut self, version: Version, reply: Reply) {
        match version {
            Version::V1 if self.v1_line.is_empty() => self.put(version, reply),
            Version::V1 => {
                let place = self.v1_line.join();
                self.v1_line.answer(place, reply);
            }
            Version::V2 { request_id, .. } => self.put(Version::V2 { request_id, deadline_ms: 0 }, reply),
        }
    }

    /// Puts the answers whose turn has come, while there is room for them; then a stream that waits for its turn starts.
    fn advance(&mut self) {
        while self.has_room()
            && let Some(reply) = self.v1_line.leave()
        {
            self.put(Version::V1, reply);
        }
        if self.v1_line.is_empty()
            && let Some(V1Stream::Waiting(request, deadline, place)) =
                self.v1_stream.take_if(|s| matches!(s, V1Stream::Waiting(..)))
        {
            self.start_v1(request, deadline, place);
        }
    }

    fn put(&mut self, version: Version, (kind, payload): Reply) {
        debug_assert!(payload.len() + HEADER_V1 <= IPC_FRAME_MAX);
        Frame::new(version, kind, payload).encode(&mut self.output);
    }

    fn refuse(&mut self, version: Version, code: ErrorCode, text: &str) {
        self.gateway.stats.failed(code);
        self.answer(version, (FrameType::ResponseError, ErrorPayload::new(code, text).encode().into()));
    }

    fn overloaded(&mut self, version: Version, text: &str) {
        self.gateway.stats.failed(ErrorCode::Overloaded);
        let mut error = ErrorPayload::new(ErrorCode::Overloaded, text);
        error.error.retry_after_ms = Some(RETRY_AFTER_MS);
        self.answer(version, (FrameType::ResponseError, error.encode().into()));
    }

    /// The drain has lasted too long: everything in flight is answered with code 6.
    fn abandon(&mut self) {
        self.ended_bytes = 0;
        for (slot, held) in std::mem::take(&mut self.ended) {
            self.finished(slot, held);
        }
        let open = self.v1_open + self.v2_open.len();
        if open == 0 {
            self.closing = Some(Exit::Drained);
            return;
        }
        // Nothing of a request may come after its last frame.
        while let Ok((slot, piece)) = self.pieces.1.try_recv() {
            self.piece(slot, piece);
        }
        self.requests = FuturesUnordered::new();
        if let Some(V1Stream::Waiting(..)) = self.v1_stream.take() {
            // It had no place in the line yet.
            self.v1_line.join();
        }
        let error = || {
            let text = "The gateway shut down before the answer came; the task may still run";
            (FrameType::ResponseError, Bytes::from(ErrorPayload::new(ErrorCode::ConnectionClosed, text).encode()))
        };
        self.v1_line.answer_all(error);
        self.advance();
        for request_id in std::mem::take(&mut self.v2_open) {
            self.put(Version::V2 { request_id, deadline_ms: 0 }, error());
        }
        self.v1_open = 0;
        for _ in 0..open {
            self.gateway.stats.failed(ErrorCode::ConnectionClosed);
        }
        // And what stood behind them.
        self.decode(true);
        self.closing = Some(Exit::Drained);
    }

    fn capabilities(&self) -> Capabilities {
        let config = self.gateway.config();
        Capabilities {
            protocol_versions: vec![1, 2],
            message_types: FrameType::ALL.iter().map(|kind| *kind as u8).collect(),
            max_frame_size: IPC_FRAME_MAX,
            features: ["pipelining", "multiplexing", "streaming", "query", "cancel", "wait_result", "wait_stream"]
                .map(String::from)
                .to_vec(),
            breaker: self.gateway.router.state().as_str().into(),
            limits: Limits {
                max_connections: config.max_connections,
                max_in_flight: config.max_in_flight,
                max_in_flight_v1: config.max_in_flight_v1,
                max_in_flight_v2: config.max_in_flight_v2,
                max_in_flight_per_user: config.share,
                request_timeout_ms: u64::try_from(config.request_timeout.as_millis()).unwrap_or(u64::MAX),
                max_deadline_ms: u64::try_from(config.max_deadline.as_millis()).unwrap_or(u64::MAX),
            },
        }
    }
}

async fn wait(budget: &mut Option<BoxFuture<'static, Option<OwnedSemaphorePermit>>>) -> Option<OwnedSemaphorePermit> {
    match budget {
        Some(waiting) => waiting.await,
        None => std::future::pending().await,
    }
}
