//! The session of a WebSocket connection, one task: reads commands, carries them out, and writes the client's outbox.

use crate::client::{Outbox, frame};
use crate::commands::{self, Connection, Outcome, TokenEnd, Transport};
use crate::slot::ConnectionSlot;
use bytes::{Buf, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{ErrorKind, IoSlice};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use wire::limits::CLIENT_MESSAGE_MAX;
use wire::realtime::{Disconnect, Encoding, Reply, decode_commands};
use wire::websocket::{self, Decoder, Event, Opcode};

const READ_CHUNK: usize = 4 * 1024;
/// Frames in one vectored write.
const WRITE_SLICES: usize = 64;
/// A client that reads no bytes for this long is disconnected.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take to read its last frames and the close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a client may take to close its side after the close frame.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The connection broke, or the client stopped reading.
    Gone,
    Closed(Disconnect),
    /// The client broke the WebSocket protocol or sent a close frame. Holds the close code of the server's answer.
    Violation(u16),
}

pub async fn run(slot: ConnectionSlot, stream: TcpStream, early: Bytes, transport: Transport) {
    let node = slot.node().clone();
    let mut session = Session::new(&slot, stream, early, transport);
    let exit = session.serve().await;

    // Dropping the session cancels the command in progress, which could otherwise subscribe after the cleanup.
    drop(session);
    slot.release().await;
    node.stats().ended(exit);
    tracing::debug!(?exit, "connection ended");
}

struct Session {
    connection: Connection,
    stream: TcpStream,
    decoder: Decoder,
    input: BytesMut,
    /// Frames to write. The first may be partly written.
    output: VecDeque<Bytes>,
    phase: Phase,
    /// The commands of one message. Nothing is read while they are carried out.
    current: Option<BoxFuture<'static, Outcome>>,
    /// RPCs in flight, and the cleanup of expired subscriptions.
    rpcs: FuturesUnordered<BoxFuture<'static, ()>>,
    /// When the write timeout expires; `None` while no bytes wait to be written.
    write_due: Option<Instant>,
}

enum Phase {
    /// The connect command must succeed before this time.
    Connecting { until: Instant },
    Connected {
        next_ping: Instant,
        /// When the pong to the oldest unanswered ping is due.
        pong_due: Option<Instant>,
        /// When the connection token and its refresh grace expire.
        token_end: Option<Instant>,
    },
}

impl Session {
    fn new(slot: &ConnectionSlot, stream: TcpStream, early: Bytes, transport: Transport) -> Self {
        let node = slot.node().clone();
        let until = Instant::now() + node.config.connect_timeout;
        let connection = Connection {
            outbox: Arc::new(Outbox::new(node.config.client_queue)),
            client: slot.client().clone(),
            transport,
            node,
        };
        Self {
            connection,
            stream,
            decoder: Decoder::new(CLIENT_MESSAGE_MAX),
            input: BytesMut::from(&early[..]),
            output: VecDeque::new(),
            phase: Phase::Connecting { until },
            current: None,
            rpcs: FuturesUnordered::new(),
            write_due: None,
        }
    }

    async fn serve(&mut self) -> Exit {
        let Err(exit) = self.exchange().await;
        self.close(exit).await;
        exit
    }

    /// Reads, carries out commands and writes until the session has a reason to end.
    async fn exchange(&mut self) -> Result<Infallible, Exit> {
        self.decode()?;
        let mut closing: Option<Disconnect> = None;
        loop {
            if closing.is_none() {
                closing = self.connection.outbox.take(&mut self.output);
            }
            self.write()?;
            // A client that is disconnected as slow does not get its backlog first.
            if let Some(code) = closing
                && (self.output.is_empty() || code == Disconnect::Slow)
            {
                return Err(Exit::Closed(code));
            }

            let due = self.due();
            let connecting = matches!(self.phase, Phase::Connecting { .. });
            tokio::select! {
                () = self.connection.outbox.changed.notified(), if closing.is_none() => {}
                // A drain paces the disconnects of connected clients only; connecting ones are closed at once.
                () = self.connection.node.stopping.cancelled(), if connecting => {
                    return Err(Exit::Closed(Disconnect::Shutdown));
                }
                ready = self.stream.writable(), if !self.output.is_empty() => ready.map_err(|_| Exit::Gone)?,
                // Nothing is read while commands are in progress, so that TCP flow control slows the client down.
                ready = self.stream.readable(), if self.current.is_none() && closing.is_none() => {
                    ready.map_err(|_| Exit::Gone)?;
                    self.read()?;
                    self.decode()?;
                }
                outcome = current(&mut self.current) => {
                    self.current = None;
                    self.apply(outcome);
                    self.decode()?;
                }
                Some(()) = self.rpcs.next(), if !self.rpcs.is_empty() => {}
                () = tokio::time::sleep_until(due) => self.timer()?,
            }
        }
    }

