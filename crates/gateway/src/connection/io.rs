//! The futures that a connection waits for on its socket, its budget and its timers.

use crate::byte_budget::Share;
use futures_util::future::BoxFuture;
use std::cell::RefCell;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

const SCRATCH_SIZE: usize = 64 * 1024;
/// How often a socket is checked for a hangup while it is not read.
const HANGUP_POLL: Duration = Duration::from_millis(100);

thread_local! {
    /// The receive buffer of all connections on this thread, so that an idle connection holds no buffer of its own.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_SIZE]);
}

/// Waits for bytes and passes them to `take`. Returns their number, 0 at the end of the stream. Cancel-safe.
pub async fn receive(reader: &mut OwnedReadHalf, mut take: impl FnMut(&[u8])) -> std::io::Result<usize> {
    std::future::poll_fn(|context| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *reader).poll_read(context, &mut buffer))?;
            if !buffer.filled().is_empty() {
                take(buffer.filled());
            }
            Poll::Ready(Ok(buffer.filled().len()))
        })
    })
    .await
}

/// Passes bytes that have already arrived to `take`, without waiting. Returns whether there were any.
pub fn read_once(reader: &OwnedReadHalf, mut take: impl FnMut(&[u8])) -> bool {
    SCRATCH.with_borrow_mut(|scratch| match reader.try_read(scratch) {
        Ok(read) if read > 0 => {
            take(&scratch[..read]);
            true
        }
        Ok(_) | Err(_) => false,
    })
}

/// Waits for the share of the receive budget; forever if none is awaited.
pub async fn granted(budget: &mut Option<BoxFuture<'static, Share>>) -> Share {
    match budget {
        Some(share) => share.await,
        None => std::future::pending().await,
    }
}

/// Waits until `due`; forever if it is `None`.
pub async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// Waits until the client has closed both directions. Used while its frames are not read, when no read reports it.
pub async fn gone(stream: &OwnedWriteHalf) {
    loop {
        match stream.ready(Interest::READABLE | Interest::WRITABLE).await {
            Ok(ready) if ready.is_write_closed() => return,
            Err(_) => return,
            // Unread bytes keep the socket readable, so readiness would return at once: poll instead.
            Ok(_) => tokio::time::sleep(HANGUP_POLL).await,
        }
    }
}
