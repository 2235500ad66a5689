//! A WebSocket connection: reads commands, has them carried out, writes what its outbox holds. One task.

use crate::Node;
use crate::client::{Client, Outbox, frame};
use crate::commands;
use crate::place::Place;
use bytes::{Buf, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;
use wire::limits::CLIENT_MESSAGE_MAX;
use wire::realtime::{Command, Disconnect, Encoding, Reply, decode_commands};
use wire::websocket::{self, Decoder, Event, Opcode};

const READ_CHUNK: usize = 4 * 1024;
/// Frames in one write.
const WRITE_SLICES: usize = 64;
/// RPCs of one client that run at once.
pub const RPCS_MAX: usize = 32;
/// A client must take any bytes of what it is owed within.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// A client has this long to take what is left for it, and its goodbye.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(3);
/// And this long to close its side.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// What a client asked for with its upgrade.
#[derive(Debug, Clone, Copy)]
pub struct Transport {
    pub encoding: Encoding,
    /// Pings are WebSocket frames, not messages of the protocol.
    pub frame_pings: bool,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The client left or its connection broke.
    Gone,
    Closed(Disconnect),
    /// The WebSocket protocol was broken; its close code.
    Violation(u16),
}

pub async fn run(place: Place, stream: TcpStream, early: Bytes, transport: Transport) {
    let node = place.node().clone();
    let mut session = Session::new(&place, stream, early, transport);
    let exit = session.serve().await;
    // With it goes the command that it is in the middle of: nothing is subscribed behind the departure.
    drop(session);
    place.leave().await;
    node.stats().ended(exit);
    tracing::debug!(?exit, "connection ended");
}

struct Session {
    node: Arc<Node>,
    stream: TcpStream,
    transport: Transport,
    decoder: Decoder,
    input: BytesMut,
    /// Frames on their way; the first may be cut.
    output: VecDeque<Bytes>,
    outbox: Arc<Outbox>,
    /// Filled by its connect command.
    client: Arc<OnceLock<Arc<Client>>>,
    connected: bool,
    /// The commands of one message, carried out in order; nothing more is read meanwhile.
    current: Option<BoxFuture<'static, Outcome>>,
    rpcs: FuturesUnordered<BoxFuture<'static, ()>>,
    next_ping: Instant,
    pong_due: Option<Instant>,
    write_due: Option<Instant>,
    /// When its connection token, and the grace after it, are over.
    expires: Option<Instant>,
}

/// When a connection token ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenEnd {
    Never,
    /// Seconds from now.
    In(u32),
}

impl TokenEnd {
    pub fn of(ttl: Option<u32>) -> Self {
        ttl.map_or(Self::Never, Self::In)
    }
}

/// What the commands of a message came to.
#[derive(Default)]
pub struct Outcome {
    /// There was a connect command that succeeded.
    pub connected: bool,
    /// Of the last connect or refresh that succeeded.
    pub token_end: Option<TokenEnd>,
    pub rpcs: Vec<BoxFuture<'static, ()>>,
    pub close: Option<Disconnect>,
}

impl Session {
    fn new(place: &Place, stream: TcpStream, early: Bytes, transport: Transport) -> Self {
        let (node, now) = (place.node().clone(), Instant::now());
        Self {
            outbox: Arc::new(Outbox::new(node.config.client_queue)),
            stream,
            transport,
            decoder: Decoder::new(CLIENT_MESSAGE_MAX),
            input: BytesMut::from(&early[..]),
            output: VecDeque::new(),
            client: place.client().clone(),
            connected: false,
            current: None,
            rpcs: FuturesUnordered::new(),
            next_ping: now + node.config.connect_timeout,
            pong_due: None,
            write_due: None,
            expires: None,
            node,
        }
    }

