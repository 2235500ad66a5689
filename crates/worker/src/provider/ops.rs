//! A provider that answers questions about this deployment from the status messages of its parts. It needs no model.

use super::{Job, Outcome, Output};
use bus::{Bus, Headers, Message, Subscription};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use wire::channels::{Answer, Presence, PresenceResult};
use wire::status::{GatewayStatus, Heartbeat, NodeStatus, PolicyStatus, RouterStatus};
use wire::subjects;

/// A part without a status message for this long is gone. Workers send theirs every 5 s, the other parts every second.
const SILENCE_MAX: Duration = Duration::from_secs(4);
const WORKER_SILENCE_MAX: Duration = Duration::from_secs(16);
/// How long a node may take to tell who is in a room.
const PRESENCE_TIMEOUT: Duration = Duration::from_secs(2);

/// The newest status of every part.
#[derive(Default)]
pub struct Live {
    nodes: Table<NodeStatus>,
    routers: Table<RouterStatus>,
    gateways: Table<GatewayStatus>,
    workers: Table<Heartbeat>,
}

struct Table<T>(Mutex<BTreeMap<String, (Instant, T)>>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone + serde::de::DeserializeOwned> Table<T> {
    /// Keeps the status in `message` and forgets parts that have been silent.
    fn update(&self, message: &Message, name: impl Fn(&T) -> &str, silence: Duration) {
        if let Ok(status) = serde_json::from_slice::<T>(&message.payload) {
            let mut table = self.0.lock();
            table.insert(name(&status).into(), (Instant::now(), status));
            table.retain(|_, (heard, _)| heard.elapsed() < silence);
        }
    }

    fn all(&self, silence: Duration) -> Vec<T> {
        let table = self.0.lock();
        table
            .values()
            .filter(|(heard, _)| heard.elapsed() < silence)
            .map(|(_, status)| status.clone())
            .collect()
    }
}

pub struct Subscriptions {
    nodes: Subscription,
    routers: Subscription,
    gateways: Subscription,
    workers: Subscription,
}

impl Subscriptions {
    pub async fn subscribe(bus: &Bus) -> bus::Result<Self> {
        Ok(Self {
            nodes: bus.subscribe(subjects::NODE_STATUS, None, 1024).await?,
            routers: bus.subscribe(subjects::ROUTER_STATUS, None, 1024).await?,
            gateways: bus.subscribe(subjects::GATEWAY_STATUS, None, 1024).await?,
            workers: bus.subscribe(subjects::HEARTBEAT, None, 1024).await?,
        })
    }
}

/// Collects status messages until cancelled.
pub async fn listen(live: Arc<Live>, mut from: Subscriptions, cancel: CancellationToken) {
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            Some(message) = from.nodes.next() => live.nodes.update(&message, |s| &s.node, SILENCE_MAX),
            Some(message) = from.routers.next() => live.routers.update(&message, |s| &s.router, SILENCE_MAX),
            Some(message) = from.gateways.next() => live.gateways.update(&message, |s| &s.gateway, SILENCE_MAX),
            Some(message) = from.workers.next() => live.workers.update(&message, |s| &s.worker_id, WORKER_SILENCE_MAX),
            else => return,
        }
    }
}

pub struct Ops {
    pub bus: Bus,
    pub live: Arc<Live>,
}

impl Ops {
    pub async fn run(&self, job: &Job<'_>, output: &Output) -> Outcome {
        let question = job.text("prompt").unwrap_or("help".into()).to_lowercase();
        let room = job.text("room").unwrap_or_default();
        let answer = match topic(&question) {
            Topic::Status => self.status(),
            Topic::Nodes => self.nodes(),
            Topic::Providers => self.providers(),
            Topic::Who => self.who(&room).await,
            Topic::Help => help(&question),
        };

        // Line by line, like a model's answer, so that the page shows the first line at once.
        for line in answer.split_inclusive('\n') {
            output.push(line).await;
        }
        Outcome::text(answer)
    }

    fn status(&self) -> String {
        let nodes = self.live.nodes.all(SILENCE_MAX);
        let routers = self.live.routers.all(SILENCE_MAX);
        let gateways = self.live.gateways.all(SILENCE_MAX);
        let workers = self.live.workers.all(WORKER_SILENCE_MAX);

        let connections: u64 = nodes.iter().map(|n| n.connections).sum();
        let deliveries: u64 = nodes.iter().map(|n| n.deliveries_total).sum();
        let decisions: u64 = routers.iter().map(|r| r.decisions_total).sum();
        let running: u64 = workers.iter().map(|w| w.running).sum();
        let requests: u64 = gateways.iter().map(|g| g.requests_total).sum();

        // Routers share their breakers, so the same breaker is in several statuses.
        let open: BTreeSet<String> = routers
            .iter()
            .flat_map(|r| &r.breakers)
            .filter(|b| b.state != "closed")
            .map(|b| match b.tenant.as_ref().zip(b.policy.as_ref()) {
                Some((tenant, policy)) => format!("{} ({} for policy {tenant}/{policy})", b.provider, b.state),
                None => format!("{} ({})", b.provider, b.state),
            })
            .collect();
        let breakers = match open.len() {
            0 => "all closed".to_string(),
            _ => Vec::from_iter(open).join(", "),
        };

        let mut text = String::from("**Status of this deployment**\n");
        let _ = writeln!(
            text,
            "- {} with {connections} open connections and {deliveries} deliveries",
            count(nodes.len(), "node")
        );
        let _ = writeln!(text, "- {} with {decisions} decisions", count(routers.len(), "router"));
        for router in &routers {
            let p = router.decide_us;
            let _ = writeln!(text, "- decisions take {:.0} µs at p50, {:.0} µs at p99", p.p50, p.p99);
        }
        let _ = writeln!(text, "- {} running {running} assignments now", count(workers.len(), "worker"));
        let _ = writeln!(text, "- {} with {requests} requests from programs", count(gateways.len(), "gateway"));
        let _ = writeln!(text, "- breakers: {breakers}");

        let policies = routers.iter().flat_map(|router| &router.policies);
        let problems: BTreeSet<String> = policies.flat_map(policy_problems).collect();
        for problem in problems {
            let _ = writeln!(text, "- policy {problem}");
        }
        text
    }

