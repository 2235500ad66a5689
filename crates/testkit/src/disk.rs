//! Disks that fail: a small one in a mount namespace of its own, which can be full or read-only, and errors of the disk
//! for a running process.

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

const INSTALL: &str = "install it with scripts/install-test-deps.sh";
/// The system calls that write to a disk.
const WRITES: &str = "write,pwrite64,pwritev,ftruncate,fallocate";
const SYNCS: &str = "fsync,fdatasync";

/// A file system in memory that only the processes started with [`SmallDisk::command`] see.
pub struct SmallDisk {
    dir: TempDir,
    /// Holds the namespace; it ends with its standard input, so no test leaves it behind.
    holder: Child,
}

impl SmallDisk {
    pub fn new(kib: usize) -> Self {
        let dir = TempDir::new().expect("cannot create a temporary directory");
        let mount = format!("mount -t tmpfs -o size={kib}k none \"$0\" && echo mounted && exec cat >/dev/null");
        let holder = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", &mount])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut holder = holder.expect("unshare is part of util-linux");

        let mut said = String::new();
        let stdout = holder.stdout.take().expect("the standard output is a pipe");
        BufReader::new(stdout).read_line(&mut said).expect("the output is text");
        assert_eq!(said.trim(), "mounted", "a user namespace with a mount of its own is needed");
        Self { dir, holder }
    }

    /// Where the processes on the disk find it.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A command that runs on the disk, in its directory, with the process id of the child that is spawned.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--preserve-credentials", "--user", "--mount", "--target"])
            .arg(self.holder.id().to_string())
            .args(["--", "sh", "-c", "cd \"$0\" && exec \"$@\""])
            .arg(self.path())
            .arg(program);
        command
    }

    /// Fills the disk, except for this much.
    pub fn fill(&self, left_kib: u64) {
        let mut ballast = std::fs::File::create(self.ballast()).expect("the ballast can be created");
        while ballast.write_all(&[0; 512]).is_ok() {}
        let len = ballast.metadata().expect("an open file has metadata").len();
        ballast
            .set_len(len.saturating_sub(left_kib * 1024))
            .expect("a file can be shortened");
    }

    /// Gives back what [`SmallDisk::fill`] took.
    pub fn free(&self) {
        std::fs::remove_file(self.ballast()).expect("the disk was filled");
    }

    /// Makes the disk read-only, or writable again. Fails while a file is open for writing, as everywhere on Linux.
    pub fn remount(&self, read_only: bool) -> bool {
        let option = if read_only { "remount,ro" } else { "remount,rw" };
        let mounted = self.command("mount").args(["-o", option]).arg(self.path()).output();
        mounted.expect("mount can be started").status.success()
    }

    /// As this process finds it.
    fn ballast(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        let inside = self.path().strip_prefix("/").expect("the path is absolute");
        root.join(inside).join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// An error of the disk that a running process meets: until this is dropped, some of its system calls on some files
/// fail. It is strace that makes them fail.
pub struct DiskFault(Child);

impl DiskFault {
    /// Every write fails with an I/O error.
    pub fn writes(pid: u32, files: &[&Path]) -> Self {
        Self::begin(pid, WRITES, files)
    }

    /// Every sync fails with an I/O error.
    pub fn syncs(pid: u32, files: &[&Path]) -> Self {
        Self::begin(pid, SYNCS, files)
    }

    fn begin(pid: u32, calls: &str, files: &[&Path]) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-o", "/dev/null", "-e", &format!("trace={calls}")]);
        command.args(["-e", &format!("inject={calls}:error=EIO"), "-p", &pid.to_string()]);
        for file in files {
            command.arg("-P").arg(file);
        }
        let strace = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut strace = strace.unwrap_or_else(|error| panic!("cannot start strace: {error}; {INSTALL}"));

        let mut stderr = BufReader::new(strace.stderr.take().expect("the standard error is a pipe"));
        let mut said = String::new();
        while !said.contains("attached") {
            let read = stderr.read_line(&mut said).expect("strace writes text");
            assert!(read > 0, "strace cannot attach; it may take root, or kernel.yama.ptrace_scope = 0: {said}");
        }
        // Later lines are about threads that come and go; a full pipe would stop strace. The thread ends with it.
        std::thread::spawn(move || stderr.read_to_end(&mut Vec::new()));
        Self(strace)
    }
}

impl Drop for DiskFault {
    fn drop(&mut self) {
        // At this signal, strace lets the process go before it ends.
        let _ = signal::kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}
