//! The lifecycle of a connection: connect, commands, pings, tokens and close.

use crate::client::{Client, ENCODINGS, code, to};
use crate::node::{DEADLINE, Node, SECRET, exchange, now_s, sign, status, token, user};
use serde_json::json;
use std::time::Duration;
use testkit::eventually;
use tokio_tungstenite::tungstenite::Message;
use wire::realtime::{
    Command, ConnectRequest, Encoding, PresenceRequest, PublishRequest, RefreshRequest, RpcRequest, SendRequest,
    SubscribeRequest,
};

#[tokio::test]
async fn token_opens_a_connection() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let client = Client::connect_in(&node, encoding, "ann").await;
        let result = &client.connected;
        assert_eq!((result.node.as_str(), result.ping, result.pong), ("n1", 25, true));
        assert!(result.expires && (3590..=3600).contains(&result.ttl), "{result:?}");
        assert!(!result.client.is_empty() && result.version.starts_with("beamline"));
    }
    let client = Client::connect_with(&node, Encoding::Json, &token(&json!({"sub": "ann"}))).await;
    assert!(!client.connected.expires);
}

#[tokio::test]
async fn query_selects_protobuf() {
    let node = Node::start().await;
    let mut client = Client::open_at(&node, Encoding::Json, "?x=1&cf_protocol=protobuf").await;
    client.encoding = Encoding::Protobuf;
    assert!(client.present_token(&user("ann")).await.connect.is_some());
}

#[tokio::test]
async fn invalid_tokens_close_the_connection_and_expired_ones_do_not() {
    let node = Node::start().await;
    let unsigned = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4ifQ.";
    let mut tampered = user("ann");
    tampered.truncate(tampered.len() - 2);
    for token in [
        "",
        "x",
        "a.b.c",
        unsigned,
        &tampered,
        &sign(b"another secret", &json!({"sub": "ann"})),
        &sign(SECRET, &json!({"user": "ann"})),
        &sign(SECRET, &json!({"sub": "ann", "exp": "soon"})),
    ] {
        for encoding in ENCODINGS {
            let mut client = Client::open(&node, encoding).await;
            let connect = Some(ConnectRequest { token: token.into(), ..ConnectRequest::default() });
            client.send(&[Command { id: 1, connect, ..Command::default() }]).await;
            assert_eq!(client.closed().await, 3500, "{token:?}");
        }
    }

    let mut client = Client::open(&node, Encoding::Json).await;
    let expired = token(&json!({"sub": "ann", "exp": now_s() - 10}));
    assert_eq!(code(&client.present_token(&expired).await), 109);
    // The client may present another token on the same connection.
    assert!(client.present_token(&user("ann")).await.connect.is_some());
}

#[tokio::test]
async fn client_that_does_not_connect_in_time_is_stale() {
    let node = Node::start_with(|config| config.connect_timeout = Duration::from_millis(100)).await;
    let mut client = Client::connect(&node, "ann").await;
    for encoding in ENCODINGS {
        assert_eq!(Client::open(&node, encoding).await.closed().await, 3502);
    }
    client.nothing_pushed().await;
}

#[tokio::test]
async fn commands_out_of_order_close_the_connection() {
    let node = Node::start().await;
    let connect = |id| Command {
        id,
        connect: Some(ConnectRequest { token: user("ann"), ..ConnectRequest::default() }),
        ..Command::default()
    };
    let subscribe = |id| Command { id, subscribe: Some(to("news")), ..Command::default() };
    for commands in [vec![subscribe(1)], vec![connect(0)], vec![connect(1), connect(2)], vec![connect(1), subscribe(0)]]
    {
        for encoding in ENCODINGS {
            let mut client = Client::open(&node, encoding).await;
            client.send(&commands).await;
            assert_eq!(client.closed().await, 3501, "{commands:?}");
        }
    }

    let mut client = Client::connect(&node, "ann").await;
    assert_eq!(code(&client.ask(Command::default()).await), 104, "a command without a method");
}

