//! The connection: publishing, asking, and the task that hands replies out.

use super::convert;
use super::inbox::{Awaited, DROPPED_HEADER, Inbox};
use crate::{Error, Message, Result};
use async_nats::client::{PublishError, PublishErrorKind};
use async_nats::connection::State;
use async_nats::jetstream::{self, Context};
use async_nats::{Client, HeaderMap, StatusCode, Subject};
use bytes::Bytes;
use futures_util::StreamExt;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A publish waits only when the client's own queue is full: the server takes nothing.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(5);

pub struct Link {
    pub client: Client,
    pub jetstream: Context,
    inbox: Arc<Inbox>,
}

impl Link {
    pub async fn open(client: Client, tasks: &TaskTracker, cancel: &CancellationToken) -> Result<Self> {
        let inbox = Arc::new(Inbox::new(client.new_inbox()));
        let replies = client.subscribe(inbox.pattern()).await.map_err(|e| Error::Disconnected(e.to_string()))?;
        tasks.spawn(hand_out(replies, inbox.clone(), cancel.clone()));
        let jetstream = jetstream::new(client.clone());
        Ok(Self { client, jetstream, inbox })
    }

    pub fn connected(&self) -> Result<()> {
        match self.client.connection_state() {
            State::Connected => Ok(()),
            State::Pending | State::Disconnected => {
                Err(Error::Disconnected("the connection to NATS is lost and sought again".into()))
            }
        }
    }

    pub async fn publish(&self, message: Message) -> Result<()> {
        self.connected()?;
        let headers = convert::to_nats(&message.headers);
        let reply = message.reply.map(|reply| Subject::from(&*reply));
        let sent = self.send(&message.subject, reply, headers, message.payload);
        let full = |_| Error::Disconnected("NATS takes no messages".into());
        tokio::time::timeout(PUBLISH_DEADLINE, sent).await.map_err(full)?
    }

    /// Publishes with a reply slot and waits for the answer.
    pub async fn ask(
        &self,
        subject: &str,
        headers: HeaderMap,
        payload: Bytes,
        awaited: Awaited,
        deadline: Duration,
    ) -> Result<async_nats::Message> {
        self.connected()?;
        let closed = || Error::Disconnected("the bus is closed".into());
        let (slot, answered) = self.inbox.reserve(awaited).ok_or_else(closed)?;
        let exchange = async {
            self.send(subject, Some(slot.subject().into()), headers, payload).await?;
            answered.await.map_err(|_| closed())
        };
        let late = |_| Error::Timeout(subject.into());
        let reply = tokio::time::timeout(deadline, exchange).await.map_err(late)??;
        let refused = reply.status == Some(StatusCode::NO_RESPONDERS)
            || reply.headers.as_ref().is_some_and(|headers| headers.get(DROPPED_HEADER).is_some());
        if refused { Err(Error::NoResponders(subject.into())) } else { Ok(reply) }
    }

    /// Returns once the server has taken everything sent before.
    pub async fn round_trip(&self, deadline: Duration) -> Result<()> {
        self.connected()?;
        let closed = || Error::Disconnected("the bus is closed".into());
        let (slot, answered) = self.inbox.reserve(Awaited::Reply).ok_or_else(closed)?;
        let exchange = async {
            self.send(&slot.subject(), None, HeaderMap::new(), Bytes::new()).await?;
            answered.await.map_err(|_| closed())
        };
        let late = |_| Error::Disconnected("NATS does not answer".into());
        tokio::time::timeout(deadline, exchange).await.map_err(late)??;
        Ok(())
    }

    async fn send(&self, subject: &str, reply: Option<Subject>, headers: HeaderMap, payload: Bytes) -> Result<()> {
        let max = self.client.max_payload().min(wire::limits::BUS_MESSAGE_MAX);
        let size = payload.len();
        if size > max {
            return Err(Error::TooLarge { size, max });
        }
        let client = &self.client;
        let to = Subject::from(subject);
        let sent = match (reply, headers.is_empty()) {
            (None, true) => client.publish(to, payload).await,
            (None, false) => client.publish_with_headers(to, headers, payload).await,
            (Some(reply), true) => client.publish_with_reply(to, reply, payload).await,
            (Some(reply), false) => client.publish_with_reply_and_headers(to, reply, headers, payload).await,
        };
        sent.map_err(|error: PublishError| match error.kind() {
            // The headers are what made it too large.
            PublishErrorKind::MaxPayloadExceeded => Error::TooLarge { size, max },
            PublishErrorKind::InvalidSubject => Error::InvalidSubject(subject.into()),
            PublishErrorKind::Send => Error::Disconnected(error.to_string()),
        })
    }
}

async fn hand_out(mut replies: async_nats::Subscriber, inbox: Arc<Inbox>, cancel: CancellationToken) {
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            reply = replies.next() => match reply {
                Some(reply) => { inbox.answer(reply); }
                None => break,
            }
        }
    }
    inbox.close();
}
