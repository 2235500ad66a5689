//! Starts, kills and restarts the real binary.

use serde_json::Value;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

/// A start or an end of the process that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Process {
    pub dir: tempfile::TempDir,
    pub ready: Value,
    child: Child,
    extra: Vec<String>,
}

impl Process {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts with further arguments after `up`, in which `{dir}` stands for the test's directory.
    pub async fn start_with(extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display().to_string();
        let extra: Vec<String> = extra.iter().map(|arg| arg.replace("{dir}", &path)).collect();
        let (child, ready) = launch(dir.path(), "127.0.0.1:0", &extra).await;
        Self { dir, ready, child, extra }
    }

    /// Starts with a settings file.
    pub async fn start_with_settings(settings: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("beamline.toml"), settings).unwrap();
        let (child, ready) = launch(dir.path(), "127.0.0.1:0", &[]).await;
        Self { dir, ready, child, extra: Vec::new() }
    }

    /// Starts with a settings file and another stderr than the file `log`.
    pub async fn start_logging_to(stderr: impl Into<Stdio>, settings: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("beamline.toml"), settings).unwrap();
        let child = up(command(dir.path()), dir.path(), "127.0.0.1:0", &[])
            .stderr(stderr)
            .spawn()
            .unwrap();
        let (child, ready) = until_ready(child, dir.path()).await;
        Self { dir, ready, child, extra: Vec::new() }
    }

    /// Starts with a settings file. No file of the process can exceed `blocks` of 512 bytes until [`Process::unlimit`]:
    /// writes beyond them fail as on a full disk.
    pub async fn start_limited(settings: &str, blocks: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("beamline.toml"), settings).unwrap();
        // The signal of the limit would end the process.
        let script = format!("trap '' XFSZ; ulimit -S -f {blocks}; exec \"$@\"");
        let mut shell = surroundings(Command::new("/bin/sh"), dir.path());
        shell.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_beamline")]);
        let child = up(shell, dir.path(), "127.0.0.1:0", &[]).spawn().unwrap();
        let (child, ready) = until_ready(child, dir.path()).await;
        Self { dir, ready, child, extra: Vec::new() }
    }

    /// Lifts the limit of [`Process::start_limited`].
    pub async fn unlimit(&self) {
        let pid = self.child.id().unwrap().to_string();
        let lifted = Command::new("prlimit")
            .args(["--pid", &pid, "--fsize=unlimited"])
            .status();
        assert!(lifted.await.unwrap().success());
    }

    /// Starts like a service manager, in an existing directory.
    pub async fn start_under(manager: Manager, dir: tempfile::TempDir) -> Self {
        let (child, ready) = until_ready(manager.spawn(dir.path()), dir.path()).await;
        Self { dir, ready, child, extra: Vec::new() }
    }

    /// The whole lines of the log so far. It is written beside the work, so a line may be a moment late.
    pub fn log(&self) -> String {
        let mut log = std::fs::read_to_string(self.dir.path().join("log")).unwrap();
        log.truncate(log.rfind('\n').map_or(0, |end| end + 1));
        log
    }

    /// Waits for a line that contains `text`, and returns the log with it.
    pub async fn logged(&self, text: &str) -> String {
        testkit::eventually(PATIENCE, async || self.log().contains(text)).await;
        self.log()
    }

    /// Kills the process with SIGKILL.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Kills the process with SIGKILL, and starts it with the same data directory and HTTP port.
    pub async fn kill_and_restart(&mut self) {
        self.kill().await;
        let http = self.http().to_string();
        let (child, ready) = launch(self.dir.path(), &http, &self.extra).await;
        self.child = child;
        self.ready = ready;
    }

    pub fn http(&self) -> &str {
        self.ready["http"].as_str().unwrap()
    }

    pub fn ops(&self) -> &str {
        self.ready["ops"].as_str().unwrap()
    }

    pub fn socket(&self) -> PathBuf {
        self.ready["socket"].as_str().unwrap().into()
    }

    pub fn pid(&self) -> u32 {
        self.child.id().expect("the process has not been waited for")
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().unwrap().cast_signed());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits for the process to end, and returns its exit code.
    pub async fn ended(&mut self) -> Option<i32> {
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("the process ends")
            .unwrap()
            .code()
    }

    /// Runs another subcommand with this process's data directory and socket.
    pub async fn run(&self, args: &[&str]) -> Output {
        run_in(self.dir.path(), args).await
    }
}

