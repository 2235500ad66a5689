//! What a service manager does with the process: hands it sockets, hears of it, watches it, has it read its settings again.

use crate::journey::get;
use crate::process::{Manager, Process};
use nix::sys::signal::Signal;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;
use testkit::eventually;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixDatagram, UnixListener, UnixStream};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_connection_made_before_the_start_is_served_and_the_socket_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("given");
    let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let inode = std::fs::metadata(&path).unwrap().ino();
    let mut early = UnixStream::connect(&path).await.unwrap();
    let ping = frame(wire::ipc::FrameType::Ping);
    early.write_all(&ping).await.unwrap();

    let given = Some(("beamline.socket", socket.try_clone().unwrap().into()));
    let mut process = Process::start_under(Manager { given, ..Manager::default() }, dir).await;
    let mut pong = vec![0; ping.len()];
    early.read_exact(&mut pong).await.unwrap();
    assert_eq!(pong, frame(wire::ipc::FrameType::Pong));
    assert_eq!(process.socket(), path);
    assert!(!process.dir.path().join("s").exists(), "none of its own is made");

    process.signal(Signal::SIGTERM);
    assert_eq!(process.ended().await, Some(0));
    assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode, "its file is the service manager's");
    UnixStream::connect(&path)
        .await
        .expect("who comes now waits for the next start");
}

#[tokio::test]
async fn the_http_port_is_taken_over_by_its_name() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let manager = Manager { given: Some(("http", socket.into())), ..Manager::default() };
    let process = Process::start_under(manager, tempfile::tempdir().unwrap()).await;
    assert_eq!(process.http(), address);
    assert_eq!(get(&format!("http://{address}/health")).await.0, 200);
}

#[tokio::test]
async fn a_socket_of_another_kind_is_refused() {
    let unix = |dir: &Path| -> OwnedFd {
        std::os::unix::net::UnixListener::bind(dir.join("given"))
            .unwrap()
            .into()
    };
    let tcp = |_: &Path| -> OwnedFd { std::net::TcpListener::bind("127.0.0.1:0").unwrap().into() };
    let file = |dir: &Path| -> OwnedFd { std::fs::File::create(dir.join("given")).unwrap().into() };
    let datagrams = |dir: &Path| -> OwnedFd {
        std::os::unix::net::UnixDatagram::bind(dir.join("given"))
            .unwrap()
            .into()
    };
    let connected = |_: &Path| -> OwnedFd { std::os::unix::net::UnixStream::pair().unwrap().0.into() };
    let cases: [(&str, &dyn Fn(&Path) -> OwnedFd, &str); 6] = [
        ("gateway", &tcp, "not a valid unix stream socket"),
        ("gateway", &file, "not a socket"),
        ("", &datagrams, "not a valid unix stream socket"),
        ("gateway", &connected, "not a listening Unix stream socket"),
        ("http", &unix, "not a valid tcp socket"),
        ("ops", &file, "not a socket"),
    ];
    for (name, make, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Manager { given: Some((name, make(dir.path()))), ..Manager::default() }.spawn(dir.path());
        let ended = tokio::time::timeout(PATIENCE, child.wait())
            .await
            .expect("it ends")
            .unwrap();
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(ended.code(), Some(1), "{name}: {log}");
        assert!(log.contains(expected) && log.contains(name), "{name}: {log}");
    }
}

/// What the process says of itself.
struct Ear(UnixDatagram);

impl Ear {
    fn new(dir: &Path) -> (Self, (&'static str, String)) {
        let path = dir.join("notify");
        (Self(UnixDatagram::bind(&path).unwrap()), ("NOTIFY_SOCKET", path.display().to_string()))
    }

    /// The next word that holds `expected`, whatever came before.
    async fn hears(&self, expected: &str) -> String {
        let heard = async {
            loop {
                let mut bytes = [0; 4096];
                let length = self.0.recv(&mut bytes).await.unwrap();
                let text = String::from_utf8(bytes[..length].to_vec()).unwrap();
                if text.contains(expected) {
                    return text;
                }
            }
        };
        tokio::time::timeout(PATIENCE, heard)
            .await
            .unwrap_or_else(|_| panic!("{expected} was not said"))
    }

    /// What is there to be heard now.
    fn now(&self) -> usize {
        std::iter::from_fn(|| self.0.try_recv(&mut [0; 4096]).ok()).count()
    }
}

#[tokio::test]
async fn it_says_when_it_serves_reloads_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let (ear, variable) = Ear::new(dir.path());
    let manager = Manager { environment: vec![variable], ..Manager::default() };
    let mut process = Process::start_under(manager, dir).await;
    assert!(
        ear.hears("READY=1")
            .await
            .contains(&format!("STATUS=gateway, router, worker, cluster, webapp on http://{}", process.http()))
    );
    for _ in 0..2 {
        process.signal(Signal::SIGHUP);
        let reloading = ear.hears("RELOADING=1").await;
        assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
        ear.hears("READY=1").await;
    }
    process.signal(Signal::SIGTERM);
    ear.hears("STOPPING=1").await;
    assert_eq!(process.ended().await, Some(0));
}

