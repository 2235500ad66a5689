//! The log of the real process: nothing waits for stderr, and every task has one line.

use crate::journey::get;
use crate::process::Process;
use client::Client as Ipc;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, PipeReader};
use std::time::Duration;
use testkit::eventually;

const PATIENCE: Duration = Duration::from_secs(30);

async fn submit(ipc: &Ipc, request_id: &str, task_type: &str) {
    let submit = json!({
        "command": "task_submit", "task_type": task_type, "request_id": request_id, "wait": "result",
        "params": {"prompt": "a secret of the user"},
    });
    let _ = tokio::time::timeout(PATIENCE, ipc.submit(&submit))
        .await
        .expect("an answer in time")
        .unwrap();
}

async fn dropped(process: &Process) -> u64 {
    let (status, metrics) = get(&format!("http://{}/metrics", process.ops())).await;
    assert_eq!(status, 200);
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix("beamline_log_dropped_total{reason=\"full\"} "));
    line.map_or(0, |count| count.parse().unwrap())
}

/// Works until more lines than `before` were dropped.
async fn work_until_lines_are_dropped(process: &Process, ipc: &Ipc, before: u64) {
    let end = tokio::time::Instant::now() + PATIENCE;
    for n in 0.. {
        submit(ipc, &format!("task-{before}-{n}"), "echo").await;
        if n % 20 == 0 && dropped(process).await > before {
            return;
        }
        assert!(tokio::time::Instant::now() < end, "no line was dropped");
    }
}

/// Reads up to the line that reports the dropped lines.
fn read_the_report(stderr: &mut BufReader<PipeReader>) {
    let mut line = String::new();
    while !line.contains("log lines were dropped") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "the process ended");
    }
}

#[tokio::test]
async fn stderr_that_nobody_reads_holds_up_nothing() {
    let (stderr, writer) = std::io::pipe().unwrap();
    let mut process = Process::start_logging_to(writer, "[log]\nlevel = \"trace\"\n").await;
    let ipc = Ipc::connect(&process.socket()).await.unwrap();
    work_until_lines_are_dropped(&process, &ipc, 0).await;
    assert_eq!(get(&format!("http://{}/readyz", process.ops())).await.0, 200);

    // As soon as somebody reads, the log goes on and says what is missing.
    let reading = tokio::task::spawn_blocking(move || {
        let mut stderr = BufReader::new(stderr);
        read_the_report(&mut stderr);
        stderr
    });
    let _stderr = tokio::time::timeout(PATIENCE, reading)
        .await
        .expect("a report")
        .unwrap();

    // Nor does the exit wait.
    let before = dropped(&process).await;
    work_until_lines_are_dropped(&process, &ipc, before).await;
    process.signal(Signal::SIGTERM);
    assert_eq!(process.ended().await, Some(0));
}

#[tokio::test]
async fn task_has_one_line_without_its_payload_and_the_access_log_is_switched_off_by_a_reload() {
    let settings = |access: &str| {
        format!(
            "[log]\nformat = \"json\"\naccess = \"{access}\"\n[router]\npolicies = \"p\"\n\
             [[worker.providers]]\nname = \"fails\"\nkind = \"command\"\nprogram = \"false\"\n"
        )
    };
    let process = Process::start_with_settings(&settings("all")).await;
    let policy = "version: \"1\"\nproviders: [{name: echo, weight: 1}, {name: fails, weight: 0}]\n\
                  rules: [{when: \"task.type == 'fails'\", to: fails}]\n";
    std::fs::create_dir_all(process.dir.path().join("p/default")).unwrap();
    std::fs::write(process.dir.path().join("p/default/default.yaml"), policy).unwrap();
    process.logged("policy loaded").await;

    let ipc = Ipc::connect(&process.socket()).await.unwrap();
    submit(&ipc, "good", "echo").await;
    submit(&ipc, "bad", "fails").await;
    eventually(PATIENCE, async || of_task(&process, "bad").len() == 1).await;
    for (id, provider, status, code) in
        [("good", "echo", "success", json!(null)), ("bad", "fails", "error", json!("exit_status"))]
    {
        let lines = of_task(&process, id);
        let [line] = &lines[..] else { panic!("{lines:?}") };
        assert_eq!((&line["target"], &line["message"]), (&json!("access"), &json!("task ended")));
        assert_eq!(
            (&line["provider_id"], &line["status"], &line["error_code"]),
            (&json!(provider), &json!(status), &code)
        );
        assert_eq!(line["tenant_id"], "default");
        assert!(line["trace_id"].is_string(), "{line}");
        assert!(line["total_ms"].as_u64().unwrap() >= line["run_ms"].as_u64().unwrap(), "{line}");
    }
    assert!(!process.log().contains("a secret of the user"), "{}", process.log());

    std::fs::write(process.dir.path().join("beamline.toml"), settings("off")).unwrap();
    process.signal(Signal::SIGHUP);
    process.logged("\"reloaded\"").await;
    submit(&ipc, "unseen", "echo").await;
    std::fs::write(process.dir.path().join("beamline.toml"), settings("all")).unwrap();
    process.signal(Signal::SIGHUP);
    eventually(PATIENCE, async || process.log().matches("\"reloaded\"").count() == 2).await;
    submit(&ipc, "seen", "echo").await;
    eventually(PATIENCE, async || of_task(&process, "seen").len() == 1).await;
    assert_eq!(of_task(&process, "unseen").len(), 0);
}

/// The lines of the log about a task.
fn of_task(process: &Process, request_id: &str) -> Vec<Value> {
    let log = process.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["request_id"] == request_id).collect()
}
