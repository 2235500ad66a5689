//! Measures the fan-out of one channel to many subscribers, beside nats-server's WebSocket, in deliveries a second.

use crate::Result;
use crate::beamline::Beamline;
use crate::report::{Figure, Report};
use crate::sockets::{self, BINARY, MARK, TEXT, frame};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use testkit::NatsServer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const SUBSCRIBERS: usize = 1000;
const MESSAGES: usize = 3200;
const PAYLOAD: usize = 128;
/// How long all deliveries of one measurement may take.
const DEADLINE: Duration = Duration::from_secs(120);

pub async fn run(report: &mut Report) -> Result {
    // The window: how many messages the publisher sends before it waits for their answers.
    for window in [1, 64] {
        let ours = ours(window).await?;
        let peer = nats(window).await?;
        let what = format!("fan-out, 1 channel × {SUBSCRIBERS}, {PAYLOAD} B, published by {window}");
        let peer = Some(("nats-server WebSocket", Figure::PerSecond(peer)));
        report.row(&what, Figure::PerSecond(ours), peer, "ahead of the peer");
    }
    Ok(())
}

async fn ours(window: usize) -> Result<f64> {
    let settings = "[[cluster.namespaces]]\nname = \"bench\"\nhistory_size = 0\nrecovery = false\n\
                    presence = false\npublish = true\n";
    let server = Beamline::start(settings)?;
    let token = server.token("bench")?;

    let mut subscribers = Vec::new();
    for n in 0..SUBSCRIBERS {
        subscribers.push(sockets::ours(&server.http, &token, Some("bench:x"), n).await?);
    }

    let mut publisher = sockets::ours(&server.http, &token, None, 0).await?;
    let text = payload();
    let commands: Vec<String> = (0..window)
        .map(|n| format!(r#"{{"id":{},"publish":{{"channel":"bench:x","data":"{text}"}}}}"#, n + 10))
        .collect();
    let batch = frame(TEXT, commands.join("\n").as_bytes());

    deliveries(subscribers, async move {
        for _ in 0..MESSAGES / window {
            publisher.write_all(&batch).await?;
            sockets::read_until(&mut publisher, format!(r#""id":{},"#, window + 9).as_bytes()).await?;
        }
        // The caller keeps the publisher connected until everything has been counted.
        Ok(Box::new(publisher) as Box<dyn Send>)
    })
    .await
}

async fn nats(window: usize) -> Result<f64> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let settings = format!("websocket {{ listen: \"127.0.0.1:{port}\", no_tls: true }}\n");
    let _server = NatsServer::start_with(&settings).await;
    let address = format!("127.0.0.1:{port}");

    let mut subscribers = Vec::new();
    for n in 0..SUBSCRIBERS {
        subscribers.push(sockets::nats(&address, Some("bench"), n).await?);
    }

    let mut publisher = sockets::nats(&address, None, 0).await?;
    // A PONG confirms that the server has taken the messages before it, as our replies do.
    let commands = format!("PUB bench {PAYLOAD}\r\n{}\r\n", payload()).repeat(window) + "PING\r\n";
    let batch = frame(BINARY, commands.as_bytes());

    deliveries(subscribers, async move {
        for _ in 0..MESSAGES / window {
            publisher.write_all(&batch).await?;
            sockets::read_until(&mut publisher, b"PONG").await?;
        }
        Ok(Box::new(publisher) as Box<dyn Send>)
    })
    .await
}

/// Publishes and counts until every message has reached every subscriber; returns deliveries a second.
async fn deliveries<P>(subscribers: Vec<TcpStream>, publish: P) -> Result<f64>
where
    P: Future<Output = Result<Box<dyn Send>>> + Send + 'static,
{
    let expected = (MESSAGES * subscribers.len()) as u64;
    let counted = Arc::new(AtomicU64::new(0));
    let mut readers = JoinSet::new();
    for mut stream in subscribers {
        let counted = counted.clone();
        readers.spawn(async move {
            let mut buffer = vec![0; 16 * 1024];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                let marks = buffer[..count].iter().filter(|byte| **byte == MARK).count();
                counted.fetch_add(marks as u64, Relaxed);
            }
        });
    }

    let began = Instant::now();
    let published = tokio::spawn(publish);
    while counted.load(Relaxed) < expected {
        if began.elapsed() > DEADLINE {
            return Err(format!("only {} of {expected} deliveries arrived", counted.load(Relaxed)).into());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    let rate = expected as f64 / began.elapsed().as_secs_f64();
    drop(published.await??);
    readers.shutdown().await;
    Ok(rate)
}

fn payload() -> String {
    let mut text = "x".repeat(PAYLOAD - 1);
    text.push(char::from(MARK));
    text
}
