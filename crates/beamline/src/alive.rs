//! Whether this process serves: asked from outside, as a client would.

use bytes::BytesMut;
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use wire::ipc::{Decoder, Frame, FrameType, Version};

/// The way in that is tried.
#[derive(Debug, Clone)]
pub enum Door {
    /// The gateway's socket, which our own user may always use.
    Gateway(PathBuf),
    /// Where there is no gateway: the operations port.
    Operations(SocketAddr),
}

impl Door {
    /// Ends when there is an answer; how long that may take, the caller knows.
    pub async fn answers(&self) -> Result<(), String> {
        match self {
            Self::Gateway(path) => gateway(path).await.map_err(|e| format!("the gateway's socket: {e}")),
            Self::Operations(address) => operations(*address)
                .await
                .map_err(|e| format!("the operations port: {e}")),
        }
    }
}

/// Any frame will do: a gateway that is full refuses, and is alive.
async fn gateway(path: &PathBuf) -> std::io::Result<()> {
    let mut stream = UnixStream::connect(path).await?;
    let mut bytes = BytesMut::new();
    Frame::new(Version::V1, FrameType::Ping, Vec::new()).encode(&mut bytes);
    // One that refuses may have closed already; what it said can still be read.
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
        Err(std::io::Error::other("it does not say that it lives"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, UnixListener};

    /// What the door says to one who finds this behind it.
    async fn behind_gateway(says: &'static [u8]) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let answers = async { listener.accept().await.unwrap().0.write_all(says).await.unwrap() };
        let door = Door::Gateway(path);
        tokio::join!(door.answers(), answers).0.is_ok()
    }

    async fn behind_operations(says: &'static [u8]) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let door = Door::Operations(listener.local_addr().unwrap());
        let answers = async {
            let mut stream = listener.accept().await.unwrap().0;
            stream.read_buf(&mut BytesMut::new()).await.unwrap();
            stream.write_all(says).await.unwrap();
        };
        tokio::join!(door.answers(), answers).0.is_ok()
    }

    #[tokio::test]
    async fn any_frame_is_a_sign_of_life_and_nothing_else() {
        let mut refusal = BytesMut::new();
        Frame::new(Version::V1, FrameType::ResponseError, "{}").encode(&mut refusal);
        let refusal: &'static [u8] = Vec::leak(refusal.to_vec());
        assert!(behind_gateway(refusal).await, "one that is full lives");
        assert!(!behind_gateway(&refusal[..5]).await);
        assert!(!behind_gateway(b"").await);
        assert!(!behind_gateway(b"HTTP/1.1 200 OK").await);
        assert!(Door::Gateway("/nonexistent".into()).answers().await.is_err());
    }

    #[tokio::test]
    async fn the_operations_port_must_say_200() {
        assert!(behind_operations(b"HTTP/1.1 200 OK\r\n\r\n").await);
        assert!(!behind_operations(b"HTTP/1.1 503 Service Unavailable\r\n\r\n").await);
        assert!(!behind_operations(b"").await);
    }
}
