//! Sockets that the service manager has bound for us, so that nobody is turned away while we start.

use anyhow::{Context, Result, bail, ensure};
use listenfd::ListenFd;
use socket2::SockRef;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;

/// Each is taken out by the part it is for.
#[derive(Debug, Default)]
pub struct Given {
    pub gateway: Option<UnixListener>,
    pub http: Option<TcpListener>,
    pub ops: Option<TcpListener>,
    pub grpc: Option<TcpListener>,
}

impl Given {
    /// By their names (`FileDescriptorName=`, with colons between them in LISTEN_FDNAMES): `http`, `ops` and `grpc` are
    /// TCP, and any other is the gateway's, as systemd's own names say nothing. To be called before there are threads: it
    /// takes LISTEN_FDS out of the environment.
    pub fn take(names: Option<&str>) -> Result<Self> {
        let mut sockets = ListenFd::from_env();
        let names: Vec<&str> = names.unwrap_or_default().split(':').collect();
        let mut given = Self::default();
        for index in 0..sockets.len() {
            let name = names.get(index).copied().unwrap_or_default();
            given.place(name, &mut sockets, index).with_context(|| {
                format!(
                    "the service manager's socket {name:?} is not one for us; http, ops and grpc are TCP, any other name \
                     is the gateway's Unix socket (FileDescriptorName= and ListenStream= of the .socket unit)"
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
                ensure!(self.gateway.is_none(), "the gateway has one already");
                self.gateway = sockets.take_unix_listener(index)?;
                return Ok(());
            }
        };
        ensure!(place.is_none(), "there is one of that name already");
        let Some(listener) = sockets.take_tcp_listener(index)? else {
            bail!("it was taken before")
        };
        ensure!(SockRef::from(&listener).is_listener()?, "it does not listen");
        listener.set_nonblocking(true)?;
        *place = Some(listener);
        Ok(())
    }
}
