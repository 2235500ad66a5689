//! A test client that sends exactly the given commands and keeps everything that it receives.

use crate::node::{DEADLINE, Node, user};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use std::collections::VecDeque;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use wire::realtime::{
    Command, ConnectRequest, ConnectResult, Encoding, HistoryRequest, HistoryResult, PresenceRequest, Publication,
    PublishRequest, Push, Reply, SubscribeRequest, SubscribeResult, UnsubscribeRequest, decode_replies, encode_command,
};

pub const ENCODINGS: [Encoding; 2] = [Encoding::Json, Encoding::Protobuf];

pub struct Client {
    pub socket: WebSocketStream<TcpStream>,
    pub encoding: Encoding,
    pub connected: ConnectResult,
    /// Whether it answers the server's pings.
    pub pongs: bool,
    pub pings: usize,
    heard: VecDeque<Reply>,
    pushes: VecDeque<Push>,
    last_id: u32,
}

/// A request to subscribe, without recovery.
pub fn to(channel: &str) -> SubscribeRequest {
    SubscribeRequest { channel: channel.into(), ..SubscribeRequest::default() }
}

/// A request to subscribe that recovers the publications after `offset` in the epoch of `before`.
pub fn again(channel: &str, before: &SubscribeResult, offset: u64) -> SubscribeRequest {
    SubscribeRequest { recover: true, epoch: before.epoch.clone(), offset, ..to(channel) }
}

impl Client {
    /// Opens the WebSocket connection without sending a connect command.
    pub async fn open(node: &Node, encoding: Encoding) -> Self {
        Self::open_at(node, encoding, "").await
    }

