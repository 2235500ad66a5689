//! Lanes, each of which sends one request after another, and clients with minimal overhead.

use crate::Result;
use bytes::BytesMut;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use wire::ipc::{Frame, FrameType, Version};

/// Sends one request for the lane with this number and waits for the answer.
pub type Ask = Arc<dyn Fn(usize) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

pub struct Seen {
    /// In µs, like `p99`.
    pub p50: f64,
    pub p99: f64,
    pub per_second: f64,
    /// Length of the measurement, including the last answers.
    pub took: Duration,
}

/// Runs this many lanes for the length of `round`, each as fast as its answers arrive.
pub async fn measure(lanes: usize, round: Duration, ask: &Ask) -> Result<Seen> {
    run(lanes, round, None, ask).await
}

/// Runs the lanes at a fixed total rate, with their requests spread evenly.
pub async fn paced(lanes: usize, round: Duration, per_second: f64, ask: &Ask) -> Result<Seen> {
    run(lanes, round, Some(Duration::from_secs_f64(lanes as f64 / per_second)), ask).await
}

async fn run(lanes: usize, round: Duration, every: Option<Duration>, ask: &Ask) -> Result<Seen> {
    let began = Instant::now();
    let mut running = JoinSet::new();
    for n in 0..lanes {
        let ask = ask.clone();
        let mut ticks = every.map(|every| {
            let first = began + every.mul_f64(n as f64 / lanes as f64);
            let mut ticks = tokio::time::interval_at(first.into(), every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });

        running.spawn(async move {
            let mut times = hdrhistogram::Histogram::<u64>::new(3).map_err(|e| e.to_string())?;
            while began.elapsed() < round {
                if let Some(ticks) = &mut ticks {
                    ticks.tick().await;
                }
                let start = Instant::now();
                ask(n).await?;
                let took = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
                times.record(took).map_err(|e| e.to_string())?;
            }
            Ok::<_, String>(times)
        });
    }

    let mut all = hdrhistogram::Histogram::<u64>::new(3)?;
    while let Some(times) = running.join_next().await {
        all.add(times??)?;
    }
    let took = began.elapsed();
    let at = |quantile| all.value_at_quantile(quantile) as f64 / 1000.0;
    Ok(Seen {
        p50: at(0.5),
        p99: at(0.99),
        per_second: all.len() as f64 / took.as_secs_f64(),
        took,
    })
}

/// Sends the same bytes repeatedly and counts the answers.
pub struct Raw {
    stream: UnixStream,
    requests: BytesMut,
    in_flight: usize,
    buffer: BytesMut,
}

/// Opens `count` connections, one a lane. Each round keeps `in_flight` requests open at once.
pub async fn raw(socket: &Path, count: usize, kind: FrameType, payload: &[u8], in_flight: usize) -> Result<Ask> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(Arc::new(Mutex::new(Raw::connect(socket, kind, payload, in_flight).await?)));
    }
    Ok(Arc::new(move |n| {
        let client = clients[n].clone();
        async move { client.lock().await.round().await }.boxed()
    }))
}

impl Raw {
    async fn connect(socket: &Path, kind: FrameType, payload: &[u8], in_flight: usize) -> Result<Self> {
        let stream = UnixStream::connect(socket).await?;
        let mut requests = BytesMut::new();
        for request_id in 1..=in_flight as u64 {
            let version = Version::V2 { request_id, deadline_ms: 0 };
            Frame::new(version, kind, payload.to_vec()).encode(&mut requests);
        }
        Ok(Self { stream, requests, in_flight, buffer: BytesMut::with_capacity(64 * 1024) })
    }

    async fn round(&mut self) -> Result<(), String> {
        self.stream.write_all(&self.requests).await.map_err(|e| e.to_string())?;
        for _ in 0..self.in_flight {
            let length = loop {
                let length = self
                    .buffer
                    .first_chunk::<4>()
                    .map_or(4, |head| u32::from_be_bytes(*head) as usize);
                if length > 4 && self.buffer.len() >= length {
                    break length;
                }
                if self
                    .stream
                    .read_buf(&mut self.buffer)
                    .await
                    .map_err(|e| e.to_string())?
                    == 0
                {
                    return Err("the gateway closed the connection".into());
                }
            };

            let frame = self.buffer.split_to(length);
            if frame[5] == FrameType::ResponseError as u8 {
                return Err(String::from_utf8_lossy(&frame[20..]).into_owned());
            }
        }
        Ok(())
    }
}
