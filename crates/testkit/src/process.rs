//! A child process of a test: dropping the handle kills it, and its output is kept for failure messages.

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use tokio::time::Instant;

const STOP_DEADLINE: Duration = Duration::from_secs(10);

pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output appended to `log`. Panics with `install` when the program does not exist.
    pub fn spawn(command: &mut Command, log: &Path, install: &str) -> Self {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("cannot write to the test's directory");
        let errors = file.try_clone().expect("cannot clone the log's file handle");

        let program = command.get_program().to_owned();
        let child = command.stdin(Stdio::null()).stdout(file).stderr(errors).spawn();
        let child = child.unwrap_or_else(|e| panic!("cannot start {}: {e}; {install}", program.display()));
        Self { child, log: log.into() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("cannot wait for the child process")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("the process id exceeds i32");
        // An exited child that was not waited for is a zombie, which still accepts signals.
        let _ = signal::kill(Pid::from_raw(pid), signal);
    }

    /// Suspends the process with SIGSTOP, and waits until each of its threads stands still.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        let end = std::time::Instant::now() + STOP_DEADLINE;
        while !self.is_stopped() && std::time::Instant::now() < end {
            std::thread::yield_now();
        }
    }

    fn is_stopped(&self) -> bool {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.id()));
        threads.into_iter().flatten().flatten().all(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // The state follows the name, which is in brackets.
            stat.rsplit(')')
                .next()
                .is_none_or(|rest| rest.trim_start().starts_with('T'))
        })
    }

    /// Sends SIGTERM and waits up to ten seconds. The subsequent drop kills a process that has not exited.
    pub async fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let end = Instant::now() + STOP_DEADLINE;
        while self.exited().is_none() && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns a port that was free a moment ago. Another process may bind it first, so callers must retry.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("cannot bind a loopback port");
    listener
        .local_addr()
        .expect("cannot read the listener's address")
        .port()
}

pub fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}
