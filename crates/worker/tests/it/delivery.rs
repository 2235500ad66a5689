//! One result for each assignment despite crashes, outages, drains and redelivery, and dead letters for the assignments
//! that cannot be run.

use crate::{Place, SOON, Worker, append, assignment, chunk, open, provider, shell};
use serde_json::{Value, json};
use std::time::Duration;
use wire::json::Json;
use wire::router::ResultStatus;
use wire::subjects;
use worker::{Config, Kind};

const WAITS: &str = "echo $$; while [ ! -e $DIR/go ]; do sleep 0.02; done; echo done";

pub async fn echo_returns_the_payload(place: Place) {
    let (mut results, mut output) = (place.results().await, place.output("r1").await);
    let _worker = place.worker(Config::default()).await;
    place.assign("r1", "echo", json!({"prompt": "say it again"})).await;
    for (seq, word) in ["say ", "it ", "again"].into_iter().enumerate() {
        let chunk = chunk(&mut output).await;
        assert_eq!((chunk.seq, chunk.attempt, chunk.data.value()), (seq as u64, 1, json!(word)));
    }
    let result = results.next().await;
    assert_eq!(
        (result.status, result.output),
        (ResultStatus::Success, Some(Json::of(&json!({"text": "say it again"}))))
    );
    assert_eq!(result.chunks, Some(3));

    place.assign("r2", "echo", json!({"a": [1, null]})).await;
    assert_eq!(results.next().await.output.map(|output| output.value()), Some(json!({"a": [1, null]})));

    let mut by_reference = assignment("r3", "echo", json!(null));
    by_reference["job"] = json!({"type": "t", "payload_ref": "s3://x"});
    place.append(subjects::ASSIGN, by_reference.to_string()).await;
    assert_eq!(results.next().await.output.map(|output| output.value()), Some(json!({"payload_ref": "s3://x"})));
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;
}

#[tokio::test]
async fn job_that_ends_during_an_outage_runs_once() {
    let mut place = Place::nats().await;
    let exists = |name: &str| place.dir.path().join(name).exists();
    let _worker = place
        .shell("echo run >> $DIR/runs; while [ ! -e $DIR/go ]; do sleep 0.02; done; touch $DIR/ended", |_| {})
        .await;
    place.assign("r", "sh", json!({})).await;
    testkit::eventually(SOON, || async { exists("runs") }).await;

    let mut server = place.server.take().unwrap();
    server.kill();
    place.file("go");
    testkit::eventually(SOON, || async { exists("ended") }).await;
    server.restart().await;

    // The wait is shorter than the time after which the stream delivers the assignment again.
    testkit::eventually(SOON, || async {
        let stored = place.bus.stream_info(subjects::STREAM_RESULT).await;
        stored.is_ok_and(|info| info.messages == 1)
    })
    .await;
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;
    let runs = std::fs::read_to_string(place.dir.path().join("runs")).unwrap();
    assert_eq!(runs, "run\n");
}

#[tokio::test]
async fn assignments_that_cannot_be_read_are_dead_letters() {
    let place = Place::local().await;
    let mut results = place.results().await;
    let _worker = place.worker(Config::default()).await;

    let mut incomplete = assignment("r", "echo", json!({}));
    incomplete.as_object_mut().unwrap().remove("executor");
    let deep = "[".repeat(100_000);
    for bad in [&b"\xff"[..], b"", b"{}", deep.as_bytes(), incomplete.to_string().as_bytes()] {
        place.append(subjects::ASSIGN, bad.to_vec()).await;
    }

    place.assign("good", "echo", json!({})).await;
    assert_eq!(results.next().await.request_id, "good");
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_UNREADABLE).await == 5 }).await;
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;
    assert!(
        place.dead_letter(subjects::STREAM_UNREADABLE).await["reason"]
            .as_str()
            .unwrap()
            .starts_with("the assignment cannot be read")
    );
}

