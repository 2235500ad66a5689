//! WebSocket clients with minimal overhead: they count the data that arrives and do not parse it.

use crate::Result;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// A byte that occurs exactly once in each counted payload, and nowhere else.
pub const MARK: u8 = b'~';

/// Connects the `n`th client. Every 10,000 clients share a loopback address, so that none runs out of ports.
pub async fn connect(address: &str, path: &str, n: usize) -> Result<TcpStream> {
    let address: SocketAddr = address.parse()?;
    let socket = TcpSocket::new_v4()?;
    let from = Ipv4Addr::new(127, 0, 0, 2 + u8::try_from(n / 10_000)?);
    socket.bind(SocketAddr::from((from, 0)))?;
    let mut stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;

    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;

    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head);
    if head.starts_with("HTTP/1.1 101") {
        Ok(stream)
    } else {
        Err(format!("the server did not upgrade to WebSocket: {head}").into())
    }
}

/// Encodes one masked frame. The mask is all zeros, which leaves the payload unchanged.
pub fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | opcode];
    match payload.len() {
        length @ 0..126 => frame.push(0x80 | length as u8),
        length @ 126..65_536 => {
            frame.push(0x80 | 126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(0x80 | 127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;

/// Reads until `wanted` has appeared.
pub async fn read_until(stream: &mut TcpStream, wanted: &[u8]) -> Result {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !seen.windows(wanted.len()).any(|window| window == wanted) {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Err(format!("the connection closed before {:?} arrived", String::from_utf8_lossy(wanted)).into());
        }
        seen.extend_from_slice(&buffer[..count]);
    }
    Ok(())
}

/// Connects to our endpoint and subscribes to the channel, if there is one.
pub async fn ours(http: &str, token: &str, channel: Option<&str>, n: usize) -> Result<TcpStream> {
    let mut stream = connect(http, "/connection/websocket", n).await?;
    let connect = format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#);
    stream.write_all(&frame(TEXT, connect.as_bytes())).await?;
    read_until(&mut stream, br#""id":1"#).await?;
    if let Some(channel) = channel {
        let subscribe = format!(r#"{{"id":2,"subscribe":{{"channel":"{channel}"}}}}"#);
        stream.write_all(&frame(TEXT, subscribe.as_bytes())).await?;
        read_until(&mut stream, br#""id":2"#).await?;
    }
    Ok(stream)
}

/// Connects to nats-server's WebSocket port and subscribes to the subject, if there is one.
pub async fn nats(address: &str, subject: Option<&str>, n: usize) -> Result<TcpStream> {
    let mut stream = connect(address, "/", n).await?;
    let mut commands = String::from("CONNECT {\"verbose\":false}\r\n");
    if let Some(subject) = subject {
        commands += &format!("SUB {subject} 1\r\n");
    }
    commands += "PING\r\n";
    stream.write_all(&frame(BINARY, commands.as_bytes())).await?;
    read_until(&mut stream, b"PONG").await?;
    Ok(stream)
}
