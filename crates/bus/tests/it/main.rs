//! One meaning, two buses: every case runs against the embedded bus and against a real nats-server,
//! over one connection and over several.

mod access;
mod buckets;
mod consumers;
mod embedded;
mod outage;
mod server;
mod streams;
mod subjects;
mod traffic;

use bus::nats::{Nats, NatsConfig};
use bus::{Bus, ConsumerConfig, Message, Retention, StreamConfig};
use std::time::Duration;
use testkit::NatsServer;

/// No wait of a test is longer.
const SOON: Duration = Duration::from_secs(15);
/// What must not come has not come after this.
const QUIET: Duration = Duration::from_millis(250);

macro_rules! conformance {
    ($($module:ident::$case:ident),* $(,)?) => {
        mod local {
            $(#[tokio::test]
            async fn $case() {
                let dir = tempfile::tempdir().unwrap();
                crate::$module::$case(bus::local::Local::open(dir.path()).await.unwrap()).await;
            })*
        }
        mod nats {
            $(#[tokio::test]
            async fn $case() {
                let server = testkit::NatsServer::start().await;
                crate::$module::$case(crate::connect_with(&server, 1).await).await;
            })*
        }
        mod nats_pool {
            $(#[tokio::test]
            async fn $case() {
                let server = testkit::NatsServer::start().await;
                crate::$module::$case(crate::connect_with(&server, 3).await).await;
            })*
        }
    };
}

conformance! {
    subjects::wildcards_take_what_they_should,
    subjects::a_queue_group_shares,
    subjects::a_request_is_answered,
    subjects::nobody_to_answer_is_said_at_once,
    subjects::a_late_reply_reaches_nobody,
    subjects::a_full_queue_refuses_requests,
    subjects::a_dropped_subscription_is_gone,
    subjects::bad_messages_are_refused,
    streams::a_subject_without_stream_is_refused,
    streams::a_repeat_is_stored_once,
    streams::live_subscribers_get_what_is_appended,
    streams::declaring_again_changes_what_differs,
    streams::a_work_queue_forgets_what_is_acknowledged,
    streams::a_limits_stream_keeps_what_is_acknowledged,
    streams::a_full_work_queue_refuses_and_a_limits_stream_drops_its_oldest,
    consumers::a_delivery_carries_what_was_appended,
    consumers::silence_redelivers,
    consumers::a_nak_redelivers_after_its_delay,
    consumers::progress_holds_redelivery_off,
    consumers::a_terminated_message_never_comes_again,
    consumers::consumers_of_one_name_share,
    consumers::consumers_of_other_names_each_get_all,
    consumers::a_filter_chooses,
    consumers::a_consumer_may_start_with_what_comes_next,
    consumers::unacknowledged_messages_are_bounded,
    consumers::a_burst_comes_whole_and_in_order,
    consumers::no_more_is_taken_than_there_is_place_for,
    consumers::a_closed_consumer_gives_back_what_it_was_given,
    buckets::values_come_back_with_their_revision,
    buckets::an_expected_revision_is_kept,
    buckets::of_many_creators_one_wins,
    buckets::any_key_is_taken,
    buckets::old_entries_go,
    buckets::an_undeclared_bucket_is_refused,
}

async fn connect(server: &NatsServer) -> Bus {
    connect_with(server, 2).await
}

async fn connect_with(server: &NatsServer, connections: usize) -> Bus {
    let connections = Some(connections);
    let config = NatsConfig { url: server.url(), name: "test".into(), connections, ..NatsConfig::default() };
    Nats::connect(config).await.unwrap()
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("it happens soon")
}

fn message(subject: &str, payload: &str) -> Message {
    Message { subject: subject.into(), payload: payload.to_string().into(), ..Message::default() }
}

fn text(message: &Message) -> &str {
    std::str::from_utf8(&message.payload).unwrap()
}

/// The stream `S` over `s.>`.
fn stream(retention: Retention) -> StreamConfig {
    StreamConfig {
        name: "S",
        subjects: vec!["s.>".into()],
        retention,
        max_age: Duration::from_secs(3600),
        max_bytes: 1 << 24,
        dedup_window: Duration::from_secs(60),
    }
}

/// A consumer of `S` that is given ten seconds for each message.
fn consumer(name: &str) -> ConsumerConfig {
    ConsumerConfig {
        stream: "S",
        name: name.into(),
        filter: None,
        ack_wait: Duration::from_secs(10),
        max_ack_pending: 256,
        max_in_hand: 256,
        from_start: true,
    }
}
