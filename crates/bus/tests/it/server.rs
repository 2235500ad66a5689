//! NATS only: a server that is away, comes back, refuses us, or was set up by somebody else.

use crate::{SOON, connect, consumer, message, soon, stream, text};
use bus::nats::{Nats, NatsConfig};
use bus::{ConsumerConfig, Error, Headers, Retention};
use std::time::Duration;
use testkit::{NatsServer, eventually};

#[tokio::test]
async fn a_killed_server_loses_nothing_that_was_acknowledged() {
    let mut server = NatsServer::start().await;
    let bus = connect(&server).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.declare_kv("B", Duration::from_secs(60)).await.unwrap();
    let mut live = bus.subscribe("live", None, 8).await.unwrap();
    let mut consumer = bus.consume(ConsumerConfig { ack_wait: Duration::from_secs(1), ..consumer("c") }).await.unwrap();
    bus.append(message("s.a", "0"), Some("0")).await.unwrap();
    let held = soon(consumer.next()).await.unwrap();
    bus.append(message("s.a", "1"), Some("1")).await.unwrap();
    let revision = bus.kv_put("B", "key", "value".into(), None).await.unwrap();

    server.kill();
    eventually(SOON, || async { bus.health().await.is_err() }).await;
    let asked = soon(bus.request("live", Headers::new(), "x".into(), Duration::from_secs(60))).await;
    assert!(matches!(asked, Err(Error::Disconnected(_))), "a lost connection is said at once: {asked:?}");
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
        // The server may have forgotten that it delivered before it was killed; then it does not take the ack,
        // says nothing, and delivers again.
        if delivery.ack().await.is_ok() {
            left.retain(|payload| payload != text(&delivery.message));
        }
    }
    eventually(SOON, || async { bus.stream_info("S").await.unwrap().messages == 0 }).await;
}

#[tokio::test]
async fn a_stopped_server_is_not_healthy_and_requests_keep_their_deadline() {
    let server = NatsServer::start().await;
    let bus = connect(&server).await;
    let _live = bus.subscribe("live", None, 8).await.unwrap();
    server.pause();
    let asked = soon(bus.request("live", Headers::new(), "x".into(), Duration::from_millis(100))).await;
    assert!(matches!(asked, Err(Error::Timeout(_))), "{asked:?}");
    assert!(soon(bus.health()).await.is_err());
    server.resume();
    eventually(SOON, || async { bus.health().await.is_ok() }).await;
}

#[tokio::test]
async fn a_deleted_consumer_is_made_again() {
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
async fn what_an_operator_set_on_a_stream_stays() {
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
    assert!(matches!(refused, Err(Error::Storage(_))), "retention cannot change: {refused:?}");
}

#[tokio::test]
async fn two_connections_meet_and_one_leaves_the_other_well() {
    let server = NatsServer::start().await;
    let (one, two) = (connect(&server).await, connect(&server).await);
    let mut served = one.subscribe("s", Some("g"), 8).await.unwrap();
    let answer = async {
        let request = soon(served.next()).await.unwrap();
        one.publish(message(&request.reply.unwrap(), "pong")).await.unwrap();
    };
    let (asked, ()) = tokio::join!(two.request("s", Headers::new(), "ping".into(), SOON), answer);
    assert_eq!(text(&asked.unwrap()), "pong");
    drop((one, served));
    eventually(SOON, || async {
        let asked = two.request("s", Headers::new(), "ping".into(), Duration::from_millis(200)).await;
        matches!(asked, Err(Error::NoResponders(_)))
    })
    .await;
}

#[tokio::test]
async fn a_server_is_named_whether_it_is_there_or_not() {
    let server = NatsServer::start().await;
    assert_eq!(connect(&server).await.describe(), format!("nats 127.0.0.1:{}", server.port()));
    let nowhere = NatsConfig { url: "nats://me:secret@127.0.0.1:1".into(), ..NatsConfig::default() };
    let error = Nats::connect(nowhere).await.err().expect("nobody listens there").to_string();
    assert!(error.contains("127.0.0.1:1") && !error.contains("secret"), "{error}");
    for bad in ["", "http//", "nats://a:b:c"] {
        assert!(Nats::connect(NatsConfig { url: bad.into(), ..NatsConfig::default() }).await.is_err(), "{bad:?}");
    }
}

#[tokio::test]
async fn a_client_of_another_make_learns_that_its_request_was_dropped() {
    let server = NatsServer::start().await;
    let bus = connect(&server).await;
    let _full = bus.subscribe("busy", Some("g"), 1).await.unwrap();
    let other = async_nats::connect(server.url()).await.unwrap();
    other.publish("busy", "fills".into()).await.unwrap();
    #[allow(clippy::disallowed_methods, reason = "the client of another make")]
    let request = other.request("busy", "x".into());
    let reply = soon(request).await.unwrap();
    let headers = reply.headers.unwrap();
    assert_eq!(headers.get("Nats-Service-Error-Code").unwrap().as_str(), "503");
}
