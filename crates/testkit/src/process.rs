//! A child process of a test: ended with its handle, its output kept for the failure message.

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
    /// Starts `command` with its output in the file `log`. Panics with `install` when there is no such program.
    pub fn spawn(command: &mut Command, log: &Path, install: &str) -> Self {
        let file = File::options().create(true).append(true).open(log).expect("the test's directory is writable");
        let errors = file.try_clone().expect("an open file can be cloned");
        let program = command.get_program().to_owned();
        let child = command.stdin(Stdio::null()).stdout(file).stderr(errors).spawn();
        let child = child.unwrap_or_else(|e| panic!("cannot start {}: {e}; {install}", program.display()));
        Self { child, log: log.into() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("process ids fit");
        // A child that has exited and was not waited for still takes signals.
        let _ = signal::kill(Pid::from_raw(pid), signal);
    }

    /// Asks it to end, and ends it when it has not within ten seconds.
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

/// A port that was free a moment ago; whoever binds it must be ready to try another.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
    listener.local_addr().expect("a bound listener has an address").port()
}

pub fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}
