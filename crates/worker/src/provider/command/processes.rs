//! The processes of a run, wherever they went: also those that left its process group or lost their parent.
//!
//! This process is a child subreaper (`PR_SET_CHILD_SUBREAPER` in prctl(2)): a process whose parent has ended becomes
//! its child, and stays in sight. A process belongs to the run whose id is in its environment, which children inherit,
//! or whose program is its ancestor or leads its group.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::Pid;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

/// The variable with the run's id.
const RUN_ID: &str = "BEAMLINE_RUN_ID";
/// Time between SIGTERM and SIGKILL.
pub const GRACE: Duration = Duration::from_secs(2);
/// Pause between two looks at processes that are ending.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long killed processes may take to disappear. One that waits for a dead disk or device cannot be killed.
const KILLED_WITHIN: Duration = Duration::from_secs(5);
/// How often orphans that ended by themselves are reaped. Everybody else waits for their children at once, so one that
/// is dead at two looks is an orphan.
const REAP_EVERY: Duration = Duration::from_secs(1);

/// The programs of the runs, whose exit status belongs to their runs. Locked while a program is started.
static PROGRAMS: Mutex<BTreeSet<Pid>> = Mutex::new(BTreeSet::new());

/// Makes this process the parent of every process that a run leaves behind.
pub fn adopt_orphans() {
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        tracing::warn!(%error, "cannot become a subreaper; programs may leave processes behind");
    }
}

/// Reaps orphans that ended by themselves, until cancelled.
pub async fn reap(cancel: CancellationToken) {
    let mut dead = BTreeSet::new();
    while cancel
        .run_until_cancelled(tokio::time::sleep(REAP_EVERY))
        .await
        .is_some()
    {
        let seen = if has_children() {
            dead_children().await
        } else {
            BTreeSet::new()
        };
        let programs = PROGRAMS.lock();
        for (pid, _) in dead.intersection(&seen) {
            if !programs.contains(pid) {
                is_reaped(*pid);
            }
        }
        dead = seen;
    }
}

/// The processes of one run. Dropping it kills the program's process group, unless [`Self::end`] ended the run.
pub struct Processes {
    run_id: String,
    /// The program, which leads the group.
    program: Pid,
    /// Processes that were seen as the run's, with their start: later, their ancestors may be gone.
    known: BTreeMap<Pid, u64>,
    ended: bool,
}

impl Processes {
    /// Starts the program in a group of its own.
    pub fn start(command: &mut Command) -> io::Result<(Child, Self)> {
        let run_id = uuid::Uuid::now_v7().to_string();
        command.process_group(0).env(RUN_ID, &run_id);

        let mut programs = PROGRAMS.lock();
        let child = command.spawn()?;
        let id = child.id().expect("a child that was not waited for has an id");
        let program = Pid::from_raw(id.cast_signed());
        programs.insert(program);
        Ok((child, Self { run_id, program, known: BTreeMap::new(), ended: false }))
    }

