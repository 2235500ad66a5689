//! Measures the server's memory for an idle IPC connection. The clients live in this process.

use crate::Result;
use crate::beamline::Beamline;
use crate::memory::{each, settle};
use crate::report::{Figure, Report};
use tokio::net::UnixStream;

const CONNECTIONS: usize = 10_000;

pub async fn run(report: &mut Report) -> Result {
    let settings = format!("gateway.max_connections = {}\n", CONNECTIONS + 100);
    let server = Beamline::start(&settings)?.start_again()?;
    let mut open = Vec::new();
    for _ in 0..50 {
        open.push(used(&server).await?);
    }
    settle().await;

    let before = server.rss();
    for _ in 0..CONNECTIONS {
        open.push(used(&server).await?);
    }
    settle().await;

    let bytes = each(before, server.rss(), CONNECTIONS);
    report.row(
        &format!("an idle IPC connection of {CONNECTIONS}, resident memory"),
        Figure::Bytes(bytes),
        None,
        "< 8,192 B",
    );
    Ok(())
}

/// Opens a connection and exchanges one PING, since a used connection holds more memory than a fresh one.
async fn used(server: &Beamline) -> Result<UnixStream> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = UnixStream::connect(server.socket()).await?;
    stream.write_all(&[0, 0, 0, 6, 1, 0xf0]).await?;
    stream.read_exact(&mut [0; 6]).await?;
    Ok(stream)
}