#[tokio::test]
async fn first_method_of_a_command_counts() {
    let node = Node::start().await;
    let rpc = || Some(RpcRequest { method: "nobody".into(), ..RpcRequest::default() });
    let send = || Some(SendRequest { data: "1".into() });
    for encoding in ENCODINGS {
        let mut client = Client::connect_in(&node, encoding, "ann").await;
        let both = Command { subscribe: Some(to("news")), rpc: rpc(), ..Command::default() };
        assert!(client.ask(both).await.subscribe.is_some());

        // Only the first method counts: a leading `send` needs no id, but a later one does not excuse a missing id.
        client
            .send(&[Command { send: send(), rpc: rpc(), ..Command::default() }])
            .await;
        client.nothing_pushed().await;
        let subscribe = Some(to("more"));
        client
            .send(&[Command { subscribe, send: send(), ..Command::default() }])
            .await;
        assert_eq!(client.closed().await, 3501);
    }
}

#[tokio::test]
async fn commands_of_one_message_are_answered_in_order() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let mut client = Client::open(&node, encoding).await;
        let channel = format!("news-{}", encoding.as_str());
        let none = Command::default;
        client
            .send(&[
                Command {
                    id: 1,
                    connect: Some(ConnectRequest { token: user("ann"), ..ConnectRequest::default() }),
                    ..none()
                },
                Command { id: 2, subscribe: Some(to(&channel)), ..none() },
                Command { id: 3, send: Some(SendRequest { data: "1".into() }), ..none() },
                Command {
                    id: 4,
                    publish: Some(PublishRequest { channel: channel.clone(), data: "{\"n\":1}".into() }),
                    ..none()
                },
                Command { id: 5, presence: Some(PresenceRequest { channel }), ..none() },
            ])
            .await;

        assert!(client.next().await.unwrap().connect.is_some());
        assert!(client.next().await.unwrap().subscribe.is_some());
        let publication = client.next().await.unwrap().push.unwrap().r#pub.unwrap();
        assert_eq!((&publication.data[..], publication.offset), (&b"{\"n\":1}"[..], 1));
        assert!(client.next().await.unwrap().publish.is_some());
        assert_eq!(client.next().await.unwrap().presence.unwrap().presence.len(), 1);
    }
}

#[tokio::test]
async fn client_that_does_not_answer_pings_is_disconnected() {
    let node = Node::start_with(|config| {
        config.ping_interval = Duration::from_millis(60);
        config.pong_timeout = Duration::from_millis(150);
    })
    .await;
    for encoding in ENCODINGS {
        let mut client = Client::connect_in(&node, encoding, "ann").await;
        client.subscribe(to("news")).await;
        while client.pings < 5 {
            let _ = tokio::time::timeout(Duration::from_millis(20), client.next()).await;
        }
        client.nothing_pushed().await;

        client.pongs = false;
        assert_eq!(client.closed().await, 3012);
    }
}

#[tokio::test]
async fn pings_are_frames_if_the_client_asks() {
    let node = Node::start_with(|config| config.ping_interval = Duration::from_millis(50)).await;
    let mut client = Client::open_at(&node, Encoding::Json, "?cf_ws_frame_ping_pong=true").await;
    let connected = client.present_token(&user("ann")).await.connect.unwrap();
    assert_eq!((connected.ping, connected.pong), (0, false));
    for _ in 0..3 {
        let message = futures_util::StreamExt::next(&mut client.socket)
            .await
            .unwrap()
            .unwrap();
        assert!(matches!(message, Message::Ping(_)), "{message:?}");
    }
    client.nothing_pushed().await;
}

#[tokio::test]
async fn connection_ends_with_its_token_unless_refreshed() {
    let node = Node::start_with(|config| config.refresh_grace = Duration::from_millis(200)).await;
    let short = || token(&json!({"sub": "ann", "exp": now_s() + 2}));
    let refresh = |token: String| Command { refresh: Some(RefreshRequest { token }), ..Command::default() };

    let mut stays = Client::connect_with(&node, Encoding::Protobuf, &short()).await;
    let refreshed = stays.ask(refresh(user("ann"))).await.refresh.unwrap();
    assert!(refreshed.expires && refreshed.ttl > 3500, "{refreshed:?}");
    let mut leaves = Client::connect_with(&node, Encoding::Json, &short()).await;
    assert_eq!(leaves.closed().await, 3005);
    stays.nothing_pushed().await;

    for (token, expected) in [(user("bob"), 3500), ("x".into(), 3500), (token(&json!({"sub": "ann", "exp": 1})), 3005)]
    {
        let mut client = Client::connect(&node, "ann").await;
        client.send(&[Command { id: 9, ..refresh(token) }]).await;
        assert_eq!(client.closed().await, expected);
    }
}

