//! Collects the status messages of all parts, and publishes a sample for the console once a second on `ops:live`.
//!
//! If several web apps run, the one with the smallest id publishes, and the others stand by.

use crate::channels::Channels;
use bus::{Bus, Message, Subscription};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::console::{CHANNEL, Policy, Provider, Sample, Totals};
use wire::status::{BreakerStatus, GatewayStatus, Heartbeat, NodeStatus, Percentiles, RouterStatus};
use wire::subjects;

/// On this subject, each web app announces itself to the others every second.
const ALIVE: &str = "beamline.webapp.v1.alive";
const EVERY: Duration = Duration::from_secs(1);
/// A part whose status has not arrived for this long is no longer shown.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// The same for workers, which send heartbeats every 5 s.
const WORKER_SILENCE_MAX: Duration = Duration::from_secs(15);
const QUEUE_MAX: usize = 1024;
/// Maximum parts of one kind.
const PARTS_MAX: usize = 1000;

pub struct Live {
    bus: Bus,
    channels: Channels,
    id: String,
    same: Same,
    /// Web apps whose settings differ from ours, so that each is logged once.
    strangers: HashSet<String>,
    latest: Latest,
    alive: Subscription,
    nodes: Subscription,
    routers: Subscription,
    gateways: Subscription,
    workers: Subscription,
}

/// The latest status of every part.
#[derive(Default)]
struct Latest {
    webapps: Parts<Alive>,
    nodes: Parts<NodeStatus>,
    routers: Parts<RouterStatus>,
    gateways: Parts<GatewayStatus>,
    workers: Parts<Heartbeat>,
}

/// The latest status of each part of one kind, by name, and when it arrived.
struct Parts<T>(BTreeMap<String, (T, Instant)>);

impl<T> Default for Parts<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Parts<T> {
    fn put(&mut self, name: String, status: T, now: Instant) {
        if self.0.len() < PARTS_MAX || self.0.contains_key(&name) {
            self.0.insert(name, (status, now));
        }
    }

    fn forget_silent(&mut self, silence_max: Duration, now: Instant) {
        self.0.retain(|_, (_, at)| now.duration_since(*at) < silence_max);
    }

    fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.values().map(|(status, _)| status)
    }
}

impl<T: DeserializeOwned> Parts<T> {
    fn receive(&mut self, message: &Message, name: impl Fn(&T) -> &String) {
        match serde_json::from_slice::<T>(&message.payload) {
            Ok(status) => self.put(name(&status).clone(), status, Instant::now()),
            Err(error) => tracing::debug!(subject = &*message.subject, %error, "cannot read a status message"),
        }
    }
}

#[derive(Clone, Serialize, Deserialize)]
struct Alive {
    webapp: String,
    /// Absent in the announcements of older versions.
    #[serde(flatten)]
    same: Option<Same>,
}

/// What all web apps on one bus must have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Same {
    pub database: String,
    /// The beginning of a hash of the token secret.
    pub secret: String,
}

impl Same {
    /// Describes the difference, its consequence and the remedy; `None` if there is none.
    fn difference(&self, other: &Self) -> Option<&'static str> {
        if self.database != other.database {
            return Some(
                "it uses another database, so accounts and rooms differ from call to call: \
                 give both the same database.url",
            );
        }
        (self.secret != other.secret).then_some(
            "it has another token secret, so each refuses the tokens of the other: \
             copy token-secret from one data directory to the other",
        )
    }
}

impl Live {
    pub async fn subscribe(bus: &Bus, channels: Channels, same: Same) -> bus::Result<Self> {
        Ok(Self {
            bus: bus.clone(),
            channels,
            id: uuid::Uuid::now_v7().to_string(),
            same,
            strangers: HashSet::new(),
            latest: Latest::default(),
            alive: bus.subscribe(ALIVE, None, QUEUE_MAX).await?,
            nodes: bus.subscribe(subjects::NODE_STATUS, None, QUEUE_MAX).await?,
            routers: bus.subscribe(subjects::ROUTER_STATUS, None, QUEUE_MAX).await?,
            gateways: bus.subscribe(subjects::GATEWAY_STATUS, None, QUEUE_MAX).await?,
            workers: bus.subscribe(subjects::HEARTBEAT, None, QUEUE_MAX).await?,
        })
    }

