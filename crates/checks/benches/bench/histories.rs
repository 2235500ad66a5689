//! Measures publications to channels with a history, which Beamline stores before it acknowledges them, beside
//! Centrifugo's memory engine, which does not store them. The peer is measured where `centrifugo` (v6) is on the PATH.

use crate::Result;
use crate::beamline::Beamline;
use crate::report::{Figure, Report};
use crate::sockets::{self, TEXT, frame};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const CHANNELS: usize = 5000;
const PAYLOAD: usize = 128;
const PUBLISHERS: usize = 64;
/// Publications that a publisher sends in one message before it waits for their replies.
const WINDOW: usize = 8;
const WARM_UP: Duration = Duration::from_secs(1);
const MEASURED: Duration = Duration::from_secs(5);

pub async fn run(report: &mut Report) -> Result {
    let settings = "[[cluster.namespaces]]\nname = \"bench\"\npresence = false\npublish = true\n";
    let server = Beamline::start(settings)?;
    let token = server.token("bench")?;
    let mut publishers = Vec::new();
    for n in 0..PUBLISHERS {
        publishers.push(sockets::ours(&server.http, &token, None, n).await?);
    }
    let ours = publications(publishers).await?;
    drop(server);

    let peer = centrifugo()
        .await?
        .map(|rate| ("Centrifugo, in memory", Figure::PerSecond(rate)));
    let what = format!("durable publications, {CHANNELS} channels, {} in flight", PUBLISHERS * WINDOW);
    report.row(&what, Figure::PerSecond(ours), peer, "50,000/s, and ahead of the peer");
    Ok(())
}

/// Publications a second; `None` if the peer is not installed.
async fn centrifugo() -> Result<Option<f64>> {
    let dir = tempfile::tempdir()?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let config = serde_json::json!({
        "http_server": {"address": "127.0.0.1", "port": port.to_string()},
        "client": {"insecure": true},
        "channel": {"namespaces": [{
            "name": "bench", "history_size": 100, "history_ttl": "600s", "allow_publish_for_client": true,
        }]},
        "log": {"level": "error"},
    });
    let file = dir.path().join("config.json");
    std::fs::write(&file, config.to_string())?;

    let mut command = Command::new("centrifugo");
    command.arg("-c").arg(file).stdout(Stdio::null()).stderr(Stdio::null());
    let _running = match command.spawn() {
        Ok(child) => Running(child),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let address = format!("127.0.0.1:{port}");
    let end = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(&address).await.is_err() {
        if Instant::now() > end {
            return Err("centrifugo did not start".into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let mut publishers = Vec::new();
    for n in 0..PUBLISHERS {
        publishers.push(sockets::ours(&address, "", None, n).await?);
    }
    Ok(Some(publications(publishers).await?))
}

/// Kills the process when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Publishes from all connections until the time is over; returns acknowledged publications a second.
async fn publications(publishers: Vec<TcpStream>) -> Result<f64> {
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for (n, publisher) in publishers.into_iter().enumerate() {
        tasks.spawn(publish(publisher, n, began));
    }
    let mut count = 0;
    while let Some(published) = tasks.join_next().await {
        count += published??;
    }
    Ok(count as f64 / MEASURED.as_secs_f64())
}

/// Returns the publications that were acknowledged after the warm-up.
async fn publish(mut stream: TcpStream, publisher: usize, began: Instant) -> Result<usize> {
    let text = "x".repeat(PAYLOAD);
    let mut buffer = vec![0; 16 * 1024];
    let (mut sent, mut counted) = (publisher * CHANNELS / PUBLISHERS, 0);
    while began.elapsed() < WARM_UP + MEASURED {
        let commands: Vec<String> = (0..WINDOW)
            .map(|n| {
                let channel = (sent + n) % CHANNELS;
                format!(r#"{{"id":{},"publish":{{"channel":"bench:{channel}","data":"{text}"}}}}"#, n + 10)
            })
            .collect();
        stream.write_all(&frame(TEXT, commands.join("\n").as_bytes())).await?;
        sent += WINDOW;

        // Each reply names its id once, and nothing else does. A reply that spans two reads is counted by its end.
        let mut replies = 0;
        let mut before = 0;
        while replies < WINDOW {
            let count = stream.read(&mut buffer[before..]).await?;
            if count == 0 {
                return Err("the server closed a publisher's connection".into());
            }
            let text = String::from_utf8_lossy(&buffer[..before + count]).into_owned();
            if text.contains("\"error\"") {
                return Err(format!("a publication was refused: {text}").into());
            }
            replies = text.matches("\"publish\"").count();
            before += count;
        }
        if began.elapsed() > WARM_UP {
            counted += WINDOW;
        }
    }
    Ok(counted)
}
