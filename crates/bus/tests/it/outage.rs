//! NATS only: servers that disappear, for good or for a while, under continuous requests.

use crate::traffic::Traffic;
use crate::{SOON, connect, connect_with, consumer, message, soon, stream, text};
use async_nats::jetstream::consumer::pull;
use bus::nats::{Nats, NatsConfig};
use bus::{Error, Headers, Retention};
use std::time::Duration;
use testkit::{NatsServer, eventually};
use tokio::net::TcpListener;

const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn lost_connection_fails_requests_in_flight_at_once() {
    let mut server = NatsServer::start().await;
    let bus = connect(&server).await;
    let mut silent = bus.subscribe("silent", None, 64).await.unwrap();

    let request = bus.request("silent", Headers::new(), "x".into(), LONG);
    let kill = async {
        soon(silent.next()).await.unwrap();
        server.kill();
    };
    let (outcome, ()) = soon(async { tokio::join!(request, kill) }).await;

    assert!(matches!(outcome, Err(Error::Disconnected(_))), "{outcome:?}");
}

#[tokio::test]
async fn lost_connection_fails_bucket_calls_in_flight_at_once() {
    let mut server = NatsServer::start().await;
    let bus = connect(&server).await;
    bus.declare_kv("B", Some(LONG)).await.unwrap();

    // A paused server answers nothing, so both calls are in flight when it dies.
    server.pause();
    let kill = async {
        tokio::task::yield_now().await;
        server.kill();
    };
    let calls = async { tokio::join!(bus.kv_put("B", "key", "x".into(), None), bus.kv_get("B", "key"), kill) };
    let (put, get, ()) = soon(calls).await;

    assert!(matches!(put, Err(Error::Disconnected(_))), "{put:?}");
    assert!(matches!(get, Err(Error::Disconnected(_))), "{get:?}");
}

#[tokio::test]
async fn slow_append_times_out_without_asking_more() {
    let server = NatsServer::start().await;
    let bus = connect(&server).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();

    server.pause();
    let began = std::time::Instant::now();
    let appended = bus.append(message("s.a", "x"), None).await;
    server.resume();
    assert!(matches!(appended, Err(Error::Timeout(_))), "{appended:?}");
    // The append takes five seconds; the look for the stream would take another five.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[tokio::test]
async fn closed_subscription_ends_although_the_server_does_not_respond() {
    let server = NatsServer::start().await;
    let bus = connect(&server).await;
    let mut subscription = bus.subscribe("news", None, 16).await.unwrap();
    bus.publish(message("news", "before")).await.unwrap();
    bus.health().await.unwrap();

    server.pause();
    subscription.close();
    assert_eq!(text(&soon(subscription.next()).await.unwrap()), "before");
    assert!(soon(subscription.next()).await.is_none());
    server.resume();
}

#[tokio::test]
async fn reconnect_is_counted_as_an_interruption() {
    let mut server = NatsServer::start().await;
    let bus = connect(&server).await;
    let mut interruptions = bus.interruptions();
    assert_eq!(*interruptions.borrow_and_update(), 0, "the first connect is none");

    server.kill();
    server.restart().await;
    soon(interruptions.changed()).await.unwrap();
}

#[tokio::test]
async fn consumer_waits_while_the_server_refuses_its_pulls() {
    let server = NatsServer::start().await;
    let bus = connect(&server).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    // An operator's consumer that takes one pull at a time.
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let narrow = pull::Config { durable_name: Some("c".into()), max_waiting: 1, ..Default::default() };
    jetstream.create_consumer_on_stream(narrow, "S").await.unwrap();

    let first = bus.consume(consumer("c")).await.unwrap();
    let mut second = bus.consume(consumer("c")).await.unwrap();
    soon(first.close()).await;
    bus.append(message("s.a", "1"), None).await.unwrap();

    let delivery = soon(second.next()).await.unwrap();
    assert_eq!(text(&delivery.message), "1");
    delivery.ack().await.unwrap();
}

#[tokio::test]
async fn pool_opens_the_configured_number_of_connections() {
    let server = NatsServer::start_with("max_connections: 3").await;
    let config = |connections| NatsConfig {
        url: server.url(),
        connections: Some(connections),
        ..NatsConfig::default()
    };
    let bus = Nats::connect(config(3)).await.unwrap();
    bus.health().await.unwrap();
    assert!(Nats::connect(config(1)).await.is_err(), "the server allows three connections");

    drop(bus);
    eventually(SOON, || async { Nats::connect(config(3)).await.is_ok() }).await;
    assert!(soon(Nats::connect(config(4))).await.is_err());
}

#[tokio::test]
async fn reload_loses_no_request_in_flight() {
    let server = NatsServer::start().await;
    let (asker, responder) = (connect_with(&server, 3).await, connect_with(&server, 3).await);
    let traffic = Traffic::default();

    let scene = async {
        for round in 1..=3 {
            eventually(SOON, || async { traffic.now().answered > round * 100 }).await;
            soon(asker.reload()).await.unwrap();
        }
    };
    traffic.during(&asker, &responder, scene).await;

    let outcomes = traffic.now();
    assert_eq!((outcomes.answered, outcomes.failed()), (outcomes.sent, 0), "{outcomes:?}");
}

#[tokio::test]
async fn consumer_continues_after_reload() {
    let server = NatsServer::start().await;
    let bus = connect_with(&server, 3).await;
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    let mut consumer = bus.consume(consumer("c")).await.unwrap();

    for n in ["before", "after", "later"] {
        bus.append(message("s.a", n), None).await.unwrap();
        let delivery = soon(consumer.next()).await.unwrap();
        assert_eq!(text(&delivery.message), n);
        delivery.ack().await.unwrap();
        soon(bus.reload()).await.unwrap();
    }
}

#[tokio::test]
async fn clients_reconnect_after_many_failed_attempts() {
    let mut server = NatsServer::start().await;
    let (asker, responder) = (connect_with(&server, 2).await, connect_with(&server, 1).await);
    let mut live = asker.subscribe("live", None, 64).await.unwrap();
    let traffic = Traffic::default();

    let scene = async {
        eventually(SOON, || async { traffic.now().answered > 50 }).await;
        server.kill();

        // A listener in the server's place accepts and closes twelve attempts.
        let port = ("127.0.0.1", server.port());
        let listener = TcpListener::bind(port).await.unwrap();
        for _ in 0..12 {
            drop(soon(listener.accept()).await.unwrap());
        }
        drop(listener);
        let before = traffic.now();
        assert!(before.disconnected > 0, "{before:?}");

        server.restart().await;
        eventually(SOON, || async { asker.health().await.is_ok() && responder.health().await.is_ok() }).await;
        let back = traffic.now().answered;
        eventually(SOON, || async { traffic.now().answered > back + 50 }).await;
    };
    traffic.during(&asker, &responder, scene).await;

    let outcomes = traffic.now();
    assert_eq!(outcomes.answered + outcomes.failed(), outcomes.sent, "{outcomes:?}");

    responder.publish(message("live", "again")).await.unwrap();
    assert_eq!(text(&soon(live.next()).await.unwrap()), "again");
}

#[tokio::test]
async fn clients_move_from_a_lame_duck_to_the_other_server() {
    let mut pair = NatsServer::start_pair("lame_duck_duration: \"30s\"\nlame_duck_grace_period: \"500ms\"").await;
    let url = pair.each_ref().map(NatsServer::url).join(",");
    let connect = || {
        let config = NatsConfig { url: url.clone(), connections: Some(3), ..NatsConfig::default() };
        async { Nats::connect(config).await.unwrap() }
    };
    let (asker, responder) = (connect().await, connect().await);
    let traffic = Traffic::default();

    let scene = async {
        eventually(SOON, || async { traffic.now().answered > 50 }).await;

        pair[0].lame_duck();
        soon(pair[0].exit()).await;
        eventually(SOON, || async { asker.health().await.is_ok() && responder.health().await.is_ok() }).await;

        // Requests that were in flight during the move may still fail.
        let moving = traffic.now();
        eventually(SOON, || async { traffic.has_outcomes_of(moving.sent) }).await;
        let moved = traffic.now();
        eventually(SOON, || async { traffic.now().answered > moved.answered + 100 }).await;
        moved
    };
    let moved = traffic.during(&asker, &responder, scene).await;

    let outcomes = traffic.now();
    assert_eq!(outcomes.answered + outcomes.failed(), outcomes.sent, "{outcomes:?}");
    assert_eq!(outcomes.failed(), moved.failed(), "no request fails after the move: {moved:?} {outcomes:?}");
    // Only requests in flight when a connection moved may fail: three connections on each side, eight requests at once.
    assert!(outcomes.failed() <= 6 * 8, "{outcomes:?}");
}

/// Resident pages and open file descriptors of this process.
fn resources() -> (u64, usize) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages = statm.split(' ').nth(1).unwrap().parse().unwrap();
    (pages, std::fs::read_dir("/proc/self/fd").unwrap().count())
}

