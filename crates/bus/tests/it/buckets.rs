//! Key-value buckets: revisions, concurrent creation, expiry.

use crate::SOON;
use bus::{Bus, Error};
use std::time::Duration;
use testkit::eventually;

const HOUR: Duration = Duration::from_secs(3600);

pub async fn values_are_returned_with_their_revision(bus: Bus) {
    bus.declare_kv("B", Some(HOUR)).await.unwrap();
    bus.declare_kv("B", Some(HOUR)).await.unwrap();
    assert_eq!(bus.kv_get("B", "key").await.unwrap(), None);
    let first = bus.kv_put("B", "key", "1".into(), None).await.unwrap();
    assert_eq!(bus.kv_get("B", "key").await.unwrap(), Some(("1".into(), first)));

    let second = bus.kv_put("B", "key", "".into(), None).await.unwrap();
    assert!(second > first);
    assert_eq!(bus.kv_get("B", "key").await.unwrap(), Some(("".into(), second)));
}

pub async fn put_with_expected_revision_detects_conflicts(bus: Bus) {
    bus.declare_kv("B", Some(HOUR)).await.unwrap();
    let refused = bus.kv_put("B", "key", "x".into(), Some(7)).await;
    assert!(matches!(refused, Err(Error::WrongRevision(key)) if key == "key"));

    let first = bus.kv_put("B", "key", "1".into(), Some(0)).await.unwrap();
    assert!(matches!(bus.kv_put("B", "key", "x".into(), Some(0)).await, Err(Error::WrongRevision(_))));
    let second = bus.kv_put("B", "key", "2".into(), Some(first)).await.unwrap();
    assert!(matches!(bus.kv_put("B", "key", "x".into(), Some(first)).await, Err(Error::WrongRevision(_))));
    assert_eq!(bus.kv_get("B", "key").await.unwrap(), Some(("2".into(), second)));

    // Writes to another key do not change the revision.
    bus.kv_put("B", "other", "1".into(), Some(0)).await.unwrap();
    bus.kv_put("B", "key", "3".into(), Some(second)).await.unwrap();
}

pub async fn exactly_one_concurrent_create_wins(bus: Bus) {
    bus.declare_kv("B", Some(HOUR)).await.unwrap();
    let mut attempts = tokio::task::JoinSet::new();
    for n in 0..20 {
        let bus = bus.clone();
        attempts.spawn(async move { bus.kv_put("B", "key", n.to_string().into(), Some(0)).await });
    }
    let outcomes = attempts.join_all().await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert!(
        outcomes
            .iter()
            .flat_map(|o| o.as_ref().err())
            .all(|error| matches!(error, Error::WrongRevision(_)))
    );
}

pub async fn any_key_is_accepted(bus: Bus) {
    bus.declare_kv("B", Some(HOUR)).await.unwrap();
    let long = "x".repeat(256);
    let keys = ["", ".", "a.b", "a b", "*", ">", "tenant/ünïcode\r\n", "$KV", &long];
    for (n, key) in keys.iter().enumerate() {
        bus.kv_put("B", key, n.to_string().into(), Some(0))
            .await
            .unwrap_or_else(|e| panic!("{key:?}: {e}"));
    }
    for (n, key) in keys.iter().enumerate() {
        assert_eq!(bus.kv_get("B", key).await.unwrap().unwrap().0, n.to_string(), "{key:?}");
    }
}

pub async fn expired_entries_are_gone(bus: Bus) {
    bus.declare_kv("B", Some(HOUR)).await.unwrap();
    bus.declare_kv("B", Some(Duration::from_secs(1))).await.unwrap();
    bus.kv_put("B", "key", "1".into(), Some(0)).await.unwrap();
    eventually(SOON, || async { bus.kv_get("B", "key").await.unwrap().is_none() }).await;
    bus.kv_put("B", "key", "2".into(), Some(0))
        .await
        .expect("an expired entry counts as missing");
}

pub async fn bucket_without_max_age_keeps_entries(bus: Bus) {
    bus.declare_kv("B", Some(Duration::from_secs(1))).await.unwrap();
    bus.declare_kv("F", None).await.unwrap();
    let kept = bus.kv_put("F", "key", "1".into(), Some(0)).await.unwrap();
    bus.kv_put("B", "key", "1".into(), Some(0)).await.unwrap();
    eventually(SOON, || async { bus.kv_get("B", "key").await.unwrap().is_none() }).await;
    assert_eq!(bus.kv_get("F", "key").await.unwrap(), Some(("1".into(), kept)));
}

pub async fn oversized_value_is_refused(bus: Bus) {
    bus.declare_kv("B", Some(HOUR)).await.unwrap();
    let huge = vec![0; wire::limits::BUS_MESSAGE_MAX + 1];
    assert!(matches!(bus.kv_put("B", "key", huge.into(), None).await, Err(Error::TooLarge { .. })));
    assert_eq!(bus.kv_get("B", "key").await.unwrap(), None);
}

pub async fn undeclared_bucket_is_refused(bus: Bus) {
    assert!(matches!(bus.kv_get("B", "key").await, Err(Error::Storage(_))));
    assert!(matches!(bus.kv_put("B", "key", "1".into(), None).await, Err(Error::Storage(_))));
}
