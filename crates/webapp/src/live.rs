//! The console's numbers: what every part says of itself, put together once a second on channel `ops:live`.
//!
//! Several web apps may run; the one with the smallest id publishes, the others stand by.

use crate::channels::Channels;
use bus::{Bus, Message, Subscription};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::status::{BreakerStatus, GatewayStatus, Heartbeat, NodeStatus, Percentiles, PolicyStatus, RouterStatus};
use wire::subjects;

pub const CHANNEL: &str = "ops:live";
/// Core, every second: which web apps there are.
const ALIVE: &str = "beamline.webapp.v1.alive";
const EVERY: Duration = Duration::from_secs(1);
const QUEUE_MAX: usize = 1024;
/// Parts of one kind that are shown.
const PARTS_MAX: usize = 1000;

pub struct Live {
    bus: Bus,
    channels: Channels,
    id: String,
    same: Same,
    /// Other web apps that were found to differ; each is told of once.
    strangers: HashSet<String>,
    said: Said,
    alive: Subscription,
    nodes: Subscription,
    routers: Subscription,
    gateways: Subscription,
    workers: Subscription,
}

/// The last word of every part, and when it came.
#[derive(Default)]
struct Said {
    webapps: Parts<Alive>,
    nodes: Parts<NodeStatus>,
    routers: Parts<RouterStatus>,
    gateways: Parts<GatewayStatus>,
    workers: Parts<Heartbeat>,
}

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

    /// Forgets those that have said nothing for so long.
    fn forget(&mut self, silence: Duration, now: Instant) {
        self.0.retain(|_, (_, at)| now.duration_since(*at) < silence);
    }

    fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.values().map(|(status, _)| status)
    }
}

#[derive(Clone, Serialize, Deserialize)]
struct Alive {
    webapp: String,
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
    /// What goes wrong with another that differs.
    fn differs(&self, other: &Self) -> Option<&'static str> {
        if self.database != other.database {
            return Some(
                "it uses another database, so accounts and rooms differ from call to call: give both the same database.url",
            );
        }
        (self.secret != other.secret)
            .then_some("it has another token secret, so tokens of one are refused by the other: copy token-secret from one data directory to the other")
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
            said: Said::default(),
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
                Some(m) = self.alive.next() => note(&mut self.said.webapps, &m, |alive: &Alive| alive.webapp.clone(), |alive| alive),
                Some(m) = self.nodes.next() => note(&mut self.said.nodes, &m, |s: &NodeStatus| s.node.clone(), |s| s),
                Some(m) = self.routers.next() => note(&mut self.said.routers, &m, |s: &RouterStatus| s.router.clone(), |s| s),
                Some(m) = self.gateways.next() => note(&mut self.said.gateways, &m, |s: &GatewayStatus| s.gateway.clone(), |s| s),
                Some(m) = self.workers.next() => note(&mut self.said.workers, &m, |s: &Heartbeat| s.worker_id.clone(), |s| s),
            }
        }
    }

    async fn tick(&mut self) {
        let alive = Alive { webapp: self.id.clone(), same: Some(self.same.clone()) };
        let payload = serde_json::to_vec(&alive).expect("a name is JSON").into();
        let alive = self
            .bus
            .publish(Message { subject: ALIVE.into(), payload, ..Message::default() })
            .await;
        if let Err(error) = alive {
            tracing::debug!(%error, "the bus does not take what the console shows");
            return;
        }
        self.said.forget(Instant::now());
        self.compare();
        if self.said.webapps.0.keys().next().is_some_and(|first| *first < self.id) {
            return;
        }
        let sample = self.said.sample(crate::db::now_ms(), self.streams().await);
        if let Err(error) = self.channels.publish_json(CHANNEL, &sample, None).await {
            tracing::debug!(error, "the console's numbers were not published");
        }
    }

    /// Two web apps with databases of their own would answer in turns, each from its own.
    fn compare(&mut self) {
        for other in self.said.webapps.iter() {
            let differs = other.same.as_ref().and_then(|same| self.same.differs(same));
            if let Some(differs) = differs.filter(|_| self.strangers.insert(other.webapp.clone())) {
                tracing::error!(webapp = other.webapp, "another web app is on this bus, and {differs}");
            }
        }
    }

    /// What waits in each stream; of those without consumers, what lies there.
    async fn streams(&self) -> BTreeMap<&'static str, u64> {
        let mut waiting = BTreeMap::new();
        for stream in [subjects::STREAM_ASSIGN, subjects::STREAM_RESULT, subjects::STREAM_DLQ] {
            if let Ok(info) = self.bus.stream_info(stream).await {
                let behind = info.consumers.iter().map(|(_, pending)| *pending).max();
                waiting.insert(
                    stream,
                    if stream == subjects::STREAM_DLQ {
                        info.messages
                    } else {
                        behind.unwrap_or(0)
                    },
                );
            }
        }
        waiting
    }
}

