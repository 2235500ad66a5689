//! The process under a service manager: socket activation, notifications, watchdog, reloads.

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
async fn connection_from_before_the_start_is_served_and_the_socket_file_stays() {
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
    assert!(!process.dir.path().join("s").exists(), "the process created a socket of its own");

    process.signal(Signal::SIGTERM);
    assert_eq!(process.ended().await, Some(0));
    assert_eq!(
        std::fs::metadata(&path).unwrap().ino(),
        inode,
        "the process replaced the service manager's socket file"
    );
    UnixStream::connect(&path)
        .await
        .expect("the service manager still listens");
}

#[tokio::test]
async fn http_listener_is_taken_over_by_its_name() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let manager = Manager { given: Some(("http", socket.into())), ..Manager::default() };
    let process = Process::start_under(manager, tempfile::tempdir().unwrap()).await;
    assert_eq!(process.http(), address);
    assert_eq!(get(&format!("http://{address}/health")).await.0, 200);
}

#[tokio::test]
async fn socket_of_the_wrong_kind_is_refused() {
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

/// Receives the notifications of the process.
struct Notifications(UnixDatagram);

impl Notifications {
    fn new(dir: &Path) -> (Self, (&'static str, String)) {
        let path = dir.join("notify");
        (Self(UnixDatagram::bind(&path).unwrap()), ("NOTIFY_SOCKET", path.display().to_string()))
    }

    /// Returns the next notification that contains `expected`, and discards those before it.
    async fn next_with(&self, expected: &str) -> String {
        let received = async {
            loop {
                let mut bytes = [0; 4096];
                let length = self.0.recv(&mut bytes).await.unwrap();
                let text = String::from_utf8(bytes[..length].to_vec()).unwrap();
                if text.contains(expected) {
                    return text;
                }
            }
        };
        tokio::time::timeout(PATIENCE, received)
            .await
            .unwrap_or_else(|_| panic!("{expected} was not notified"))
    }

    /// Discards the notifications that have arrived, and returns their number.
    fn discard(&self) -> usize {
        std::iter::from_fn(|| self.0.try_recv(&mut [0; 4096]).ok()).count()
    }
}

#[tokio::test]
async fn process_notifies_when_it_serves_reloads_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let (notifications, variable) = Notifications::new(dir.path());
    let manager = Manager { environment: vec![variable], ..Manager::default() };
    let mut process = Process::start_under(manager, dir).await;
    assert!(
        notifications
            .next_with("READY=1")
            .await
            .contains(&format!("STATUS=gateway, router, worker, cluster, webapp on http://{}", process.http()))
    );

    for _ in 0..2 {
        process.signal(Signal::SIGHUP);
        let reloading = notifications.next_with("RELOADING=1").await;
        assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
        notifications.next_with("READY=1").await;
    }

    process.signal(Signal::SIGTERM);
    notifications.next_with("STOPPING=1").await;
    assert_eq!(process.ended().await, Some(0));
}

#[tokio::test]
async fn watchdog_is_notified_only_while_the_gateway_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (notifications, variable) = Notifications::new(dir.path());
    let environment = vec![variable, ("WATCHDOG_USEC", "1000000".to_string())];
    let process = Process::start_under(Manager { environment, ..Manager::default() }, dir).await;
    for _ in 0..3 {
        notifications.next_with("WATCHDOG=1").await;
    }

    // Replace the gateway by a socket that accepts connections and never answers, like a process that hangs.
    let [socket, aside] = [process.socket(), process.dir.path().join("aside")];
    std::fs::rename(&socket, &aside).unwrap();
    let silent = UnixListener::bind(&socket).unwrap();

    let asked = async || {
        tokio::time::timeout(PATIENCE, silent.accept())
            .await
            .expect("it asks")
            .unwrap()
            .0
    };

    let mut questions = vec![asked().await];
    // Discard what was sent before the first failing check.
    notifications.discard();
    for _ in 0..4 {
        questions.push(asked().await);
    }
    assert_eq!(notifications.discard(), 0, "the watchdog was notified although the gateway does not answer");

    std::fs::rename(&aside, &socket).unwrap();
    notifications.next_with("WATCHDOG=1").await;
    process.logged("the self-check failed").await;
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
    assert_eq!(mode(&process), 0o666, "the users in allowed_uids can connect");
    let second = client::Client::connect(&process.socket()).await.unwrap();
    assert!(matches!(second.ping().await, Err(client::Error::Refused(_) | client::Error::Closed)));
    client.ping().await.unwrap();

    let log = process.logged("needs a restart").await;
    let named = log
        .lines()
        .find(|line| line.contains("needs a restart"))
        .unwrap_or_else(|| panic!("{log}"));
    // A flag of this process sets the address, which the file cannot change.
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
    process.logged("beamline.toml:3").await;
    assert_eq!(
        (limits().await.max_connections, limits().await.max_in_flight),
        (1, 3),
        "a refused reload changed a setting"
    );

    reload(&process, "[gateway]\nmax_connections = 3\n[log]\nlevel = \"debug\"\n", "done", 2).await;
    assert_eq!(limits().await.max_in_flight, 1000, "a setting that is no longer in the file returns to its default");
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
async fn sighup_takes_over_a_new_api_key() {
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

/// Reloads, and waits until reloads with this outcome have happened so many `times` in all.
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
        "POST /api/v1/routes/decide HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-API-Key: {key}\r\n\
         Content-Length: 2\r\n\r\n{{}}"
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
