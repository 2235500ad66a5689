//! The embedded bus: restarts and exclusive use of a directory.

use crate::{consumer, message, soon, stream, text};
use bus::local::Local;
use bus::{Bus, Retention};
use std::path::Path;
use std::time::Duration;
use testkit::eventually;

/// Opens the bus again. The old one releases its file shortly after its last handle is dropped, so this retries.
async fn reopen(dir: &Path) -> Bus {
    let opened = parking_lot::Mutex::new(None);
    eventually(crate::SOON, || async {
        let bus = Local::open(dir).await.ok();
        let done = bus.is_some();
        *opened.lock() = bus;
        done
    })
    .await;
    opened.into_inner().expect("the bus was opened")
}

#[tokio::test]
async fn restart_keeps_stored_state_and_redelivers_unsettled_messages() {
    let dir = tempfile::tempdir().unwrap();
    let bus = Local::open(dir.path()).await.unwrap();
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.declare_kv("B", Some(Duration::from_secs(60))).await.unwrap();
    let revision = bus.kv_put("B", "key", "value".into(), None).await.unwrap();

    let mut first = bus.consume(consumer("c")).await.unwrap();
    for n in 0..3 {
        bus.append(message("s.a", &n.to_string()), Some(&n.to_string()))
            .await
            .unwrap();
    }
    soon(first.next()).await.unwrap().ack().await.unwrap();
    let held = soon(first.next()).await.unwrap();
    assert_eq!(text(&held.message), "1");
    drop((held, first, bus));

    let bus = reopen(dir.path()).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.declare_kv("B", Some(Duration::from_secs(60))).await.unwrap();
    assert_eq!(bus.kv_get("B", "key").await.unwrap(), Some(("value".into(), revision)));
    assert!(bus.append(message("s.a", "1"), Some("1")).await.unwrap().duplicate);

    let mut second = bus.consume(consumer("c")).await.unwrap();
    let again = soon(second.next()).await.unwrap();
    assert_eq!((text(&again.message), again.delivered), ("1", 2));
    assert_eq!(text(&soon(second.next()).await.unwrap().message), "2");
}

#[tokio::test]
async fn second_bus_on_a_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _bus = Local::open(dir.path()).await.unwrap();
    assert!(Local::open(dir.path()).await.is_err());
}
