//! Two processes on one data directory, or on one socket: the second is refused, and the first serves on.

use crate::journey::get;
use crate::process::{Process, spawn};
use serde_json::json;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use testkit::{NatsServer, SmallDisk};

/// Starts another process in the directory of `first`, which must fail; returns what it says.
async fn refused(first: &Process, arguments: &[&str]) -> String {
    let before = first.log().len();
    let arguments: Vec<String> = arguments.iter().map(|argument| argument.to_string()).collect();
    let second = spawn(first.dir.path(), "127.0.0.1:0", &arguments);
    let output = tokio::time::timeout(std::time::Duration::from_secs(30), second.wait_with_output());
    let output = output.await.expect("the second process ends").unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "", "it did not say that it is ready");
    first.log()[before..].into()
}

/// The files that only one process may have, by name: which file it is, and its mode.
fn files(dir: &Path) -> BTreeMap<String, (u64, u32)> {
    let entries = std::fs::read_dir(dir.join("data")).unwrap().flatten();
    let files = entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap()));
    let mut files: BTreeMap<_, _> = files.map(|(name, file)| (name, (file.ino(), file.mode()))).collect();
    if let Ok(socket) = std::fs::symlink_metadata(dir.join("s")) {
        files.insert("socket".into(), (socket.ino(), socket.mode()));
    }
    files
}

#[tokio::test]
async fn second_process_on_a_data_directory_is_refused_and_the_first_serves_on() {
    let first = Process::start().await;
    let files_before = files(first.dir.path());
    for name in ["bus.db", "channels.db", "webapp.db", "socket"] {
        assert!(files_before.contains_key(name), "{name} is missing: {files_before:?}");
    }

    let said = refused(&first, &[]).await;
    let expected = format!("bus.db is in use by process {}; stop it", first.ready["pid"]);
    assert!(said.contains(&expected), "{said}");

    assert_eq!(files(first.dir.path()), files_before, "a file was replaced or removed");
    assert_eq!(get(&format!("http://{}/readyz", first.ops())).await.0, 200);
    let client = client::Client::connect(&first.socket()).await.unwrap();
    let submit = json!({"command": "task_submit", "task_type": "echo", "wait": "result", "params": {"n": 1}});
    assert_eq!(client.submit(&submit).await.unwrap()["status"], "success");
}

#[tokio::test]
async fn read_only_data_directory_is_named_at_the_start() {
    let (disk, socket) = (SmallDisk::new(4096), tempfile::tempdir().unwrap());
    assert!(
        disk.command("mkdir")
            .args(["-m", "700", "data"])
            .status()
            .unwrap()
            .success()
    );
    assert!(disk.remount(true));
    let mut command = tokio::process::Command::from(disk.command(env!("CARGO_BIN_EXE_beamline")));
    command.args([
        "up",
        "--data-dir",
        "data",
        "--http",
        "127.0.0.1:0",
        "--ops",
        "127.0.0.1:0",
        "--grpc",
        "127.0.0.1:0",
    ]);
    command.arg("--socket").arg(socket.path().join("s")).kill_on_drop(true);
    let output = tokio::time::timeout(std::time::Duration::from_secs(30), command.output());
    let output = output.await.expect("the process ends").unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("data/") && said.contains("Read-only file system"), "{said}");
}

/// With NATS there is no bus.db; each part that has a file or a socket of its own defends it.
#[tokio::test]
async fn each_part_refuses_what_another_process_uses() {
    let nats = NatsServer::start().await;
    for (role, expected) in
        [("cluster", "channels.db is in use by process"), ("gateway", "another gateway is listening")]
    {
        let arguments = ["--roles", role, "--nats-url", &nats.url()];
        let first = Process::start_with(&arguments).await;
        let files_before = files(first.dir.path());
        let said = refused(&first, &arguments).await;
        assert!(said.contains(expected), "{role}: {said}");
        assert_eq!(files(first.dir.path()), files_before, "{role}: a file was replaced or removed");
        assert_eq!(get(&format!("http://{}/readyz", first.ops())).await.0, 200, "{role}");
    }
}
