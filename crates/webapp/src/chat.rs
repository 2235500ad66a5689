//! The chat: rooms, messages, and an assistant whose answers come from the router and stream into the room.

mod answers;
mod quotas;
mod rooms;
mod store;

pub use quotas::Quotas;
pub use rooms::Rooms;

use crate::accounts::Accounts;
use crate::channels::Channels;
use crate::db::{self, Db};
use crate::rpc::{Caller, Handler, Refusal};
use answers::Answers;
use bus::Bus;
use bytes::Bytes;
use quotas::{Minute, Refused};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Instant;
use store::Store;
use tokio_util::sync::CancellationToken;
use wire::chat::{CreateRoom, Event, History, InRoom, Message, Messages, OfMessage, RoomCreated, Send, Sent, State};
use wire::realtime::ErrorCode;

/// Who is asked by a message that begins with `@assistant`.
pub const ASSISTANT: &str = "assistant";
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
/// Of one message, bytes.
const TEXT_MAX: usize = 8 * 1024;
const NONCE_MAX: usize = 64;
const PAGE: i64 = 50;
const PAGE_MAX: i64 = 100;
/// Of one page of history, bytes, unless its first message alone has more.
const PAGE_BYTES: usize = 256 * 1024;

pub struct Chat {
    store: Store,
    rooms: Arc<Rooms>,
    channels: Channels,
    accounts: Arc<Accounts>,
    answers: Arc<Answers>,
    minute: Minute,
}

impl Chat {
    /// Subscribed to what answers are made of; nothing runs yet.
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
        // PostgreSQL keeps none.
        if text.contains('\0') || request.nonce.contains('\0') {
            return Err(Refusal::bad("a message holds no NUL characters"));
        }
        // A message that is sent again was counted the first time.
        if !self.store.has(&caller.user, &request.nonce).await.map_err(internal)? {
            self.minute.message(&caller.user, Instant::now())?;
            if store::asked(text).is_some() {
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
        // From here on it is kept, whatever happens to us; and what it asks for is asked, whether or not the room hears.
        let mut told = self.announce(&message).await;
        if let Some(mut answer) = answer {
            self.answers.fill(&mut answer.message);
            told = told.and(self.announce(&answer.message).await);
            self.answers.ask(answer);
        }
        told.map(|()| Sent { message })
    }

    /// Says it to the room; once, however often it is sent.
    async fn announce(&self, message: &Message) -> Result<(), Refusal> {
        let told = "the message is kept, but the room has not heard it; send it again";
        say(&self.channels, message)
            .await
            .map_err(|error| Refusal::failed(told, "a room was not told", error))
    }

    async fn history(&self, request: History) -> Result<Messages, Refusal> {
        let room = self.rooms.get(&request.room).ok_or_else(unknown_room)?;
        let limit = request.limit.unwrap_or(PAGE).clamp(1, PAGE_MAX);
        let mut messages = self
            .store
            .page(&room.id, request.before, limit + 1)
            .await
            .map_err(internal)?;
        messages
            .iter_mut()
            .filter(|m| m.state == State::Streaming)
            .for_each(|m| self.answers.fill(m));
        let limit = usize::try_from(limit).unwrap_or_default();
        let fitting = newest(messages.iter().map(|message| message.text.len()), limit);
        let older = messages.len() - fitting;
        Ok(Messages { messages: messages.split_off(older), more: older > 0 })
    }

    async fn typing(&self, caller: &Caller, request: InRoom) -> Result<(), Refusal> {
        let room = self.rooms.get(&request.room).ok_or_else(unknown_room)?;
        if !self.minute.typing(&caller.user, Instant::now()) {
            return Ok(());
        }
        let name = self.accounts.name(&caller.user).await;
        let event = Event::Typing { user: caller.user.clone(), name };
        let told = self.channels.publish_passing(&channel(&room.id), &event).await;
        told.map_err(|error| Refusal::internal("a room was not told who is typing", error))
    }

    /// Deletes a room with all that was said in it. What is still being answered there is stopped.
    async fn delete_room(&self, caller: &Caller, request: InRoom) -> Result<(), Refusal> {
        let room = self.rooms.get(&request.room).ok_or_else(unknown_room)?;
        if !self.rooms.manages(&caller.user, &room.id) {
            return Err(denied("a room is deleted by whoever made it, or by an operator"));
        }
        let coming = self.store.delete_room(&room.id).await.map_err(internal)?;
        tracing::info!(user = caller.user, room = room.id, "a room was deleted");
        self.rooms.deleted(&room.id).await?;
        for answer in coming {
            self.answers.drop_one(&answer).await;
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
            return Err(denied("an answer is stopped by whoever asked, whoever made the room, or an operator"));
        }
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
            return Err(denied("an answer is asked for again by whoever asked first, or by an operator"));
        }
        match answer.message.state {
            State::Streaming => return Err(Refusal::bad("the answer is still coming")),
            State::Done => return Err(Refusal::bad("the answer is there; ask in a new message")),
            State::Failed | State::Stopped => {}
        }
        self.minute.run(&caller.user, Instant::now())?;
        if let Some(again) = self.store.ask_again(&answer, &caller.user).await.map_err(refused)? {
            let told = say(&self.channels, &again.message).await;
            // It is written: it is asked for, whether or not the room hears of it.
            self.answers.ask(again);
            told.map_err(|error| Refusal::internal("a room was not told", error))?;
        }
        Ok(())
    }
}

/// What [`Chat::run`] listens to.
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
            other => Err(Refusal(ErrorCode::MethodNotFound, format!("no method {other}"))),
        }
    }
}

/// How many of the newest fit a page, by their sizes, oldest first.
fn newest(sizes: impl DoubleEndedIterator<Item = usize>, limit: usize) -> usize {
    let mut bytes = 0;
    let fits = |(n, size): (usize, usize)| {
        bytes += size;
        n == 0 || (n < limit && bytes <= PAGE_BYTES)
    };
    sizes.rev().enumerate().map(fits).take_while(|fits| *fits).count()
}

fn channel(room: &str) -> String {
    format!("chat:{room}")
}

/// Publishes a message as it is now. A person's is said once, however often it is sent; an answer's may be repeated, and
/// replaces itself.
async fn say(channels: &Channels, message: &Message) -> Result<(), String> {
    let key = message.nonce.is_some().then(|| format!("message-{}", message.id));
    let event = Event::Message { message: message.clone() };
    channels.publish_json(&channel(&message.room), &event, key).await
}

fn read<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(payload).map_err(|e| Refusal::bad(format!("the request does not fit: {e}")))
}

fn reply(answer: &impl Serialize) -> Result<Bytes, Refusal> {
    serde_json::to_vec(answer)
        .map(Bytes::from)
        .map_err(|error| Refusal::internal("an answer is no JSON", error))
}

fn done() -> Result<Bytes, Refusal> {
    Ok(Bytes::from_static(b"{}"))
}

fn internal(error: db::Error) -> Refusal {
    Refusal::internal("the chat cannot use its database", error)
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
    Refusal::bad("this message is no answer of the assistant")
}
