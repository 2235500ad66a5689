//! The gRPC port, which serves the standard health service.

use anyhow::Result;
use futures_util::StreamExt;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// The pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long clients may take to close their connections at the end, before they are closed.
const GOODBYE: Duration = Duration::from_secs(1);

/// Serves until cancelled. Reports `NOT_SERVING` once `draining` is cancelled.
pub async fn serve(listener: TcpListener, draining: CancellationToken, cancel: CancellationToken) -> Result<()> {
    let (mut reporter, health) = tonic_health::server::health_reporter();
    reporter
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;

    let ended = cancel.clone();
    let report_drain = async move {
        draining.cancelled().await;
        reporter
            .set_service_status("", tonic_health::ServingStatus::NotServing)
            .await;
        cancel.cancelled().await;
        // Ends the streams of watching clients, for which the server would wait.
        reporter.clear_service_status("").await;
    };

    let incoming = futures_util::stream::unfold(listener, |listener| async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((Ok::<_, std::io::Error>(stream), listener)),
                Err(error) => {
                    // Usually out of file descriptors: pause until some are closed, rather than spin.
                    tracing::warn!(%error, "cannot accept a gRPC connection; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
    .boxed();

    let server = tonic::transport::Server::builder()
        .add_service(health)
        .serve_with_incoming_shutdown(incoming, report_drain);
    let overdue = async {
        ended.cancelled().await;
        tokio::time::sleep(GOODBYE).await;
    };
    tokio::select! {
        served = server => served?,
        () = overdue => tracing::info!("some gRPC clients did not close their connections in time; closing them"),
    }
    Ok(())
}
