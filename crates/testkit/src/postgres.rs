//! Runs a real PostgreSQL server in its own temporary directory.

use crate::process::{Process, free_port};
use nix::sys::signal::{self, Signal};
use nix::unistd::{Pid, User, chown, geteuid};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::Instant;

const INSTALL: &str = "install it with scripts/install-test-deps.sh (package postgresql)";
const START_DEADLINE: Duration = Duration::from_secs(20);
const START_ATTEMPTS: usize = 8;
/// Where Debian installs the server's programs, by version and outside of PATH.
const DEBIAN: &str = "/usr/lib/postgresql";

pub struct PostgresServer {
    dir: TempDir,
    /// The user to run the server as when the tests run as root, since PostgreSQL refuses to.
    owner: Option<User>,
    port: u16,
    process: Option<Process>,
}

impl PostgresServer {
    pub async fn start() -> Self {
        let dir = TempDir::new().expect("cannot create a temporary directory");
        let owner = geteuid().is_root().then(|| {
            let known = User::from_name("postgres").ok().flatten();
            known.unwrap_or_else(|| panic!("the user postgres does not exist; {INSTALL}"))
        });
        if let Some(owner) = &owner {
            chown(dir.path(), Some(owner.uid), Some(owner.gid))
                .expect("cannot change the owner of the test's directory");
        }

        let mut server = Self { dir, owner, port: 0, process: None };
        let mut init = server.command("initdb");
        init.args(["--username=beamline", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--pgdata"]);
        let made = init
            .arg(server.data())
            .output()
            .unwrap_or_else(|e| panic!("cannot start initdb: {e}; {INSTALL}"));
        assert!(made.status.success(), "initdb failed:\n{}", String::from_utf8_lossy(&made.stderr));

        let mut log = String::new();
        // Another process may take the port before the server binds it.
        for _ in 0..START_ATTEMPTS {
            server.port = free_port();
            match server.run().await {
                Ok(()) => return server,
                Err(text) => log = text,
            }
        }
        panic!("postgres did not start:\n{log}");
    }

    /// `postgres://beamline@127.0.0.1:<port>/postgres`
    pub fn url(&self) -> String {
        format!("postgres://beamline@127.0.0.1:{}/postgres", self.port)
    }

    /// Kills the server and its backend processes with SIGKILL.
    pub fn kill(&mut self) {
        self.signal_all(Signal::SIGKILL);
        self.process = None;
    }

    /// Kills the server and starts it again on the same port and directory.
    pub async fn restart(&mut self) {
        self.kill();
        if let Err(log) = self.run().await {
            panic!("postgres did not start again:\n{log}");
        }
    }

    /// Suspends the server with SIGSTOP: connections stay open, but nothing answers.
    pub fn pause(&self) {
        self.signal_all(Signal::SIGSTOP);
    }

    pub fn resume(&self) {
        self.signal_all(Signal::SIGCONT);
    }

    fn signal_all(&self, signal: Signal) {
        let Some(process) = &self.process else { return };
        // List the children before the signal: afterwards they have another parent, and would survive.
        let id = process.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();

        process.signal(signal);
        for child in children.split_ascii_whitespace().filter_map(|child| child.parse().ok()) {
            // A failure means that the process has already exited.
            let _ = signal::kill(Pid::from_raw(child), signal);
        }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(binary(program));
        command.current_dir(self.dir.path());
        if let Some(owner) = &self.owner {
            command.uid(owner.uid.as_raw()).gid(owner.gid.as_raw());
        }
        command
    }

    async fn run(&mut self) -> Result<(), String> {
        let mut command = self.command("postgres");
        // -F turns fsync off: tests kill the process but not the machine, so nothing needs to reach the disk.
        command.args(["-F", "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]);
        command.arg("-p").arg(self.port.to_string()).arg("-D").arg(self.data());

        let log = self.dir.path().join("log");
        let before = std::fs::read_to_string(&log).unwrap_or_default().len();
        let mut process = Process::spawn(&mut command, &log, INSTALL);

        let end = Instant::now() + START_DEADLINE;
        while !process.log()[before..].contains("ready to accept connections") {
            if process.exited().is_some() || Instant::now() > end {
                return Err(process.log());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.process = Some(process);
        Ok(())
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Finds the program on PATH, else in the newest version that Debian installed.
fn binary(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut installed: Vec<(u32, PathBuf)> = std::fs::read_dir(DEBIAN)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .collect();
    installed.sort_by_key(|(version, _)| std::cmp::Reverse(*version));

    std::env::split_paths(&path)
        .chain(installed.into_iter().map(|(_, bin)| bin))
        .map(|bin: PathBuf| bin.join(program))
        .find(|file: &PathBuf| Path::is_file(file))
        .unwrap_or_else(|| panic!("{program} is neither on PATH nor in {DEBIAN}; {INSTALL}"))
}