fn note<M: DeserializeOwned, T>(
    parts: &mut Parts<T>,
    message: &Message,
    name: impl Fn(&M) -> String,
    keep: impl Fn(M) -> T,
) {
    match serde_json::from_slice::<M>(&message.payload) {
        Ok(status) => parts.put(name(&status), keep(status), Instant::now()),
        Err(error) => tracing::debug!(subject = &*message.subject, %error, "a status does not fit"),
    }
}

impl Said {
    fn forget(&mut self, now: Instant) {
        let silence = 3 * EVERY;
        self.webapps.forget(silence, now);
        self.nodes.forget(silence, now);
        self.routers.forget(silence, now);
        self.gateways.forget(silence, now);
        // Heartbeats come every 5 s.
        self.workers.forget(Duration::from_secs(15), now);
    }

    fn sample(&self, t: i64, streams: BTreeMap<&'static str, u64>) -> Json {
        let nodes = || self.nodes.iter();
        let routers = || self.routers.iter();
        let gateways = || self.gateways.iter();
        let mut by_provider: BTreeMap<&str, u64> = BTreeMap::new();
        for (provider, count) in routers().flat_map(|router| &router.decisions_by_provider) {
            *by_provider.entry(provider).or_default() += count;
        }
        let providers = self.workers.iter().flat_map(|worker| {
            worker.providers.iter().map(|provider| {
                json!({
                    "name": provider.name, "kind": provider.kind, "worker": worker.worker_id, "running": provider.running,
                    "completed_total": provider.completed_total, "failed_total": provider.failed_total,
                    "p50": provider.latency_ms.p50, "p95": provider.latency_ms.p95,
                })
            })
        });
        let errors = gateways().flat_map(|g| g.errors_by_code.values()).sum::<u64>()
            + routers().flat_map(|r| r.errors_by_code.values()).sum::<u64>();
        let worst = |each: &mut dyn Iterator<Item = Percentiles>| {
            each.fold(Percentiles::default(), |a, b| Percentiles {
                p50: a.p50.max(b.p50),
                p95: a.p95.max(b.p95),
                p99: a.p99.max(b.p99),
            })
        };
        json!({
            "t": t,
            "nodes": nodes().collect::<Vec<_>>(),
            "routers": routers().collect::<Vec<_>>(),
            "gateways": gateways().collect::<Vec<_>>(),
            "workers": self.workers.iter().collect::<Vec<_>>(),
            "providers": providers.collect::<Vec<_>>(),
            "breakers": breakers(routers()),
            "policies": policies(routers()),
            "totals": {
                "connections": nodes().map(|n| n.connections).sum::<u64>(),
                "users": nodes().map(|n| n.users).sum::<u64>(),
                "channels": nodes().map(|n| n.channels).sum::<u64>(),
                "deliveries": nodes().map(|n| n.deliveries_total).sum::<u64>(),
                "publications": nodes().map(|n| n.publications_total).sum::<u64>(),
                "decisions": routers().map(|r| r.decisions_total).sum::<u64>(),
                "requests": gateways().map(|g| g.requests_total).sum::<u64>(),
                "errors": errors,
            },
            "decisions_by_provider": by_provider,
            "decide_us": worst(&mut routers().map(|r| r.decide_us)),
            "forward_us": worst(&mut gateways().map(|g| g.forward_us)),
            "streams": streams,
        })
    }
}

