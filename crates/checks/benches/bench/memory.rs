//! Measures the server's resident memory for an idle connection, before and after opening many on a fresh process.

use crate::beamline::{self, Beamline};
use crate::report::{Figure, Report};
use crate::{Result, sockets};
use std::time::Duration;
use testkit::NatsServer;
use tokio::net::TcpStream;

const CONNECTIONS: usize = 5000;

pub async fn run(report: &mut Report) -> Result {
    let ours = {
        // Restart first: memory freed after the first start's password hash would be reused and flatter the figure.
        let server = Beamline::start("")?.start_again()?;
        let token = server.token("bench")?;
        // The first connections allocate the state that all connections share.
        let mut open: Vec<TcpStream> = Vec::new();
        for n in 0..50 {
            open.push(sockets::ours(&server.http, &token, None, n).await?);
        }
        settle().await;

        let before = server.rss();
        for n in 0..CONNECTIONS {
            open.push(sockets::ours(&server.http, &token, None, n).await?);
        }
        settle().await;
        each(before, server.rss(), CONNECTIONS)
    };

    let peer = {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let settings = format!("websocket {{ listen: \"127.0.0.1:{port}\", no_tls: true }}\n");
        let server = NatsServer::start_with(&settings).await;
        let address = format!("127.0.0.1:{port}");
        let mut open = Vec::new();
        for n in 0..50 {
            open.push(sockets::nats(&address, None, n).await?);
        }
        settle().await;

        let before = beamline::rss(server.pid());
        for n in 0..CONNECTIONS {
            open.push(sockets::nats(&address, None, n).await?);
        }
        settle().await;
        each(before, beamline::rss(server.pid()), CONNECTIONS)
    };

    let what = format!("an idle connection of {CONNECTIONS}, resident memory");
    report.row(&what, Figure::Bytes(ours), Some(("nats-server WebSocket", Figure::Bytes(peer))), "< 5,000 B");
    Ok(())
}

/// Memory growth in bytes per connection.
pub fn each(before: u64, after: u64, connections: usize) -> f64 {
    after.saturating_sub(before) as f64 / connections as f64
}

/// Gives the server time to finish the work that follows a connect.
pub async fn settle() {
    tokio::time::sleep(Duration::from_secs(3)).await;
}
