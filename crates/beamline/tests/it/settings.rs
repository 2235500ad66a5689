//! Settings and secrets of a process, and how it ends.

use crate::process::{Process, run_in, spawn};
use nix::sys::signal::Signal;
use std::time::Duration;

#[tokio::test]
async fn every_bad_setting_is_reported_and_nothing_is_bound() {
    let dir = tempfile::tempdir().unwrap();
    let file = "[http]\nlisten = \"nowhere\"\nlissten = 1\n[gateway]\nread_timeout = \"5 sec\"\n[[worker.providers]]\n\
                name = \"model\"\nkind = \"openai\"\nmodel = \"m\"\nbase_url = \"host/v1\"\ntimeout = \"0s\"\n";
    std::fs::write(dir.path().join("beamline.toml"), file).unwrap();
    let output = run_in(dir.path(), &["up", "--roles", "gateway"]).await;
    assert_eq!(output.code, Some(64), "{}", output.stderr);
    for expected in [
        "beamline.toml:2: http.listen",
        "beamline.toml:3: http.lissten is not a setting; did you mean http.listen?",
        "beamline.toml:5: gateway.read_timeout",
        "beamline.toml:10: base_url is not a URL",
        "beamline.toml:11: timeout is \"0s\"",
        "set nats.url",
    ] {
        assert!(output.stderr.contains(expected), "{expected} is missing in {}", output.stderr);
    }
    assert!(!dir.path().join("s").exists() && !dir.path().join("data").exists());

    let output = run_in(dir.path(), &["config", "check"]).await;
    assert_eq!(output.code, Some(64));
    assert!(output.stderr.contains("beamline.toml:10: base_url"), "{}", output.stderr);
}

#[tokio::test]
async fn config_show_redacts_secrets_and_names_sources() {
    let dir = tempfile::tempdir().unwrap();
    let file = "[database]\nurl = \"postgres://u:geheim@h/d\"\n[log]\nformat = \"json\"\n";
    std::fs::write(dir.path().join("beamline.toml"), file).unwrap();
    let shown = run_in(dir.path(), &["config", "show"]).await.success();
    assert!(!shown.contains("geheim"), "{shown}");
    assert!(shown.contains("format = \"json\"  # line 4"), "{shown}");
    assert!(shown.contains("# $IPC_SOCKET_PATH"), "{shown}");
}

#[tokio::test]
async fn errors_of_a_taken_port_or_socket_name_the_holder() {
    let process = Process::start().await;
    let pid = process.ready["pid"].to_string();
    let free = ["--http", "127.0.0.1:0", "--ops", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];

    let other = tempfile::tempdir().unwrap();
    let taken = run_in(other.path(), &["up", "--http", process.http()]).await;
    assert_eq!(taken.code, Some(1));
    assert!(taken.stderr.contains(&format!("(pid {pid})")), "{}", taken.stderr);

    let socket = process.socket().display().to_string();
    let mut args = vec!["up", "--socket", &socket];
    args.extend(free);
    let taken = run_in(other.path(), &args).await;
    assert_eq!(taken.code, Some(1));
    assert!(taken.stderr.contains("another gateway is listening"), "{}", taken.stderr);

    let mut args = vec!["up", "--socket", "other"];
    args.extend(free);
    let taken = process.run(&args).await;
    assert_eq!(taken.code, Some(1), "a second process used the same data directory");
    assert!(taken.stderr.contains("data"), "{}", taken.stderr);
}

#[tokio::test]
async fn sigterm_and_ctrl_c_drain_and_exit_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut process = Process::start().await;
        let token = process.run(&["token", "--user", "ann"]).await.success();
        let mut client = crate::realtime::Client::connect(process.http(), token.trim())
            .await
            .unwrap();
        process.signal(signal);
        let end = client.push(|_| false).await.unwrap_err();
        assert!(end.0.contains("3001"), "the close code should be that of a shutdown: {end:?}");
        assert_eq!(process.ended().await, Some(0), "{signal}");
        assert!(!process.socket().exists(), "an orderly end removes the socket");
    }
}

#[tokio::test]
async fn secrets_survive_restarts() {
    let mut process = Process::start().await;
    let key = process.run(&["api-key"]).await.success();
    process.kill_and_restart().await;
    assert_eq!(process.run(&["api-key"]).await.success(), key);
}

#[tokio::test]
async fn sigterm_ends_a_start_that_waits_for_a_server() {
    // A server that accepts the connection and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://u@{}/d", silent.local_addr().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let mut starting = spawn(dir.path(), "127.0.0.1:0", &["--database-url".into(), url]);
    let (_connection, _) = silent.accept().await.unwrap();
    let pid = nix::unistd::Pid::from_raw(starting.id().unwrap().cast_signed());
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), starting.wait())
        .await
        .expect("it ends")
        .unwrap();
    assert_eq!(ended.code(), Some(0));
    assert!(!dir.path().join("s").exists(), "an interrupted start left its socket behind");
}

#[tokio::test]
async fn sqlite_url_is_relative_to_the_working_directory_and_creates_its_file() {
    let mut process = Process::start_with(&["--database-url", "sqlite://people.db"]).await;
    assert!(process.dir.path().join("people.db").exists() && !process.dir.path().join("data/webapp.db").exists());
    let password = std::fs::read_to_string(process.dir.path().join("data/admin-password")).unwrap();
    process.kill_and_restart().await;
    assert_eq!(sign_in(&process, password.trim()).await, 200);

    let dir = tempfile::tempdir().unwrap();
    let args = ["up", "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let output = run_in(dir.path(), &[&args[..], &["--database-url", "sqlite://no/such/people.db"]].concat()).await;
    assert_eq!(output.code, Some(1));
    assert!(
        output.stderr.contains("no/such/people.db") && output.stderr.contains("directory"),
        "{}",
        output.stderr
    );
    assert!(!dir.path().join("no").exists(), "the start created a directory");
}

#[tokio::test]
async fn stored_admin_password_opens_a_new_database() {
    let mut process = Process::start().await;
    let data = process.dir.path().join("data");
    let password = std::fs::read_to_string(data.join("admin-password")).unwrap();
    assert_eq!(sign_in(&process, password.trim()).await, 200);
    let log = std::fs::read_to_string(process.dir.path().join("log")).unwrap();
    assert!(!log.contains(password.trim()), "the password is in the log");
    process.kill().await;
    for entry in std::fs::read_dir(&data).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("webapp.db") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    process.kill_and_restart().await;
    assert_eq!(sign_in(&process, password.trim()).await, 200);
}

async fn sign_in(process: &Process, password: &str) -> u16 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let body = serde_json::json!({"name": "admin", "password": password}).to_string();
    let mut stream = tokio::net::TcpStream::connect(process.http()).await.unwrap();
    let request = format!(
        "POST /auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response.split(' ').nth(1).unwrap().parse().unwrap()
}
