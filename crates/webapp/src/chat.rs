//! The chat: rooms, messages, and an assistant whose answers are tasks that stream into the room.

mod answers;
mod prompt;
mod publish;
mod quotas;
mod rooms;
mod store;

pub use quotas::Quotas;
pub use rooms::Rooms;

use crate::accounts::Accounts;
use crate::channels::{self, Channels};
use crate::db::{self, Db};
use crate::rpc::{Caller, Handler, Refusal};
use answers::Answers;
use bus::Bus;
use bytes::Bytes;
use publish::publish;
use quotas::{Minute, Refused};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Instant;
use store::Store;
use tokio_util::sync::CancellationToken;
use wire::chat::{CreateRoom, Event, History, InRoom, Message, Messages, OfMessage, RoomCreated, Send, Sent, State};
use wire::realtime::ErrorCode;

pub const METHODS: &[&str] = &[
    "chat.rooms",
    "chat.create_room",
    "chat.delete_room",
    "chat.history",
    "chat.send",
    "chat.typing",
    "chat.stop",
    "chat.retry",
];
/// Longest text of a message, in bytes.
const TEXT_MAX: usize = 8 * 1024;
/// Longest nonce, in bytes.
const NONCE_MAX: usize = 64;
/// Default number of messages in a page of history.
const PAGE: i64 = 50;
const PAGE_MAX: i64 = 100;
/// Maximum bytes of text in a page of history. A page has at least one message, even if it is longer.
const PAGE_BYTES_MAX: usize = 256 * 1024;

pub struct Chat {
    store: Store,
    rooms: Arc<Rooms>,
    channels: Channels,
    accounts: Arc<Accounts>,
    answers: Arc<Answers>,
    minute: Minute,
}

impl Chat {
    /// Loads the rooms and subscribes to everything that [`Self::run`] consumes.
    pub async fn bind(
        bus: &Bus,
        db: Db,
        channels: Channels,
        accounts: Arc<Accounts>,
        quotas: Quotas,
        operators: Vec<String>,
    ) -> Result<(Arc<Self>, Loops), crate::Error> {
        let store = Store::new(db.clone(), quotas);
        let rooms = Arc::new(Rooms::load(db, bus.clone(), channels.clone(), quotas, operators).await?);
        let answers = Arc::new(Answers::new(bus.clone(), store.clone(), channels.clone()));

        let loops = Loops { rooms: rooms.subscribe().await?, answers: answers.subscribe().await? };
        Ok((Arc::new(Self { store, rooms, channels, accounts, answers, minute: Minute::new(quotas) }), loops))
    }

    pub fn rooms(&self) -> Arc<Rooms> {
        self.rooms.clone()
    }

    pub async fn run(&self, loops: Loops, cancel: CancellationToken) -> Result<(), crate::Error> {
        // If the answers end by themselves, the rooms end with them.
        let stop = cancel.child_token();
        let answers = async {
            let ended = self.answers.run(loops.answers, cancel).await;
            stop.cancel();
            ended
        };
        let ((), ended) = tokio::join!(self.rooms.follow(loops.rooms, stop.clone()), answers);
        ended
    }

    async fn send(&self, caller: &Caller, request: Send) -> Result<Sent, Refusal> {
        let room = self.rooms.get(&request.room).ok_or_else(unknown_room)?;
        let text = request.text.trim();
        if text.is_empty() || text.len() > TEXT_MAX {
            return Err(Refusal::bad(format!("a message has 1 to {TEXT_MAX} bytes; this one has {}", text.len())));
        }
        if request.nonce.is_empty() || request.nonce.len() > NONCE_MAX {
            return Err(Refusal::bad(format!("a nonce has 1 to {NONCE_MAX} bytes")));
        }
        // PostgreSQL cannot store NUL.
        if text.contains('\0') || request.nonce.contains('\0') {
            return Err(Refusal::bad("a message must not contain NUL characters"));
        }

        // A repeat has already been counted.
        if !self.store.has(&caller.user, &request.nonce).await.map_err(internal)? {
            self.minute.message(&caller.user, Instant::now())?;
            if prompt::prompt_in(text).is_some() {
                self.minute.run(&caller.user, Instant::now())?;
            }
        }

        let name = self.accounts.name(&caller.user).await;
        let fresh = store::New {
            room: &room.id,
            user: &caller.user,
            name: &name,
            text,
            nonce: &request.nonce,
        };
        let (message, answer) = self.store.send(&fresh).await.map_err(refused)?;

        // The message is committed, so its answer is requested even if the room cannot be notified.
        let mut notified = self.notify(&message).await;
        if let Some(mut answer) = answer {
            // For a repeat, output may have arrived already.
            self.answers.fill(&mut answer.message);
            notified = notified.and(self.notify(&answer.message).await);
            self.answers.ask(answer);
        }
        notified.map(|()| Sent { message })
    }

