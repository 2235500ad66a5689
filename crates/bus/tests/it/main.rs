//! The conformance suite: every case runs against the embedded bus and against a real nats-server, over one connection
//! and over several.

mod access;
mod batches;
mod buckets;
mod consumers;
mod crashes;
mod disks;
mod embedded;
mod outage;
mod places;
mod replicas;
mod retention;
mod server;
mod streams;
mod subjects;
mod traffic;

use bus::nats::{Nats, NatsConfig};
use bus::{Bus, ConsumerConfig, Message, Retention, StreamConfig};
use std::time::Duration;
use testkit::NatsServer;

/// The deadline for anything that must happen.
const SOON: Duration = Duration::from_secs(15);
/// How long a test waits for something that must not happen.
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
    subjects::wildcards_match_subjects,
    subjects::queue_group_shares_messages,
    subjects::request_receives_its_reply,
    subjects::request_without_responders_fails_at_once,
    subjects::late_reply_does_not_reach_the_next_request,
    subjects::full_queue_refuses_requests,
    subjects::dropped_subscription_no_longer_responds,
    subjects::closed_subscription_answers_what_was_delivered_to_it,
    subjects::closed_subscription_ends_after_its_last_message,
    subjects::invalid_subjects_and_oversized_messages_are_refused,
    streams::append_without_stream_is_refused,
    streams::repeated_message_id_is_stored_once,
    streams::live_subscribers_receive_appended_messages,
    streams::redeclaring_a_stream_updates_it,
    streams::redeclaring_a_stream_keeps_its_other_subjects,
    streams::overlapping_streams_are_refused,
    streams::work_queue_deletes_settled_messages,
    streams::limits_stream_keeps_settled_messages,
    streams::full_work_queue_refuses_and_full_limits_stream_drops_oldest,
    retention::interest_keeps_a_message_until_every_consumer_has_it,
    retention::interest_without_consumers_stores_nothing,
    retention::full_interest_stream_refuses_and_drops_nothing,
    retention::limits_stream_becomes_one_of_interest,
    retention::retired_consumer_is_deleted_once_nobody_reads_it,
    retention::idle_consumer_is_retired_with_its_subject,
    retention::age_evicts_nothing_from_a_stream_without_a_maximum,
    retention::fills_say_how_full_streams_and_buckets_are,
    retention::full_bucket_evicts_what_is_done,
    retention::readable_dead_letters_survive_a_flood_of_unreadable_messages,
    consumers::delivery_carries_the_appended_message,
    consumers::unsettled_message_is_redelivered,
    consumers::nak_redelivers_after_its_delay,
    consumers::progress_postpones_redelivery,
    consumers::terminated_message_is_not_redelivered,
    consumers::consumers_with_one_name_share_messages,
    consumers::consumers_with_different_names_each_receive_everything,
    consumers::filter_selects_subjects,
    consumers::consumer_can_start_with_new_messages,
    consumers::max_ack_pending_bounds_outstanding_messages,
    consumers::burst_arrives_complete_and_in_order,
    consumers::max_in_hand_bounds_what_a_consumer_takes,
    consumers::closed_consumer_returns_undelivered_messages,
    places::shared_places_bound_all_consumers_and_starve_none,
    places::idle_consumer_leaves_its_places_to_the_others,
    places::message_for_a_full_reader_goes_to_another_one,
    places::consumers_of_an_idle_reader_share_one_place,
    places::released_delivery_can_still_be_settled,
    streams::seen_message_id_is_known_and_nothing_is_stored,
    streams::time_is_that_of_the_clock_that_stamps_messages,
    batches::batch_puts_appends_and_acknowledges,
    batches::batch_publishes_after_its_writes,
    batches::failed_step_ends_a_batch,
    batches::duplicate_append_does_not_fail_a_batch,
    batches::large_message_refuses_a_batch,
    buckets::values_are_returned_with_their_revision,
    buckets::put_with_expected_revision_detects_conflicts,
    buckets::exactly_one_concurrent_create_wins,
    buckets::any_key_is_accepted,
    buckets::expired_entries_are_gone,
    buckets::bucket_without_max_age_keeps_entries,
    buckets::oversized_value_is_refused,
    buckets::undeclared_bucket_is_refused,
}

async fn connect(server: &NatsServer) -> Bus {
    connect_with(server, 2).await
}

async fn connect_with(server: &NatsServer, connections: usize) -> Bus {
    let connections = Some(connections);
    let config = NatsConfig {
        url: server.url(),
        name: "test".into(),
        connections,
        ..NatsConfig::default()
    };
    Nats::connect(config).await.unwrap()
}

/// Awaits `future`; panics if it takes longer than [`SOON`].
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future)
        .await
        .expect("finished before the test deadline")
}

fn message(subject: &str, payload: &str) -> Message {
    Message {
        subject: subject.into(),
        payload: payload.to_string().into(),
        ..Message::default()
    }
}

fn text(message: &Message) -> &str {
    std::str::from_utf8(&message.payload).unwrap()
}

/// The stream `S` over `s.>`.
fn stream(retention: Retention) -> StreamConfig {
    StreamConfig {
        max_age: (retention == Retention::Limits).then_some(Duration::from_secs(3600)),
        max_bytes: 1 << 24,
        dedup_window: Duration::from_secs(60),
        ..StreamConfig::new("S", vec!["s.>".into()], retention)
    }
}

/// A consumer of `S` with an `ack_wait` of ten seconds.
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