#[tokio::test]
async fn the_watchdog_is_told_only_while_the_gateway_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (ear, variable) = Ear::new(dir.path());
    let environment = vec![variable, ("WATCHDOG_USEC", "1000000".to_string())];
    let process = Process::start_under(Manager { environment, ..Manager::default() }, dir).await;
    for _ in 0..3 {
        ear.hears("WATCHDOG=1").await;
    }

    // In the gateway's place one that takes connections and says nothing, as if it hung.
    let [socket, aside] = [process.socket(), process.dir.path().join("aside")];
    std::fs::rename(&socket, &aside).unwrap();
    let deaf = UnixListener::bind(&socket).unwrap();
    let asked = async || {
        tokio::time::timeout(PATIENCE, deaf.accept())
            .await
            .expect("it asks")
            .unwrap()
            .0
    };
    let mut questions = vec![asked().await];
    // Said before it asked the deaf one.
    ear.now();
    for _ in 0..4 {
        questions.push(asked().await);
    }
    assert_eq!(ear.now(), 0, "it does not answer, and yet it was said to live");

    std::fs::rename(&aside, &socket).unwrap();
    ear.hears("WATCHDOG=1").await;
    assert!(process.log().contains("the self-check failed"));
}

#[tokio::test]
async fn sighup_changes_limits_while_connections_are_open() {
    let process = Process::start_with_settings("[gateway]\nmax_connections = 2\nmax_in_flight = 5\n").await;
    let client = client::Client::connect(&process.socket()).await.unwrap();
    let limits = async || client.capabilities().await.unwrap().limits;
    assert_eq!(limits().await.max_in_flight, 5);
    assert_eq!(mode(&process), 0o600);

    let settings = "[gateway]\nmax_connections = 1\nmax_in_flight = 3\nallowed_uids = [\"12345\"]\n\
                    [http]\nlisten = \"127.0.0.1:1\"\n[worker]\nslots = 3\n";
    reload(&process, settings, "done", 1).await;
    assert_eq!((limits().await.max_connections, limits().await.max_in_flight), (1, 3));
    assert_eq!(mode(&process), 0o666, "those in allowed_uids reach it");
    let second = client::Client::connect(&process.socket()).await.unwrap();
    assert!(matches!(second.ping().await, Err(client::Error::Refused(_) | client::Error::Closed)));
    client.ping().await.unwrap();
    let log = process.log();
    let named = log
        .lines()
        .find(|line| line.contains("needs a restart"))
        .unwrap_or_else(|| panic!("{log}"));
    // The address is a flag of this process, which the file does not change.
    assert!(
        named.contains("worker.slots") && !named.contains("http.listen") && !named.contains("max_in_flight"),
        "{named}"
    );

    reload(
        &process,
        "[gateway]\nmax_in_flight = 7\nmax_connections = \"many\"\n[log]\nlevel = \"info\"\n",
        "refused",
        1,
    )
    .await;
    assert!(process.log().contains("beamline.toml:3"), "{}", process.log());
    assert_eq!((limits().await.max_connections, limits().await.max_in_flight), (1, 3), "nothing has changed");

    reload(&process, "[gateway]\nmax_connections = 3\n[log]\nlevel = \"debug\"\n", "done", 2).await;
    assert_eq!(limits().await.max_in_flight, 1000, "what is no longer set has its default");
    client::Client::connect(&process.socket())
        .await
        .unwrap()
        .ping()
        .await
        .unwrap();
    assert_eq!(mode(&process), 0o600);
    eventually(PATIENCE, async || process.log().contains("IPC connection ended")).await;
}

#[tokio::test]
async fn sighup_takes_a_new_api_key() {
    let process = Process::start().await;
    let old = process.run(&["api-key"]).await.success();
    let new = "0123456789abcdef0123456789abcdef";
    std::fs::write(process.dir.path().join("data/api-key"), new).unwrap();
    process.signal(Signal::SIGHUP);
    eventually(PATIENCE, async || decide(&process, new).await != 401).await;
    assert_eq!(decide(&process, old.trim()).await, 401);
}

fn mode(process: &Process) -> u32 {
    std::fs::metadata(process.socket()).unwrap().permissions().mode() & 0o777
}

/// Has ended with this outcome when it returns, so many times in all.
async fn reload(process: &Process, settings: &str, outcome: &str, times: u32) {
    std::fs::write(process.dir.path().join("beamline.toml"), settings).unwrap();
    process.signal(Signal::SIGHUP);
    let line = format!("beamline_reloads_total{{outcome=\"{outcome}\"}} {times}");
    eventually(PATIENCE, async || {
        get(&format!("http://{}/metrics", process.ops()))
            .await
            .1
            .contains(&line)
    })
    .await;
}

async fn decide(process: &Process, key: &str) -> u16 {
    let mut stream = tokio::net::TcpStream::connect(process.http()).await.unwrap();
    let request = format!(
        "POST /api/v1/routes/decide HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-API-Key: {key}\r\nContent-Length: 2\r\n\r\n{{}}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response.split(' ').nth(1).unwrap().parse().unwrap()
}

fn frame(kind: wire::ipc::FrameType) -> Vec<u8> {
    let mut bytes = bytes::BytesMut::new();
    wire::ipc::Frame::new(wire::ipc::Version::V1, kind, Vec::new()).encode(&mut bytes);
    bytes.to_vec()
}
