//! Binds a TCP port, or adopts the socket that the service manager bound. If the port is taken, the error names the
//! process that holds it.

use anyhow::{Context, Result, anyhow};
use std::net::SocketAddr;
use std::path::Path;
use tokio::net::TcpListener;

/// Returns the listener and its address, which has the real port if port 0 was asked for. `given` is the socket of the
/// service manager; `setting` names the address in errors.
pub fn bind(
    setting: &str,
    address: SocketAddr,
    given: Option<std::net::TcpListener>,
) -> Result<(TcpListener, SocketAddr)> {
    let listener = given
        .map_or_else(|| try_bind(address), TcpListener::from_std)
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::AddrInUse => {
                let by = holder(address.port()).unwrap_or_else(|| "a process that this user may not inspect".into());
                anyhow!("{setting}: {address} is taken by {by}; stop it or set another address")
            }
            std::io::ErrorKind::PermissionDenied => {
                anyhow!("{setting}: no permission to listen on {address}; ports below 1024 need CAP_NET_BIND_SERVICE")
            }
            _ => anyhow!("{setting}: cannot listen on {address}: {e}"),
        })?;
    let address = listener
        .local_addr()
        .with_context(|| format!("{setting}: cannot read the local address of the listener"))?;
    Ok((listener, address))
}

fn try_bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};

    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for the connections of the previous process to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    TcpListener::from_std(socket.into())
}

/// The process that listens on a port, as `nginx (pid 123)`. Like `ss`, this looks for the socket's inode in /proc.
fn holder(port: u16) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok())
        .find_map(|table| listening_inode(&table, port).map(String::from))?;

    let target = format!("socket:[{inode}]");
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let pid = process.file_name();
        if !pid.to_string_lossy().bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(process.path().join("fd")) else {
            // A process of another user, or one that has just ended.
            continue;
        };
        let holds = |fd: std::fs::DirEntry| std::fs::read_link(fd.path()).is_ok_and(|to| to == Path::new(&target));
        if descriptors.flatten().any(holds) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (pid {})", name.trim(), pid.to_string_lossy()));
        }
    }
    None
}

/// Finds the inode of the socket that listens on `port` in a table of /proc/net.
fn listening_inode(table: &str, port: u16) -> Option<&str> {
    const LISTEN: &str = "0A";
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (_, hex_port) = fields.get(1)?.rsplit_once(':')?;
        (fields.get(3) == Some(&LISTEN) && u16::from_str_radix(hex_port, 16) == Ok(port))
            .then(|| fields.get(9).copied())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn taken_port_names_the_process_that_holds_it() {
        let (_listener, address) = bind("http.listen", "127.0.0.1:0".parse().unwrap(), None).unwrap();
        let error = bind("http.listen", address, None).unwrap_err().to_string();
        assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
    }
}
