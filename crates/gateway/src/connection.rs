//! One connection: the only task that reads and writes its socket, keeps its timers and runs its requests. All
//! decisions are made by its [`Session`].

mod io;

use crate::byte_budget::{Claim, Share};
use crate::output::Pieces;
use crate::reply::{Reply, Slot};
use crate::session::{Effect, Event, Exit, Finished, Session, Start};
use crate::{Gateway, forward};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Capacity of the channel that carries pieces of output from the requests to their session.
const PIECES: usize = 16;

pub async fn run(gateway: Arc<Gateway>, stream: UnixStream, uid: u32, cancel: CancellationToken) {
    let exit = Connection::new(gateway, stream, uid).serve(cancel).await;
    tracing::debug!(uid, ?exit, "IPC connection ended");
}

struct Connection {
    gateway: Arc<Gateway>,
    uid: u32,
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    session: Session,
    requests: FuturesUnordered<BoxFuture<'static, Finished>>,
    /// Carries pieces of output from the requests to the session.
    pieces: (mpsc::Sender<(Slot, Reply)>, mpsc::Receiver<(Slot, Reply)>),
    /// The wait for a share of the receive budget.
    budget: Option<BoxFuture<'static, Share>>,
}

impl Connection {
    fn new(gateway: Arc<Gateway>, stream: UnixStream, uid: u32) -> Self {
        let (reader, writer) = stream.into_split();
        Self {
            session: Session::new(gateway.shared.clone(), uid),
            gateway,
            uid,
            reader,
            writer,
            requests: FuturesUnordered::new(),
            pieces: mpsc::channel(PIECES),
            budget: None,
        }
    }

    async fn serve(mut self, cancel: CancellationToken) -> Exit {
        let mut draining = false;
        loop {
            // Flushed first: the session ends only once its output is written.
            if self.flush().is_err() {
                return Exit::Broken;
            }

            match self.session.effect() {
                Some(Effect::End(exit)) => return exit,
                Some(effect) => {
                    self.carry_out(effect);
                    continue;
                }
                None => {}
            }

            // The session can go on only after an event.
            let (reads, writes) = (self.session.reads(), !self.session.output().is_empty());
            let (room, timer) = (self.session.has_room(), self.session.timer());
            tokio::select! {
                ready = self.writer.writable(), if writes => {
                    if ready.is_err() {
                        return Exit::Broken;
                    }
                }
                Some((slot, piece)) = self.pieces.1.recv(), if room => self.handle(Event::Piece(slot, piece)),
                // Also while the client does not read: requests reach their deadlines and release their permits.
                Some(finished) = self.requests.next(), if !self.requests.is_empty() => {
                    self.handle(Event::Finished(finished));
                }
                received = io::receive(&mut self.reader, |bytes| self.session.handle(Event::Received(bytes), now())),
                    if reads => match received {
                        // The client may still read: it may have closed only its sending side.
                        Ok(0) => self.handle(Event::EndOfFile),
                        Ok(_) => {}
                        Err(_) => return Exit::Broken,
                    },
                share = io::granted(&mut self.budget) => {
                    self.budget = None;
                    self.handle(Event::Budget(share));
                }
                () = io::at(timer) => self.timer(),
                () = cancel.cancelled(), if !draining => {
                    draining = true;
                    self.handle(Event::Drain);
                }
                () = io::gone(&self.writer), if !reads && !self.requests.is_empty() => return Exit::ClientClosed,
            }
        }
    }

    fn handle(&mut self, event: Event<'_>) {
        self.session.handle(event, now());
    }

    /// Writes as much as the socket accepts without waiting.
    fn flush(&mut self) -> std::io::Result<()> {
        while !self.session.output().is_empty() {
            match self.writer.try_write(self.session.output()) {
                Ok(written) => self.handle(Event::Written(written)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Start(start) => self.start(start),
            Effect::AwaitBudget(claim) => self.budget = Some(Box::pin(Claim::take(claim))),
            Effect::StopAwaitingBudget => self.budget = None,
            Effect::Abandon => self.requests.clear(),
            Effect::ReadOnce => {
                let read = io::read_once(&self.reader, |bytes| self.session.handle(Event::Received(bytes), now()));
                if !read {
                    self.handle(Event::NothingToRead);
                }
            }
            Effect::End(_) => unreachable!("serve returns instead"),
        }
    }

    fn start(&mut self, Start { slot, request, deadline, permit }: Start) {
        let (gateway, uid) = (self.gateway.clone(), self.uid);
        let mut pieces = Pieces::new(slot, self.pieces.0.clone());
        self.requests.push(Box::pin(async move {
            let reply = forward::run(gateway, uid, request, deadline, &mut pieces).await;
            // Released before the client reads the answer, so that a client that does not read holds no permit.
            drop(permit);
            Finished { slot, reply, pieces: pieces.sent() }
        }));
    }

    fn timer(&mut self) {
        // If the timer ends the drain, finished streams must first receive the output that precedes their last frame.
        while let Ok((slot, piece)) = self.pieces.1.try_recv() {
            self.handle(Event::Piece(slot, piece));
        }
        self.handle(Event::Timer);
    }
}

/// The time of Tokio's clock, which tests can pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