    pub async fn run(mut self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = ticks.tick() => self.tick().await,
                Some(m) = self.alive.next() => self.latest.webapps.receive(&m, |alive| &alive.webapp),
                Some(m) = self.nodes.next() => self.latest.nodes.receive(&m, |status| &status.node),
                Some(m) = self.routers.next() => self.latest.routers.receive(&m, |status| &status.router),
                Some(m) = self.gateways.next() => self.latest.gateways.receive(&m, |status| &status.gateway),
                Some(m) = self.workers.next() => self.latest.workers.receive(&m, |status| &status.worker_id),
            }
        }
    }

    async fn tick(&mut self) {
        let alive = Alive { webapp: self.id.clone(), same: Some(self.same.clone()) };
        let payload = serde_json::to_vec(&alive).expect("strings serialize to JSON").into();
        let alive = self
            .bus
            .publish(Message { subject: ALIVE.into(), payload, ..Message::default() })
            .await;
        if let Err(error) = alive {
            tracing::debug!(%error, "cannot publish to the bus; the console gets no sample");
            return;
        }

        self.latest.forget_silent(Instant::now());
        self.compare();

        // All web apps agree on the smallest id within a second. Until then, two may publish.
        let first = self.latest.webapps.0.keys().next();
        if first.is_some_and(|first| *first < self.id) {
            return;
        }
        let sample = self.latest.sample(crate::db::now_ms(), self.streams().await);
        if let Err(error) = self.channels.publish_json(CHANNEL, &sample, None).await {
            tracing::debug!(error, "cannot publish a sample for the console");
        }
    }

    /// Logs web apps that must not share a bus with this one, because either may answer a call, from its own data.
    fn compare(&mut self) {
        for other in self.latest.webapps.iter() {
            let difference = other.same.as_ref().and_then(|same| self.same.difference(same));
            if let Some(difference) = difference.filter(|_| self.strangers.insert(other.webapp.clone())) {
                tracing::error!(webapp = other.webapp, "another web app is on this bus, and {difference}");
            }
        }
    }

    /// Returns the backlog of each stream. All messages of ASSIGN and DLQ count: ASSIGN has a consumer for each subject and
    /// deletes what is acknowledged, DLQ has none.
    async fn streams(&self) -> BTreeMap<&'static str, u64> {
        let mut waiting = BTreeMap::new();
        for stream in [subjects::STREAM_ASSIGN, subjects::STREAM_RESULT, subjects::STREAM_DLQ] {
            let Ok(info) = self.bus.stream_info(stream).await else {
                continue;
            };
            let behind = info.consumers.iter().map(|(_, pending)| *pending).max();
            let count = if stream == subjects::STREAM_RESULT {
                behind.unwrap_or(0)
            } else {
                info.messages
            };
            waiting.insert(stream, count);
        }
        waiting
    }
}

impl Latest {
    fn forget_silent(&mut self, now: Instant) {
        self.webapps.forget_silent(SILENCE_MAX, now);
        self.nodes.forget_silent(SILENCE_MAX, now);
        self.routers.forget_silent(SILENCE_MAX, now);
        self.gateways.forget_silent(SILENCE_MAX, now);
        self.workers.forget_silent(WORKER_SILENCE_MAX, now);
    }

    fn sample(&self, t: i64, streams: BTreeMap<&'static str, u64>) -> Sample<'_> {
        let routers = || self.routers.iter();
        let mut decisions_by_provider: BTreeMap<&str, u64> = BTreeMap::new();
        for (provider, count) in routers().flat_map(|router| &router.decisions_by_provider) {
            *decisions_by_provider.entry(provider).or_default() += count;
        }

        Sample {
            t,
            nodes: self.nodes.iter().collect(),
            routers: routers().collect(),
            gateways: self.gateways.iter().collect(),
            workers: self.workers.iter().collect(),
            providers: self.workers.iter().flat_map(providers).collect(),
            breakers: breakers(routers()),
            policies: policies(routers()),
            totals: self.totals(),
            decisions_by_provider,
            decide_us: highest(routers().map(|r| r.decide_us)),
            forward_us: highest(self.gateways.iter().map(|g| g.forward_us)),
            streams,
        }
    }

    fn totals(&self) -> Totals {
        let nodes = || self.nodes.iter();
        let routers = || self.routers.iter();
        let gateways = || self.gateways.iter();
        let gateway_errors: u64 = gateways().flat_map(|g| g.errors_by_code.values()).sum();
        let router_errors: u64 = routers().flat_map(|r| r.errors_by_code.values()).sum();
        Totals {
            connections: nodes().map(|n| n.connections).sum(),
            users: nodes().map(|n| n.users).sum(),
            channels: nodes().map(|n| n.channels).sum(),
            deliveries: nodes().map(|n| n.deliveries_total).sum(),
            publications: nodes().map(|n| n.publications_total).sum(),
            decisions: routers().map(|r| r.decisions_total).sum(),
            requests: gateways().map(|g| g.requests_total).sum(),
            errors: gateway_errors + router_errors,
        }
    }
}

fn providers(worker: &Heartbeat) -> impl Iterator<Item = Provider<'_>> {
    worker.providers.iter().map(|provider| Provider {
        name: &provider.name,
        kind: &provider.kind,
        worker: &worker.worker_id,
        running: provider.running,
        completed_total: provider.completed_total,
        failed_total: provider.failed_total,
        p50: provider.latency_ms.p50,
        p95: provider.latency_ms.p95,
    })
}

