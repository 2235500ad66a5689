//! Input that no well-behaved client sends.

use crate::client::{Client, ENCODINGS, to};
use crate::node::{DEADLINE, Node};
use bytes::Bytes;
use futures_util::SinkExt;
use serde_json::json;
use testkit::eventually;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use wire::limits::CLIENT_MESSAGE_MAX;
use wire::realtime::{Command, ConnectRequest, Encoding, SubscribeRequest};
use wire::status::NodeStatus;

/// Sends one message as a connected client and expects this close code.
async fn check(node: &Node, encoding: Encoding, message: Message, expected: u16) {
    let mut client = Client::connect_in(node, encoding, "ann").await;
    let sent = format!("{message:.60?}");
    client.socket.send(message).await.unwrap();
    assert_eq!(client.closed().await, expected, "{sent}");
}

#[tokio::test]
async fn unreadable_messages_close_the_connection() {
    let node = Node::start().await;
    for text in [
        "{",
        "[]",
        "null",
        "\"x\"",
        "{\"id\":-1}",
        "{\"id\":4294967296}",
        "{\"id\":1,\"subscribe\":{\"channel\":5}}",
        "{\"id\":1,\"ping\":{}} trailing",
        "{\"id\":1,\"ping\":{}}\n{",
    ] {
        check(&node, Encoding::Json, Message::text(text), 3501).await;
    }
    for bytes in [&[5][..], &[0xff; 12], &[2, 0x0a], &[3, 0x22, 5, 1], &[0xff, 0xff, 0xff, 0xff, 0x0f]] {
        check(&node, Encoding::Protobuf, Message::binary(Bytes::copy_from_slice(bytes)), 3501).await;
    }
    check(&node, Encoding::Protobuf, Message::text("{\"id\":1,\"ping\":{}}"), 3501).await;
    check(&node, Encoding::Protobuf, Message::text(""), 3501).await;
    check(&node, Encoding::Json, Message::binary(vec![0xff]), 3501).await;

    let deep = format!("{{\"id\":1,\"rpc\":{{\"method\":\"m\",\"data\":{}}}}}", "[".repeat(30_000));
    check(&node, Encoding::Json, Message::text(deep), 3501).await;
}

#[tokio::test]
async fn messages_over_the_limit_close_the_connection() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let message = |size| match encoding {
            Encoding::Json => Message::text(" ".repeat(size)),
            Encoding::Protobuf => Message::binary(vec![0; size]),
        };
        check(&node, encoding, message(CLIENT_MESSAGE_MAX + 1), 1009).await;

        let mut client = Client::connect_in(&node, encoding, "ann").await;
        client.socket.send(message(CLIENT_MESSAGE_MAX)).await.unwrap();
        client.nothing_pushed().await;
    }
}

/// Opens a connection and upgrades it. Returns the raw socket.
async fn raw(node: &Node) -> TcpStream {
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    let request = format!(
        "GET /connection/websocket HTTP/1.1\r\nhost: {}\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        node.address
    );
    stream.write_all(request.as_bytes()).await.unwrap();

    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(DEADLINE, stream.read_u8()).await.unwrap().unwrap());
    }
    stream
}

