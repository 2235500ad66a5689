//! Does the minimum that any program between a Unix socket and a bus must do: read, pass on, write.

use crate::Result;
use bytes::{Bytes, BytesMut};
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use wire::subjects;

const V2_HEADER: usize = 20;

/// Sends every byte back. The server stops when `tasks` is shut down.
pub fn echo(socket: &Path, tasks: &mut JoinSet<()>) -> Result {
    serve(socket, tasks, async |mut stream| {
        let mut buffer = BytesMut::with_capacity(16 * 1024);
        while stream.read_buf(&mut buffer).await.is_ok_and(|read| read > 0) {
            if stream.write_all(&buffer.split()).await.is_err() {
                return;
            }
        }
    })
}

/// Sends each frame's payload to NATS as a request and the answer back in a frame. A connection has one request at a
/// time.
pub fn relay(socket: &Path, client: async_nats::Client, tasks: &mut JoinSet<()>) -> Result {
    serve(socket, tasks, move |mut stream| {
        let client = client.clone();
        async move {
            let mut buffer = BytesMut::with_capacity(16 * 1024);
            while stream.read_buf(&mut buffer).await.is_ok_and(|read| read > 0) {
                let length = buffer
                    .first_chunk::<4>()
                    .map_or(usize::MAX, |head| u32::from_be_bytes(*head) as usize);
                if buffer.len() < length {
                    continue;
                }

                let mut frame = buffer.split_to(length);
                let payload: Bytes = frame.split_off(V2_HEADER).freeze();
                let answer = client
                    .request_with_headers(subjects::DECIDE, super::headers(), payload)
                    .await;
                let Ok(answer) = answer else { return };

                let length = u32::try_from(V2_HEADER + answer.payload.len()).expect("the answer is short");
                frame[..4].copy_from_slice(&length.to_be_bytes());
                frame[5] = wire::ipc::FrameType::ResponseOk as u8;
                frame.extend_from_slice(&answer.payload);
                if stream.write_all(&frame).await.is_err() {
                    return;
                }
            }
        }
    })
}

fn serve<F: Future<Output = ()> + Send + 'static>(
    socket: &Path,
    tasks: &mut JoinSet<()>,
    each: impl Fn(UnixStream) -> F + Send + Sync + 'static,
) -> Result {
    let listener = UnixListener::bind(socket)?;
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(each(stream));
        }
    });
    Ok(())
}