#[tokio::test]
async fn assignments_with_control_characters_in_an_id_are_dead_letters() {
    for (field, message) in [
        ("assignment_id", "the assignment's assignment_id has a control character; ids have none"),
        ("request_id", "the assignment's request_id has a control character; ids have none"),
        ("tenant_id", "the assignment's tenant_id must have 1 to 128 of the characters A-Z a-z 0-9 _ . -"),
    ] {
        let place = Place::local().await;
        let _worker = place.shell("cat", |_| {}).await;

        let mut bad = assignment("r", "sh", json!({}));
        bad[field] = json!("a\0b");
        place.append(subjects::ASSIGN, bad.to_string()).await;
        assert_eq!(place.dead_letter(subjects::STREAM_UNREADABLE).await["reason"], message);
        assert_eq!(place.count(subjects::STREAM_RESULT).await, 0, "{field}: the job was not run");
    }
}

#[tokio::test]
async fn assignment_is_a_dead_letter_after_its_deliveries() {
    let place = Place::local().await;
    let subject = subjects::assign_to("echo").unwrap();
    place
        .bus
        .add_subjects(subjects::STREAM_ASSIGN, std::slice::from_ref(&subject))
        .await
        .unwrap();
    place
        .append(&subject, assignment("r", "echo", json!({})).to_string())
        .await;
    for _ in 0..5 {
        place.lose_delivery(&subject).await;
    }

    let mut results = place.results().await;
    let _worker = place.worker(Config::default()).await;
    let result = results.next().await;
    assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Error, Some("max_deliver")));
    let letter = place.dead_letter(subjects::STREAM_DLQ).await;
    assert_eq!((&letter["delivered"], &letter["original_subject"]), (&json!(6), &json!(subject)));
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;
}

pub async fn assignments_beyond_the_slots_go_to_another_worker(place: Place) {
    let mut results = place.results().await;
    let first = place.shell(WAITS, |config| config.slots = 1).await;
    let mut output = place.output("r0").await;
    place.assign("r0", "sh", json!({})).await;
    chunk(&mut output).await;
    place.assign("r1", "sh", json!({})).await;
    place.assign("r2", "sh", json!({})).await;

    let second = place.shell("echo quick", |config| config.slots = 1).await;
    let mut quick = [results.next().await.request_id, results.next().await.request_id];
    quick.sort();
    assert_eq!(quick, ["r1", "r2"]);

    place.file("go");
    assert_eq!(results.next().await.request_id, "r0");
    first.stop().await;
    second.stop().await;
}

/// A worker on its own runtime, which stands for a process: a crash drops all of its tasks without a shutdown.
struct Process(tokio::runtime::Runtime);

impl Process {
    fn start(dir: &std::path::Path, config: Config) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();

        let dir = dir.to_path_buf();
        runtime.spawn(async move {
            let bus = open(&dir).await;
            Worker::start(bus, config).await.running.await.unwrap().unwrap();
        });
        Self(runtime)
    }

    fn crash(self) {
        self.0.shutdown_background();
    }
}

#[tokio::test]
async fn crashed_run_is_repeated_and_leaves_one_result() {
    let Place { dir, bus, .. } = Place::local().await;
    let path = |name: &str| dir.path().join(name);

    // Each run appends its process id to the file `runs` and waits for the file `go`.
    let script =
        format!("echo $$ >> {0}/runs; while [ ! -e {0}/go ]; do sleep 0.02; done; echo done", dir.path().display());
    let config = || Config { providers: vec![shell(&script)], ..Config::default() };
    append(&bus, subjects::ASSIGN, assignment("r", "sh", json!({})).to_string()).await;
    drop(bus);
    let runs = || std::fs::read_to_string(path("runs")).unwrap_or_default();

    for crashes in 1..=2 {
        let process = Process::start(dir.path(), config());
        testkit::eventually(SOON, || async { runs().lines().count() == crashes }).await;
        process.crash();

        // The program ends with the worker that started it.
        testkit::eventually(SOON, || async { runs().lines().all(crate::is_gone) }).await;
    }

    std::fs::write(path("go"), "").unwrap();
    let bus = open(dir.path()).await;
    bus::streams::declare(&bus).await.unwrap();
    let mut output = bus.subscribe(&subjects::output("r"), None, 64).await.unwrap();
    let worker = Worker::start(bus.clone(), config()).await;
    let last = chunk(&mut output).await;
    assert_eq!((last.attempt, last.seq, last.data.value()), (3, 0, json!("done\n")));
    testkit::eventually(SOON, || async { bus.stream_info(subjects::STREAM_ASSIGN).await.unwrap().messages == 0 }).await;
    assert_eq!(bus.stream_info(subjects::STREAM_RESULT).await.unwrap().messages, 1);
    worker.stop().await;
}

