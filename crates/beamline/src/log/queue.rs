//! Log lines on their way to stderr: a buffer of bounded size, and the thread that writes it.
//!
//! Whoever logs copies the line into the buffer and goes on. A pipe that nobody reads or a slow disk holds up this
//! thread only; once the buffer is full, lines are dropped and counted.

use parking_lot::{Condvar, Mutex};
use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tracing_subscriber::fmt::MakeWriter;

/// Bytes of the lines that may wait: about 4,000 lines. As much again may be with the thread.
const WAITING_MAX: usize = 1 << 20;
/// How long the thread waits for further lines, to write them with the same call.
const GATHER: Duration = Duration::from_millis(2);
/// When to try again to write to a stderr that does not block and is full.
const RETRY_AFTER: Duration = Duration::from_millis(10);

/// A handle to the queue; every clone writes to the same one.
#[derive(Clone)]
pub struct Queue(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Wakes the thread.
    wake: Condvar,
    /// Wakes those who wait for a flush.
    written: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// Lines that were accepted, ever.
    accepted: u64,
    /// Lines that the thread is done with, ever.
    done: u64,
    /// Lines that were not written, ever: no room, or stderr failed.
    dropped: u64,
    /// The thread writes without waiting for further lines: somebody waits for a flush.
    hurried: bool,
    closed: bool,
}

/// The thread that writes the lines. Dropping it ends the queue.
pub struct Writer {
    queue: Queue,
    thread: Option<JoinHandle<()>>,
    /// How long the drop waits for the last lines.
    patience: Duration,
}

