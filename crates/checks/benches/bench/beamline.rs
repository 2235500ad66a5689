//! Runs the release binary as a separate process.

use crate::Result;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub struct Beamline {
    child: Running,
    dir: tempfile::TempDir,
    pub http: String,
}

impl Beamline {
    pub fn start(settings: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("beamline.toml"), settings)?;
        Self::start_in(dir)
    }

    /// Restarts on the same data, so that the work of a first start (hashing a password) is not measured.
    pub fn start_again(self) -> Result<Self> {
        drop(self.child);
        Self::start_in(self.dir)
    }

    fn start_in(dir: tempfile::TempDir) -> Result<Self> {
        let mut command = command(dir.path())?;
        let addresses = ["--http", "127.0.0.1:0", "--ops", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
        // The log goes to a file, as it does where people run it.
        command
            .arg("up")
            .args(addresses)
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(dir.path().join("log"))?);

        let mut child = Running(command.spawn()?);
        let stdout = child.0.stdout.take().ok_or("the process has no standard output")?;

        for line in BufReader::new(stdout).lines() {
            if let Some(ready) = line?.strip_prefix("ready ") {
                let ready: serde_json::Value = serde_json::from_str(ready)?;
                let http = ready["http"].as_str().ok_or("no http address")?.to_string();
                return Ok(Self { child, dir, http });
            }
        }
        Err("beamline ended before it was ready".into())
    }

    pub fn token(&self, user: &str) -> Result<String> {
        let output = command(self.dir.path())?
            .args(["token", "--user", user, "--ttl", "1h"])
            .output()?;
        Ok(String::from_utf8(output.stdout)?.trim().to_string())
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn rss(&self) -> u64 {
        rss(self.child.0.id())
    }

    /// Bytes that the process has caused to be written to disk; 0 if they cannot be read.
    pub fn written(&self) -> u64 {
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.child.0.id())).unwrap_or_default();
        io.lines()
            .find_map(|line| line.strip_prefix("write_bytes: ")?.parse().ok())
            .unwrap_or(0)
    }
}

/// Kills the process when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The binary that `make bench` built beforehand, with its data and socket in `dir`.
fn command(dir: &Path) -> Result<Command> {
    let target = std::env::current_exe()?
        .ancestors()
        .nth(2)
        .map(PathBuf::from)
        .ok_or("no target directory")?;
    let binary = target.join("beamline");
    if !binary.exists() {
        return Err(format!("{} does not exist; run make bench, which builds it", binary.display()).into());
    }

    let mut command = Command::new(binary);
    command
        .current_dir(dir)
        .env("BEAMLINE_DATA_DIR", "data")
        .env("IPC_SOCKET_PATH", dir.join("s"));
    Ok(command)
}

/// Resident memory of a process in bytes; 0 if it cannot be read.
pub fn rss(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok())
        .unwrap_or(0)
        * 4096
}