    pub async fn open_at(node: &Node, encoding: Encoding, query: &str) -> Self {
        let stream = TcpStream::connect(node.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut request = format!("ws://{}/connection/websocket{query}", node.address)
            .into_client_request()
            .unwrap();
        if encoding == Encoding::Protobuf {
            request
                .headers_mut()
                .insert("sec-websocket-protocol", "centrifuge-protobuf".parse().unwrap());
        }
        let (socket, _) = tokio_tungstenite::client_async(request, stream).await.unwrap();
        Self {
            socket,
            encoding,
            connected: ConnectResult::default(),
            pongs: true,
            pings: 0,
            heard: VecDeque::new(),
            pushes: VecDeque::new(),
            last_id: 0,
        }
    }

    pub async fn connect(node: &Node, name: &str) -> Self {
        Self::connect_in(node, Encoding::Json, name).await
    }

    pub async fn connect_in(node: &Node, encoding: Encoding, name: &str) -> Self {
        Self::connect_with(node, encoding, &user(name)).await
    }

    pub async fn connect_with(node: &Node, encoding: Encoding, token: &str) -> Self {
        let mut client = Self::open(node, encoding).await;
        client.connected = client
            .present_token(token)
            .await
            .connect
            .expect("the token is accepted");
        client
    }

    pub async fn present_token(&mut self, token: &str) -> Reply {
        let connect = ConnectRequest { token: token.into(), ..ConnectRequest::default() };
        self.ask(Command { connect: Some(connect), ..Command::default() }).await
    }

    /// Sends all commands in one message.
    pub async fn send(&mut self, commands: &[Command]) {
        let mut out = Vec::new();
        for command in commands {
            if self.encoding == Encoding::Json && !out.is_empty() {
                out.push(b'\n');
            }
            encode_command(self.encoding, command, &mut out);
        }

        let message = match self.encoding {
            Encoding::Json => Message::text(String::from_utf8(out).unwrap()),
            Encoding::Protobuf => Message::binary(out),
        };
        self.socket.send(message).await.unwrap();
    }

    /// Sends a command and waits for its reply. Pushes that arrive before it are kept.
    pub async fn ask(&mut self, command: Command) -> Reply {
        self.last_id += 1;
        let id = self.last_id;
        self.send(&[Command { id, ..command }]).await;
        self.reply(id).await
    }

    pub async fn reply(&mut self, id: u32) -> Reply {
        loop {
            match self.next().await {
                Ok(reply) if reply.id == id => return reply,
                Ok(reply) => self.pushes.extend(reply.push),
                Err(code) => panic!("closed with {code} while waiting for reply {id}"),
            }
        }
    }

    /// Returns the next reply that is not a ping, or the close code (1006 if there was no close frame).
    pub async fn next(&mut self) -> Result<Reply, u16> {
        loop {
            while let Some(reply) = self.heard.pop_front() {
                if reply != Reply::default() {
                    return Ok(reply);
                }
                self.pings += 1;
                if self.pongs {
                    self.send(&[Command::default()]).await;
                }
            }

            let message = timeout(DEADLINE, self.socket.next())
                .await
                .expect("something arrives in time");
            let bytes = match message {
                Some(Ok(Message::Text(text))) => Bytes::from(text),
                Some(Ok(Message::Binary(bytes))) => bytes,
                Some(Ok(Message::Close(frame))) => return Err(frame.map_or(1005, |frame| frame.code.into())),
                Some(Ok(_)) => continue,
                Some(Err(_)) | None => return Err(1006),
            };
            self.heard.extend(decode_replies(self.encoding, &bytes).unwrap());
        }
    }

    pub async fn push(&mut self) -> Push {
        if let Some(push) = self.pushes.pop_front() {
            return push;
        }
        match self.next().await {
            Ok(Reply { push: Some(push), .. }) => push,
            other => panic!("expected a push, got {other:?}"),
        }
    }

    /// Takes the pushes that arrived while a reply was awaited.
    pub fn kept(&mut self) -> VecDeque<Push> {
        std::mem::take(&mut self.pushes)
    }

    pub async fn publication(&mut self) -> Publication {
        let push = self.push().await;
        push.r#pub
            .clone()
            .unwrap_or_else(|| panic!("expected a publication, got {push:?}"))
    }

    /// Reads until the connection is closed. Returns the close code.
    pub async fn closed(&mut self) -> u16 {
        loop {
            if let Err(code) = self.next().await {
                return code;
            }
        }
    }

    /// Sends a ping and asserts that no push precedes its reply.
    pub async fn nothing_pushed(&mut self) {
        let ping = Command { ping: Some(wire::realtime::PingRequest {}), ..Command::default() };
        assert!(self.ask(ping).await.ping.is_some());
        assert!(self.pushes.is_empty(), "{:?}", self.pushes);
    }

    pub async fn try_subscribe(&mut self, request: SubscribeRequest) -> Reply {
        self.ask(Command { subscribe: Some(request), ..Command::default() })
            .await
    }

    pub async fn subscribe(&mut self, request: SubscribeRequest) -> SubscribeResult {
        let reply = self.try_subscribe(request).await;
        reply.subscribe.clone().unwrap_or_else(|| panic!("{reply:?}"))
    }

    pub async fn unsubscribe(&mut self, channel: &str) -> Reply {
        let unsubscribe = Some(UnsubscribeRequest { channel: channel.into() });
        self.ask(Command { unsubscribe, ..Command::default() }).await
    }

    pub async fn publish(&mut self, channel: &str, data: impl Into<Bytes>) -> Reply {
        let publish = Some(PublishRequest { channel: channel.into(), data: data.into() });
        self.ask(Command { publish, ..Command::default() }).await
    }

    pub async fn presence(&mut self, channel: &str) -> Reply {
        let presence = Some(PresenceRequest { channel: channel.into() });
        self.ask(Command { presence, ..Command::default() }).await
    }

    pub async fn try_history(&mut self, request: HistoryRequest) -> Reply {
        self.ask(Command { history: Some(request), ..Command::default() }).await
    }

    pub async fn history(&mut self, request: HistoryRequest) -> HistoryResult {
        let reply = self.try_history(request).await;
        reply.history.clone().unwrap_or_else(|| panic!("{reply:?}"))
    }

    /// Drops the connection without a close frame.
    pub fn cut(self) {
        drop(self.socket);
    }
}

/// The code of an error reply.
pub fn code(reply: &Reply) -> u32 {
    reply
        .error
        .as_ref()
        .unwrap_or_else(|| panic!("expected an error, got {reply:?}"))
        .code
}

/// The data of publications, each read as a JSON number.
pub fn numbers(publications: &[Publication]) -> Vec<u64> {
    publications.iter().map(number).collect()
}

pub fn number(publication: &Publication) -> u64 {
    let value: Value = serde_json::from_slice(&publication.data).unwrap();
    value.as_u64().unwrap()
}
