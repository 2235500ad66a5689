//! Runs real redis-servers: a single one, or a cluster of three primaries with one replica each.

use crate::process::{Process, free_port, is_free};
use nix::sys::signal::Signal;
use std::io;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

const INSTALL: &str = "install it with scripts/install-test-deps.sh (package redis-server)";
const START_DEADLINE: Duration = Duration::from_secs(20);
const COMMAND_DEADLINE: Duration = Duration::from_secs(5);
const CLUSTER_DEADLINE: Duration = Duration::from_secs(40);
const START_ATTEMPTS: usize = 8;
/// The distance of a node's cluster port from its client port, as Redis chooses it.
const CLUSTER_PORT_OFFSET: u16 = 10_000;
const CLUSTER_NODES: usize = 6;

pub struct RedisServer {
    dir: TempDir,
    arguments: Vec<String>,
    port: u16,
    process: Option<Process>,
}

impl RedisServer {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts a server with additional arguments. Unless they include `--appendonly yes`, a restart loses the data.
    pub async fn start_with(arguments: &[&str]) -> Self {
        Self::start_on(free_port, arguments).await
    }

    async fn start_on(port: impl Fn() -> u16, arguments: &[&str]) -> Self {
        let dir = TempDir::new().expect("cannot create a temporary directory");
        let arguments = arguments.iter().map(ToString::to_string).collect();
        let mut server = Self { dir, arguments, port: 0, process: None };
        let mut log = String::new();
        // Another process may take the port before the server binds it.
        for _ in 0..START_ATTEMPTS {
            server.port = port();
            match server.run().await {
                Ok(()) => return server,
                Err(text) => log = text,
            }
        }
        panic!("redis-server did not start:\n{log}");
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// `redis://127.0.0.1:<port>`
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
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
        if let Err(log) = self.run().await {
            panic!("redis-server did not start again:\n{log}");
        }
    }

    /// Suspends the server with SIGSTOP: connections stay open, but nothing answers.
    pub fn pause(&self) {
        self.process.iter().for_each(Process::pause);
    }

    pub fn resume(&self) {
        self.process.iter().for_each(|process| process.signal(Signal::SIGCONT));
    }

    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Sends one command, written as words, and returns the reply: the text of a bulk string, else the raw line.
    pub async fn command(&self, words: &str) -> io::Result<String> {
        let exchange = async {
            let mut stream = BufReader::new(TcpStream::connect(("127.0.0.1", self.port)).await?);
            stream.write_all(format!("{words}\r\n").as_bytes()).await?;

            let mut line = String::new();
            stream.read_line(&mut line).await?;
            let line = line.trim_end();
            match line.strip_prefix('$').and_then(|size| size.parse::<usize>().ok()) {
                Some(size) => {
                    let mut text = vec![0; size];
                    stream.read_exact(&mut text).await?;
                    Ok(String::from_utf8_lossy(&text).into_owned())
                }
                None if line.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
                None => Ok(line.into()),
            }
        };

        timeout(COMMAND_DEADLINE, exchange)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    async fn run(&mut self) -> Result<(), String> {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--daemonize", "no"]);
        command
            .arg("--port")
            .arg(self.port.to_string())
            .arg("--dir")
            .arg(self.dir.path());
        command.args(&self.arguments);

        let mut process = Process::spawn(&mut command, &self.dir.path().join("log"), INSTALL);
        let end = Instant::now() + START_DEADLINE;
        loop {
            // Check for an exit first: if this server failed to bind the port, another one may answer on it.
            if process.exited().is_some() || Instant::now() > end {
                return Err(process.log());
            }
            if process.log().contains("Ready to accept connections") && self.command("PING").await.is_ok() {
                self.process = Some(process);
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

pub struct RedisCluster {
    nodes: Vec<RedisServer>,
}

impl RedisCluster {
    /// Starts six nodes; returns once every slot is served and every primary has its replica.
    pub async fn start() -> Self {
        let arguments =
            ["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "1000"];
        let mut nodes = Vec::new();
        for _ in 0..CLUSTER_NODES {
            nodes.push(RedisServer::start_on(cluster_port, &arguments).await);
        }

        let mut create = tokio::process::Command::new("redis-cli");
        create
            .args(["--cluster", "create"])
            .args(nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())));
        create
            .args(["--cluster-replicas", "1", "--cluster-yes"])
            .kill_on_drop(true);
        let made = timeout(CLUSTER_DEADLINE, create.output())
            .await
            .expect("redis-cli did not create the cluster in time");
        let made = made.unwrap_or_else(|e| panic!("cannot start redis-cli: {e}; {INSTALL}"));
        assert!(
            made.status.success(),
            "redis-cli failed to create the cluster:\n{}",
            String::from_utf8_lossy(&made.stdout)
        );

        let cluster = Self { nodes };
        cluster.wait_until_whole().await;
        cluster
    }

    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(RedisServer::url).collect()
    }

    pub fn node(&mut self, index: usize) -> &mut RedisServer {
        &mut self.nodes[index]
    }

    /// The indexes of the running primaries.
    pub async fn primaries(&self) -> Vec<usize> {
        let mut found = Vec::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let role = if node.is_running() {
                node.command("INFO replication").await
            } else {
                continue;
            };
            if role.is_ok_and(|text| text.contains("role:master")) {
                found.push(index);
            }
        }
        found
    }

    /// Kills a primary with SIGKILL and returns its index.
    pub async fn kill_primary(&mut self) -> usize {
        let index = *self
            .primaries()
            .await
            .first()
            .expect("the cluster has no running primary");
        self.nodes[index].kill();
        index
    }

    pub async fn restart(&mut self, index: usize) {
        self.nodes[index].restart().await;
        self.wait_until_whole().await;
    }

    /// Waits until all running nodes see every slot served, three primaries run, and every replica is connected.
    pub async fn wait_until_whole(&self) {
        crate::eventually(CLUSTER_DEADLINE, || async {
            for node in self.nodes.iter().filter(|node| node.is_running()) {
                let state = node.command("CLUSTER INFO").await.unwrap_or_default();
                let role = node.command("INFO replication").await.unwrap_or_default();
                let linked = role.contains("role:master") || role.contains("master_link_status:up");
                if !linked || !state.contains("cluster_state:ok") || !state.contains("cluster_slots_ok:16384") {
                    return false;
                }
            }
            self.primaries().await.len() == CLUSTER_NODES / 2
        })
        .await;
    }
}

/// Returns a free port whose cluster port is free too.
fn cluster_port() -> u16 {
    loop {
        let port = free_port();
        if port.checked_add(CLUSTER_PORT_OFFSET).is_some_and(is_free) {
            return port;
        }
    }
}