    /// Ends what is left of the run: SIGTERM, and SIGKILL after [`GRACE`].
    pub async fn end(&mut self, child: &mut Child) {
        let started = Instant::now();
        let mut told = BTreeSet::new();
        loop {
            let exited = child.try_wait().is_ok_and(|status| status.is_some());
            let left = self.left(exited).await;
            let waited = started.elapsed();
            if exited && left.is_empty() {
                break;
            }
            if waited > GRACE + KILLED_WITHIN {
                let pids: Vec<i32> = left.iter().map(|process| process.pid.as_raw()).collect();
                tracing::error!(?pids, "processes of a run cannot be killed; look for what they wait for");
                break;
            }

            let signal = if waited < GRACE {
                Signal::SIGTERM
            } else {
                Signal::SIGKILL
            };
            self.signal(signal, exited, &left, &mut told);
            tokio::select! {
                _ = child.wait(), if !exited => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
        self.ended = true;
    }

    /// Sends the signal to the group and to those who left it. A process gets SIGTERM once: some take a second one for
    /// the wish to end without cleaning up.
    fn signal(&self, signal: Signal, exited: bool, left: &[Process], told: &mut BTreeSet<Pid>) {
        // The group as one, so that a shell does not see its command end and start the next one.
        let to_group = !exited && (signal == Signal::SIGKILL || told.insert(self.program));
        if to_group {
            // Fails if all of them have ended just now.
            let _ = killpg(self.program, signal);
        }

        for process in left.iter().filter(|process| !process.ended) {
            let is_first = told.insert(process.pid);
            let was_told = to_group && process.group == self.program;
            if signal == Signal::SIGKILL || (is_first && !was_told) {
                let _ = kill(process.pid, signal);
            }
        }
    }

    /// The processes of the run besides the program. Orphans that have ended are reaped, and left out.
    async fn left(&mut self, exited: bool) -> Vec<Process> {
        if exited && !has_children() {
            return Vec::new();
        }
        let mark = format!("{RUN_ID}={}", self.run_id);
        let (program, known) = (self.program, std::mem::take(&mut self.known));
        let look = move || of_run(&all(), program, exited, &mark, &known);
        let mut left = tokio::task::spawn_blocking(look).await.unwrap_or_default();

        self.known = left.iter().map(|process| (process.pid, process.start)).collect();
        left.retain(|process| !(process.ended && process.is_child() && is_reaped(process.pid)));
        left
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        if !self.ended {
            // Fails if all processes of the group have ended, which is fine.
            let _ = killpg(self.program, Signal::SIGKILL);
        }
        PROGRAMS.lock().remove(&self.program);
    }
}

/// A process, as `/proc/<pid>/stat` describes it (proc_pid_stat(5)).
#[derive(Debug, Clone)]
struct Process {
    pid: Pid,
    parent: Pid,
    group: Pid,
    /// In clock ticks since the boot. Together with the pid it names one process.
    start: u64,
    /// It waits to be reaped.
    ended: bool,
}

impl Process {
    /// `None` if the process is gone.
    fn read(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name of the program, in parentheses, may contain anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(Self {
            pid: Pid::from_raw(pid),
            ended: matches!(*fields.first()?, "Z" | "X"),
            parent: Pid::from_raw(fields.get(1)?.parse().ok()?),
            group: Pid::from_raw(fields.get(2)?.parse().ok()?),
            start: fields.get(19)?.parse().ok()?,
        })
    }

    fn is_child(&self) -> bool {
        self.parent == Pid::this()
    }

    /// Whether the process was started with `mark` in its environment, which is hidden if it is another user's.
    fn is_marked(&self, mark: &str) -> bool {
        let environment = std::fs::read(format!("/proc/{}/environ", self.pid)).unwrap_or_default();
        environment
            .split(|byte| *byte == 0)
            .any(|variable| variable == mark.as_bytes())
    }
}

/// All processes that this process can see.
fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(Process::read).collect()
}

/// The processes of the run whose program is, or was, `program`, without the program itself.
fn of_run(all: &[Process], program: Pid, exited: bool, mark: &str, known: &BTreeMap<Pid, u64>) -> Vec<Process> {
    let belongs = |process: &Process| {
        let is_known = known.get(&process.pid) == Some(&process.start);
        is_known || process.is_child() && (process.group == program || process.is_marked(mark))
    };
    let found = all.iter().filter(|process| belongs(process)).map(|process| process.pid);
    let mut found: BTreeSet<Pid> = found.collect();
    if !exited {
        found.insert(program);
    }

    // Children may be listed before their parents.
    loop {
        let children = all.iter().filter(|process| found.contains(&process.parent));
        let children: Vec<Pid> = children.map(|process| process.pid).collect();
        let before = found.len();
        found.extend(children);
        if found.len() == before {
            break;
        }
    }

    let others = all.iter().filter(|process| process.pid != program);
    others.filter(|process| found.contains(&process.pid)).cloned().collect()
}

/// The children that wait to be reaped, with their start.
async fn dead_children() -> BTreeSet<(Pid, u64)> {
    let all = tokio::task::spawn_blocking(all).await.unwrap_or_default();
    let dead = all.iter().filter(|process| process.is_child() && process.ended);
    dead.map(|process| (process.pid, process.start)).collect()
}

/// Whether this process has any child, running or not: a question that saves most looks at all processes.
fn has_children() -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(Id::All, flags) != Err(Errno::ECHILD)
}

fn is_reaped(pid: Pid) -> bool {
    waitpid(pid, Some(WaitPidFlag::WNOHANG)).is_ok()
}