#[tokio::test]
async fn lost_acknowledgement_leaves_one_result() {
    let place = Place::local().await;
    let stored = json!({"version": "1", "assignment_id": "a-r", "request_id": "r", "status": "success",
        "provider_id": "echo", "job": {"type": "t"}, "output": {"text": "the first"}});
    let message = bus::Message {
        subject: subjects::RESULT.into(),
        payload: stored.to_string().into(),
        ..Default::default()
    };
    place.bus.append(message, Some("result-a-r")).await.unwrap();

    let _worker = place.worker(Config::default()).await;
    place.assign("r", "echo", json!({"prompt": "the second"})).await;
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;
    assert_eq!(place.count(subjects::STREAM_RESULT).await, 1);
}

#[tokio::test]
async fn cancel_stops_only_the_run_that_it_names() {
    let place = Place::local().await;
    let (mut results, mut output) = (place.results().await, place.output("r").await);
    let _worker = place.shell(WAITS, |_| {}).await;
    for tenant in ["acme", "beta"] {
        let mut namesake = assignment("r", "sh", json!({}));
        (namesake["tenant_id"], namesake["assignment_id"]) = (json!(tenant), json!(format!("a-{tenant}")));
        place.append(subjects::ASSIGN, namesake.to_string()).await;
        let began = chunk(&mut output).await;
        assert_eq!((began.tenant_id.as_deref(), began.assignment_id), (Some(tenant), format!("a-{tenant}")));
    }

    for of_nobody in [
        json!({"request_id": "r"}),
        json!({"request_id": "r", "tenant_id": "other"}),
        json!({"request_id": "r", "tenant_id": "acme", "assignment_id": "a-beta"}),
    ] {
        place.cancel_run(of_nobody).await;
    }
    place
        .cancel_run(json!({"request_id": "r", "tenant_id": "beta", "assignment_id": "a-beta"}))
        .await;
    let result = results.next().await;
    assert_eq!((result.status, &*result.assignment_id), (ResultStatus::Cancelled, "a-beta"));

    place.file("go");
    let result = results.next().await;
    assert_eq!((result.status, &*result.assignment_id), (ResultStatus::Success, "a-acme"));
}

#[tokio::test]
async fn task_record_decides_whether_an_assignment_runs() {
    let place = Place::local().await;
    let mut results = place.results().await;
    let task = |state: &str, result: Value| {
        let mut task =
            json!({"task_id": "r", "state": state, "assignment_id": "a-r", "tenant_id": "acme", "digest": "d"});
        if !result.is_null() {
            task["result"] = result;
        }
        task
    };
    let put = async |task: Value| {
        place
            .bus
            .kv_put(subjects::BUCKET_TASKS, "acme/r", task.to_string().into(), None)
            .await
            .unwrap();
    };

    put(task("cancelled", Value::Null)).await;
    let _worker = place.shell(WAITS, |_| {}).await;
    place.assign("r", "sh", json!({})).await;
    let result = results.next().await;
    assert_eq!((result.status, result.output, result.cost), (ResultStatus::Cancelled, None, 0.0), "not started");
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;

    put(task("completed", serde_json::to_value(assigned_result()).unwrap())).await;
    place.assign("r", "sh", json!({})).await;
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;

    put(task("assigned", Value::Null)).await;
    place.assign("r", "sh", json!({})).await;
    let state = async || -> Value {
        let (bytes, _) = place
            .bus
            .kv_get(subjects::BUCKET_TASKS, "acme/r")
            .await
            .unwrap()
            .unwrap();
        serde_json::from_slice(&bytes).unwrap()
    };
    testkit::eventually(SOON, || async { state().await["state"] == "running" }).await;
    assert_eq!(state().await, task("running", Value::Null), "only the state has changed");
    place.cancel("r").await;
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;
}

