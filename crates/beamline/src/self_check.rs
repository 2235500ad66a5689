//! The self-check behind the watchdog: connects to this process as a client would.

use bytes::BytesMut;
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use wire::ipc::{Decoder, Frame, FrameType, Version};

/// The endpoint that the self-check connects to.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// The gateway's socket, to which the process's own user may always connect.
    Gateway(PathBuf),
    /// The operations port, in a process without a gateway.
    Operations(SocketAddr),
}

impl Endpoint {
    /// Waits for an answer; the error says what failed. The caller sets the timeout.
    pub async fn answers(&self) -> Result<(), String> {
        match self {
            Self::Gateway(path) => gateway(path).await.map_err(|e| format!("the gateway's socket: {e}")),
            Self::Operations(address) => operations(*address)
                .await
                .map_err(|e| format!("the operations port: {e}")),
        }
    }
}

/// Accepts any frame as an answer: a gateway at its limit refuses the connection, and is alive.
async fn gateway(path: &PathBuf) -> std::io::Result<()> {
    let mut stream = UnixStream::connect(path).await?;
    let mut bytes = BytesMut::new();
    Frame::new(Version::V1, FrameType::Ping, Vec::new()).encode(&mut bytes);
    // A gateway that refuses may already have closed the connection; its frame can still be read.
    let _ = stream.write_all(&bytes).await;

    bytes.clear();
    loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if Decoder.decode(&mut bytes).map_err(std::io::Error::other)?.is_some() {
            return Ok(());
        }
    }
}

async fn operations(address: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .await?;

    let mut answer = Vec::new();
    stream.take(64 * 1024).read_to_end(&mut answer).await?;
    if answer.starts_with(b"HTTP/1.1 200 ") {
        Ok(())
    } else {
        Err(std::io::Error::other("health check did not return 200"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, UnixListener};

    /// Whether the check passes against a socket that sends `says`.
    async fn behind_gateway(says: &'static [u8]) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let answers = async { listener.accept().await.unwrap().0.write_all(says).await.unwrap() };
        let endpoint = Endpoint::Gateway(path);
        tokio::join!(endpoint.answers(), answers).0.is_ok()
    }

    async fn behind_operations(says: &'static [u8]) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint::Operations(listener.local_addr().unwrap());
        let answers = async {
            let mut stream = listener.accept().await.unwrap().0;
            stream.read_buf(&mut BytesMut::new()).await.unwrap();
            stream.write_all(says).await.unwrap();
        };
        tokio::join!(endpoint.answers(), answers).0.is_ok()
    }

    #[tokio::test]
    async fn gateway_check_passes_on_any_whole_frame_only() {
        let mut refusal = BytesMut::new();
        Frame::new(Version::V1, FrameType::ResponseError, "{}").encode(&mut refusal);
        let refusal: &'static [u8] = Vec::leak(refusal.to_vec());
        assert!(behind_gateway(refusal).await, "a gateway at its limit is alive");
        assert!(!behind_gateway(&refusal[..5]).await);
        assert!(!behind_gateway(b"").await);
        assert!(!behind_gateway(b"HTTP/1.1 200 OK").await);
        assert!(Endpoint::Gateway("/nonexistent".into()).answers().await.is_err());
    }

    #[tokio::test]
    async fn operations_check_passes_on_status_200_only() {
        assert!(behind_operations(b"HTTP/1.1 200 OK\r\n\r\n").await);
        assert!(!behind_operations(b"HTTP/1.1 503 Service Unavailable\r\n\r\n").await);
        assert!(!behind_operations(b"").await);
    }
}