    /// Publishes a message to its room. If that fails, the error asks the sender to repeat the message.
    async fn notify(&self, message: &Message) -> Result<(), Refusal> {
        let public = "the message is stored, but the room could not be notified; send it again";
        publish(&self.channels, message)
            .await
            .map_err(|error| Refusal::failed(public, "cannot notify a room", error))
    }

    async fn history(&self, request: History) -> Result<Messages, Refusal> {
        let room = self.rooms.get(&request.room).ok_or_else(unknown_room)?;
        let limit = request.limit.unwrap_or(PAGE).clamp(1, PAGE_MAX);
        // One more than requested, to detect whether older messages exist.
        let mut messages = self
            .store
            .page(&room.id, request.before, limit + 1)
            .await
            .map_err(internal)?;
        // The output of a streaming answer is in memory only.
        messages
            .iter_mut()
            .filter(|m| m.state == State::Streaming)
            .for_each(|m| self.answers.fill(m));

        let limit = usize::try_from(limit).unwrap_or_default();
        let fitting = newest_that_fit(messages.iter().map(|message| message.text.len()), limit);
        let older = messages.len() - fitting;
        Ok(Messages { messages: messages.split_off(older), more: older > 0 })
    }

    async fn typing(&self, caller: &Caller, request: InRoom) -> Result<(), Refusal> {
        let room = self.rooms.get(&request.room).ok_or_else(unknown_room)?;
        // Dropped silently: the page sends notices without waiting for replies.
        if !self.minute.typing(&caller.user, Instant::now()) {
            return Ok(());
        }
        let name = self.accounts.name(&caller.user).await;
        let event = Event::Typing { user: caller.user.clone(), name };
        let published = self
            .channels
            .publish_passing(&channels::of_room(&room.id), &event)
            .await;
        published.map_err(|error| Refusal::internal("cannot publish a typing notice", error))
    }

    /// Deletes a room and its messages, and cancels answers that still stream into it.
    async fn delete_room(&self, caller: &Caller, request: InRoom) -> Result<(), Refusal> {
        let room = self.rooms.get(&request.room).ok_or_else(unknown_room)?;
        if !self.rooms.manages(&caller.user, &room.id) {
            return Err(denied("only its creator or an operator may delete a room"));
        }

        let streaming = self.store.delete_room(&room.id).await.map_err(internal)?;
        tracing::info!(user = caller.user, room = room.id, "a room was deleted");
        self.rooms.deleted(&room.id).await?;
        // Last, because a cancel may wait seconds for a router.
        for answer in streaming {
            self.answers.abandon(&answer).await;
        }
        Ok(())
    }

    async fn stop(&self, caller: &Caller, request: OfMessage) -> Result<(), Refusal> {
        let answer = self
            .store
            .answer(request.message)
            .await
            .map_err(internal)?
            .ok_or_else(no_answer)?;
        if !is_asker(caller, &answer.message) && !self.rooms.manages(&caller.user, &answer.message.room) {
            return Err(denied("only the asker, the room's creator or an operator may stop an answer"));
        }
        // Stopping an answer that has just ended is not an error: the page still showed the button.
        if answer.message.state == State::Streaming {
            self.answers.stop(&answer).await.map_err(internal)?;
        }
        Ok(())
    }

