//! The gRPC port: the standard health service, until the router's own services join it.

use anyhow::Result;
use futures_util::StreamExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub async fn serve(listener: TcpListener, cancel: CancellationToken) -> Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let draining = cancel.clone();
    let tell = async move {
        draining.cancelled().await;
        reporter.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    };
    let incoming = futures_util::stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    })
    .boxed();
    let server = tonic::transport::Server::builder().add_service(health).serve_with_incoming_shutdown(incoming, tell);
    server.await?;
    Ok(())
}