/// Must run alone in its process: `cargo test -p bus --test it -- --ignored ten_minute_outage --nocapture`
#[tokio::test]
#[ignore = "takes ten minutes"]
async fn ten_minute_outage_leaks_nothing() {
    const OUTAGE: Duration = Duration::from_secs(600);
    let mut server = NatsServer::start().await;
    let (asker, responder) = (connect_with(&server, 4).await, connect_with(&server, 4).await);
    let traffic = Traffic::default();

    let scene = async {
        eventually(SOON, || async { traffic.now().answered > 5_000 }).await;
        let descriptors = resources().1;

        server.kill();
        let began = tokio::time::Instant::now();
        let mut samples = tokio::time::interval(Duration::from_secs(30));
        let mut pages = Vec::new();
        while began.elapsed() < OUTAGE {
            samples.tick().await;
            pages.push(resources().0);
            println!("{:?}: {:?}, pages and descriptors {:?}", began.elapsed(), traffic.now(), resources());
        }

        server.restart().await;
        let began = tokio::time::Instant::now();
        eventually(SOON, || async { asker.health().await.is_ok() && responder.health().await.is_ok() }).await;
        println!("back after {:?}: {:?}", began.elapsed(), traffic.now());
        let back = traffic.now().answered;
        eventually(SOON, || async { traffic.now().answered > back + 1_000 }).await;
        println!("at the end: {:?}, pages and descriptors {:?}", traffic.now(), resources());

        // Memory may grow by 2 MiB after the first minute.
        assert!(pages[pages.len() - 1] < pages[2] + 512, "{pages:?}");
        assert_eq!(resources().1, descriptors);
    };
    traffic.during(&asker, &responder, scene).await;

    let outcomes = traffic.now();
    assert_eq!(outcomes.answered + outcomes.failed(), outcomes.sent, "{outcomes:?}");
}
