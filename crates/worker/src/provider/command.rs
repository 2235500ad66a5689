//! A provider that runs a program in its own process group, with the task on its standard input, and streams its
//! standard output.

pub mod processes;

use super::{Job, Limit, Outcome, Output};
use parking_lot::Mutex;
use processes::{GRACE, Processes};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command as Process};
use tokio_util::sync::CancellationToken;

/// Bytes of the end of standard error that the error message quotes.
const STDERR_MAX: usize = 4096;

pub struct Command {
    pub program: PathBuf,
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub output_max: usize,
}

enum End {
    Exited(ExitStatus),
    Failed(Outcome),
    Stopped,
    TimedOut,
}

impl Command {
    /// Runs the program until it exits, `limit` passes or `stop` is cancelled. All processes that it
    /// started have ended when this returns.
    pub async fn run(&self, job: &Job<'_>, output: &Output, limit: Limit, stop: &CancellationToken) -> Outcome {
        let (mut child, mut processes) = match Processes::start(&mut self.process(job)) {
            Ok(started) => started,
            Err(error) => {
                let text = format!("cannot start {}: {error}", self.program.display());
                return Outcome::failed("spawn_failed", text);
            }
        };
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            return Outcome::failed("spawn_failed", "the program has no pipes");
        };

        let input = serde_json::to_vec(job.task).expect("a task serializes to JSON");
        let feed = async move {
            // A program need not read its input, so a closed pipe is not an error.
            let _ = stdin.write_all(&input).await;
            drop(stdin);
        };
        let stderr_end = Mutex::new(Vec::new());
        let end = {
            let pipes = async {
                // An error of the output ends the run at once, without waiting for the other pipes.
                let rest = async { Ok(tokio::join!(feed, tail(stderr, &stderr_end))) };
                tokio::try_join!(stream(stdout, output, self.output_max), rest).map(drop)
            };
            tokio::select! {
                end = finish(&mut child, &mut processes, pipes) => end,
                () = stop.cancelled() => End::Stopped,
                () = tokio::time::sleep(limit.duration()) => End::TimedOut,
            }
        };

        processes.end(&mut child).await;

        match end {
            End::Exited(status) if status.success() => Outcome::text(output.text()),
            End::Exited(status) => {
                let stderr = String::from_utf8_lossy(&stderr_end.lock()).trim().to_string();
                Outcome::failed("exit_status", format!("{status}; standard error ended with: {stderr}"))
            }
            End::Failed(outcome) => outcome,
            End::Stopped => Outcome::cancelled(),
            End::TimedOut => Outcome::timed_out(limit),
        }
    }

    fn process(&self, job: &Job<'_>) -> Process {
        let mut process = Process::new(&self.program);
        process.args(&self.args).kill_on_drop(true);
        process
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());

        // This process's environment holds passwords of servers; the program gets only what the settings list.
        process.env_clear().envs(&self.env);
        process
            .env("BEAMLINE_REQUEST_ID", job.request_id)
            .env("BEAMLINE_TENANT_ID", job.tenant_id);
        process
    }
}

/// Waits until the program has exited and its pipes are closed. Processes that it left behind may hold the pipes open;
/// they are ended after a grace period.
async fn finish(child: &mut Child, processes: &mut Processes, pipes: impl Future<Output = std::io::Result<()>>) -> End {
    let mut pipes = std::pin::pin!(pipes);
    let failed = |error: std::io::Error| End::Failed(Outcome::failed("output", error.to_string()));
    let status = tokio::select! {
        read = &mut pipes => match read {
            Ok(()) => return child.wait().await.map_or_else(failed, End::Exited),
            Err(error) => return failed(error),
        },
        status = child.wait() => status,
    };

    let mut read = tokio::time::timeout(GRACE, &mut pipes).await;
    if read.is_err() {
        // A process that hides from its run may hold the pipes beyond its end.
        (read, ()) = tokio::join!(tokio::time::timeout(2 * GRACE, &mut pipes), processes.end(child));
    }
    match read {
        Ok(Err(error)) => failed(error),
        _ => status.map_or_else(failed, End::Exited),
    }
}

/// Publishes the program's output as text that is cut between characters only.
async fn stream(mut from: impl AsyncRead + Unpin, output: &Output, max: usize) -> std::io::Result<()> {
    let mut pending: Vec<u8> = Vec::new();
    let mut buffer = [0_u8; 4096];
    let mut total = 0;
    loop {
        let read = from.read(&mut buffer).await?;
        pending.extend_from_slice(&buffer[..read]);

        // At the end of the output no character can be completed any more.
        let whole = if read == 0 {
            pending.len()
        } else {
            whole_characters(&pending)
        };
        let piece = String::from_utf8_lossy(&pending[..whole]).into_owned();
        pending.drain(..whole);

        total += piece.len();
        if total > max {
            return Err(std::io::Error::other(format!("the program wrote more than {max} bytes and was ended")));
        }
        output.push(&piece).await;
        if read == 0 {
            return Ok(());
        }
    }
}

/// The number of bytes that can be published without cutting a character that may still be completed.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Ok(_) => bytes.len(),
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        // Invalid UTF-8: more bytes would not complete it.
        Err(_) => bytes.len(),
    }
}

/// Keeps the last [`STDERR_MAX`] bytes.
async fn tail(mut from: impl AsyncRead + Unpin, kept: &Mutex<Vec<u8>>) {
    let mut buffer = [0_u8; 1024];
    while let Ok(read) = from.read(&mut buffer).await {
        if read == 0 {
            return;
        }
        let mut kept = kept.lock();
        kept.extend_from_slice(&buffer[..read]);
        let over = kept.len().saturating_sub(STDERR_MAX);
        kept.drain(..over);
    }
}

#[cfg(test)]
mod tests {
    use super::whole_characters;

    #[test]
    fn text_is_cut_between_characters() {
        let euro = "a€".as_bytes();
        for (length, expected) in [(1, 1), (2, 1), (3, 1), (4, 4)] {
            assert_eq!(whole_characters(&euro[..length]), expected);
        }
        assert_eq!(whole_characters(&[0xff, b'a']), 2);
    }
}
