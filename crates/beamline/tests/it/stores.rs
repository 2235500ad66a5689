//! Full stores and lost streams, as operators see them.

use crate::journey;
use crate::process::Process;
use bus::ConsumerConfig;
use bus::local::Local;
use client::Client;
use futures_util::StreamExt;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use testkit::{DiskFault, NatsServer, SmallDisk};
use wire::subjects;

const SOON: Duration = Duration::from_secs(60);
/// Tasks that are submitted while the disk fills.
const TASKS: usize = 10_000;

async fn get(address: &str, path: &str) -> (u16, String) {
    journey::get(&format!("http://{address}{path}")).await
}

fn submit(request_id: &str) -> Value {
    json!({
        "command": "task_submit", "task_type": "echo", "request_id": request_id, "push_assignment": true,
        "params": {"text": "x".repeat(200)},
    })
}

#[tokio::test]
async fn full_store_is_reported_and_refuses_new_tasks_only() {
    let settings = "roles = [\"gateway\", \"router\"]\n[bus]\nassignments_size = \"64KiB\"\n";
    let process = Process::start_with_settings(settings).await;
    let ipc = Client::connect(&process.socket()).await.unwrap();
    let (status, body) = get(process.ops(), "/readyz").await;
    assert!(status == 200 && body.contains("\"stores\":\"ok\""), "{body}");

    let mut refused = None;
    for n in 0..1000 {
        if let Err(error) = ipc.submit(&submit(&format!("r{n}"))).await {
            refused = Some(error.to_string());
            break;
        }
    }
    let refused = refused.expect("64 KiB hold no thousand assignments");
    assert!(refused.contains("bus.assignments_size"), "{refused}");

    testkit::eventually(SOON, async || get(process.ops(), "/readyz").await.1.contains("ASSIGN is full")).await;
    let (status, body) = get(process.http(), "/ready").await;
    assert!(status == 200 && body.contains("\"stores\":\"warning\""), "{status} {body}");
    let (_, metrics) = get(process.ops(), "/metrics").await;
    assert!(metrics.contains("beamline_store_level{store=\"ASSIGN\",limit=\"refuses\"} 2"), "{metrics}");
    assert!(metrics.contains("beamline_store_max_bytes{store=\"ASSIGN\"} 65536"), "{metrics}");

    let log = process.logged("the store is full, and new tasks are refused").await;
    assert_eq!(log.matches("the store is full").count(), 1, "{log}");
    ipc.ping().await.unwrap();
}

#[tokio::test]
async fn nats_that_lost_its_streams_or_jetstream_is_not_ready_until_it_is_mended() {
    let mut nats = NatsServer::start().await;
    let settings = format!("roles = [\"gateway\", \"router\", \"worker\"]\n[nats]\nurl = \"{}\"\n", nats.url());
    let process = Process::start_with_settings(&settings).await;
    let ipc = Client::connect(&process.socket()).await.unwrap();
    ipc.submit(&submit("before")).await.unwrap();

    nats.restart_with_jetstream(false).await;
    testkit::eventually(SOON, async || {
        let (status, body) = get(process.ops(), "/readyz").await;
        status == 503 && body.contains("JetStream")
    })
    .await;
    assert!(ipc.submit(&submit("without")).await.is_err());

    nats.restart_with_jetstream(true).await;
    testkit::eventually(SOON, async || get(process.ops(), "/readyz").await.0 == 200).await;
    testkit::eventually(SOON, async || ipc.submit(&submit("again")).await.is_ok()).await;

    nats.restart_empty().await;
    process.logged("NATS had lost it").await;
    testkit::eventually(SOON, async || get(process.ops(), "/readyz").await.0 == 200).await;
    testkit::eventually(SOON, async || ipc.submit(&submit("after")).await.is_ok()).await;
    testkit::eventually(SOON, async || ipc.query("after").await.is_ok_and(|task| task.state.is_final())).await;
}

/// The disk fills while ten thousand tasks are under way, and has room again later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accepted_tasks_survive_a_full_disk() {
    let settings = "roles = [\"gateway\", \"router\", \"worker\"]\n[gateway]\nmax_in_flight_v2 = 256\n\
                    [shutdown]\ndeadline = \"30s\"\n";
    let mut process = Process::start_limited(settings, 16_384).await;
    let ipc = Client::connect(&process.socket()).await.unwrap();

    let answers = futures_util::stream::iter(0..TASKS).map(|n| {
        let ipc = &ipc;
        async move {
            let request_id = format!("r{n}");
            ipc.submit(&submit(&request_id)).await.is_ok().then_some(request_id)
        }
    });
    let accepted: Vec<String> = answers.buffer_unordered(200).filter_map(async |id| id).collect().await;
    println!("{} of {TASKS} tasks were accepted", accepted.len());
    assert!(accepted.len() > 100 && accepted.len() < TASKS, "the disk filled meanwhile: {}", accepted.len());
    // The bus reopens its log every second, and is ready until the next write: further tasks keep it failing.
    let more = async {
        for n in 0.. {
            let _ = ipc.submit(&submit(&format!("more-{n}"))).await;
        }
    };
    let reported = testkit::eventually(SOON, async || {
        let (status, body) = get(process.ops(), "/readyz").await;
        status == 503 && body.contains("cannot write")
    });
    tokio::select! {
        () = more => {}
        () = reported => {}
    }

    process.unlimit().await;
    testkit::eventually(SOON, async || get(process.ops(), "/readyz").await.0 == 200).await;
    all_end(&ipc, &accepted).await;
    ends_with_each_billed_once(&mut process, &accepted).await;
}