pub struct Output {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!(self.code, Some(0), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout
    }
}

/// Runs the binary to its end in `dir`.
pub async fn run_in(dir: &Path, args: &[&str]) -> Output {
    let output = command(dir).args(args).output();
    let output = tokio::time::timeout(PATIENCE, output)
        .await
        .expect("the command ends")
        .unwrap();
    Output {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The descriptor and variables that a service manager passes to a process.
#[derive(Default)]
pub struct Manager {
    /// The name of descriptor 3, and the descriptor.
    pub given: Option<(&'static str, OwnedFd)>,
    pub environment: Vec<(&'static str, String)>,
}

impl Manager {
    /// Starts `up` without waiting until it is ready. A shell moves the descriptor to number 3 and then becomes the
    /// process, so that LISTEN_PID is right.
    pub fn spawn(self, dir: &Path) -> Child {
        const SHELL: &str = "exec 3<&0 </dev/null; export LISTEN_PID=$$; exec \"$@\"";
        let Some((name, given)) = self.given else {
            return up(command(dir), dir, "127.0.0.1:0", &[])
                .envs(self.environment)
                .spawn()
                .unwrap();
        };
        let mut shell = surroundings(Command::new("/bin/sh"), dir);
        shell.args(["-c", SHELL, "sh", env!("CARGO_BIN_EXE_beamline")]);
        let mut up = up(shell, dir, "127.0.0.1:0", &[]);
        up.env("LISTEN_FDS", "1")
            .env("LISTEN_FDNAMES", name)
            .envs(self.environment);
        up.stdin(Stdio::from(given)).spawn().unwrap()
    }
}

/// Sends a POST with the server's API key, and returns status line, headers and body of the answer.
pub async fn post(http: &str, path: &str, key: &str, body: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(http).await.unwrap();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\nX-API-Key: {key}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response
}

fn command(dir: &Path) -> Command {
    surroundings(Command::new(env!("CARGO_BIN_EXE_beamline")), dir)
}

fn surroundings(mut command: Command, dir: &Path) -> Command {
    command
        .current_dir(dir)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin");
    command
        .env("BEAMLINE_DATA_DIR", "data")
        .env("IPC_SOCKET_PATH", dir.join("s"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Starts `up` without waiting until it is ready.
pub fn spawn(dir: &Path, http: &str, extra: &[String]) -> Child {
    up(command(dir), dir, http, extra).spawn().unwrap()
}

fn up(mut command: Command, dir: &Path, http: &str, extra: &[String]) -> Command {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"))
        .unwrap();
    command
        .args(["up", "--http", http, "--ops", "127.0.0.1:0", "--grpc", "127.0.0.1:0"])
        .args(extra)
        .stderr(log);
    command
}

async fn launch(dir: &Path, http: &str, extra: &[String]) -> (Child, Value) {
    until_ready(spawn(dir, http, extra), dir).await
}

async fn until_ready(mut child: Child, dir: &Path) -> (Child, Value) {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = tokio::time::timeout(PATIENCE, async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if let Some(json) = line.strip_prefix("ready ") {
                return serde_json::from_str(json).unwrap();
            }
        }
        panic!("the process ended before it was ready:\n{}", std::fs::read_to_string(dir.join("log")).unwrap());
    });
    let ready = ready.await.expect("ready in time");
    (child, ready)
}
