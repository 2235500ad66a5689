//! Reloads the settings of a running gateway.

use crate::{Config, Shared, socket};
use std::sync::Arc;

/// A handle that reloads the settings of a running gateway.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
    file: Option<socket::File>,
}

impl Control {
    pub(crate) fn new(shared: Arc<Shared>, file: Option<socket::File>) -> Self {
        Self { shared, file }
    }

    /// Takes effect at once, also for open connections. Requests in flight continue; while more of them are in flight
    /// than a lowered limit allows, new ones are refused. The socket's path does not change.
    pub fn reload(&self, mut config: Config) {
        let Shared { admission, upstream, .. } = &*self.shared;
        {
            let before = admission.settings();
            config.socket = before.socket.clone();
            // Configuring the breaker resets its open time, so an unchanged configuration is not applied again.
            if (config.breaker, config.request_timeout) != (before.breaker, before.request_timeout) {
                upstream.configure(config.breaker, config.request_timeout);
            }
        }

        let shared = !config.allowed_uids.is_empty();
        if let Some(file) = &self.file
            && let Err(error) = file.set_shared(shared)
        {
            tracing::error!(%error, shared, "cannot change the mode of the gateway's socket; change it by hand");
        }
        admission.reload(config);
    }
}

#[cfg(test)]
mod tests {
    use crate::{Config, bind, connection};
    use bytes::BytesMut;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_util::sync::CancellationToken;
    use wire::ipc::{Decoder, ErrorCode, Frame, FrameType, Version};

    /// The uid is made up, because tests may run as root, who is always admitted.
    #[tokio::test]
    async fn user_removed_from_the_settings_is_refused_on_an_open_connection() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let with = |uid: u32| Config {
            socket: dir.path().join("s"),
            allowed_uids: vec![uid],
            ..Config::default()
        };
        let bound = bind(with(12345), bus).await.unwrap();

        let (control, (mut client, stream)) = (bound.control(), tokio::net::UnixStream::pair().unwrap());
        let session = connection::run(bound.gateway.clone(), stream, 12345, CancellationToken::new());
        let session = tokio::spawn(session);

        // No router runs: UNAVAILABLE means that the request was admitted.
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