    fn read(&mut self) -> Result<(), Exit> {
        self.input.reserve(READ_CHUNK);
        match self.stream.try_read_buf(&mut self.input) {
            Ok(0) => Err(Exit::Gone),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(_) => Err(Exit::Gone),
        }
    }

    /// Decodes frames until one has commands, which become `current`, or no complete frame is left.
    fn decode(&mut self) -> Result<(), Exit> {
        while self.current.is_none() {
            let event = match self.decoder.decode(&mut self.input) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(violation) => {
                    tracing::debug!(%violation, "a client broke the WebSocket protocol");
                    return Err(Exit::Violation(violation.close_code()));
                }
            };
            match event {
                // JSON may also come in a binary frame, but protobuf is never text.
                Event::Text(_) if self.connection.transport.encoding == Encoding::Protobuf => {
                    return Err(Exit::Closed(Disconnect::BadRequest));
                }
                Event::Text(message) | Event::Binary(message) => self.message(&message)?,
                Event::Ping(payload) => {
                    let mut pong = BytesMut::new();
                    websocket::encode(Opcode::Pong, &payload, &mut pong);
                    self.connection.outbox.push(pong.freeze());
                }
                Event::Pong => self.pong(),
                // The code is echoed; a close frame without one is answered with 1000, a normal closure.
                Event::Close(code) => return Err(Exit::Violation(code.unwrap_or(1000))),
            }
        }

