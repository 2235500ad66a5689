//! Socket activation: adopts the sockets that the service manager has bound, so that clients can connect before this
//! process has started.

use anyhow::{Context, Result, bail, ensure};
use listenfd::ListenFd;
use socket2::SockRef;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;

/// The inherited sockets, by listener.
#[derive(Debug, Default)]
pub struct Given {
    pub gateway: Option<UnixListener>,
    pub http: Option<TcpListener>,
    pub ops: Option<TcpListener>,
    pub grpc: Option<TcpListener>,
}

impl Given {
    /// Assigns the sockets by their names (`FileDescriptorName=`, separated by colons in LISTEN_FDNAMES): `http`, `ops`
    /// and `grpc` are TCP; any other name is the gateway's socket, because systemd's default name is that of the unit.
    /// Call this before there are threads: it removes LISTEN_FDS from the environment.
    pub fn take(names: Option<&str>) -> Result<Self> {
        let mut sockets = ListenFd::from_env();
        let names: Vec<&str> = names.unwrap_or_default().split(':').collect();

        let mut given = Self::default();
        for index in 0..sockets.len() {
            let name = names.get(index).copied().unwrap_or_default();
            given.place(name, &mut sockets, index).with_context(|| {
                format!(
                    "cannot use the service manager's socket {name:?}; http, ops and grpc must be TCP, any other name \
                     must be the gateway's Unix socket (FileDescriptorName= and ListenStream= of the .socket unit)"
                )
            })?;
        }
        Ok(given)
    }

    fn place(&mut self, name: &str, sockets: &mut ListenFd, index: usize) -> Result<()> {
        let place = match name {
            "http" => &mut self.http,
            "ops" => &mut self.ops,
            "grpc" => &mut self.grpc,
            _ => {
                ensure!(self.gateway.is_none(), "the gateway already has a socket");
                self.gateway = sockets.take_unix_listener(index)?;
                return Ok(());
            }
        };

        ensure!(place.is_none(), "another socket has the same name");
        let Some(listener) = sockets.take_tcp_listener(index)? else {
            bail!("it is already in use")
        };

        ensure!(SockRef::from(&listener).is_listener()?, "it is not a listening socket");
        listener.set_nonblocking(true)?;
        *place = Some(listener);
        Ok(())
    }
}
