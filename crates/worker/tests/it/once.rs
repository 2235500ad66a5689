//! No assignment runs twice by accident.

use crate::{Place, SOON, assignment};
use bus::Message;
use bus::local::{Durability, Local};
use bus::streams::Sizes;
use serde_json::json;
use std::time::Duration;
use wire::router::ResultStatus;
use wire::subjects::{self, ASSIGN, STREAM_ASSIGN, STREAM_RESULT, assign_to};

const RUN: &str = "echo run >> $DIR/runs";

/// The worker stored the result and ended before it acknowledged; no router has recorded the result.
pub async fn assignment_with_a_stored_result_is_only_acknowledged(place: Place) {
    place.assign("r", "sh", json!({})).await;
    place.lose_delivery(ASSIGN).await;
    let stored = json!({"version": "1", "assignment_id": "a-r", "request_id": "r", "status": "success",
        "provider_id": "sh", "job": {"type": "t"}, "output": {"text": "the first"}});
    let message = Message {
        subject: subjects::RESULT.into(),
        payload: stored.to_string().into(),
        ..Message::default()
    };
    place.bus.append(message, Some("result-a-r")).await.unwrap();

    let _worker = place.shell(RUN, |_| {}).await;
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
    assert_eq!((place.count(STREAM_RESULT).await, place.lines("runs").len()), (1, 0));
}

/// The worker that moved the assignment ended before it acknowledged.
pub async fn assignment_whose_move_was_not_acknowledged_runs_once(place: Place) {
    let mut results = place.results().await;
    place.assign("r", "sh", json!({})).await;
    let delivery = place.take(ASSIGN).await;
    let subject = assign_to("sh").unwrap();
    place
        .bus
        .add_subjects(STREAM_ASSIGN, std::slice::from_ref(&subject))
        .await
        .unwrap();
    let copy = Message { subject: subject.as_str().into(), ..delivery.message.clone() };
    let msg_id = format!("a-r-from-{}", delivery.sequence);
    place.bus.append(copy, Some(&msg_id)).await.unwrap();
    // Another worker runs the copy.
    let copy = place.take(&subject).await;
    delivery.nak(Duration::ZERO).await.unwrap();
    drop(delivery);

    let _worker = place.shell(RUN, |_| {}).await;
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 1 }).await;
    assert_eq!(place.lines("runs").len(), 0, "the copy is elsewhere");
    copy.nak(Duration::ZERO).await.unwrap();
    assert_eq!(results.next().await.status, ResultStatus::Success);
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
    assert_eq!((place.count(STREAM_RESULT).await, place.lines("runs").len()), (1, 1));
}

pub async fn second_delivery_waits_for_the_run_in_this_worker(place: Place) {
    let mut results = place.results().await;
    let script = "echo run >> $DIR/runs; while [ ! -e $DIR/go ]; do sleep 0.02; done";
    let worker = place.shell(script, |config| config.slots = 2).await;
    let subject = assign_to("sh").unwrap();
    for n in 0..3 {
        // The second is the first one again. The third starts only after the second was delivered.
        let id = if n == 2 { "after" } else { "r" };
        place
            .append(&subject, assignment(id, "sh", json!({})).to_string())
            .await;
    }
    testkit::eventually(SOON, || async { place.lines("runs").len() == 2 }).await;

    place.file("go");
    for _ in 0..2 {
        assert_eq!(results.next().await.status, ResultStatus::Success);
    }
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
    assert_eq!((place.count(STREAM_RESULT).await, place.lines("runs").len()), (2, 2));
    worker.stop().await;
}

/// Two workers, because one of them notices a second delivery of what it runs.
pub async fn run_that_outlasts_the_ack_wait_is_not_delivered_again(place: Place) {
    let script = "echo run >> $DIR/runs; sleep 33";
    let _workers = [place.shell(script, |_| {}).await, place.shell(script, |_| {}).await];
    place.assign("r", "sh", json!({})).await;
    let ended = || async { place.count(STREAM_ASSIGN).await == 0 };
    testkit::eventually(Duration::from_secs(90), ended).await;
    assert_eq!((place.count(STREAM_RESULT).await, place.lines("runs").len()), (1, 1));
}

/// The stream of results has no room, because nobody reads it.
#[tokio::test]
async fn result_that_waits_for_room_does_not_occupy_a_slot() {
    let dir = tempfile::TempDir::new().unwrap();
    let sizes = Sizes { results: 4096, ..Sizes::default() };
    let bus = Local::open_with(dir.path(), Durability::Process, sizes).await.unwrap();
    let place = Place::with(dir, bus, None).await;
    let filling = || Message {
        subject: subjects::RESULT.into(),
        payload: vec![b'x'; 100].into(),
        ..Message::default()
    };
    let mut count = 0;
    while place.bus.append(filling(), None).await.is_ok() {
        count += 1;
    }

    let _worker = place.shell(RUN, |config| config.slots = 1).await;
    for n in 0..3 {
        place.assign(&format!("r{n}"), "sh", json!({})).await;
    }
    testkit::eventually(SOON, || async { place.lines("runs").len() == 3 }).await;
    assert_eq!(place.count(STREAM_RESULT).await, count);

    let mut results = place
        .bus
        .consume(crate::consumer(STREAM_RESULT, "router"))
        .await
        .unwrap();
    for _ in 0..count + 3 {
        let result = tokio::time::timeout(SOON, results.next()).await.unwrap().unwrap();
        result.ack().await.unwrap();
    }
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
    assert_eq!(place.lines("runs").len(), 3);
}

/// The stream of results is away, the one of assignments is not.
#[tokio::test]
async fn result_that_waits_for_the_bus_does_not_occupy_a_slot() {
    let place = Place::nats().await;
    let _worker = place.shell(RUN, |config| config.slots = 1).await;
    let delete = place
        .bus
        .request("$JS.API.STREAM.DELETE.RESULT", bus::Headers::new(), bytes::Bytes::new(), SOON);
    delete.await.unwrap();

    for n in 0..3 {
        place.assign(&format!("r{n}"), "sh", json!({})).await;
    }
    testkit::eventually(SOON, || async { place.lines("runs").len() == 3 }).await;
    bus::streams::declare(&place.bus).await.unwrap();
    testkit::eventually(SOON, || async { place.count(STREAM_RESULT).await == 3 }).await;
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
    assert_eq!(place.lines("runs").len(), 3);
}