        if self.input.is_empty() && self.input.capacity() > 0 {
            // An idle connection holds no buffer.
            self.input = BytesMut::new();
        }
        Ok(())
    }

    fn message(&mut self, message: &Bytes) -> Result<(), Exit> {
        let connection = &self.connection;
        let mut commands = decode_commands(connection.transport.encoding, message).map_err(|error| {
            tracing::debug!(%error, "cannot decode a client's message");
            Exit::Closed(Disconnect::BadRequest)
        })?;

        let received = commands.len();
        commands.retain(|command| !command.is_pong());
        let pongs = received - commands.len();
        if !commands.is_empty() {
            connection.node.stats().message_in(commands.len());
            let carried_out = commands::carry_out(connection.clone(), commands, self.rpcs.len());
            self.current = Some(Box::pin(carried_out));
        }
        if pongs > 0 {
            self.pong();
        }
        Ok(())
    }

    fn pong(&mut self) {
        if let Phase::Connected { pong_due, .. } = &mut self.phase {
            *pong_due = None;
        }
    }

    fn apply(&mut self, outcome: Outcome) {
        if let Some(end) = outcome.token_end {
            self.present_token(end);
        }
        self.rpcs.extend(outcome.rpcs);
        if let Some(code) = outcome.close {
            self.connection.outbox.close(code);
        }
    }

    /// Sets the token expiry after a connect or refresh succeeded. A connect also starts the pings.
    fn present_token(&mut self, end: TokenEnd) {
        let (now, config) = (Instant::now(), &self.connection.node.config);
        let ends = match end {
            TokenEnd::Never => None,
            TokenEnd::In(seconds) => Some(now + Duration::from_secs(seconds.into()) + config.refresh_grace),
        };
        match &mut self.phase {
            Phase::Connecting { .. } => {
                self.phase =
                    Phase::Connected { next_ping: now + config.ping_interval, pong_due: None, token_end: ends };
            }
            Phase::Connected { token_end, .. } => *token_end = ends,
        }
    }

    /// Writes as much of the output as the socket accepts without waiting.
    fn write(&mut self) -> Result<(), Exit> {
        while !self.output.is_empty() {
            match self.stream.try_write_vectored(&slices(&self.output)) {
                Ok(written) => {
                    self.connection.outbox.written(written);
                    drop_written(&mut self.output, written);
                    self.write_due = Some(Instant::now() + WRITE_TIMEOUT);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.write_due.get_or_insert_with(|| Instant::now() + WRITE_TIMEOUT);
                    return Ok(());
                }
                Err(_) => return Err(Exit::Gone),
            }
        }

        self.write_due = None;
        if self.output.capacity() > WRITE_SLICES {
            // Releases the memory of a large backlog.
            self.output = VecDeque::new();
        }
        Ok(())
    }

    /// When [`Self::timer`] is to be called next.
    fn due(&self) -> Instant {
        let (first, others) = match self.phase {
            Phase::Connecting { until } => (until, [None, None]),
            Phase::Connected { next_ping, pong_due, token_end } => (next_ping, [pong_due, token_end]),
        };
        others
            .into_iter()
            .chain([self.write_due])
            .flatten()
            .fold(first, Instant::min)
    }

    fn timer(&mut self) -> Result<(), Exit> {
        let now = Instant::now();
        let is_over = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        if is_over(self.write_due) {
            return Err(Exit::Gone);
        }

        // If several timers are due at once, this order determines the close code.
        match &mut self.phase {
            Phase::Connecting { until } if *until <= now => Err(Exit::Closed(Disconnect::Stale)),
            Phase::Connecting { .. } => Ok(()),
            Phase::Connected { pong_due, .. } if is_over(*pong_due) => Err(Exit::Closed(Disconnect::NoPong)),
            Phase::Connected { token_end, .. } if is_over(*token_end) => Err(Exit::Closed(Disconnect::Expired)),
            Phase::Connected { next_ping, pong_due, .. } => {
                if *next_ping <= now {
                    let config = &self.connection.node.config;
                    pong_due.get_or_insert(now + config.pong_timeout);
                    *next_ping = now + config.ping_interval;
                    self.ping();
                }
                Ok(())
            }
        }
    }

    /// Pings the client, and ends its expired subscriptions at the same time.
    fn ping(&mut self) {
        let Connection { node, client, outbox, transport } = &self.connection;
        if let Some(client) = client.get() {
            self.rpcs.extend(commands::expire(node, client));
        }
        outbox.push(if transport.frame_pings {
            let mut ping = BytesMut::new();
            websocket::encode(Opcode::Ping, b"", &mut ping);
            ping.freeze()
        } else {
            frame(transport.encoding, &Reply::default())
        });
    }

    /// Writes the remaining frames and the close frame, then closes the socket gracefully.
    async fn close(&mut self, exit: Exit) {
        let (code, reason) = match exit {
            Exit::Gone => return,
            Exit::Closed(disconnect) => (disconnect as u16, disconnect.reason()),
            Exit::Violation(code) => (code, ""),
        };
        if exit == Exit::Closed(Disconnect::Slow) {
            // The first frame may be partly written and must be completed before the close frame.
            self.output.truncate(1);
        } else {
            self.connection.outbox.take(&mut self.output);
        }
        let mut close = BytesMut::new();
        websocket::encode_close(code, reason, &mut close);
        self.output.push_back(close.freeze());

        let _ = timeout(CLOSE_TIMEOUT, self.flush()).await;
        // Closing a socket with unread bytes resets the connection, and the client could miss the close frame.
        let _ = timeout(LINGER_TIMEOUT, self.linger()).await;
    }

    async fn flush(&mut self) {
        while !self.output.is_empty() {
            match self.stream.try_write_vectored(&slices(&self.output)) {
                Ok(written) => drop_written(&mut self.output, written),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    if self.stream.writable().await.is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    /// Shuts down the sending side and reads until the client has closed its own.
    async fn linger(&mut self) {
        let mut rest = [0; 1024];
        let _ = self.stream.shutdown().await;
        while matches!(self.stream.read(&mut rest).await, Ok(read) if read > 0) {}
    }
}

fn slices(output: &VecDeque<Bytes>) -> Vec<IoSlice<'_>> {
    output
        .iter()
        .take(WRITE_SLICES)
        .map(|frame| IoSlice::new(frame))
        .collect()
}

/// Removes written bytes from the front of the output.
fn drop_written(output: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(first) = output.front_mut() {
        if written < first.len() {
            first.advance(written);
            return;
        }
        written -= first.len();
        output.pop_front();
    }
}

/// Resolves with the outcome of the current commands; pending forever if there are none.
async fn current(future: &mut Option<BoxFuture<'static, Outcome>>) -> Outcome {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