    fn nodes(&self) -> String {
        let nodes = self.live.nodes.all(SILENCE_MAX);
        if nodes.is_empty() {
            return "No node has reported in the last seconds.\n".into();
        }

        let mut text = String::from(
            "| node | address | connections | users | channels | memory | up |\n|---|---|---|---|---|---|---|\n",
        );
        for n in nodes {
            let (memory, up) = (n.rss_bytes >> 20, duration(n.uptime_s));
            let (node, address) = (n.node, n.address);
            let _ = writeln!(
                text,
                "| {node} | {address} | {} | {} | {} | {memory} MiB | {up} |",
                n.connections, n.users, n.channels
            );
        }
        text
    }

    fn providers(&self) -> String {
        let workers = self.live.workers.all(WORKER_SILENCE_MAX);
        let mut text =
            String::from("| provider | kind | running | done | failed | p50 | p99 |\n|---|---|---|---|---|---|---|\n");
        for p in workers.iter().flat_map(|w| &w.providers) {
            let (p50, p99) = (p.latency_ms.p50, p.latency_ms.p99);
            let (done, failed) = (p.completed_total, p.failed_total);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {done} | {failed} | {p50:.0} ms | {p99:.0} ms |",
                p.name, p.kind, p.running
            );
        }
        text
    }

    async fn who(&self, room: &str) -> String {
        if room.is_empty() {
            return "Ask me in a room, and I will tell you who is in it.\n".into();
        }

        let request = Presence { channel: format!("chat:{room}") };
        let request = serde_json::to_vec(&request).expect("a request serializes to JSON");
        let asked = self
            .bus
            .request(subjects::CHANNELS_PRESENCE, Headers::new(), request.into(), PRESENCE_TIMEOUT);
        let answer = match asked.await {
            Ok(message) => serde_json::from_slice::<Answer<PresenceResult>>(&message.payload),
            Err(error) => return format!("I cannot see who is here: {error}\n"),
        };

        match answer.map(Answer::into_result) {
            Ok(Ok(result)) => {
                let people: BTreeSet<_> = result.presence.into_values().map(|info| info.user).collect();
                match people.len() {
                    0 => "Nobody is in this room now.\n".into(),
                    _ => format!("In this room now: {}.\n", people.into_iter().collect::<Vec<_>>().join(", ")),
                }
            }
            Ok(Err(failure)) => format!("I cannot see who is here: {}\n", failure.message),
            Err(error) => format!("I cannot see who is here: {error}\n"),
        }
    }
}

#[derive(Debug, PartialEq)]
enum Topic {
    Status,
    Nodes,
    Providers,
    Who,
    Help,
}

fn topic(question: &str) -> Topic {
    let words: Vec<&str> = question
        .split(|c: char| !c.is_alphanumeric())
        .map(|w| w.trim_end_matches('s'))
        .collect();
    let asks = |any: &[&str]| any.iter().any(|word| words.contains(word));

    if asks(&["help"]) {
        Topic::Help
    } else if asks(&["who", "present", "here"]) {
        Topic::Who
    } else if asks(&["provider", "worker"]) {
        Topic::Providers
    } else if asks(&["node", "connection", "memory"]) {
        Topic::Nodes
    } else if asks(&["statu", "health", "how", "ok", "breaker", "decision"]) {
        Topic::Status
    } else {
        Topic::Help
    }
}

fn help(question: &str) -> String {
    let mut text = String::new();
    if !question.contains("help") {
        text.push_str(
            "I answer questions about this deployment; for anything else, connect a model (docs/providers.md).\n\n",
        );
    }

    text.push_str("Ask me for\n- `status`: connections, decisions and breakers at a glance\n");
    text.push_str("- `nodes`: every node with its load\n");
    text.push_str(
        "- `providers`: what runs the tasks, and how fast\n- `who`: the people in this room\n- `help`: this list\n",
    );
    text
}

fn count(n: usize, what: &str) -> String {
    if n == 1 {
        format!("1 {what}")
    } else {
        format!("{n} {what}s")
    }
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The problems of a policy that an operator should know, each as a line.
fn policy_problems(policy: &PolicyStatus) -> Vec<String> {
    let name = format!("{}/{}", policy.tenant, policy.policy);
    let rules = policy.rule_errors.iter().map(|rule| {
        format!(
            "{name}: the condition of rule {} failed {} times, the last time: {}",
            rule.rule, rule.count, rule.last
        )
    });
    policy
        .error
        .iter()
        .chain(&policy.warnings)
        .map(|problem| format!("{name}: {problem}"))
        .chain(rules)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn question_words_select_the_topic() {
        for (question, expected) in [
            ("status", Topic::Status),
            ("how are the nodes?", Topic::Nodes),
            ("who is here?", Topic::Who),
            ("which providers are there", Topic::Providers),
            ("help", Topic::Help),
            ("tell me a joke", Topic::Help),
        ] {
            assert_eq!(topic(question), expected, "{question}");
        }
    }
}