/// A worker that was there when the assignment was made knows without the record whether it still has to run.
#[tokio::test]
async fn record_is_read_unless_the_assignment_is_surely_wanted() {
    let place = Place::local().await;
    let mut results = place.results().await;
    let made = |age_s: u64| {
        let made = bus::clock::unix_ms() / 1000 - age_s;
        uuid::Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, made, 0)).to_string()
    };
    let assign = async |id: &str, assignment_id: String, record: Value| {
        let mut task = json!({"task_id": id, "assignment_id": assignment_id, "tenant_id": "acme", "digest": "d"});
        task.as_object_mut()
            .unwrap()
            .extend(record.as_object().unwrap().clone());
        let key = format!("acme/{id}");
        let put = place
            .bus
            .kv_put(subjects::BUCKET_TASKS, &key, task.to_string().into(), None);
        put.await.unwrap();
        let mut assigned = assignment(id, "sh", json!({}));
        assigned["assignment_id"] = assignment_id.into();
        place.append(subjects::ASSIGN, assigned.to_string()).await;
    };
    let settled = || testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 });
    let cancelled = json!({"state": "cancelled"});
    let done = json!({"state": "completed", "result": assigned_result()});

    let script = "echo $BEAMLINE_REQUEST_ID >> $DIR/runs; [ $BEAMLINE_REQUEST_ID != waits ] || sleep 60";

    // Made before this worker heard of cancellations.
    assign("early", made(0), cancelled.clone()).await;
    let _worker = place.shell(script, |_| {}).await;
    assert_eq!(results.next().await.status, ResultStatus::Cancelled);

    assign("known", made(0), json!({"state": "assigned"})).await;
    assert_eq!(results.next().await.status, ResultStatus::Success);

    // Replayed long after it was made.
    assign("replayed", made(3600), done).await;
    settled().await;

    // Cancelled before its turn came. Cancellations are heard in order, so the second shows that the first was heard.
    place.cancel("cancelled").await;
    assign("waits", made(0), json!({"state": "assigned"})).await;
    testkit::eventually(SOON, || async { place.lines("runs").contains(&"waits".into()) }).await;
    place.cancel("waits").await;
    assert_eq!(results.next().await.status, ResultStatus::Cancelled);
    assign("cancelled", made(0), cancelled).await;
    assert_eq!(results.next().await.status, ResultStatus::Cancelled);
    settled().await;

    let runs = place.lines("runs");
    assert!(runs.contains(&"known".into()), "{runs:?}");
    for id in ["early", "replayed", "cancelled"] {
        assert!(!runs.contains(&id.to_string()), "{runs:?}");
    }
}

fn assigned_result() -> Value {
    json!({"version": "1", "assignment_id": "a-r", "request_id": "r", "status": "success", "provider_id": "sh", "job": {"type": "t"}})
}

