//! What the embedded bus keeps when it is closed and opened again.

use crate::{consumer, message, soon, stream, text};
use bus::local::Local;
use bus::{Bus, Retention};
use std::path::Path;
use std::time::Duration;
use testkit::eventually;

/// The old bus lets go of its file soon after its last handle.
async fn reopen(dir: &Path) -> Bus {
    let opened = parking_lot::Mutex::new(None);
    eventually(crate::SOON, || async {
        let bus = Local::open(dir).await.ok();
        let done = bus.is_some();
        *opened.lock() = bus;
        done
    })
    .await;
    opened.into_inner().expect("it was opened")
}

#[tokio::test]
async fn a_restart_keeps_what_was_acknowledged_and_redelivers_what_was_not() {
    let dir = tempfile::tempdir().unwrap();
    let bus = Local::open(dir.path()).await.unwrap();
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.declare_kv("B", Duration::from_secs(60)).await.unwrap();
    let revision = bus.kv_put("B", "key", "value".into(), None).await.unwrap();
    let mut first = bus.consume(consumer("c")).await.unwrap();
    for n in 0..3 {
        bus.append(message("s.a", &n.to_string()), Some(&n.to_string())).await.unwrap();
    }
    soon(first.next()).await.unwrap().ack().await.unwrap();
    let held = soon(first.next()).await.unwrap();
    assert_eq!(text(&held.message), "1");
    drop((held, first, bus));

    let bus = reopen(dir.path()).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.declare_kv("B", Duration::from_secs(60)).await.unwrap();
    assert_eq!(bus.kv_get("B", "key").await.unwrap(), Some(("value".into(), revision)));
    assert!(bus.append(message("s.a", "1"), Some("1")).await.unwrap().duplicate);
    let mut second = bus.consume(consumer("c")).await.unwrap();
    let again = soon(second.next()).await.unwrap();
    assert_eq!((text(&again.message), again.delivered), ("1", 2));
    assert_eq!(text(&soon(second.next()).await.unwrap().message), "2");
}

#[tokio::test]
async fn one_directory_has_one_bus() {
    let dir = tempfile::tempdir().unwrap();
    let _bus = Local::open(dir.path()).await.unwrap();
    assert!(Local::open(dir.path()).await.is_err());
}
