//! A TCP forwarder with a changeable target, for tests in which an address moves from one server to another.

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Forwards connections to its current target; dropping it closes them.
pub struct Forwarder {
    port: u16,
    target: watch::Sender<u16>,
}

impl Forwarder {
    /// Starts a forwarder to a port on loopback.
    pub async fn start(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("cannot bind a loopback port");
        let port = listener
            .local_addr()
            .expect("cannot read the listener's address")
            .port();
        let (sender, receiver) = watch::channel(target);
        tokio::spawn(accept(listener, receiver));
        Self { port, target: sender }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Closes all connections and forwards new ones to `target`.
    pub fn switch(&self, target: u16) {
        self.target.send_replace(target);
    }
}

async fn accept(listener: TcpListener, target: watch::Receiver<u16>) {
    let (mut changes, mut pairs) = (target.clone(), JoinSet::new());

    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((client, _)) = accepted {
                    pairs.spawn(forward(client, target.clone()));
                }
            }
            Some(_) = pairs.join_next() => {}
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

async fn forward(mut client: TcpStream, mut target: watch::Receiver<u16>) {
    let port = *target.borrow_and_update();
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else {
        return;
    };

    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
        _ = target.changed() => {}
    }
}
