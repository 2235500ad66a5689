//! No assignment runs twice by accident.

use crate::{Place, SOON, assignment};
use bus::Message;
use serde_json::json;
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
    let copy = Message { subject: subject.into(), ..delivery.message.clone() };
    let msg_id = format!("a-r-from-{}", delivery.sequence);
    place.bus.append(copy, Some(&msg_id)).await.unwrap();
    delivery.nak(std::time::Duration::ZERO).await.unwrap();
    drop(delivery);

    let _worker = place.shell(RUN, |_| {}).await;
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