    async fn retry(&self, caller: &Caller, request: OfMessage) -> Result<(), Refusal> {
        let answer = self
            .store
            .answer(request.message)
            .await
            .map_err(internal)?
            .ok_or_else(no_answer)?;
        if !is_asker(caller, &answer.message) && !self.rooms.is_operator(&caller.user) {
            return Err(denied("only the asker or an operator may ask for an answer again"));
        }
        match answer.message.state {
            State::Streaming => return Err(Refusal::bad("the answer is still streaming")),
            State::Done => return Err(Refusal::bad("the answer is complete; ask in a new message")),
            State::Failed | State::Stopped => {}
        }

        self.minute.run(&caller.user, Instant::now())?;
        if let Some(again) = self.store.ask_again(&answer, &caller.user).await.map_err(refused)? {
            let published = publish(&self.channels, &again.message).await;
            // The new request is committed, so it is sent even if the room cannot be notified.
            self.answers.ask(again);
            published.map_err(|error| Refusal::internal("cannot notify a room", error))?;
        }
        Ok(())
    }
}

/// The subscriptions that [`Chat::run`] consumes.
pub struct Loops {
    rooms: bus::Subscription,
    answers: answers::Inputs,
}

impl Handler for Chat {
    async fn call(&self, method: &'static str, caller: Caller, payload: Bytes) -> Result<Bytes, Refusal> {
        match method {
            "chat.rooms" => reply(&wire::chat::Rooms { rooms: self.rooms.all() }),
            "chat.create_room" => {
                let CreateRoom { name } = read(&payload)?;
                reply(&RoomCreated { room: self.rooms.create(&name, &caller.user).await? })
            }
            "chat.delete_room" => self.delete_room(&caller, read(&payload)?).await.and_then(|()| done()),
            "chat.history" => reply(&self.history(read(&payload)?).await?),
            "chat.send" => reply(&self.send(&caller, read(&payload)?).await?),
            "chat.typing" => self.typing(&caller, read(&payload)?).await.and_then(|()| done()),
            "chat.stop" => self.stop(&caller, read(&payload)?).await.and_then(|()| done()),
            "chat.retry" => self.retry(&caller, read(&payload)?).await.and_then(|()| done()),
            other => Err(Refusal(ErrorCode::MethodNotFound, format!("there is no method {other}"))),
        }
    }
}

/// Returns how many of the newest messages fit a page. `sizes` are the sizes of the texts, oldest first.
fn newest_that_fit(sizes: impl DoubleEndedIterator<Item = usize>, limit: usize) -> usize {
    let mut bytes = 0;
    let fits = |(n, size): (usize, usize)| {
        bytes += size;
        n == 0 || (n < limit && bytes <= PAGE_BYTES_MAX)
    };
    sizes.rev().enumerate().map(fits).take_while(|fits| *fits).count()
}

fn read<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(payload).map_err(|e| Refusal::bad(format!("cannot read the request: {e}")))
}

fn reply(answer: &impl Serialize) -> Result<Bytes, Refusal> {
    serde_json::to_vec(answer)
        .map(Bytes::from)
        .map_err(|error| Refusal::internal("cannot write an answer as JSON", error))
}

fn done() -> Result<Bytes, Refusal> {
    Ok(Bytes::from_static(b"{}"))
}

fn internal(error: db::Error) -> Refusal {
    Refusal::internal("cannot access the database of the chat", error)
}

fn refused(refused: Refused) -> Refusal {
    match refused {
        Refused::Database(error) => internal(error),
        Refused::Over(over) => over.into(),
        Refused::NoRoom => unknown_room(),
    }
}

fn denied(text: &str) -> Refusal {
    Refusal(ErrorCode::PermissionDenied, text.into())
}

fn is_asker(caller: &Caller, answer: &Message) -> bool {
    answer.asker.as_deref() == Some(&*caller.user)
}

fn unknown_room() -> Refusal {
    Refusal::bad("there is no such room; it may have been deleted")
}

fn no_answer() -> Refusal {
    Refusal::bad("this message is not an answer of the assistant")
}
