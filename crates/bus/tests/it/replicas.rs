//! NATS only: a cluster of three servers that keeps every stream and bucket three times.

use crate::{message, stream, text};
use bus::nats::{Nats, NatsConfig};
use bus::{Bus, Error, Retention};
use futures_util::future::join_all;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;
use testkit::{NatsServer, eventually};
use tokio_util::sync::CancellationToken;

/// A cluster elects its leaders anew within seconds.
const ELECTED: Duration = Duration::from_secs(60);
const WRITERS: u64 = 4;
/// Messages that are appended between two events.
const SOME: usize = 200;

async fn connect(servers: &[NatsServer; 3]) -> Bus {
    let config = NatsConfig {
        url: servers.each_ref().map(NatsServer::url).join(","),
        name: "test".into(),
        connections: Some(3),
        replicas: Some(3),
        ..NatsConfig::default()
    };
    Nats::connect(config).await.unwrap()
}

/// Appends numbers, and a record of each, until cancelled; what is not acknowledged is repeated.
async fn write(bus: &Bus, writer: u64, acknowledged: &RefCell<BTreeSet<u64>>, cancel: &CancellationToken) {
    let mut n = writer;
    while !cancel.is_cancelled() {
        let id = format!("id-{n}");
        eventually(ELECTED, async || bus.append(message("s.a", &n.to_string()), Some(&id)).await.is_ok()).await;
        // An attempt whose acknowledgement was lost has created the entry.
        eventually(ELECTED, async || {
            let created = bus.kv_put("B", &n.to_string(), n.to_string().into(), Some(0)).await;
            matches!(created, Ok(_) | Err(Error::WrongRevision(_)))
        })
        .await;
        acknowledged.borrow_mut().insert(n);
        n += WRITERS;
    }
}

/// The index of the server that leads the stream.
async fn leader(servers: &[NatsServer; 3], bus_stream: &str) -> usize {
    let client = async_nats::connect(servers[0].url()).await.unwrap();
    let found = std::cell::Cell::new(None);
    eventually(ELECTED, async || {
        let stream = async_nats::jetstream::new(client.clone()).get_stream(bus_stream).await;
        let config = stream.ok().map(|stream| stream.cached_info().clone());
        let Some(info) = config else { return false };
        assert_eq!(info.config.num_replicas, 3, "{bus_stream}");
        let leader = info.cluster.and_then(|cluster| cluster.leader).unwrap_or_default();
        found.set(leader.strip_prefix('s').and_then(|index| index.parse().ok()));
        found.get().is_some()
    })
    .await;
    found.get().expect("a leader was found")
}

#[tokio::test]
async fn server_of_three_that_is_killed_costs_nothing_that_was_acknowledged() {
    let mut servers = NatsServer::start_three().await;
    let bus = connect(&servers).await;
    eventually(ELECTED, async || bus.declare_stream(stream(Retention::Limits)).await.is_ok()).await;
    eventually(ELECTED, async || bus.declare_kv("B", None).await.is_ok()).await;
    leader(&servers, "KV_B").await;

    let (acknowledged, cancel) = (RefCell::default(), CancellationToken::new());
    let writers = join_all((0..WRITERS).map(|writer| write(&bus, writer, &acknowledged, &cancel)));
    let some_more = async || {
        let before = acknowledged.borrow().len();
        eventually(ELECTED, async || acknowledged.borrow().len() >= before + SOME).await;
    };
    let scene = async {
        some_more().await;
        let first = leader(&servers, "S").await;
        servers[first].kill();
        some_more().await;
        servers[first].restart().await;
        eventually(ELECTED, async || bus.health().await.is_ok()).await;
        some_more().await;
        cancel.cancel();
    };
    tokio::join!(writers, scene);

    let acknowledged = acknowledged.into_inner();
    assert_eq!(bus.stream_info("S").await.unwrap().messages, acknowledged.len() as u64, "each is stored once");
    let mut reader = bus.consume(crate::consumer("reader")).await.unwrap();
    let mut stored = BTreeSet::new();
    while stored.len() < acknowledged.len() {
        let delivery = tokio::time::timeout(ELECTED, reader.next()).await.unwrap().unwrap();
        stored.insert(text(&delivery.message).parse().unwrap());
        eventually(ELECTED, async || delivery.ack().await.is_ok()).await;
    }
    assert_eq!(stored, acknowledged);
    for n in acknowledged {
        let entry = bus.kv_get("B", &n.to_string()).await.unwrap();
        assert_eq!(entry.map(|(value, _)| value), Some(n.to_string().into()));
    }
}