/// Each breaker once, as the router with the newest view sees it: within a second all of them do.
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

/// Policies with something for an operator to do, as any router sees them.
fn policies<'a>(routers: impl Iterator<Item = &'a RouterStatus>) -> Vec<Json> {
    let mut rows: BTreeMap<String, (&PolicyStatus, u64, Option<String>)> = BTreeMap::new();
    for policy in routers.flat_map(|router| &router.policies) {
        let failed = policy.rule_errors.iter().map(|rule| rule.count).sum::<u64>();
        let rule = policy
            .rule_errors
            .first()
            .map(|rule| format!("rule {}: {}", rule.rule, rule.last));
        let problem = policy
            .error
            .clone()
            .or(rule)
            .or_else(|| policy.warnings.first().cloned());
        if problem.is_none() {
            continue;
        }
        let name = format!("{}/{}", policy.tenant, policy.policy);
        let (_, total, known) = rows.entry(name).or_insert((policy, 0, None));
        *total += failed;
        *known = known.take().or(problem);
    }
    let rows = rows.into_iter().map(|(name, (policy, failed, problem))| {
        json!({"policy": name, "version": policy.version, "failed": failed, "problem": problem})
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_breaker_is_shown_once_however_many_routers_tell_of_it() {
        let of = |provider: &str, tenant: Option<&str>, generation| BreakerStatus {
            provider: provider.into(),
            tenant: tenant.map(String::from),
            policy: tenant.map(|_| "default".into()),
            generation,
            ..BreakerStatus::default()
        };
        let router = |breakers| RouterStatus { breakers, ..RouterStatus::default() };
        let said = [router(vec![of("p", None, 1), of("p", Some("acme"), 0)]), router(vec![of("p", None, 2)])];
        let shown: Vec<_> = breakers(said.iter()).into_iter().cloned().collect();
        assert_eq!(shown, [of("p", None, 2), of("p", Some("acme"), 0)]);
    }

    #[test]
    fn a_sample_adds_up_what_parts_say_and_forgets_the_silent() {
        let mut said = Said::default();
        let now = Instant::now();
        for (node, connections) in [("a", 3), ("b", 4)] {
            said.nodes
                .put(node.into(), NodeStatus { connections, ..NodeStatus::default() }, now);
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
        said.routers
            .put("s".into(), RouterStatus { policies: vec![broken.clone()], ..Default::default() }, now);
        let router = RouterStatus { policies: vec![broken, fine], ..router };
        said.routers.put("r".into(), router, now);
        let sample = said.sample(7, BTreeMap::new());
        assert_eq!(
            (&sample["totals"]["connections"], &sample["decisions_by_provider"]["echo"]),
            (&json!(7), &json!(5))
        );
        let policies = json!([{"policy": "acme/p", "version": "", "failed": 0, "problem": "bad"}]);
        assert_eq!(sample["policies"], policies, "one row, however many routers see it");
        said.forget(now + Duration::from_secs(4));
        assert_eq!(said.sample(8, BTreeMap::new())["nodes"], json!([]));
    }

    #[test]
    fn web_apps_that_do_not_belong_together_are_told_why() {
        let same = |database: &str, secret: &str| Same { database: database.into(), secret: secret.into() };
        assert_eq!(same("d", "s").differs(&same("d", "s")), None);
        assert!(
            same("d", "s")
                .differs(&same("e", "s"))
                .unwrap()
                .contains("database.url")
        );
        assert!(
            same("d", "s")
                .differs(&same("d", "t"))
                .unwrap()
                .contains("token-secret")
        );
        let older: Alive = serde_json::from_str(r#"{"webapp":"w"}"#).unwrap();
        assert_eq!(older.same, None);
    }
}
