//! SIGKILL at random moments: everything acknowledged survives the restart.

use crate::ledger::Ledger;
use crate::process::Process;
use crate::random::Random;
use crate::realtime::{Client, Failed};
use bus::local::Local;
use client::Client as Ipc;
use nix::sys::signal::Signal;
use rstest::rstest;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

const ROUNDS: usize = 4;

/// Everything that the process has acknowledged.
#[derive(Default)]
struct Acknowledged {
    /// Chat text by message id.
    messages: BTreeMap<u64, String>,
    /// Request ids of pushed tasks.
    tasks: Vec<String>,
}

#[rstest]
#[case::sqlite(false)]
#[case::postgres(true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_to_sigkill(#[case] on_postgres: bool) {
    let mut random = Random::start();
    let seed = random.seed;
    let postgres = if on_postgres {
        Some(testkit::PostgresServer::start().await)
    } else {
        None
    };
    let database = postgres
        .iter()
        .flat_map(|postgres| ["--database-url".into(), postgres.url()]);
    let arguments: Vec<String> = database.collect();
    let mut process = Process::start_with(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut acknowledged = Acknowledged::default();

    for round in 0..ROUNDS {
        let token = process.run(&["token", "--user", "ann"]).await.success();
        let moment = random.milliseconds(20..420);
        let mut client = Client::connect(process.http(), token.trim()).await.unwrap();
        let ipc = Ipc::connect(&process.socket()).await.unwrap();
        // The kill interrupts both clients; everything that was answered before it counts.
        let chat = chat_until_cut(&mut client, round, &mut acknowledged.messages);
        let tasks = submit_until_cut(&ipc, round, &mut acknowledged.tasks);
        let both = async { tokio::join!(chat, tasks) };
        let _ = tokio::time::timeout(moment, both).await;
        process.kill_and_restart().await;
    }
    println!("{} messages and {} tasks were acknowledged", acknowledged.messages.len(), acknowledged.tasks.len());
    assert!(
        !acknowledged.messages.is_empty() && !acknowledged.tasks.is_empty(),
        "nothing was acknowledged before the kills: the test shows nothing"
    );

    let token = process.run(&["token", "--user", "ann"]).await.success();
    let mut client = Client::connect(process.http(), token.trim()).await.unwrap();
    let stored = every_message(&mut client).await.unwrap();
    for (id, text) in &acknowledged.messages {
        assert_eq!(stored.get(id), Some(text), "seed {seed}: message {id} was acknowledged and is gone");
    }

    let ipc = Ipc::connect(&process.socket()).await.unwrap();
    let ledger = Ledger::default();
    for task in &acknowledged.tasks {
        let answer = result_of(&ipc, task, seed).await;
        assert_eq!(answer["output"], json!({"params": {"task": task}}), "seed {seed}: {task}");
        ledger.answered(task, answer);
    }

    // The process is gone before its streams are opened here.
    process.signal(Signal::SIGTERM);
    assert_eq!(process.ended().await, Some(0), "{}", process.log());
    let bus = Local::open(&process.dir.path().join("data")).await.unwrap();
    ledger.check(&bus, seed).await;
}

/// The result of an acknowledged task, once it has one.
async fn result_of(ipc: &Ipc, task: &str, seed: u64) -> Value {
    let result = std::cell::RefCell::new(None);
    testkit::eventually(Duration::from_secs(90), async || match ipc.query(task).await {
        Ok(answer) => {
            result.replace(answer.result);
            answer.state.is_final()
        }
        Err(error) => panic!("seed {seed}: task {task} was acknowledged and is unknown: {error}"),
    })
    .await;
    serde_json::to_value(result.take().expect("a task that ended has a result")).unwrap()
}

#[tokio::test]
async fn channels_recover_in_the_same_epoch_after_sigkill() {
    let mut process = Process::start().await;
    let token = process.run(&["token", "--user", "ann"]).await.success();
    let mut client = Client::connect(process.http(), token.trim()).await.unwrap();
    let before = client.call("subscribe", json!({"channel": "news"})).await.unwrap();
    for n in 1..=3 {
        client
            .call("publish", json!({"channel": "news", "data": n}))
            .await
            .unwrap();
    }
    process.kill_and_restart().await;

    let mut client = Client::connect(process.http(), token.trim()).await.unwrap();
    let position = json!({"channel": "news", "recover": true, "epoch": before["epoch"], "offset": 1});
    let after = client.call("subscribe", position).await.unwrap();
    assert_eq!((&after["recovered"], &after["epoch"]), (&json!(true), &before["epoch"]), "{after}");
    let data: Vec<&Value> = after["publications"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["data"])
        .collect();
    assert_eq!(data, [2, 3]);
}

/// Sends until the connection is cut.
async fn chat_until_cut(client: &mut Client, round: usize, sent: &mut BTreeMap<u64, String>) -> Result<(), Failed> {
    for n in 0.. {
        let text = format!("round {round} message {n}");
        let nonce = format!("{round}-{n}");
        let answer = client
            .rpc("chat.send", json!({"room": "general", "text": text, "nonce": nonce}))
            .await?;
        sent.insert(answer["message"]["id"].as_u64().unwrap(), text);
    }
    Ok(())
}

async fn submit_until_cut(ipc: &Ipc, round: usize, tasks: &mut Vec<String>) {
    for n in 0.. {
        let request_id = format!("task-{round}-{n}");
        let submit = json!({
            "command": "task_submit", "task_type": "echo", "request_id": request_id, "push_assignment": true,
            "params": {"task": request_id},
        });
        if ipc.submit(&submit).await.is_err() {
            return;
        }
        tasks.push(request_id);
    }
}

async fn every_message(client: &mut Client) -> Result<BTreeMap<u64, String>, Failed> {
    let mut all = BTreeMap::new();
    let mut before = Value::Null;
    loop {
        let mut query = json!({"room": "general", "limit": 100});
        if !before.is_null() {
            query["before"] = before;
        }
        let page = client.rpc("chat.history", query).await?;
        let messages = page["messages"].as_array().unwrap();
        for message in messages {
            all.insert(message["id"].as_u64().unwrap(), message["text"].as_str().unwrap().to_string());
        }
        if messages.is_empty() || page["more"] == false {
            return Ok(all);
        }
        before = messages[0]["id"].clone();
    }
}
