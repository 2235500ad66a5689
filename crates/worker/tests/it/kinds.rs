//! Workers that offer different providers on one bus: each assignment reaches a worker that can run it, at no cost for
//! those that it meets before.

use crate::{Place, SOON, Worker, assignment, chunk, provider, shell, within};
use serde_json::{Value, json};
use std::time::Duration;
use wire::router::ResultStatus;
use wire::subjects::{self, ASSIGN, STREAM_ASSIGN, STREAM_DLQ, assign_to};
use worker::{Config, Kind};

const QUICK: [Duration; 3] = [Duration::from_millis(20); 3];

/// A worker that has `echo` only.
async fn echo(place: &Place) -> Worker {
    let providers = vec![provider("echo", Kind::Echo)];
    place
        .worker(Config { providers, backoff: QUICK, ..Config::default() })
        .await
}

/// Adds the provider's subject to the stream, as its workers do.
async fn add_subject(place: &Place, provider: &str) -> String {
    let subject = assign_to(provider).unwrap();
    let subjects = std::slice::from_ref(&subject);
    place.bus.add_subjects(STREAM_ASSIGN, subjects).await.unwrap();
    subject
}

async fn publish_heartbeat(place: &Place, heartbeat: Value) {
    let message = bus::Message {
        subject: subjects::HEARTBEAT.into(),
        payload: heartbeat.to_string().into(),
        ..bus::Message::default()
    };
    place.bus.publish(message).await.unwrap();
}

pub async fn assignments_reach_the_worker_that_has_their_provider(place: Place) {
    let mut results = place.results().await;
    let mut output = place.output("r0").await;
    let others = [echo(&place).await, echo(&place).await];
    let script = "echo $$; while [ ! -e $DIR/go ]; do sleep 0.02; done; echo done";
    let busy = place
        .shell(script, |config| (config.slots, config.backoff) = (1, QUICK))
        .await;

    // The worker is busy with the first one; the others pass on what they cannot run.
    for n in 0..8 {
        place.assign(&format!("r{n}"), "sh", json!({})).await;
        if n == 0 {
            chunk(&mut output).await;
        }
    }
    place.assign("e", "echo", json!({})).await;
    assert_eq!(results.next().await.request_id, "e");
    place.file("go");
    for _ in 0..8 {
        let result = results.next().await;
        assert_eq!((result.status, &*result.provider_id), (ResultStatus::Success, "sh"), "{result:?}");
    }

    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
    assert_eq!(place.count(STREAM_DLQ).await, 0);
    busy.stop().await;
    for other in others {
        other.stop().await;
    }
}

pub async fn assignment_whose_provider_nobody_has_fails_at_its_deadline(place: Place) {
    let mut results = place.results().await;
    let _workers = [echo(&place).await, echo(&place).await];
    let sent = within(assignment("r", "nobody", json!({})), 1500);
    let before = tokio::time::Instant::now();
    place.append(ASSIGN, sent.to_string()).await;

    let result = results.next().await;
    assert!(before.elapsed() > Duration::from_millis(1400), "{:?}", before.elapsed());
    assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Error, Some("unknown_provider")));
    assert_eq!((result.cost, result.latency_ms), (0.0, 0), "the assignment was never run");

    let letter = place.dead_letter(STREAM_DLQ).await;
    let reason = letter["reason"].as_str().unwrap();
    assert!(reason.contains("no worker has a provider named \"nobody\""), "{letter}");
    assert!(letter["delivered"].as_u64().unwrap() > 5, "returned many times: {letter}");
    assert_eq!(letter["original_subject"], json!(ASSIGN));
    let payload: Value = serde_json::from_str(letter["payload"].as_str().unwrap()).unwrap();
    assert_eq!(payload, sent);
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
}

pub async fn busy_provider_does_not_starve_another(place: Place) {
    let mut results = place.results().await;
    let providers = vec![provider("echo", Kind::Echo), shell(&place.path("sleep 0.05"))];
    let _worker = place.worker(Config { slots: 2, providers, ..Config::default() }).await;
    for n in 0..60 {
        let subject = assign_to("sh").unwrap();
        let sent = assignment(&format!("r{n}"), "sh", json!({}));
        place.append(&subject, sent.to_string()).await;
    }
    place
        .append(&assign_to("echo").unwrap(), assignment("e", "echo", json!({})).to_string())
        .await;

    let mut earlier = 0;
    while results.next().await.request_id != "e" {
        earlier += 1;
    }
    assert!(earlier < 40, "{earlier} results of the busy provider came first");
}

pub async fn moved_assignment_keeps_its_time_and_counts_its_deliveries_anew(place: Place) {
    let subject = add_subject(&place, "gpu").await;
    place.assign("r", "gpu", json!({})).await;
    let first = place.take(ASSIGN).await;
    first.nak(Duration::ZERO).await.unwrap();
    let stored_ms = first.stored_ms;
    drop(first);

    let _worker = echo(&place).await;
    let of_gpu = json!({"worker_id": "w", "status": "idle", "providers": [{"name": "gpu"}], "subjects": [subject]});
    publish_heartbeat(&place, of_gpu).await;
    let moved = place.take(&subject).await;
    assert_eq!((&*moved.message.subject, moved.delivered), (&*subject, 1));
    assert_eq!(moved.message.headers.get("x_sent_at_ms"), Some(&*stored_ms.to_string()));
    let before = moved.message.headers.get("x_retry_count").unwrap();
    assert!(before.parse::<u32>().unwrap() >= 2, "attempts count on: {before}");
    assert_eq!(moved.message.payload, assignment("r", "gpu", json!({})).to_string());
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 1 }).await;
}