#[tokio::test]
async fn drain_waits_for_runs_and_reports_draining() {
    let place = Place::local().await;
    let mut results = place.results().await;
    let mut beats = place.bus.subscribe(subjects::HEARTBEAT, None, 64).await.unwrap();
    let mut output = place.output("r").await;
    let worker = place.shell(WAITS, |_| {}).await;
    place.assign("r", "sh", json!({})).await;
    chunk(&mut output).await;

    worker.cancel.cancel();
    let mut heard = async |status: &str| loop {
        let beat = tokio::time::timeout(SOON, beats.next())
            .await
            .expect("a heartbeat")
            .unwrap();
        let beat: Value = serde_json::from_slice(&beat.payload).unwrap();
        if beat["status"] == status {
            return beat;
        }
    };
    let draining = heard("draining").await;
    assert_eq!((&draining["running"], &draining["subjects"]), (&json!(1), &json!(["caf.exec.assign.v1.sh"])));

    place.assign("late", "sh", json!({})).await;
    place.file("go");
    assert_eq!(results.next().await.status, ResultStatus::Success);
    let last = heard("stopped").await;
    assert_eq!((&last["running"], &last["completed_total"]), (&json!(0), &json!(1)));
    worker.ended().await;
    assert_eq!(place.count(subjects::STREAM_ASSIGN).await, 1, "an assignment made during the drain stays queued");
}

#[tokio::test]
async fn drain_timeout_returns_unfinished_runs_to_the_stream() {
    let place = Place::local().await;
    let mut results = place.results().await;
    let mut output = place.output("r").await;
    let worker = place
        .shell(WAITS, |config| config.drain_timeout = Duration::from_millis(50))
        .await;
    place.assign("r", "sh", json!({})).await;
    let pid = chunk(&mut output).await.data;

    worker.stop().await;
    assert!(crate::is_gone(&pid.string().unwrap()));
    assert_eq!(place.count(subjects::STREAM_RESULT).await, 0);

    place.file("go");
    let _worker = place.shell(WAITS, |_| {}).await;
    let result = results.next().await;
    assert_eq!(result.status, ResultStatus::Success);
}

#[tokio::test]
async fn draining_worker_still_obeys_cancels() {
    let place = Place::local().await;
    let mut results = place.results().await;
    let mut output = place.output("r").await;
    let worker = place.shell(WAITS, |_| {}).await;
    place.assign("r", "sh", json!({})).await;
    chunk(&mut output).await;

    worker.cancel.cancel();
    place.cancel("r").await;
    assert_eq!(results.next().await.status, ResultStatus::Cancelled);
    worker.ended().await;
}

#[tokio::test]
async fn two_providers_with_one_name_are_refused() {
    let place = Place::local().await;
    let providers = vec![provider("echo", Kind::Echo), provider("echo", Kind::Ops)];
    let error = worker::bind(Config { providers, ..Config::default() }, place.bus.clone())
        .await
        .err()
        .unwrap();
    assert!(matches!(error, worker::Error::Duplicate(ref name) if name == "echo"), "{error}");
}

#[tokio::test]
async fn copy_of_the_result_goes_to_the_one_who_waits() {
    let fixture = Place::nats().await;
    let _worker = fixture.worker(Config::default()).await;
    let mut copies = fixture.bus.subscribe("beamline.>", None, 64).await.unwrap();
    let mut results = fixture.bus.subscribe(subjects::RESULT, None, 64).await.unwrap();

    for (request_id, subject, told) in
        [("told", "beamline.result.v1.a", true), ("elsewhere", "beamline.usage.v1.metered", false)]
    {
        let mut assignment = assignment(request_id, "echo", json!({"prompt": "hi"}));
        assignment["correlation"]["result_subject"] = json!(subject);
        fixture.append(subjects::ASSIGN, assignment.to_string()).await;

        let result = tokio::time::timeout(SOON, results.next()).await.unwrap().unwrap();
        assert_eq!(result.headers.get("result_subject"), told.then_some(subject), "the router is told about the copy");
        if told {
            let copy = tokio::time::timeout(SOON, copies.next()).await.unwrap().unwrap();
            assert_eq!((&*copy.subject, copy.payload), (subject, result.payload));
        }
    }
    // Everything that the worker has published has arrived.
    fixture.bus.health().await.unwrap();
    copies.close();
    while let Some(other) = copies.next().await {
        assert!(!other.subject.starts_with("beamline.usage"), "an assignment cannot make a worker publish anywhere");
    }
}
