//! The gRPC port: the standard health service, until the router's own services join it.

use anyhow::Result;
use futures_util::StreamExt;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// After an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Those who watch our health have been told; whoever has not hung up by then is cut off.
const GOODBYE: Duration = Duration::from_secs(1);

/// Serves until cancelled; says from the beginning of the drain on that this process does not serve.
pub async fn serve(listener: TcpListener, draining: CancellationToken, cancel: CancellationToken) -> Result<()> {
    let (mut reporter, health) = tonic_health::server::health_reporter();
    reporter
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;
    let ended = cancel.clone();
    let tell = async move {
        draining.cancelled().await;
        reporter
            .set_service_status("", tonic_health::ServingStatus::NotServing)
            .await;
        cancel.cancelled().await;
        // Ends the streams of those who watch, which the server would wait for.
        reporter.clear_service_status("").await;
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
    let server = tonic::transport::Server::builder()
        .add_service(health)
        .serve_with_incoming_shutdown(incoming, tell);
    let overdue = async {
        ended.cancelled().await;
        tokio::time::sleep(GOODBYE).await;
    };
    tokio::select! {
        served = server => served?,
        () = overdue => tracing::info!("some gRPC clients did not hang up; their connections are cut"),
    }
    Ok(())
}
