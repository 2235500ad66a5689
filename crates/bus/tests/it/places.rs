//! Consumers that share their places.

use crate::{QUIET, consumer, message, soon, stream, text};
use bus::{Bus, Consumer, ConsumerConfig, Delivery, Places, Retention};

/// A consumer of the subject `s.<name>`.
fn only(name: &str) -> ConsumerConfig {
    ConsumerConfig { filter: Some(format!("s.{name}")), ..consumer(name) }
}

async fn open(bus: &Bus, name: &str, places: &Places) -> Consumer {
    bus.consume_within(only(name), places).await.unwrap()
}

async fn fill(bus: &Bus, name: &str, count: usize) {
    for n in 0..count {
        bus.append(message(&format!("s.{name}"), &format!("{name}{n}")), None)
            .await
            .unwrap();
    }
}

/// The next delivery of either consumer.
async fn either(a: &mut Consumer, b: &mut Consumer) -> Delivery {
    let next = async {
        tokio::select! {
            delivery = a.next() => delivery,
            delivery = b.next() => delivery,
        }
    };
    soon(next).await.unwrap()
}

async fn nothing(a: &mut Consumer, b: &mut Consumer) {
    let next = async {
        tokio::select! {
            delivery = a.next() => delivery,
            delivery = b.next() => delivery,
        }
    };
    assert!(tokio::time::timeout(QUIET, next).await.is_err());
}

pub async fn shared_places_bound_all_consumers_and_starve_none(bus: Bus) {
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    fill(&bus, "a", 30).await;
    let places = Places::new(3);
    let (mut a, mut b) = (open(&bus, "a", &places).await, open(&bus, "b", &places).await);

    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(soon(a.next()).await.unwrap());
    }
    nothing(&mut a, &mut b).await;

    // The other consumer gets its turn while this one still has a backlog.
    fill(&bus, "b", 3).await;
    nothing(&mut a, &mut b).await;
    let mut from_b = 0;
    for settled in 0.. {
        held.remove(0).ack().await.unwrap();
        let delivery = either(&mut a, &mut b).await;
        assert_eq!(delivery.delivered, 1);
        from_b += usize::from(text(&delivery.message).starts_with('b'));
        held.push(delivery);
        if from_b == 3 {
            break;
        }
        assert!(settled < 25, "the consumer b is starved");
        // Longer than a consumer that found nothing pauses.
        tokio::time::sleep(QUIET / 5).await;
    }
}

pub async fn idle_consumer_leaves_its_places_to_the_others(bus: Bus) {
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    let places = Places::new(4);
    let (mut a, mut b) = (open(&bus, "a", &places).await, open(&bus, "b", &places).await);
    nothing(&mut a, &mut b).await;

    fill(&bus, "a", 6).await;
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(soon(a.next()).await.unwrap());
    }
    nothing(&mut a, &mut b).await;
    drop(held);
}

pub async fn message_for_a_full_reader_goes_to_another_one(bus: Bus) {
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    let places = Places::new(1);
    let (mut a, mut b) = (open(&bus, "a", &places).await, open(&bus, "b", &places).await);
    nothing(&mut a, &mut b).await;
    fill(&bus, "a", 1).await;
    let held = soon(a.next()).await.unwrap();
    nothing(&mut a, &mut b).await;

    // The full reader has waited for a message of `b`, too, and must have taken that back.
    let mut free = open(&bus, "b", &Places::new(1)).await;
    fill(&bus, "b", 1).await;
    let delivery = soon(free.next()).await.unwrap();
    assert_eq!((text(&delivery.message), delivery.delivered), ("b0", 1));
    drop(held);
}

pub async fn consumers_of_an_idle_reader_share_one_place(bus: Bus) {
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    let places = Places::new(1);
    let mut a = open(&bus, "a", &places).await;
    // The first one waits for a message already when the second one is opened.
    assert!(tokio::time::timeout(QUIET, a.next()).await.is_err());
    let mut b = open(&bus, "b", &places).await;
    for round in 0..10 {
        for name in ["a", "b"] {
            fill(&bus, name, 1).await;
            let delivery = either(&mut a, &mut b).await;
            assert!(text(&delivery.message).starts_with(name), "{round}");
            // Each delivery takes the only place for a moment, in which the other consumer takes back its wait. What
            // arrives meanwhile is returned.
            assert!(delivery.delivered <= 2, "{round}: {}", delivery.delivered);
            delivery.ack().await.unwrap();
        }
    }
}

pub async fn released_delivery_can_still_be_settled(bus: Bus) {
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    fill(&bus, "a", 2).await;
    let mut reader = bus
        .consume(ConsumerConfig { max_in_hand: 1, ..only("a") })
        .await
        .unwrap();

    let mut first = soon(reader.next()).await.unwrap();
    first.release();
    let second = soon(reader.next()).await.unwrap();
    assert_eq!(text(&second.message), "a1");
    first.ack().await.unwrap();
    second.ack().await.unwrap();
    assert_eq!(bus.stream_info("S").await.unwrap().messages, 0);
}
