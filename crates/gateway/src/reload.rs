//! Settings that change while the gateway runs.

use crate::{Config, Gateway, Live, socket};
use std::sync::Arc;

/// A hand on a gateway that runs.
#[derive(Clone)]
pub struct Control {
    gateway: Arc<Gateway>,
    file: Option<socket::File>,
}

impl Control {
    pub(crate) fn new(gateway: Arc<Gateway>, file: Option<socket::File>) -> Self {
        Self { gateway, file }
    }

    /// Takes effect at once, also for open connections: what is in flight goes on, and what is above a limit that came
    /// down ends before anything new begins. The socket stays where it is.
    pub fn reload(&self, mut config: Config) {
        let gateway = &self.gateway;
        let before = gateway.live.load_full();
        config.socket = before.socket.clone();
        if (config.breaker, config.request_timeout) != (before.breaker, before.request_timeout) {
            gateway.router.configure(config.breaker, config.request_timeout);
        }
        let shared = !config.allowed_uids.is_empty();
        if let Some(file) = &self.file
            && let Err(error) = file.share(shared)
        {
            tracing::error!(%error, shared, "cannot change who may reach the gateway's socket");
        }
        // What holds a part of an old budget keeps it until it ends, which is soon.
        gateway
            .live
            .store(Arc::new(Live::new(config, Some(&before), gateway.uid)));
    }
}

#[cfg(test)]
mod tests {
    use crate::{Config, Peer, bind, session};
    use bytes::BytesMut;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_util::sync::CancellationToken;
    use wire::ipc::{Decoder, ErrorCode, Frame, FrameType, Version};

    /// Tests run as root, whom nobody shuts out; so the peer is made up here.
    #[tokio::test]
    async fn a_user_who_is_shut_out_gets_no_more_on_an_open_connection() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let with = |uid: u32| Config {
            socket: dir.path().join("s"),
            allowed_uids: vec![uid],
            ..Config::default()
        };
        let bound = bind(with(12345), bus).await.unwrap();
        let (control, (mut client, stream)) = (bound.control(), tokio::net::UnixStream::pair().unwrap());
        let session = session::run(bound.gateway.clone(), stream, Peer { uid: 12345 }, CancellationToken::new());
        let session = tokio::spawn(session);
        // No router runs, so who is let through is told so.
        for (allowed, expected) in
            [(12345, ErrorCode::Unavailable), (23456, ErrorCode::Forbidden), (12345, ErrorCode::Unavailable)]
        {
            control.reload(with(allowed));
            let mut bytes = BytesMut::new();
            Frame::new(Version::V1, FrameType::TaskQuery, r#"{"task_id":"t"}"#).encode(&mut bytes);
            client.write_all(&bytes).await.unwrap();
            bytes.clear();
            let answer = loop {
                assert_ne!(client.read_buf(&mut bytes).await.unwrap(), 0);
                if let Some(frame) = Decoder.decode(&mut bytes).unwrap() {
                    break frame;
                }
            };
            let answer: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap();
            assert_eq!(answer["error"]["code"], expected as u64, "{answer}");
        }
        drop(client);
        session.await.unwrap();
    }
}
