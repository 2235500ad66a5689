//! NATS only: server restarts, pauses and settings made by an operator.

use crate::{SOON, connect, consumer, message, soon, stream, text};
use bus::nats::{Nats, NatsConfig};
use bus::{ConsumerConfig, Error, Headers, Retention, StreamConfig};
use std::time::Duration;
use testkit::{NatsServer, eventually};

#[tokio::test]
async fn killed_server_loses_no_acknowledged_write() {
    let mut server = NatsServer::start().await;
    let bus = connect(&server).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.declare_kv("B", Some(Duration::from_secs(60))).await.unwrap();
    let mut live = bus.subscribe("live", None, 8).await.unwrap();
    let mut consumer = bus
        .consume(ConsumerConfig { ack_wait: Duration::from_secs(1), ..consumer("c") })
        .await
        .unwrap();
    bus.append(message("s.a", "0"), Some("0")).await.unwrap();
    let held = soon(consumer.next()).await.unwrap();
    bus.append(message("s.a", "1"), Some("1")).await.unwrap();
    let revision = bus.kv_put("B", "key", "value".into(), None).await.unwrap();

    server.kill();
    eventually(SOON, || async { bus.health().await.is_err() }).await;
    let outcome = soon(bus.request("live", Headers::new(), "x".into(), Duration::from_secs(60))).await;
    assert!(
        matches!(outcome, Err(Error::Disconnected(_))),
        "fails without waiting for the deadline: {outcome:?}"
    );
    assert!(matches!(bus.append(message("s.a", "x"), None).await, Err(Error::Disconnected(_))));
    assert!(held.ack().await.is_err());

    server.restart().await;
    eventually(SOON, || async { bus.health().await.is_ok() }).await;
    assert!(bus.append(message("s.a", "1"), Some("1")).await.unwrap().duplicate);
    assert_eq!(bus.kv_get("B", "key").await.unwrap(), Some(("value".into(), revision)));
    bus.publish(message("live", "again")).await.unwrap();
    assert_eq!(text(&soon(live.next()).await.unwrap()), "again");

    let mut left = vec!["0".to_string(), "1".to_string()];
    while !left.is_empty() {
        let delivery = soon(consumer.next()).await.unwrap();
        // The killed server may have lost the record of this delivery. It then ignores the ack and redelivers.
        if delivery.ack().await.is_ok() {
            left.retain(|payload| payload != text(&delivery.message));
        }
    }
    eventually(SOON, || async { bus.stream_info("S").await.unwrap().messages == 0 }).await;
}

#[tokio::test]
async fn paused_server_is_unhealthy_and_requests_time_out() {
    let server = NatsServer::start().await;
    let bus = connect(&server).await;
    let _live = bus.subscribe("live", None, 8).await.unwrap();

    server.pause();
    let outcome = soon(bus.request("live", Headers::new(), "x".into(), Duration::from_millis(100))).await;
    assert!(matches!(outcome, Err(Error::Timeout(_))), "{outcome:?}");
    assert!(soon(bus.health()).await.is_err());

    server.resume();
    eventually(SOON, || async { bus.health().await.is_ok() }).await;
}

#[tokio::test]
async fn deleted_consumer_is_recreated() {
    let server = NatsServer::start().await;
    let bus = connect(&server).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    let mut consumer = bus.consume(consumer("c")).await.unwrap();

    let operator = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    operator.delete_consumer_from_stream("c", "S").await.unwrap();
    bus.append(message("s.a", "1"), None).await.unwrap();
    assert_eq!(text(&soon(consumer.next()).await.unwrap().message), "1");
}

#[tokio::test]
async fn operator_settings_of_a_stream_are_kept() {
    let server = NatsServer::start().await;
    let operator = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let theirs = async_nats::jetstream::stream::Config {
        name: "S".into(),
        subjects: vec!["s.old".into()],
        description: Some("theirs".into()),
        ..Default::default()
    };
    operator.create_stream(theirs).await.unwrap();

    let bus = connect(&server).await;
    bus.declare_stream(stream(Retention::Limits)).await.unwrap();
    let config = operator.get_stream("S").await.unwrap().cached_info().config.clone();
    assert_eq!((config.description.as_deref(), config.subjects), (Some("theirs"), vec!["s.>".to_string()]));

    let refused = bus.declare_stream(stream(Retention::WorkQueue)).await;
    assert!(matches!(refused, Err(Error::Storage(_))), "the retention of a stream cannot change: {refused:?}");
}

#[tokio::test]
async fn requests_cross_between_buses_until_the_responder_is_dropped() {
    let server = NatsServer::start().await;
    let (one, two) = (connect(&server).await, connect(&server).await);
    let mut served = one.subscribe("s", Some("g"), 8).await.unwrap();

    let answer = async {
        let request = soon(served.next()).await.unwrap();
        one.publish(message(&request.reply.unwrap(), "pong")).await.unwrap();
    };
    let (reply, ()) = tokio::join!(two.request("s", Headers::new(), "ping".into(), SOON), answer);
    assert_eq!(text(&reply.unwrap()), "pong");

    drop((one, served));
    eventually(SOON, || async {
        let outcome = two
            .request("s", Headers::new(), "ping".into(), Duration::from_millis(200))
            .await;
        matches!(outcome, Err(Error::NoResponders(_)))
    })
    .await;
}

