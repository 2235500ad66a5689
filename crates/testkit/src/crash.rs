//! Crashes of a store: a child process that is killed while it writes, and files as a power failure would leave them.

use crate::SmallDisk;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The prefix of the lines that a child reports, because libtest also writes to its standard output.
const PREFIX: &str = "report: ";
/// The atomic unit of a disk in bytes.
const SECTOR: usize = 512;
/// The write-ahead log of SQLite changes these bytes of its header when it starts over.
const WAL_SALT: std::ops::Range<usize> = 16..24;

/// A xorshift generator, so that a seed reproduces a test.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number from 0 up to, but without, `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A child process that writes what it is ordered to, and reports what it is about to do and what was acknowledged.
pub struct Victim {
    child: Child,
    orders: ChildStdin,
    reports: BufReader<ChildStdout>,
}

impl Victim {
    /// Runs this ignored test of the calling test program in a child process, in the directory `dir`.
    pub fn start(test: &str, dir: &Path) -> Self {
        let mut command = Command::new(Self::program());
        command.current_dir(dir);
        Self::spawn(command, test)
    }

    /// As [`Victim::start`], in the directory of a small disk.
    pub fn start_on(test: &str, disk: &SmallDisk) -> Self {
        Self::spawn(disk.command(Self::program()), test)
    }

    fn program() -> PathBuf {
        std::env::current_exe().expect("a test program has a path")
    }

    fn spawn(mut command: Command, test: &str) -> Self {
        let mut child = command
            .args(["--exact", test, "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test program can be started");
        let orders = child.stdin.take().expect("the child's standard input is a pipe");
        let reports = child.stdout.take().expect("the child's standard output is a pipe");
        Self { child, orders, reports: BufReader::new(reports) }
    }

    pub fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").expect("the child reads its orders");
    }

    /// The next report; `None` after the child has ended.
    pub fn report(&mut self) -> Option<String> {
        let mut line = String::new();
        loop {
            line.clear();
            // A child that was killed may leave part of a line. What it would have reported counts as not reported.
            let read = self.reports.read_line(&mut line).expect("reports are text");
            if read == 0 || !line.ends_with('\n') {
                return None;
            }
            if let Some(report) = line.trim_end().strip_prefix(PREFIX) {
                return Some(report.to_string());
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills the process with SIGKILL. Reports that it made before can still be read.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.kill();
    }
}

/// In the child: the next order; `None` if the parent has ended or there is none.
pub fn order() -> Option<String> {
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line).ok()?;
    (read > 0).then(|| line.trim_end().to_string())
}

/// In the child: reports a line, at once and whole.
pub fn report(line: &str) {
    let mut out = std::io::stdout().lock();
    // Fails only if the parent has ended.
    let _ = out.write_all(format!("\n{PREFIX}{line}\n").as_bytes());
    let _ = out.flush();
}

/// A SQLite database and its write-ahead log.
#[derive(Clone, PartialEq)]
pub struct Files {
    pub database: Vec<u8>,
    pub wal: Vec<u8>,
}

impl Files {
    pub fn read(database: &Path) -> Self {
        let read = |path: &Path| std::fs::read(path).unwrap_or_default();
        Self { database: read(database), wal: read(&wal(database)) }
    }

    pub fn write(&self, database: &Path) {
        std::fs::write(database, &self.database).expect("the directory can be written");
        std::fs::write(wal(database), &self.wal).expect("the directory can be written");
    }

    /// Files that a power failure may leave. `self` was on disk; `after` was written later and not known to be synced.
    /// Any sectors of it may be missing, except those that SQLite's own syncs order: the log is on disk before the
    /// database changes, and the database before the log starts over.
    pub fn after_power_failure(&self, after: &Self, random: &mut Random) -> Self {
        let salt = |files: &Self| files.wal.get(WAL_SALT).map(<[u8]>::to_vec);
        if salt(self) != salt(after) {
            let mut wal = torn(&self.wal, &after.wal, random);
            // The header is synced before the first frame is overwritten.
            let header = SECTOR.min(after.wal.len());
            wal.resize(wal.len().max(header), 0);
            wal[..header].copy_from_slice(&after.wal[..header]);
            return Self { database: after.database.clone(), wal };
        }
        if random.below(2) == 0 {
            return Self {
                database: self.database.clone(),
                wal: torn(&self.wal, &after.wal, random),
            };
        }
        Self {
            database: torn(&self.database, &after.database, random),
            wal: after.wal.clone(),
        }
    }
}

fn wal(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// Replaces some of the sectors in which both differ by those of `after`. New sectors may also hold zeros or garbage, and
/// garbage may follow the end.
fn torn(before: &[u8], after: &[u8], random: &mut Random) -> Vec<u8> {
    let longest = after.len().max(before.len());
    let len = before.len() + random.below((longest - before.len()) as u64 + 1) as usize;
    let mut file = before.to_vec();
    file.resize(len, 0);

    // Few, about half, or nearly all of the new sectors are there.
    let kept = [1, 5, 9][random.below(3) as usize];
    for start in (0..len.min(after.len())).step_by(SECTOR) {
        let end = (start + SECTOR).min(len).min(after.len());
        let is_new = start >= before.len();
        if random.below(10) < kept {
            file[start..end].copy_from_slice(&after[start..end]);
        } else if is_new && random.below(2) == 0 {
            file[start..end].fill_with(|| random.below(256) as u8);
        }
    }

    if random.below(3) == 0 {
        let garbage = random.below(4096);
        file.extend((0..garbage).map(|_| random.below(256) as u8));
    }
    file
}