#[tokio::test]
async fn refresh_to_a_token_without_exp_removes_the_expiry() {
    let node = Node::start_with(|config| config.refresh_grace = Duration::from_millis(200)).await;
    let short = || token(&json!({"sub": "ann", "exp": now_s() + 2}));
    for encoding in ENCODINGS {
        let mut stays = Client::connect_with(&node, encoding, &short()).await;
        let mut leaves = Client::connect_with(&node, encoding, &short()).await;
        let refresh = Some(RefreshRequest { token: token(&json!({"sub": "ann"})) });
        let refreshed = stays
            .ask(Command { refresh, ..Command::default() })
            .await
            .refresh
            .unwrap();
        assert!(!refreshed.expires && refreshed.ttl == 0, "{refreshed:?}");
        // The other connection shows that the first token has expired.
        assert_eq!(leaves.closed().await, 3005);
        stays.nothing_pushed().await;
    }
}

#[tokio::test]
async fn subscription_token_opens_no_connection() {
    let node = Node::start().await;
    let mut ann = Client::connect(&node, "ann").await;
    for claims in [
        json!({"sub": "ann", "channel": "$vip"}),
        json!({"sub": "ann", "channel": ""}),
        json!({"sub": "ann", "channel": "$vip", "channels": ["news"]}),
    ] {
        let mut client = Client::open(&node, Encoding::Json).await;
        let connect = Some(ConnectRequest { token: token(&claims), ..ConnectRequest::default() });
        client.send(&[Command { id: 1, connect, ..Command::default() }]).await;
        assert_eq!(client.closed().await, 3500, "{claims}");
    }
    // A connection token is not accepted as a subscription token either.
    let to_vip = SubscribeRequest {
        channel: "$vip".into(),
        token: user("ann"),
        ..SubscribeRequest::default()
    };
    assert_eq!(code(&ann.try_subscribe(to_vip).await), 103);
    let mut other = Client::connect(&node, "ann").await;
    let refresh = Some(RefreshRequest { token: token(&json!({"sub": "ann", "channel": "$vip"})) });
    other.send(&[Command { id: 9, refresh, ..Command::default() }]).await;
    assert_eq!(other.closed().await, 3500, "nor does it refresh one");
}

#[tokio::test]
async fn end_of_a_sign_in_closes_its_connections_and_no_others() {
    let node = Node::start().await;
    let of = |sid: &str| token(&json!({"sub": "ann", "sid": sid, "exp": now_s() + 3600}));
    let mut phone = Client::connect_with(&node, Encoding::Json, &of("phone")).await;
    let mut laptop = Client::connect_with(&node, Encoding::Protobuf, &of("laptop")).await;
    let mut second_tab = Client::connect_with(&node, Encoding::Json, &of("laptop")).await;
    let mut program = Client::connect(&node, "ann").await;
    node.call("disconnect", &json!({"user": "ann", "session": "laptop"}))
        .await;
    assert_eq!((laptop.closed().await, second_tab.closed().await), (3503, 3503));

    // The token has not expired, but its sign-in has ended.
    let mut again = Client::open(&node, Encoding::Json).await;
    let connect = Some(ConnectRequest { token: of("laptop"), ..ConnectRequest::default() });
    again.send(&[Command { id: 1, connect, ..Command::default() }]).await;
    assert_eq!(again.closed().await, 3500);
    phone.nothing_pushed().await;
    program.nothing_pushed().await;
}

#[tokio::test]
async fn refresh_moves_the_connection_to_the_sign_in_of_its_token() {
    let node = Node::start().await;
    let of = |sid: &str| token(&json!({"sub": "ann", "sid": sid, "exp": now_s() + 3600}));
    let mut client = Client::connect_with(&node, Encoding::Json, &of("laptop")).await;
    let refresh = Some(RefreshRequest { token: of("phone") });
    assert!(
        client
            .ask(Command { refresh, ..Command::default() })
            .await
            .refresh
            .is_some()
    );

    node.call("disconnect", &json!({"user": "ann", "session": "laptop"}))
        .await;
    client.nothing_pushed().await;
    node.call("disconnect", &json!({"user": "ann", "session": "phone"}))
        .await;
    assert_eq!(client.closed().await, 3503);
}

