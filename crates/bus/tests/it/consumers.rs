//! What consumers get, when they get it again, and how they share.

use crate::{QUIET, SOON, consumer, message, soon, stream, text};
use bus::{Bus, Consumer, ConsumerConfig, Delivery, Headers, Message, Retention};
use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::time::timeout;

async fn next(consumer: &mut Consumer) -> Delivery {
    soon(consumer.next()).await.expect("the bus is open")
}

async fn with_stream(bus: &Bus, retention: Retention, messages: usize) {
    bus.declare_stream(stream(retention)).await.unwrap();
    for n in 0..messages {
        bus.append(message("s.a", &n.to_string()), None).await.unwrap();
    }
}

pub async fn a_delivery_carries_what_was_appended(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 0).await;
    let headers = Headers::new().with("trace_id", "t");
    let sent = Message { headers, ..message("s.a.b", "{}") };
    let appended = bus.append(sent, Some("id")).await.unwrap();
    let mut consumer = bus.consume(consumer("c")).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!((&*delivery.message.subject, text(&delivery.message)), ("s.a.b", "{}"));
    assert_eq!(delivery.message.headers.get("Trace_Id"), Some("t"));
    assert_eq!(delivery.message.reply, None);
    assert_eq!((delivery.sequence, delivery.delivered), (appended.sequence, 1));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    assert!(now.abs_diff(delivery.stored_ms) < 60_000);
    delivery.ack().await.unwrap();
}

pub async fn silence_redelivers(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 1).await;
    let impatient = ConsumerConfig { ack_wait: Duration::from_millis(300), ..consumer("c") };
    let mut consumer = bus.consume(impatient).await.unwrap();
    for delivered in 1..=3 {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.delivered, delivery.sequence), (delivered, 1));
        if delivered == 3 {
            delivery.ack().await.unwrap();
        }
    }
    assert!(timeout(3 * QUIET, consumer.next()).await.is_err(), "an acknowledged message stays away");
}

pub async fn a_nak_redelivers_after_its_delay(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 1).await;
    let mut consumer = bus.consume(consumer("c")).await.unwrap();
    let delay = Duration::from_millis(400);
    let refused = Instant::now();
    next(&mut consumer).await.nak(delay).await.unwrap();
    let again = next(&mut consumer).await;
    assert!(refused.elapsed() >= delay, "came after {:?}", refused.elapsed());
    assert_eq!(again.delivered, 2);
    again.nak(Duration::ZERO).await.unwrap();
    let again = next(&mut consumer).await;
    assert_eq!(again.delivered, 3);
    again.ack().await.unwrap();
}

pub async fn progress_holds_redelivery_off(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 1).await;
    let impatient = ConsumerConfig { ack_wait: 3 * QUIET, ..consumer("c") };
    let mut consumer = bus.consume(impatient).await.unwrap();
    let delivery = next(&mut consumer).await;
    for _ in 0..6 {
        delivery.in_progress().await.unwrap();
        assert!(timeout(QUIET, consumer.next()).await.is_err(), "work in progress is not given again");
    }
    assert_eq!(next(&mut consumer).await.delivered, 2, "and comes again once it says nothing");
}

pub async fn a_terminated_message_never_comes_again(bus: Bus) {
    with_stream(&bus, Retention::Limits, 1).await;
    let impatient = ConsumerConfig { ack_wait: QUIET, ..consumer("c") };
    let mut consumer = bus.consume(impatient).await.unwrap();
    next(&mut consumer).await.term().await.unwrap();
    assert!(timeout(4 * QUIET, consumer.next()).await.is_err());
}

pub async fn consumers_of_one_name_share(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 0).await;
    let sharing = ConsumerConfig { ack_wait: Duration::from_secs(3), ..consumer("c") };
    let mut first = bus.consume(sharing.clone()).await.unwrap();
    let mut second = bus.consume(sharing).await.unwrap();
    for n in 0..200 {
        bus.append(message("s.a", &n.to_string()), None).await.unwrap();
    }
    let mut seen = BTreeSet::new();
    while seen.len() < 200 {
        let delivery = soon(async {
            tokio::select! { d = first.next() => d.unwrap(), d = second.next() => d.unwrap() }
        })
        .await;
        assert_eq!(delivery.delivered, 1);
        assert!(seen.insert(delivery.sequence), "one gets what the other does not");
        delivery.ack().await.unwrap();
    }
    // One goes; what it may still have taken comes to the other.
    drop(first);
    bus.append(message("s.a", "more"), None).await.unwrap();
    assert_eq!(text(&next(&mut second).await.message), "more");
}

