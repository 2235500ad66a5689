//! Measures how long the embedded bus takes to open a data directory that holds a million messages, or a million
//! records.

use crate::Result;
use crate::report::{Figure, Report};
use bus::local::Local;
use bus::{Bus, ConsumerConfig, Message, Retention, StreamConfig, Write};
use bytes::Bytes;
use std::time::{Duration, Instant};

const COUNT: usize = 1_000_000;
const PAYLOAD: usize = 128;
/// Writes in one batch.
const BATCH: usize = 500;

pub async fn run(report: &mut Report) -> Result {
    let goal = "below 2,000,000 µs";
    let took = reopen(message).await?;
    report.row("opening with 1,000,000 messages and their ids", Figure::Micros(took), None, goal);
    let took = reopen(record).await?;
    report.row("opening with 1,000,000 records", Figure::Micros(took), None, goal);
    Ok(())
}

fn message(name: &str) -> Write<'_> {
    let message = Message {
        subject: "bench.messages".into(),
        payload: vec![b'x'; PAYLOAD].into(),
        ..Message::default()
    };
    Write::Append { message, msg_id: Some(name) }
}

fn record(name: &str) -> Write<'_> {
    let value = Bytes::from(vec![b'x'; PAYLOAD]);
    Write::Put { bucket: "BENCH", key: name.into(), value, expected: None, done: false }
}

/// Writes a million of these, closes the bus and opens it again. Returns microseconds.
async fn reopen(write: fn(&str) -> Write<'_>) -> Result<f64> {
    let dir = tempfile::tempdir()?;
    let bus = Local::open(dir.path()).await?;
    declare(&bus).await?;
    for batch in 0..COUNT / BATCH {
        let names: Vec<String> = (0..BATCH).map(|n| format!("name-{}", batch * BATCH + n)).collect();
        bus.write(names.iter().map(|name| write(name)).collect()).await?;
    }
    drop(bus);

    // The thread of the bus holds the file a moment longer.
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let began = Instant::now();
        match Local::open(dir.path()).await {
            Ok(_) => return Ok(began.elapsed().as_secs_f64() * 1e6),
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn declare(bus: &Bus) -> Result {
    bus.declare_stream(StreamConfig {
        max_bytes: 1 << 33,
        ..StreamConfig::new("BENCH", vec!["bench.>".into()], Retention::WorkQueue)
    })
    .await?;
    bus.declare_kv("BENCH", Some(Duration::from_secs(3600))).await?;
    // Dropped at once: its cursor stays.
    bus.consume(ConsumerConfig {
        stream: "BENCH",
        name: "bench".into(),
        filter: None,
        ack_wait: Duration::from_secs(30),
        max_ack_pending: 1,
        max_in_hand: 1,
        from_start: true,
    })
    .await?;
    Ok(())
}