#[tokio::test]
async fn channels_of_the_token_are_subscribed_and_recovered() {
    let node = Node::start().await;
    for encoding in ENCODINGS {
        let token = token(&json!({"sub": "ann", "channels": ["app:a1#bob", "news", "nowhere:x"]}));
        let mut client = Client::connect_with(&node, encoding, &token).await;
        let named: Vec<&String> = client.connected.subs.keys().collect();
        assert_eq!(named, ["app:a1#bob", "news"], "the unknown namespace is left out");

        let before = client.connected.subs["app:a1#bob"].clone();
        assert!(before.recoverable && before.positioned);
        node.publish("app:a1#bob", json!(1)).await;
        let push = client.push().await;
        assert_eq!((push.channel.as_str(), push.r#pub.unwrap().offset), ("app:a1#bob", before.offset + 1));

        // The connect command has the position from which to recover.
        client.cut();
        node.publish("app:a1#bob", json!(2)).await;
        let mut client = Client::open(&node, encoding).await;
        let position = SubscribeRequest {
            recover: true,
            epoch: before.epoch.clone(),
            offset: before.offset + 1,
            ..SubscribeRequest::default()
        };

        let subs = [("app:a1#bob".to_string(), position)].into();
        let connect = Some(ConnectRequest { token: token.clone(), subs, ..ConnectRequest::default() });
        let connected = client
            .ask(Command { connect, ..Command::default() })
            .await
            .connect
            .unwrap();
        let sub = &connected.subs["app:a1#bob"];
        assert!(sub.recovered, "{sub:?}");
        assert_eq!(crate::client::numbers(&sub.publications), [2]);
    }
}

#[tokio::test]
async fn full_node_refuses_connections_until_one_ends() {
    let node = Node::start_with(|config| config.max_connections = 2).await;
    let first = Client::connect(&node, "ann").await;
    let _second = Client::open(&node, Encoding::Json).await;
    assert_eq!(status(&upgrade(&node, "").await), 503);
    first.cut();
    eventually(DEADLINE, || async { status(&upgrade(&node, "").await) == 101 }).await;
}

#[tokio::test]
async fn other_origins_are_refused() {
    let node = Node::start_with(|config| config.origins = vec!["https://app.example".into()]).await;
    let own = format!("origin: http://{}\r\n", node.address);
    for (origin, expected) in [
        ("", 101),
        (own.as_str(), 101),
        ("origin: https://app.example\r\n", 101),
        ("origin: https://evil.example\r\n", 403),
        ("origin: https://app.example.evil.example\r\n", 403),
        ("origin: null\r\n", 403),
    ] {
        assert_eq!(status(&upgrade(&node, origin).await), expected, "{origin}");
    }
}

/// Asks for an upgrade and closes the connection. Returns everything that the server sent.
async fn upgrade(node: &Node, header: &str) -> String {
    let request = format!(
        "GET /connection/websocket HTTP/1.1\r\nhost: {}\r\nupgrade: websocket\r\nconnection: keep-alive, Upgrade\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{header}\r\n",
        node.address
    );

    let goodbye = [&[0x88, 0x82, 0, 0, 0, 0][..], &1000_u16.to_be_bytes()].concat();
    let mut bytes = request.into_bytes();
    bytes.extend(goodbye);
    let answer = exchange_closing(node, &bytes).await;
    assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
    answer
}

async fn exchange_closing(node: &Node, request: &[u8]) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(node.address).await.unwrap();
    stream.write_all(request).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer))
        .await
        .expect("the server answers in time");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn request_without_an_upgrade_gets_426() {
    let node = Node::start().await;
    let request = format!("GET /connection/websocket HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", node.address);
    assert_eq!(status(&exchange(node.address, request.as_bytes()).await), 426);
}

#[tokio::test]
async fn stop_closes_every_connection() {
    let node = Node::start().await;
    let mut clients = Vec::new();
    for number in 0..20 {
        clients.push(Client::connect_in(&node, ENCODINGS[number % 2], "ann").await);
    }
    clients.push(Client::open(&node, Encoding::Json).await);

    let address = node.address;
    let stopped = tokio::time::Instant::now();
    node.begin_stop();
    for mut client in clients {
        assert_eq!(client.closed().await, 3001);
    }
    node.stopped().await;
    assert!(stopped.elapsed() < Duration::from_secs(3), "{:?}", stopped.elapsed());
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn concurrent_readiness_checks_succeed() {
    let node = Node::start().await;
    let (one, other) = tokio::join!(node.ready.check(), node.ready.check());
    assert_eq!((one, other), (Ok(()), Ok(())));
}
