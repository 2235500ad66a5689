//! Measures one interaction with the console: select a tab, run the page function, receive the delta.

use crate::Result;
use crate::beamline::Beamline;
use crate::report::{Figure, Report};
use futures_util::{SinkExt, StreamExt};
use prost::Message;
use std::collections::VecDeque;
use std::time::Instant;
use tokio::net::TcpStream;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, tungstenite};
use wire::app::{Back, Body, Event, Forward, Op, Rerun, Said};
use wire::realtime::{Command, ConnectRequest, Encoding, Reply, RpcRequest, SubscribeRequest};

const INTERACTIONS: u64 = 2000;
const SESSION: &str = "00112233445566778899aabbccddeeff";

pub async fn run(report: &mut Report) -> Result {
    let server = Beamline::start("")?;
    let mut page = Page::open(&server).await?;
    let mut server_side = hdrhistogram::Histogram::<u64>::new(3)?;
    let mut whole = hdrhistogram::Histogram::<u64>::new(3)?;

    let tabs = page.rerun().await?;
    for n in 0..INTERACTIONS {
        let start = Instant::now();
        let said = Said::Event(Event { key: tabs.clone(), value: (n % 4).to_string() });
        let micros = page.interact(said).await?;
        whole.record(u64::try_from(start.elapsed().as_micros())?)?;
        server_side.record(u64::from(micros))?;
    }

    let figure = |times: &hdrhistogram::Histogram<u64>, q| Figure::Micros(times.value_at_quantile(q) as f64);
    report.row("console, one interaction in the server, p50", figure(&server_side, 0.5), None, "< 300 µs");
    report.row("console, one interaction there and back, p50", figure(&whole, 0.5), None, "");
    report.row("console, one interaction there and back, p99", figure(&whole, 0.99), None, "");
    Ok(())
}

/// A client that speaks the app protocol without a browser.
struct Page {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    replies: VecDeque<Reply>,
    next_id: u32,
    tabs: String,
}

impl Page {
    async fn open(server: &Beamline) -> Result<Self> {
        let url = format!("ws://{}/connection/websocket?cf_protocol=protobuf", server.http);
        let (socket, _) = tokio_tungstenite::connect_async_with_config(url, None, true).await?;
        let mut page = Self { socket, replies: VecDeque::new(), next_id: 0, tabs: String::new() };

        let connect = ConnectRequest { token: server.token("bench")?, ..ConnectRequest::default() };
        page.send(Command { connect: Some(connect), ..Command::default() })
            .await?;

        let channel = format!("app:{SESSION}#bench");
        let subscribe = SubscribeRequest { channel, ..SubscribeRequest::default() };
        page.send(Command { subscribe: Some(subscribe), ..Command::default() })
            .await?;
        Ok(page)
    }

    /// Loads the console and returns the key of its tabs.
    async fn rerun(&mut self) -> Result<String> {
        let rerun = Rerun { path: "/console".into(), query: String::new(), reset: true };
        self.interact(Said::Rerun(rerun)).await?;
        if self.tabs.is_empty() {
            Err("the console shows no tabs".into())
        } else {
            Ok(self.tabs.clone())
        }
    }

    /// Sends a message and waits for the run to finish; returns the server's own time for it, in µs.
    async fn interact(&mut self, said: Said) -> Result<u32> {
        let back = Back { version: 1, session: SESSION.into(), body: Some(said) };
        let rpc = RpcRequest {
            method: wire::app::EVENT_METHOD.into(),
            data: back.encode_to_vec().into(),
        };
        self.send(Command { rpc: Some(rpc), ..Command::default() }).await?;

        loop {
            let reply = self.receive().await?;
            if let Some(error) = reply.error {
                return Err(error.message.into());
            }
            let Some(publication) = reply.push.and_then(|push| push.r#pub) else {
                continue;
            };
            match Forward::decode(publication.data)?.body {
                Some(Body::RunFinished(finished)) => return Ok(finished.duration_us),
                Some(Body::Error(failure)) => return Err(failure.message.into()),
                Some(Body::Deltas(deltas)) => {
                    for delta in deltas.delta {
                        if let Some(Op::Reset(reset)) = delta.op {
                            self.tabs = find_tabs(&reset.children).unwrap_or_default();
                        }
                    }
                }
                _ => {}
            }
        }
    }

    async fn send(&mut self, mut command: Command) -> Result {
        self.next_id += 1;
        command.id = self.next_id;
        let mut bytes = Vec::new();
        wire::realtime::encode_command(Encoding::Protobuf, &command, &mut bytes);
        self.socket.send(tungstenite::Message::binary(bytes)).await?;
        Ok(())
    }

    async fn receive(&mut self) -> Result<Reply> {
        loop {
            if let Some(reply) = self.replies.pop_front() {
                return Ok(reply);
            }
            if let tungstenite::Message::Binary(bytes) = self.socket.next().await.ok_or("the server closed")?? {
                let replies =
                    wire::realtime::decode_replies(Encoding::Protobuf, &bytes).map_err(|e| format!("{e:?}"))?;
                self.replies.extend(replies);
            }
        }
    }
}

fn find_tabs(nodes: &[wire::app::Node]) -> Option<String> {
    nodes.iter().find_map(|node| {
        if node.kind == "tabs" {
            Some(node.key.clone())
        } else {
            find_tabs(&node.children)
        }
    })
}
