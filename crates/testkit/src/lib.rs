//! Test support: real servers on free ports, a scriptable chat endpoint, and [`eventually`] in place of sleeping.

mod certificates;
pub mod crash;
mod disk;
mod forwarder;
mod nats;
mod openai;
mod postgres;
mod process;
mod redis;
mod scripts;

pub use certificates::Authority;
pub use disk::{DiskFault, SmallDisk};
pub use forwarder::Forwarder;
pub use nats::NatsServer;
pub use openai::{OpenAi, Reply, Request};
pub use postgres::PostgresServer;
pub use redis::{RedisCluster, RedisServer};
pub use scripts::Scripts;

use std::time::Duration;
use tokio::time::Instant;

/// How often [`eventually`] checks its condition.
const CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `check` returns true; panics when it has not by the deadline.
#[track_caller]
pub fn eventually<F, Fut>(deadline: Duration, mut check: F) -> impl Future<Output = ()>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let caller = std::panic::Location::caller();
    async move {
        let end = Instant::now() + deadline;
        while !check().await {
            assert!(Instant::now() < end, "the condition at {caller} did not become true within {deadline:?}");
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn eventually_returns_once_the_condition_is_true() {
        let mut checks = 0;
        eventually(Duration::from_secs(1), || {
            checks += 1;
            let done = checks == 5;
            async move { done }
        })
        .await;
        assert_eq!(checks, 5);
    }

    #[tokio::test(start_paused = true)]
    #[should_panic(expected = "did not become true within")]
    async fn eventually_gives_up_at_its_deadline() {
        eventually(Duration::from_secs(1), || async { false }).await;
    }

    #[tokio::test]
    async fn redis_and_nats_restart_on_the_same_port() {
        let mut redis = RedisServer::start().await;
        assert_eq!(redis.command("PING").await.unwrap(), "+PONG");
        redis.kill();
        assert!(redis.command("PING").await.is_err());
        redis.restart().await;
        assert_eq!(redis.command("PING").await.unwrap(), "+PONG");

        let mut nats = NatsServer::start().await;
        let url = nats.url();
        nats.stop().await;
        assert!(
            tokio::net::TcpStream::connect(("127.0.0.1", nats.port()))
                .await
                .is_err()
        );
        nats.restart().await;
        assert_eq!(nats.url(), url);
    }

    #[tokio::test]
    async fn postgres_restarts_on_the_same_port() {
        let mut postgres = PostgresServer::start().await;
        let url = postgres.url();
        let address = url
            .split(['@', '/'])
            .find(|part| part.starts_with("127."))
            .unwrap()
            .to_string();
        tokio::net::TcpStream::connect(&address).await.unwrap();

        postgres.kill();
        // A backend that was forked just before the kill ends by itself, soon after its postmaster.
        eventually(Duration::from_secs(20), || async { tokio::net::TcpStream::connect(&address).await.is_err() }).await;

        postgres.restart().await;
        tokio::net::TcpStream::connect(&address).await.unwrap();
        assert_eq!(postgres.url(), url);
    }

    #[tokio::test]
    async fn cluster_replaces_a_killed_primary() {
        let mut cluster = RedisCluster::start().await;
        let killed = cluster.kill_primary().await;
        cluster.wait_until_whole().await;
        assert_eq!(cluster.primaries().await.len(), 3);
        cluster.restart(killed).await;
        assert_eq!(cluster.urls().len(), 6);
    }
}