pub async fn assignment_that_others_passed_on_is_not_given_up(place: Place) {
    let mut results = place.results().await;
    place.assign("r", "echo", json!({})).await;
    for _ in 0..7 {
        place.lose_delivery(ASSIGN).await;
    }
    let _worker = echo(&place).await;
    assert_eq!(results.next().await.status, ResultStatus::Success);
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
    assert_eq!(place.count(STREAM_DLQ).await, 0);
}

pub async fn assignment_whose_deadline_has_passed_is_not_run(place: Place) {
    let mut results = place.results().await;
    // A replay of an assignment that a router made in 2023.
    let mut replay = assignment("old", "sh", json!({}));
    replay["assignment_id"] = json!("018bcfe5-6800-7abc-8def-0123456789ab");
    place.append(ASSIGN, replay.to_string()).await;
    place
        .append(ASSIGN, within(assignment("r", "sh", json!({})), 1).to_string())
        .await;
    let stored = place.bus.time_ms(STREAM_ASSIGN).await.unwrap();
    testkit::eventually(SOON, || async { place.bus.time_ms(STREAM_ASSIGN).await.unwrap() > stored + 1 }).await;

    let _worker = place.shell("touch $DIR/ran", |_| {}).await;
    for _ in 0..2 {
        let result = results.next().await;
        let ended = (result.status, result.error_code.as_deref());
        assert_eq!(ended, (ResultStatus::Timeout, Some("deadline_exceeded")), "{result:?}");
        assert_eq!((result.cost, result.chunks), (0.0, Some(0)));
    }
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
    assert!(!place.dir.path().join("ran").exists());
    assert_eq!(place.count(STREAM_DLQ).await, 0, "nothing for an operator to do");
}

/// The time in the queue counts: a task that had nearly no time left is not run for its whole deadline once more.
pub async fn run_ends_at_the_deadline_that_counts_from_the_queue(place: Place) {
    let mut results = place.results().await;
    let now = place.bus.time_ms(STREAM_ASSIGN).await.unwrap();
    let sent = within(assignment("r", "sh", json!({})), 20_000).to_string();
    let message = bus::Message {
        subject: ASSIGN.into(),
        headers: bus::Headers::new().with("x_sent_at_ms", (now - 18_000).to_string()),
        payload: sent.into(),
        ..bus::Message::default()
    };
    place.bus.append(message, None).await.unwrap();

    let _worker = place.shell("sleep 60", |_| {}).await;
    let result = results.next().await;
    let ended = (result.status, result.error_code.as_deref());
    assert_eq!(ended, (ResultStatus::Timeout, Some("deadline_exceeded")), "{result:?}");
    assert!(result.latency_ms < 20_000, "{result:?}");
}

/// A worker of another make: it knows the common subject and its consumer, and sends no heartbeats.
#[tokio::test]
async fn foreign_worker_on_the_common_subject_gets_what_nobody_else_has() {
    let place = Place::nats().await;
    let _worker = echo(&place).await;
    let client = async_nats::connect(place.server.as_ref().unwrap().url()).await.unwrap();
    let jetstream = async_nats::jetstream::new(client);
    let stream = jetstream.get_stream(STREAM_ASSIGN).await.unwrap();
    let foreign: async_nats::jetstream::consumer::PullConsumer = stream.get_consumer("worker").await.unwrap();

    place.assign("r", "theirs", json!({})).await;
    let mut messages = foreign.messages().await.unwrap();
    let next = futures_util::StreamExt::next(&mut messages);
    let message = tokio::time::timeout(SOON, next).await.unwrap().unwrap().unwrap();
    assert_eq!(message.payload, assignment("r", "theirs", json!({})).to_string());
    message.ack().await.unwrap();
    testkit::eventually(SOON, || async { place.count(STREAM_ASSIGN).await == 0 }).await;
}

/// A process of the version before declares the stream with the common subject only.
#[tokio::test]
async fn subject_that_an_older_process_took_away_is_added_again() {
    let place = Place::nats().await;
    let mut results = place.results().await;
    let _worker = echo(&place).await;
    let client = async_nats::connect(place.server.as_ref().unwrap().url()).await.unwrap();
    let jetstream = async_nats::jetstream::new(client);
    let mut config = jetstream
        .get_stream(STREAM_ASSIGN)
        .await
        .unwrap()
        .cached_info()
        .config
        .clone();
    config.subjects = vec![ASSIGN.into()];
    jetstream.update_stream(config).await.unwrap();

    let subject = assign_to("echo").unwrap();
    testkit::eventually(SOON, || async {
        let sent = assignment("r", "echo", json!({})).to_string();
        let message = bus::Message {
            subject: subject.as_str().into(),
            payload: sent.into(),
            ..Default::default()
        };
        place.bus.append(message, Some("a-r")).await.is_ok()
    })
    .await;
    assert_eq!(results.next().await.status, ResultStatus::Success);
}