/// The disk of the bus breaks while tasks are under way, and is mended later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accepted_tasks_survive_a_broken_disk() {
    let settings = "roles = [\"gateway\", \"router\", \"worker\"]\n[bus]\ndurability = \"power\"\n\
                    [shutdown]\ndeadline = \"30s\"\n";
    let mut process = Process::start_with_settings(settings).await;
    let ipc = Client::connect(&process.socket()).await.unwrap();
    let files = ["bus.db", "bus.db-wal"].map(|name| process.dir.path().join("data").join(name));
    let files = files.each_ref().map(|file| &**file);
    let accepted = Mutex::new(Vec::new());

    let scene = async {
        for fault in [DiskFault::writes, DiskFault::syncs] {
            let before = accepted.lock().len();
            testkit::eventually(SOON, async || accepted.lock().len() >= before + 50).await;
            let fault = fault(process.pid(), &files);
            testkit::eventually(SOON, async || {
                let (status, body) = get(process.ops(), "/readyz").await;
                status == 503 && body.contains("cannot write") && body.contains("I/O error")
            })
            .await;
            let refused = ipc.submit(&submit(&format!("refused-{before}"))).await.unwrap_err();
            assert!(refused.to_string().contains("cannot write"), "{refused}");
            drop(fault);
            testkit::eventually(SOON, async || get(process.ops(), "/readyz").await.0 == 200).await;
        }
        let before = accepted.lock().len();
        testkit::eventually(SOON, async || accepted.lock().len() >= before + 50).await;
    };
    tokio::select! {
        () = submit_on(&ipc, &accepted) => {}
        () = scene => {}
    }

    process
        .logged("cannot write to the journal; refusing every operation; check the disk")
        .await;
    process.logged("reopened the journal").await;
    let accepted = accepted.into_inner();
    all_end(&ipc, &accepted).await;
    ends_with_each_billed_once(&mut process, &accepted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accepted_tasks_survive_a_full_disk_of_nats() {
    let mut nats = NatsServer::start_on(SmallDisk::new(32 * 1024)).await;
    let settings = format!("roles = [\"gateway\", \"router\", \"worker\"]\n[nats]\nurl = \"{}\"\n", nats.url());
    let process = Process::start_with_settings(&settings).await;
    let ipc = Client::connect(&process.socket()).await.unwrap();
    let accepted = Mutex::new(Vec::new());

    let scene = async {
        testkit::eventually(SOON, async || accepted.lock().len() >= 50).await;
        nats.disk().fill(0);
        testkit::eventually(SOON, async || {
            let (status, body) = get(process.ops(), "/readyz").await;
            status == 503 && body.contains("disk of its JetStream")
        })
        .await;
        testkit::eventually(SOON, async || {
            let refused = ipc.submit(&submit("refused")).await.unwrap_err().to_string();
            refused.contains("disk of its JetStream") || refused.contains("circuit breaker is open")
        })
        .await;
        nats.disk().free();
        nats.restart().await;
        testkit::eventually(SOON, async || get(process.ops(), "/readyz").await.0 == 200).await;
        let before = accepted.lock().len();
        testkit::eventually(SOON, async || accepted.lock().len() >= before + 50).await;
    };
    tokio::select! {
        () = submit_on(&ipc, &accepted) => {}
        () = scene => {}
    }
    process.logged("refusing writes until a trial write is stored").await;
    all_end(&ipc, &accepted.into_inner()).await;
}

/// Submits tasks one after the other, and notes which are accepted.
async fn submit_on(ipc: &Client, accepted: &Mutex<Vec<String>>) {
    for n in 0.. {
        let request_id = format!("r{n}");
        if ipc.submit(&submit(&request_id)).await.is_ok() {
            accepted.lock().push(request_id);
        }
    }
}

async fn all_end(ipc: &Client, accepted: &[String]) {
    for id in accepted {
        testkit::eventually(SOON, async || match ipc.query(id).await {
            Ok(task) => task.state.is_final(),
            Err(error) if error.to_string().contains("not_found") => panic!("task {id} was accepted and is unknown"),
            Err(_) => false,
        })
        .await;
    }
}

async fn ends_with_each_billed_once(process: &mut Process, accepted: &[String]) {
    process.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(process.ended().await, Some(0));
    let billed = billed(process).await;
    for id in accepted {
        assert_eq!(billed.get(id), Some(&1), "task {id} is billed once");
    }
    assert!(billed.values().all(|count| *count == 1), "nothing is billed twice");
}

/// Usage events by request id, read from the data directory of a process that has ended.
async fn billed(process: &Process) -> BTreeMap<String, usize> {
    let bus = Local::open(&process.dir.path().join("data")).await.unwrap();
    bus::streams::declare(&bus).await.unwrap();
    let count = bus.stream_info(subjects::STREAM_USAGE).await.unwrap().messages;
    let config = ConsumerConfig {
        stream: subjects::STREAM_USAGE,
        name: "test".into(),
        filter: None,
        ack_wait: SOON,
        max_ack_pending: 100_000,
        max_in_hand: 100_000,
        from_start: true,
    };
    let mut events = bus.consume(config).await.unwrap();
    let mut billed = BTreeMap::new();
    for _ in 0..count {
        let event = tokio::time::timeout(SOON, events.next()).await.unwrap().unwrap();
        let event: Value = serde_json::from_slice(&event.message.payload).unwrap();
        *billed
            .entry(event["request_id"].as_str().unwrap().to_string())
            .or_default() += 1;
    }
    billed
}