pub async fn consumers_of_other_names_each_get_all(bus: Bus) {
    with_stream(&bus, Retention::Limits, 3).await;
    for name in ["one", "two"] {
        let mut consumer = bus.consume(consumer(name)).await.unwrap();
        for n in 0..3 {
            let delivery = next(&mut consumer).await;
            assert_eq!(text(&delivery.message), n.to_string(), "{name}");
            delivery.ack().await.unwrap();
        }
    }
}

pub async fn a_filter_chooses(bus: Bus) {
    with_stream(&bus, Retention::Limits, 1).await;
    bus.append(message("s.b.1", "chosen"), None).await.unwrap();
    let filtered = ConsumerConfig { filter: Some("s.b.*".into()), ..consumer("c") };
    let mut consumer = bus.consume(filtered).await.unwrap();
    bus.append(message("s.a", "not"), None).await.unwrap();
    bus.append(message("s.b.2", "chosen too"), None).await.unwrap();
    for expected in ["chosen", "chosen too"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery.message), expected);
        delivery.ack().await.unwrap();
    }
}

pub async fn a_consumer_may_start_with_what_comes_next(bus: Bus) {
    with_stream(&bus, Retention::Limits, 2).await;
    let late = ConsumerConfig { from_start: false, ..consumer("c") };
    let mut first = bus.consume(late.clone()).await.unwrap();
    bus.append(message("s.a", "next"), None).await.unwrap();
    let delivery = next(&mut first).await;
    assert_eq!(text(&delivery.message), "next");
    delivery.ack().await.unwrap();
    drop(first);
    // Where it starts is decided once: the second finds what came while nobody was there, however it asks.
    bus.append(message("s.a", "meanwhile"), None).await.unwrap();
    let mut second = bus.consume(ConsumerConfig { from_start: true, ack_wait: QUIET, ..late }).await.unwrap();
    assert_eq!(text(&next(&mut second).await.message), "meanwhile");
}

pub async fn unacknowledged_messages_are_bounded(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 3).await;
    let one = ConsumerConfig { max_ack_pending: 1, ..consumer("c") };
    let mut consumer = bus.consume(one).await.unwrap();
    for n in 0..3 {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery.message), n.to_string());
        assert!(timeout(QUIET, consumer.next()).await.is_err(), "the next waits for this one");
        delivery.ack().await.unwrap();
    }
}

pub async fn a_burst_comes_whole_and_in_order(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 500).await;
    let mut consumer = bus.consume(consumer("c")).await.unwrap();
    for n in 0..500 {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery.message), n.to_string());
        delivery.ack().await.unwrap();
    }
    testkit::eventually(SOON, || async { bus.stream_info("S").await.unwrap().messages == 0 }).await;
}

pub async fn no_more_is_taken_than_there_is_place_for(bus: Bus) {
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    let narrow = ConsumerConfig { max_in_hand: 2, ..consumer("c") };
    let mut slow = bus.consume(narrow.clone()).await.unwrap();
    for n in 0..5 {
        bus.append(message("s.a", &n.to_string()), None).await.unwrap();
    }
    let first = soon(slow.next()).await.unwrap();
    let _second = soon(slow.next()).await.unwrap();
    assert!(timeout(QUIET, slow.next()).await.is_err(), "both hands are full");
    // What it has no place for, another takes.
    let mut other = bus.consume(ConsumerConfig { max_in_hand: 1, ..narrow }).await.unwrap();
    let third = soon(other.next()).await.unwrap();
    third.ack().await.unwrap();
    drop(third);
    let fourth = soon(other.next()).await.unwrap();
    first.ack().await.unwrap();
    drop(first);
    let fifth = soon(slow.next()).await.unwrap();
    assert_eq!((text(&fourth.message), text(&fifth.message)), ("3", "4"));
    assert_eq!((fourth.delivered, fifth.delivered), (1, 1));
}

pub async fn a_closed_consumer_gives_back_what_it_was_given(bus: Bus) {
    with_stream(&bus, Retention::WorkQueue, 5).await;
    let mut first = bus.consume(consumer("c")).await.unwrap();
    let taken = next(&mut first).await;
    soon(first.close()).await;
    let mut second = bus.consume(consumer("c")).await.unwrap();
    let mut others = BTreeSet::new();
    while others.len() < 4 {
        let delivery = next(&mut second).await;
        others.insert(text(&delivery.message).to_string());
        delivery.ack().await.unwrap();
    }
    assert!(!others.contains(text(&taken.message)), "what was taken is still in hand");
    taken.ack().await.unwrap();
    testkit::eventually(SOON, || async { bus.stream_info("S").await.unwrap().messages == 0 }).await;
}