impl Writer {
    /// Starts a thread that writes to `to`.
    pub fn start(to: impl Write + Send + 'static, patience: Duration) -> io::Result<Self> {
        let queue = Queue(Arc::new(Shared { state: Mutex::default(), wake: Condvar::new(), written: Condvar::new() }));
        let shared = queue.0.clone();
        let thread = std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_all(&shared, to))?;
        Ok(Self { queue, thread: Some(thread), patience })
    }

    pub fn queue(&self) -> &Queue {
        &self.queue
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue.0.state.lock().closed = true;
        // A thread that stderr still holds up ends with the process.
        if self.queue.flush(self.patience)
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

impl Queue {
    /// Adds one line, which ends with a line feed. Never waits for stderr.
    pub fn push(&self, line: &[u8]) {
        let mut state = self.0.state.lock();
        if state.closed || state.waiting.len() + line.len() > WAITING_MAX {
            state.dropped += 1;
            drop(state);
            metrics::counter!("beamline_log_dropped_total", "reason" => "full").increment(1);
            return;
        }

        let idle = state.waiting.is_empty();
        state.waiting.extend_from_slice(line);
        state.accepted += 1;
        drop(state);
        if idle {
            self.0.wake.notify_one();
        }
    }

    /// Waits until everything pushed so far is written, at most for `patience`. Returns whether it is.
    pub fn flush(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut state = self.0.state.lock();
        let last = state.accepted;
        while state.done < last {
            state.hurried = true;
            self.0.wake.notify_one();
            if self.0.written.wait_until(&mut state, end).timed_out() {
                return state.done >= last;
            }
        }
        self.0.wake.notify_one();
        true
    }

    /// The lines dropped so far, if there is room again to say so.
    pub fn dropped(&self) -> Option<u64> {
        let state = self.0.state.lock();
        (state.waiting.len() < WAITING_MAX / 2).then_some(state.dropped)
    }
}

impl MakeWriter<'_> for Queue {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Each call is one whole line, as `tracing_subscriber::fmt` writes it.
impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread: writes until the queue is closed and empty.
fn write_all(shared: &Shared, mut to: impl Write) {
    let mut batch = Vec::new();
    loop {
        let mut state = shared.state.lock();
        while state.waiting.is_empty() {
            if state.closed {
                return;
            }
            shared.wake.wait(&mut state);
        }
        if !state.hurried && !state.closed {
            shared.wake.wait_for(&mut state, GATHER);
        }
        std::mem::swap(&mut state.waiting, &mut batch);
        let accepted = state.accepted;
        drop(state);

        let failed = write(shared, &mut to, &batch);
        batch.clear();

        let mut state = shared.state.lock();
        if failed {
            state.dropped += accepted - state.done;
            metrics::counter!("beamline_log_dropped_total", "reason" => "failed").increment(accepted - state.done);
        }
        state.done = accepted;
        state.hurried = false;
        shared.written.notify_all();
    }
}

/// Writes the batch, however long it takes. Returns whether this failed.
fn write(shared: &Shared, to: &mut impl Write, mut batch: &[u8]) -> bool {
    while !batch.is_empty() {
        match to.write(batch) {
            Ok(0) => return true,
            Ok(written) => batch = &batch[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut state = shared.state.lock();
                shared.wake.wait_for(&mut state, RETRY_AFTER);
            }
            Err(_) => return true,
        }
    }
    to.flush().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    const SOON: Duration = Duration::from_secs(10);

    /// Passes on every write, as soon as it is told to.
    struct Gate {
        go: Receiver<()>,
        written: SyncSender<Vec<u8>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.go.recv().is_err() {
                return Err(ErrorKind::BrokenPipe.into());
            }
            let _ = self.written.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn gate() -> (Gate, SyncSender<()>, Receiver<Vec<u8>>) {
        let ((go, gone), (written, read)) = (sync_channel(64), sync_channel(64));
        (Gate { go: gone, written }, go, read)
    }

    #[test]
    fn lines_are_dropped_and_counted_while_nothing_is_written() {
        let (gate, go, read) = gate();
        let writer = Writer::start(gate, SOON).unwrap();
        let queue = writer.queue();

        // The first line is with the thread when the others arrive, or waits with them.
        queue.push(b"first\n");
        let line = [b'x'; 1024];
        for _ in 0..2000 {
            queue.push(&line);
        }
        assert_eq!(queue.dropped(), None, "there is no room to report it");
        assert!(!queue.flush(Duration::from_millis(50)), "nothing was written");

        for _ in 0..3 {
            go.send(()).unwrap();
        }
        assert!(queue.flush(SOON));
        let written: Vec<u8> = read.try_iter().flatten().collect();
        assert!(written.starts_with(b"first\n"));
        let lines = (written.len() - "first\n".len()) / line.len();
        assert!((1000..=1024).contains(&lines), "{lines}");
        assert_eq!(queue.dropped(), Some(2000 - lines as u64));
        drop(go);
    }

    #[test]
    fn lines_of_one_moment_are_one_write_and_the_drop_writes_the_last_ones() {
        let (gate, go, read) = gate();
        let writer = Writer::start(gate, SOON).unwrap();
        for _ in 0..4 {
            go.send(()).unwrap();
        }
        for n in 0..10 {
            writer.queue().push(format!("{n}\n").as_bytes());
        }
        drop(writer);
        let writes: Vec<Vec<u8>> = read.try_iter().collect();
        assert_eq!(writes.concat(), b"0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n");
        assert!(writes.len() <= 2, "{}", writes.len());
    }

    #[test]
    fn drop_gives_up_on_a_stderr_that_takes_nothing() {
        let (gate, go, _read) = gate();
        let writer = Writer::start(gate, Duration::from_millis(50)).unwrap();
        writer.queue().push(b"lost\n");
        drop(writer);
        drop(go);
    }

    #[test]
    fn lines_that_stderr_refuses_are_counted() {
        let (gate, go, _read) = gate();
        drop(go);
        let writer = Writer::start(gate, SOON).unwrap();
        writer.queue().push(b"one\n");
        assert!(writer.queue().flush(SOON));
        assert_eq!(writer.queue().dropped(), Some(1));
    }
}
