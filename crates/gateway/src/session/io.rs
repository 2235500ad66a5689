//! What a session waits for on its socket and its clocks.

use bytes::BytesMut;
use std::cell::RefCell;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Instant;

const SCRATCH_SIZE: usize = 64 * 1024;
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

thread_local! {
    /// Where the sessions of a thread receive: one that waits holds no buffer of its own.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_SIZE]);
}

/// Waits for bytes and appends them; 0 at the end. Nothing is lost when it is dropped before.
pub async fn receive(reader: &mut OwnedReadHalf, input: &mut BytesMut) -> std::io::Result<usize> {
    std::future::poll_fn(|context| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *reader).poll_read(context, &mut buffer))?;
            input.extend_from_slice(buffer.filled());
            Poll::Ready(Ok(buffer.filled().len()))
        })
    })
    .await
}

/// At this moment, or never.
pub async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Returns when the client has hung up for good; watched while its frames are not read.
pub async fn gone(stream: &OwnedWriteHalf) {
    loop {
        match stream.ready(Interest::READABLE | Interest::WRITABLE).await {
            Ok(ready) if ready.is_write_closed() => return,
            Err(_) => return,
            // Not read now, so its readiness says nothing new: looked at again soon.
            Ok(_) => tokio::time::sleep(LOOK_INTERVAL).await,
        }
    }
}