#[tokio::test]
async fn server_address_is_shown_without_credentials() {
    let server = NatsServer::start().await;
    assert_eq!(connect(&server).await.describe(), format!("nats 127.0.0.1:{}", server.port()));

    let nowhere = NatsConfig { url: "nats://me:secret@127.0.0.1:1".into(), ..NatsConfig::default() };
    let error = Nats::connect(nowhere)
        .await
        .err()
        .expect("no server listens on that port")
        .to_string();
    assert!(error.contains("127.0.0.1:1") && !error.contains("secret"), "{error}");

    for bad in ["", "http//", "nats://a:b:c"] {
        assert!(
            Nats::connect(NatsConfig { url: bad.into(), ..NatsConfig::default() })
                .await
                .is_err(),
            "{bad:?}"
        );
    }
}

#[tokio::test]
async fn foreign_client_is_told_that_its_request_was_dropped() {
    let server = NatsServer::start().await;
    let bus = connect(&server).await;
    let _full = bus.subscribe("busy", Some("g"), 1).await.unwrap();

    let other = async_nats::connect(server.url()).await.unwrap();
    other.publish("busy", "fills".into()).await.unwrap();
    #[allow(clippy::disallowed_methods, reason = "stands for a client that is not Beamline")]
    let request = other.request("busy", "x".into());
    let reply = soon(request).await.unwrap();

    let headers = reply.headers.unwrap();
    assert_eq!(headers.get("Nats-Service-Error-Code").unwrap().as_str(), "503");
}

#[tokio::test]
async fn streams_of_a_server_that_comes_back_empty_are_declared_again() {
    let mut server = NatsServer::start().await;
    let bus = connect(&server).await;
    let interest = || StreamConfig { consumers: vec![consumer("c")], ..stream(Retention::Interest) };
    bus.declare_stream(interest()).await.unwrap();
    let wider = StreamConfig { subjects: vec!["t".into()], ..interest() };
    bus.declare_stream(wider).await.unwrap();
    bus.declare_kv("B", Some(Duration::from_secs(60))).await.unwrap();
    let mut open = bus.consume(consumer("c")).await.unwrap();
    bus.append(message("s.a", "lost"), Some("1")).await.unwrap();

    server.restart_empty().await;
    eventually(SOON, || async { bus.health().await.is_ok() }).await;
    // Healthy means that everything is there, and that the next result is kept for its consumer.
    for subject in ["s.a", "t"] {
        bus.append(message(subject, subject), Some(subject)).await.unwrap();
    }
    bus.kv_put("B", "key", "value".into(), Some(0)).await.unwrap();
    let mut received = Vec::new();
    while received.len() < 2 {
        let delivery = soon(open.next()).await.unwrap();
        // The first may be one that the old server had delivered.
        if delivery.ack().await.is_ok() && text(&delivery.message) != "lost" {
            received.push(text(&delivery.message).to_string());
        }
    }
    assert_eq!(received, ["s.a", "t"]);
}

#[tokio::test]
async fn stream_that_an_operator_deleted_is_declared_again() {
    let server = NatsServer::start().await;
    let bus = connect(&server).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    jetstream.delete_stream("S").await.unwrap();

    let missed = bus.append(message("s.a", "1"), None).await.unwrap_err();
    assert!(matches!(missed, Error::NoStream(_)), "{missed}");
    eventually(SOON, || async { bus.append(message("s.a", "1"), None).await.is_ok() }).await;
}

#[tokio::test]
async fn server_without_jetstream_is_unhealthy_until_it_is_enabled() {
    let mut server = NatsServer::start().await;
    let bus = connect(&server).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.append(message("s.a", "kept"), None).await.unwrap();

    server.restart_with_jetstream(false).await;
    eventually(SOON, || async {
        let health = bus.health().await;
        health.is_err_and(|error| error.to_string().contains("JetStream"))
    })
    .await;
    assert!(bus.append(message("s.a", "x"), None).await.is_err());

    server.restart_with_jetstream(true).await;
    eventually(SOON, || async { bus.health().await.is_ok() }).await;
    bus.append(message("s.a", "more"), None).await.unwrap();
    let mut open = bus.consume(consumer("c")).await.unwrap();
    for expected in ["kept", "more"] {
        assert_eq!(text(&soon(open.next()).await.unwrap().message), expected);
    }
}

#[tokio::test]
async fn refused_declaration_says_what_to_do() {
    let server = NatsServer::start_with(
        "accounts { small: { users: [{user: small, password: p}], \
         jetstream: {max_file: 1MB} }, big: { users: [{user: big, password: p}], jetstream: enabled } }",
    )
    .await;
    let connect = |user: &str, replicas| {
        let config = NatsConfig {
            url: server.url(),
            user: Some(user.into()),
            password: Some("p".into()),
            replicas,
            ..NatsConfig::default()
        };
        async move { Nats::connect(config).await.unwrap() }
    };

    let refused = |bus: bus::Bus| async move {
        bus.declare_stream(stream(Retention::WorkQueue))
            .await
            .unwrap_err()
            .to_string()
    };
    let text = refused(connect("small", None).await).await;
    assert!(text.contains("bus.*_size"), "{text}");
    let text = refused(connect("big", Some(3)).await).await;
    assert!(text.contains("nats.replicas = 3 needs a cluster"), "{text}");
    connect("big", Some(1))
        .await
        .declare_stream(stream(Retention::WorkQueue))
        .await
        .unwrap();
}
