//! The gRPC port: the standard health service, until the router's own services join it.

use anyhow::Result;
use futures_util::StreamExt;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// After an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub async fn serve(listener: TcpListener, cancel: CancellationToken) -> Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let draining = cancel.clone();
    let tell = async move {
        draining.cancelled().await;
        reporter.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    };
    let incoming = futures_util::stream::unfold(listener, |listener| async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((Ok::<_, std::io::Error>(stream), listener)),
                Err(error) => {
                    // Out of descriptors: wait for some to come back rather than spin.
                    tracing::warn!(%error, "cannot accept a gRPC connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
    .boxed();
    let server = tonic::transport::Server::builder().add_service(health).serve_with_incoming_shutdown(incoming, tell);
    server.await?;
    Ok(())
}
