//! Discovery by the NATS services protocol (ADR-32): every router answers `$SRV.{PING,INFO,STATS}`, so that tools such as
//! `nats micro` list it, with the requests and errors of each of its subjects.

use crate::Router;
use bus::{Bus, Headers, Message, Subscription};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use wire::router::RouterCode;
use wire::router::services::{EndpointInfo, EndpointStats, Info, InfoType, Ping, PingType, Service, Stats, StatsType};
use wire::{subjects, time};

const QUEUE_MAX: usize = 64;
const DESCRIPTION: &str = "decides which provider handles a task, and assigns it";

/// One subject that the router answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    Decide,
    DecideV2,
    GetDecision,
    Cancel,
    Backpressure,
    BackpressureV2,
    Breakers,
    Extensions,
    DryRun,
    Complexity,
}

impl Endpoint {
    const ALL: [Self; 10] = [
        Self::Decide,
        Self::DecideV2,
        Self::GetDecision,
        Self::Cancel,
        Self::Backpressure,
        Self::BackpressureV2,
        Self::Breakers,
        Self::Extensions,
        Self::DryRun,
        Self::Complexity,
    ];

    pub fn subject(self) -> &'static str {
        match self {
            Self::Decide => subjects::DECIDE,
            Self::DecideV2 => subjects::DECIDE_V2,
            Self::GetDecision => subjects::GET_DECISION,
            Self::Cancel => subjects::CANCEL,
            Self::Backpressure => subjects::BACKPRESSURE,
            Self::BackpressureV2 => subjects::BACKPRESSURE_V2,
            Self::Breakers => subjects::ADMIN_BREAKERS,
            Self::Extensions => subjects::ADMIN_EXTENSIONS,
            Self::DryRun => subjects::ADMIN_DRY_RUN,
            Self::Complexity => subjects::ADMIN_COMPLEXITY,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Decide => "decide",
            Self::DecideV2 => "decide_v2",
            Self::GetDecision => "get_decision",
            Self::Cancel => "cancel",
            Self::Backpressure => "backpressure",
            Self::BackpressureV2 => "backpressure_v2",
            Self::Breakers => "get_circuit_breaker_states",
            Self::Extensions => "get_extension_health",
            Self::DryRun => "dry_run_pipeline",
            Self::Complexity => "get_pipeline_complexity",
        }
    }
}

/// What this router has answered, by endpoint.
#[derive(Default)]
pub struct Answered([Counts; Endpoint::ALL.len()]);

#[derive(Default)]
struct Counts {
    requests: AtomicU64,
    errors: AtomicU64,
    took_ns: AtomicU64,
    last_error: Mutex<String>,
}

impl Answered {
    pub fn add(&self, endpoint: Endpoint, took: Duration, error: Option<&RouterCode>) {
        let counts = &self.0[endpoint as usize];
        counts.requests.fetch_add(1, Relaxed);
        counts.took_ns.fetch_add(took.as_nanos() as u64, Relaxed);
        if let Some(code) = error {
            counts.errors.fetch_add(1, Relaxed);
            // Without the message, which may quote a client's request.
            *counts.last_error.lock() = format!("{}:{code}", code.status());
        }
    }

    fn stats(&self) -> Vec<EndpointStats> {
        let stats = Endpoint::ALL.into_iter().zip(&self.0).map(|(endpoint, counts)| {
            let (requests, took_ns) = (counts.requests.load(Relaxed), counts.took_ns.load(Relaxed));
            EndpointStats {
                name: endpoint.name().into(),
                subject: endpoint.subject().into(),
                queue_group: subjects::DECIDE_GROUP.into(),
                num_requests: requests,
                num_errors: counts.errors.load(Relaxed),
                last_error: counts.last_error.lock().clone(),
                processing_time: took_ns,
                average_processing_time: took_ns.checked_div(requests).unwrap_or_default(),
            }
        });
        stats.collect()
    }
}

#[derive(Debug, Clone, Copy)]
enum Verb {
    Ping,
    Info,
    Stats,
}

/// The subjects on which tools look for services: of all, of routers, and of this one.
pub struct Discovery(Vec<(Verb, Subscription)>);

impl Discovery {
    /// Every router answers, so these subscriptions have no queue group.
    pub async fn subscribe(bus: &Bus, id: &str) -> bus::Result<Self> {
        let mut asked = Vec::new();
        for (verb, name) in [(Verb::Ping, "PING"), (Verb::Info, "INFO"), (Verb::Stats, "STATS")] {
            for subject in subjects::discovery(name, subjects::SERVICE, id) {
                asked.push((verb, bus.subscribe(&subject, None, QUEUE_MAX).await?));
            }
        }
        Ok(Self(asked))
    }
}

/// Answers until cancelled.
pub async fn run(router: Arc<Router>, discovery: Discovery, cancel: CancellationToken) {
    let answering = discovery.0.into_iter().map(|(verb, mut asked)| {
        let (router, cancel) = (&router, &cancel);
        async move {
            while let Some(message) = asked.next_until(cancel).await {
                answer(router, verb, &message).await;
            }
        }
    });
    let mut answering = answering.collect::<FuturesUnordered<_>>();
    while answering.next().await.is_some() {}
}

async fn answer(router: &Router, verb: Verb, asked: &Message) {
    let Some(inbox) = asked.reply.clone() else { return };
    let service = Service {
        name: subjects::SERVICE.into(),
        id: router.id.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        metadata: BTreeMap::new(),
    };
    match verb {
        Verb::Ping => {
            let ping = Ping { kind: PingType::V1, service };
            router.send(inbox, Headers::new(), &ping).await;
        }
        Verb::Info => {
            let endpoints = Endpoint::ALL.map(|endpoint| EndpointInfo {
                name: endpoint.name().into(),
                subject: endpoint.subject().into(),
                queue_group: subjects::DECIDE_GROUP.into(),
                metadata: BTreeMap::new(),
            });
            let info = Info {
                kind: InfoType::V1,
                service,
                description: DESCRIPTION.into(),
                endpoints: endpoints.into(),
            };
            router.send(inbox, Headers::new(), &info).await;
        }
        Verb::Stats => {
            let started_s = bus::clock::unix_seconds().saturating_sub(router.started.elapsed().as_secs());
            let stats = Stats {
                kind: StatsType::V1,
                service,
                started: time::rfc3339(started_s),
                endpoints: router.answered.stats(),
            };
            router.send(inbox, Headers::new(), &stats).await;
        }
    }
}
