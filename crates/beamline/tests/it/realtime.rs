//! A small client of the real-time endpoint: JSON over tungstenite, an independent WebSocket implementation.

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

const PATIENCE: Duration = Duration::from_secs(10);

pub struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    next_id: u64,
    /// Replies of a frame that have not been read yet.
    unread: VecDeque<Value>,
    /// Pushes that arrived while a reply was awaited.
    pushes: VecDeque<Value>,
}

/// The connection ended, or a reply is an error.
#[derive(Debug)]
pub struct Failed(pub String);

impl Client {
    pub async fn connect(http: &str, token: &str) -> Result<Self, Failed> {
        let (socket, _) = tokio_tungstenite::connect_async(format!("ws://{http}/connection/websocket"))
            .await
            .map_err(|e| Failed(e.to_string()))?;
        let mut client = Self { socket, next_id: 0, unread: VecDeque::new(), pushes: VecDeque::new() };
        client.call("connect", json!({"token": token})).await?;
        Ok(client)
    }

    /// Sends a command and returns the result of its reply.
    pub async fn call(&mut self, command: &str, body: Value) -> Result<Value, Failed> {
        self.next_id += 1;
        let id = self.next_id;
        let text = json!({"id": id, command: body}).to_string();
        self.socket
            .send(Message::text(text))
            .await
            .map_err(|e| Failed(e.to_string()))?;
        loop {
            let reply = self.receive().await?;
            if reply["id"] == id {
                return match reply.get("error") {
                    Some(error) => Err(Failed(error.to_string())),
                    None => Ok(reply[command].clone()),
                };
            }
            self.pushes.push_back(reply["push"].clone());
        }
    }

    pub async fn rpc(&mut self, method: &str, data: Value) -> Result<Value, Failed> {
        Ok(self.call("rpc", json!({"method": method, "data": data})).await?["data"].clone())
    }

    /// Returns the next push that `matches`, and discards the others.
    pub async fn push(&mut self, matches: impl Fn(&Value) -> bool) -> Result<Value, Failed> {
        loop {
            let push = match self.pushes.pop_front() {
                Some(push) => push,
                None => self.receive().await?["push"].clone(),
            };
            if matches(&push) {
                return Ok(push);
            }
        }
    }

    async fn receive(&mut self) -> Result<Value, Failed> {
        if let Some(buffered) = self.unread.pop_front() {
            return Ok(buffered);
        }
        loop {
            let message = tokio::time::timeout(PATIENCE, self.socket.next()).await;
            let message = message.map_err(|_| Failed(format!("nothing came within {PATIENCE:?}")))?;
            match message {
                Some(Ok(Message::Text(text))) => {
                    let mut replies = text.lines().map(|line| serde_json::from_str(line).unwrap());
                    let first: Value = replies.next().unwrap();
                    let rest: Vec<Value> = replies.collect();
                    if first == json!({}) && rest.is_empty() {
                        self.socket
                            .send(Message::text("{}"))
                            .await
                            .map_err(|e| Failed(e.to_string()))?;
                        continue;
                    }
                    self.unread.extend(rest);
                    return Ok(first);
                }
                Some(Ok(Message::Close(frame))) => return Err(Failed(format!("closed: {frame:?}"))),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(Failed(error.to_string())),
                None => return Err(Failed("the connection ended".into())),
            }
        }
    }
}