    async fn serve(&mut self) -> Exit {
        let mut closing: Option<Disconnect> = None;
        if let Err(exit) = self.decode() {
            return self.goodbye(exit).await;
        }
        loop {
            if closing.is_none() {
                closing = self.outbox.take(&mut self.output);
            }
            if let Err(exit) = self.write() {
                return exit;
            }
            if let Some(code) = closing
                && (self.output.is_empty() || code == Disconnect::Slow)
            {
                return self.goodbye(Exit::Closed(code)).await;
            }
            let due = self.due();
            tokio::select! {
                () = self.outbox.changed.notified(), if closing.is_none() => {}
                // Those that have said who they are are moved away paced.
                () = self.node.stopping.cancelled(), if !self.connected => {
                    return self.goodbye(Exit::Closed(Disconnect::Shutdown)).await;
                }
                ready = self.stream.writable(), if !self.output.is_empty() => {
                    if ready.is_err() { return Exit::Gone; }
                }
                ready = self.stream.readable(), if self.current.is_none() && closing.is_none() => {
                    if ready.is_err() { return Exit::Gone; }
                    if let Err(exit) = self.read().and_then(|()| self.decode()) {
                        if exit == Exit::Gone { return exit; }
                        return self.goodbye(exit).await;
                    }
                }
                outcome = current(&mut self.current) => {
                    self.current = None;
                    self.apply(outcome);
                    if let Err(exit) = self.decode() {
                        return self.goodbye(exit).await;
                    }
                }
                Some(()) = self.rpcs.next(), if !self.rpcs.is_empty() => {}
                () = tokio::time::sleep_until(due) => match self.timer() {
                    Ok(()) => {}
                    Err(Exit::Gone) => return Exit::Gone,
                    Err(exit) => return self.goodbye(exit).await,
                },
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

    /// Takes messages until one has commands to carry out.
    fn decode(&mut self) -> Result<(), Exit> {
        while self.current.is_none() {
            let event = match self.decoder.decode(&mut self.input) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(violation) => {
                    tracing::debug!(%violation, "WebSocket violation");
                    return Err(Exit::Violation(violation.close_code()));
                }
            };
            match event {
                // JSON in a binary frame is read as well; protobuf in a text frame cannot be.
                Event::Text(_) if self.transport.encoding == Encoding::Protobuf => {
                    return Err(Exit::Closed(Disconnect::BadRequest));
                }
                Event::Text(message) | Event::Binary(message) => self.message(&message)?,
                Event::Ping(payload) => {
                    let mut pong = BytesMut::new();
                    websocket::encode(Opcode::Pong, &payload, &mut pong);
                    self.outbox.push(pong.freeze());
                }
                Event::Pong => self.pong_due = None,
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
        let commands = decode_commands(self.transport.encoding, message).map_err(|error| {
            tracing::debug!(%error, "a client's message cannot be read");
            Exit::Closed(Disconnect::BadRequest)
        })?;
        let (pongs, commands): (Vec<Command>, Vec<Command>) =
            commands.into_iter().partition(|command| *command == Command::default());
        if !pongs.is_empty() {
            self.pong_due = None;
        }
        if !commands.is_empty() {
            self.node.stats().message_in(commands.len());
            let (node, client, outbox) = (self.node.clone(), self.client.clone(), self.outbox.clone());
            let room = RPCS_MAX.saturating_sub(self.rpcs.len());
            self.current = Some(Box::pin(commands::carry_out(node, client, outbox, self.transport, commands, room)));
        }
        Ok(())
    }

    fn apply(&mut self, outcome: Outcome) {
        if outcome.connected {
            self.connected = true;
            self.next_ping = Instant::now() + self.node.config.ping_interval;
        }
        match outcome.token_end {
            None => {}
            Some(TokenEnd::Never) => self.expires = None,
            Some(TokenEnd::In(seconds)) => {
                let ends = Duration::from_secs(seconds.into()) + self.node.config.refresh_grace;
                self.expires = Some(Instant::now() + ends);
            }
        }
        self.rpcs.extend(outcome.rpcs);
        if let Some(code) = outcome.close {
            self.outbox.close(code);
        }
    }

    fn write(&mut self) -> Result<(), Exit> {
        while !self.output.is_empty() {
            let slices: Vec<IoSlice<'_>> = self
                .output
                .iter()
                .take(WRITE_SLICES)
                .map(|frame| IoSlice::new(frame))
                .collect();
            match self.stream.try_write_vectored(&slices) {
                Ok(written) => {
                    self.written(written);
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
            self.output = VecDeque::new();
        }
        Ok(())
    }

    fn written(&mut self, mut bytes: usize) {
        self.outbox.written(bytes);
        while bytes > 0 {
            let first = self.output.front_mut().expect("written bytes came from frames");
            if bytes < first.len() {
                first.advance(bytes);
                return;
            }
            bytes -= first.len();
            self.output.pop_front();
        }
    }

    fn due(&self) -> Instant {
        [self.pong_due, self.write_due, self.expires]
            .into_iter()
            .flatten()
            .fold(self.next_ping, Instant::min)
    }

    fn timer(&mut self) -> Result<(), Exit> {
        let now = Instant::now();
        let over = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        if over(self.write_due) {
            return Err(Exit::Gone);
        }
        if over(self.pong_due) {
            return Err(Exit::Closed(Disconnect::NoPong));
        }
        if over(self.expires) {
            return Err(Exit::Closed(Disconnect::Expired));
        }
        if self.next_ping <= now {
            let Some(client) = self.client.get().filter(|_| self.connected) else {
                return Err(Exit::Closed(Disconnect::Stale));
            };
            self.rpcs.extend(commands::expire_subscriptions(&self.node, client));
            self.outbox.push(if self.transport.frame_pings {
                let mut ping = BytesMut::new();
                websocket::encode(Opcode::Ping, b"", &mut ping);
                ping.freeze()
            } else {
                frame(self.transport.encoding, &Reply::default())
            });
            self.pong_due.get_or_insert(now + self.node.config.pong_timeout);
            self.next_ping = now + self.node.config.ping_interval;
        }
        Ok(())
    }

    /// The close frame behind whatever frame is half written, then the end.
    async fn goodbye(&mut self, exit: Exit) -> Exit {
        let (code, reason) = match exit {
            Exit::Gone => return exit,
            Exit::Closed(disconnect) => (disconnect as u16, disconnect.reason()),
            Exit::Violation(code) => (code, ""),
        };
        let mut close = BytesMut::new();
        websocket::encode_close(code, reason, &mut close);
        if exit == Exit::Closed(Disconnect::Slow) {
            // No more of its backlog than the frame it is in the middle of.
            self.output.truncate(1);
        } else {
            self.outbox.take(&mut self.output);
        }
        self.output.push_back(close.freeze());
        let farewell = async {
            while !self.output.is_empty() {
                let slices: Vec<IoSlice<'_>> = self.output.iter().map(|frame| IoSlice::new(frame)).collect();
                match self.stream.try_write_vectored(&slices) {
                    Ok(mut written) => {
                        while let Some(first) = self.output.front_mut() {
                            if written < first.len() {
                                first.advance(written);
                                break;
                            }
                            written -= first.len();
                            self.output.pop_front();
                        }
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {
                        if self.stream.writable().await.is_err() {
                            return;
                        }
                    }
                    Err(_) => return,
                }
            }
        };
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, farewell).await;
        // Closing with unread bytes would reset the connection before the client has read its goodbye.
        let lingering = async {
            let mut rest = [0; 1024];
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut self.stream).await;
            while matches!(tokio::io::AsyncReadExt::read(&mut self.stream, &mut rest).await, Ok(read) if read > 0) {}
        };
        let _ = tokio::time::timeout(LINGER_TIMEOUT, lingering).await;
        exit
    }
}

async fn current(future: &mut Option<BoxFuture<'static, Outcome>>) -> Outcome {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