fn highest(each: impl Iterator<Item = Percentiles>) -> Percentiles {
    each.fold(Percentiles::default(), |a, b| Percentiles {
        p50: a.p50.max(b.p50),
        p95: a.p95.max(b.p95),
        p99: a.p99.max(b.p99),
    })
}

/// Returns each breaker once, as the router with the newest state reports it. All routers agree within a second.
fn breakers<'a>(routers: impl Iterator<Item = &'a RouterStatus>) -> Vec<&'a BreakerStatus> {
    let mut newest = BTreeMap::new();
    for breaker in routers.flat_map(|router| &router.breakers) {
        let known = newest
            .entry((&breaker.tenant, &breaker.policy, &breaker.provider))
            .or_insert(breaker);
        if (breaker.generation, breaker.calls) > (known.generation, known.calls) {
            *known = breaker;
        }
    }
    newest.into_values().collect()
}

/// Returns the policies with problems, one row each, with the first problem that a router reports.
fn policies<'a>(routers: impl Iterator<Item = &'a RouterStatus>) -> Vec<Policy<'a>> {
    let mut rows: BTreeMap<String, Policy<'a>> = BTreeMap::new();
    for policy in routers.flat_map(|router| &router.policies) {
        let failed_rule = policy.rule_errors.first();
        let failed_rule = failed_rule.map(|rule| format!("rule {}: {}", rule.rule, rule.last));
        let warning = || policy.warnings.first().cloned();
        let Some(problem) = policy.error.clone().or(failed_rule).or_else(warning) else {
            continue;
        };

        let name = format!("{}/{}", policy.tenant, policy.policy);
        let row =
            rows.entry(name.clone())
                .or_insert(Policy { policy: name, version: &policy.version, failed: 0, problem });
        row.failed += policy.rule_errors.iter().map(|rule| rule.count).sum::<u64>();
    }
    rows.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use wire::status::PolicyStatus;

    #[test]
    fn breaker_is_listed_once_for_all_routers() {
        let of = |provider: &str, tenant: Option<&str>, generation| BreakerStatus {
            provider: provider.into(),
            tenant: tenant.map(String::from),
            policy: tenant.map(|_| "default".into()),
            generation,
            ..BreakerStatus::default()
        };
        let router = |breakers| RouterStatus { breakers, ..RouterStatus::default() };
        let reported = [router(vec![of("p", None, 1), of("p", Some("acme"), 0)]), router(vec![of("p", None, 2)])];

        let listed: Vec<_> = breakers(reported.iter()).into_iter().cloned().collect();
        assert_eq!(listed, [of("p", None, 2), of("p", Some("acme"), 0)]);
    }

    #[test]
    fn sample_sums_over_parts_and_omits_silent_ones() {
        let mut latest = Latest::default();
        let now = Instant::now();
        for (node, connections) in [("a", 3), ("b", 4)] {
            let status = NodeStatus { connections, ..NodeStatus::default() };
            latest.nodes.put(node.into(), status, now);
        }
        let router = RouterStatus {
            decisions_by_provider: [("echo".into(), 5)].into(),
            ..RouterStatus::default()
        };
        let broken = PolicyStatus {
            tenant: "acme".into(),
            policy: "p".into(),
            error: Some("bad".into()),
            ..Default::default()
        };
        let fine = PolicyStatus { tenant: "acme".into(), policy: "q".into(), ..Default::default() };
        let other = RouterStatus { policies: vec![broken.clone()], ..Default::default() };
        latest.routers.put("s".into(), other, now);
        let router = RouterStatus { policies: vec![broken, fine], ..router };
        latest.routers.put("r".into(), router, now);

        let sample = serde_json::to_value(latest.sample(7, BTreeMap::new())).unwrap();
        assert_eq!(
            (&sample["totals"]["connections"], &sample["decisions_by_provider"]["echo"]),
            (&json!(7), &json!(5))
        );
        let policies = json!([{"policy": "acme/p", "version": "", "failed": 0, "problem": "bad"}]);
        assert_eq!(sample["policies"], policies, "one row for all routers");

        latest.forget_silent(now + Duration::from_secs(4));
        assert!(latest.sample(8, BTreeMap::new()).nodes.is_empty());
    }

    #[test]
    fn differing_web_apps_are_described_with_the_remedy() {
        let same = |database: &str, secret: &str| Same { database: database.into(), secret: secret.into() };
        let difference = |other: Same| same("d", "s").difference(&other);
        assert_eq!(difference(same("d", "s")), None);
        assert!(difference(same("e", "s")).unwrap().contains("database.url"));
        assert!(difference(same("d", "t")).unwrap().contains("token-secret"));

        let older: Alive = serde_json::from_str(r#"{"webapp":"w"}"#).unwrap();
        assert_eq!(older.same, None);
    }
}