#[tokio::test]
async fn protocol_violations_are_answered_with_their_close_code() {
    let node = Node::start().await;
    for (name, bytes, expected) in [
        ("unmasked", &b"\x81\x02{}"[..], 1002),
        ("reserved bit", b"\xc1\x82\0\0\0\0{}", 1002),
        ("unknown opcode", b"\x83\x80\0\0\0\0", 1002),
        ("continuation of nothing", b"\x80\x80\0\0\0\0", 1002),
        ("fragmented ping", b"\x09\x80\0\0\0\0", 1002),
        ("long ping", b"\x89\xfe\x00\x7e\0\0\0\0", 1002),
        ("not UTF-8", b"\x81\x81\0\0\0\0\xff", 1007),
        ("too large by its head", b"\x81\xff\0\0\0\0\x7f\xff\xff\xff\0\0\0\0", 1009),
        ("length over 63 bits", b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0", 1009),
        ("close of one byte", b"\x88\x81\0\0\0\0x", 1002),
        ("an HTTP request", b"GET / HTTP/1.1\r\n\r\n", 1002),
    ] {
        let mut stream = raw(&node).await;
        stream.write_all(bytes).await.unwrap();

        let mut answer = Vec::new();
        let _ = timeout(DEADLINE, stream.read_to_end(&mut answer))
            .await
            .expect("the connection is closed");
        assert_eq!(answer.first(), Some(&0x88), "{name}: {answer:?}");
        assert_eq!(u16::from_be_bytes([answer[2], answer[3]]), expected, "{name}");
    }
    // Every connection has released its slot.
    connections_become(&node, 0).await;
}

/// Waits until the node reports this many connections.
async fn connections_become(node: &Node, expected: u64) {
    let mut statuses = node.bus.subscribe(wire::subjects::NODE_STATUS, None, 16).await.unwrap();
    let counted = async {
        while serde_json::from_slice::<NodeStatus>(&statuses.next().await.unwrap().payload)
            .unwrap()
            .connections
            != expected
        {}
    };
    timeout(DEADLINE, counted)
        .await
        .expect("the node counts the connections in time");
}

/// The message arrives byte by byte, with a ping between its two fragments.
#[tokio::test]
async fn fragmented_message_may_arrive_byte_by_byte() {
    let node = Node::start().await;
    let mut stream = raw(&node).await;
    stream.set_nodelay(true).unwrap();
    let connect = format!("{{\"id\":1,\"connect\":{{\"token\":\"{}\"}}}}", crate::node::user("ann"));
    let (one, two) = connect.as_bytes().split_at(40);
    let frame = |first: u8, payload: &[u8]| {
        let mut bytes = vec![first];
        match payload.len() {
            short @ 0..=125 => bytes.push(0x80 | short as u8),
            long => bytes.extend([0xfe, (long >> 8) as u8, long as u8]),
        }
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    };
    for byte in [frame(0x01, one), frame(0x89, b"hi"), frame(0x80, two)].concat() {
        stream.write_all(&[byte]).await.unwrap();
    }

    let mut pong = [0; 4];
    stream.read_exact(&mut pong).await.unwrap();
    assert_eq!(&pong, b"\x8a\x02hi");
    assert_eq!(timeout(DEADLINE, stream.read_u8()).await.unwrap().unwrap(), 0x81);
}

#[tokio::test]
async fn connections_cut_anywhere_leave_nothing_behind() {
    let node = Node::start().await;
    let mut message = Vec::new();
    let connect = Some(ConnectRequest { token: crate::node::user("ann"), ..ConnectRequest::default() });
    let subscribe = Some(SubscribeRequest { channel: "chat:lobby".into(), ..SubscribeRequest::default() });
    let commands =
        [Command { id: 1, connect, ..Command::default() }, Command { id: 2, subscribe, ..Command::default() }];
    for command in &commands {
        wire::realtime::encode_command(Encoding::Json, command, &mut message);
        message.push(b'\n');
    }

    let mut bytes = vec![0x81, 0xfe, (message.len() >> 8) as u8, message.len() as u8, 0, 0, 0, 0];
    bytes.extend(message);
    for cut in (0..=bytes.len()).step_by(bytes.len() / 20).chain([bytes.len(); 20]) {
        raw(&node).await.write_all(&bytes[..cut]).await.unwrap();
    }
    connections_become(&node, 0).await;
    eventually(DEADLINE, || async {
        let presence = node.call("presence", &json!({"channel": "chat:lobby"})).await;
        let info = node.call("info", &json!({})).await["result"]["nodes"][0].clone();
        presence["result"]["presence"] == json!({}) && info["num_clients"] == 0 && info["num_channels"] == 0
    })
    .await;
}

#[tokio::test]
async fn slow_client_is_closed_and_others_get_everything() {
    const QUEUE: usize = 128 * 1024;
    let node = Node::start_with(|config| config.client_queue = QUEUE).await;
    let mut fast = Client::connect(&node, "ann").await;
    fast.subscribe(to("news")).await;

    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = socket.connect(node.address).await.unwrap();
    let url = format!("ws://{}/connection/websocket", node.address);
    let (socket, _) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    let mut slow = Client::connect(&node, "bob").await;
    slow.socket = socket;
    slow.present_token(&crate::node::user("bob")).await;
    slow.subscribe(to("news")).await;

    // 10 MB, more than the kernel's buffers and the client's queue can hold.
    const PUBLICATIONS: usize = 200;
    let mut statuses = node.bus.subscribe(wire::subjects::NODE_STATUS, None, 16).await.unwrap();
    let text = "x".repeat(50_000);
    for _ in 0..PUBLICATIONS {
        node.publish("news", json!(text)).await;
        fast.publication().await;
    }

    let mut got = 0;
    let code = loop {
        match slow.next().await {
            Ok(_) => got += 1,
            Err(code) => break code,
        }
    };
    assert_eq!(code, 3008);
    assert!(got < PUBLICATIONS, "{got}");
    slow.cut();
    fast.nothing_pushed().await;

    let counted = async {
        while serde_json::from_slice::<NodeStatus>(&statuses.next().await.unwrap().payload)
            .unwrap()
            .slow_disconnects_total
            == 0
        {}
    };
    timeout(DEADLINE, counted)
        .await
        .expect("the status counts the slow client");
}
