//! From settings to each part's own configuration.

use crate::config::{Settings, Values, uid_and_tenant};
use crate::hosts::Hosts;
use crate::http::Front;
use crate::proxies::Proxies;
use crate::secrets;
use anyhow::{Context, Result, bail};
use bus::Bus;
use bus::local::Durability;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

pub async fn bus(settings: &Settings, data_dir: &Path) -> Result<Bus> {
    let values = &settings.values;
    let Some(url) = values.maybe_text("nats.url") else {
        let durability = match values.text("bus.durability").as_str() {
            "power" => Durability::Power,
            _ => Durability::Process,
        };
        return Ok(bus::local::Local::open_with(data_dir, durability).await?);
    };
    let config = bus::nats::NatsConfig {
        url,
        name: format!("beamline {}", values.list("roles").join(",")),
        user: values.maybe_text("nats.user"),
        password: values.maybe_text("nats.password"),
        token: values.maybe_text("nats.token"),
        nkey: values.maybe_path("nats.nkey"),
        credentials: values.maybe_path("nats.credentials"),
        tls_ca: values.maybe_path("nats.tls_ca"),
        tls_certificate: values.maybe_path("nats.tls_certificate"),
        tls_key: values.maybe_path("nats.tls_key"),
        tls_first: values.flag("nats.tls_first"),
        connections: values
            .maybe_number("nats.connections")
            .map(|n| usize::try_from(n).expect("at most 8")),
    };
    Ok(bus::nats::Nats::connect(config).await?)
}

pub fn http_front(values: &Values) -> Front {
    Front {
        hosts: Hosts::new(&values.list("http.hosts"), &values.list("http.origins")),
        proxies: Proxies::new(&values.list("http.trusted_proxies")),
    }
}

/// On loopback the operations port is open to this machine's browsers, and so to pages whose name resolves to it.
/// Elsewhere those who ask are monitors, under names that only they know.
pub fn ops_front(values: &Values, listen: SocketAddr) -> Front {
    let front = http_front(values);
    if listen.ip().is_loopback() {
        front
    } else {
        Front { hosts: Hosts::any(), ..front }
    }
}

pub async fn cluster(settings: &Settings, data_dir: &Path, http: SocketAddr, bus: Bus) -> Result<cluster::Bound> {
    let values = &settings.values;
    let defaults = cluster::Config::default();
    let urls = values.list("redis.urls");
    let engine = if urls.is_empty() {
        cluster::EngineConfig::Memory { dir: data_dir.into(), boot_id: boot_id() }
    } else {
        cluster::EngineConfig::Redis { url: urls.join(",") }
    };
    let config = cluster::Config {
        node: values.maybe_text("cluster.node").unwrap_or(defaults.node),
        address: http.to_string(),
        max_connections: values.count("cluster.max_connections"),
        ping_interval: values.duration("cluster.ping_interval"),
        pong_timeout: values.duration("cluster.pong_timeout"),
        token_secret: secrets::load_or_create(data_dir, secrets::TOKEN_SECRET)?.into_bytes(),
        api_key: secrets::load_or_create(data_dir, secrets::API_KEY)?,
        origins: values.list("http.origins"),
        client_queue: values.count("cluster.client_queue"),
        drain_period: values.duration("cluster.drain_period"),
        namespaces: settings.channel_namespaces(),
        defaults: settings.channel_defaults(),
        engine,
        ..cluster::Config::default()
    };
    cluster::bind(config, bus)
        .await
        .context("the cluster node cannot start")
}

/// Of the machine since it was last started; empty where the kernel does not tell.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .into()
}

pub async fn worker(settings: &Settings, bus: Bus) -> Result<worker::Bound> {
    let values = &settings.values;
    let mut config = worker::Config {
        slots: values.count("worker.slots"),
        drain_timeout: drain_timeout(values),
        ..worker::Config::default()
    };
    for values in &settings.providers {
        let fresh = provider(settings, values)?;
        // `echo` and `ops` are there unless replaced.
        config.providers.retain(|known| known.name != fresh.name);
        config.providers.push(fresh);
    }
    worker::bind(config, bus).await.context("the worker cannot start")
}

fn provider(settings: &Settings, values: &Values) -> Result<worker::ProviderConfig> {
    let name = values.text("name");
    let needed = |key: &str| format!("provider {name} needs {key}");
    let kind = match values.text("kind").as_str() {
        "echo" => worker::Kind::Echo,
        "ops" => worker::Kind::Ops,
        "command" => worker::Kind::Command {
            program: values.maybe_path("program").with_context(|| needed("program"))?,
            args: values.list("args"),
            env: settings.program_environment(values),
            output_max: values.count("output_max"),
        },
        "openai" => worker::Kind::OpenAi {
            base_url: values.maybe_text("base_url").with_context(|| needed("base_url"))?,
            api_key: values.maybe_text("api_key"),
            model: values.maybe_text("model").with_context(|| needed("model"))?,
            system: values.maybe_text("system"),
        },
        other => bail!("provider {name} is of the unknown kind {other}"),
    };
    Ok(worker::ProviderConfig { name, kind, timeout: values.duration("timeout") })
}

pub async fn router(settings: &Settings, bus: Bus) -> Result<router::Bound> {
    let values = &settings.values;
    let config = router::Config {
        policies: values.path("router.policies"),
        max_in_flight: values.count("router.max_in_flight"),
        drain_timeout: drain_timeout(values),
        circuit_breaker: circuit_breaker(values),
    };
    router::bind(config, bus).await.context("the router cannot start")
}

/// What the operator says of every provider, whichever policy names it.
fn circuit_breaker(values: &Values) -> wire::policy::CircuitBreaker {
    let count = |key: &str| u32::try_from(values.number(key)).expect("the settings allow 10000 at most");
    wire::policy::CircuitBreaker {
        failure_threshold: count("router.circuit_breaker.failure_threshold"),
        error_rate_threshold: values.share("router.circuit_breaker.error_rate_threshold"),
        min_calls: count("router.circuit_breaker.min_calls"),
        timeout_ms: u64::try_from(values.duration("router.circuit_breaker.timeout").as_millis())
            .expect("the settings allow a day at most"),
        half_open_max_calls: count("router.circuit_breaker.half_open_max_calls"),
        success_threshold: count("router.circuit_breaker.success_threshold"),
    }
}

/// Of what a part has in flight: less than its stage has, so that what it gives up it can still say.
pub fn drain_timeout(values: &Values) -> Duration {
    values.duration("shutdown.deadline") * 3 / 4
}

/// Also what `beamline user` works on.
pub fn webapp_config(settings: &Settings, data_dir: &Path) -> Result<webapp::Config> {
    let values = &settings.values;
    Ok(webapp::Config {
        data_dir: data_dir.into(),
        database_url: values.maybe_text("database.url"),
        token_secret: secrets::load_or_create(data_dir, secrets::TOKEN_SECRET)?.into_bytes(),
        token_ttl: values.duration("auth.token_ttl"),
        signup: values.flag("auth.signup"),
        origins: values.list("http.origins"),
        operators: values
            .list("auth.operators")
            .iter()
            .map(|name| name.to_lowercase())
            .collect(),
        quotas: quotas(values),
    })
}

fn quotas(values: &Values) -> webapp::Quotas {
    let count = |key: &str| u32::try_from(values.number(key)).expect("the table of settings bounds it");
    webapp::Quotas {
        runs_at_once: count("webapp.runs_at_once"),
        runs_per_minute: count("webapp.runs_per_minute"),
        runs_per_day: count("webapp.runs_per_day"),
        messages_per_minute: count("webapp.messages_per_minute"),
        messages_per_day: count("webapp.messages_per_day"),
        rooms_per_day: count("webapp.rooms_per_day"),
    }
}

pub async fn webapp(settings: &Settings, data_dir: &Path, bus: Bus) -> Result<webapp::Bound> {
    let config = webapp_config(settings, data_dir)?;
    webapp::bind(config, bus).await.context("the web app cannot start")
}

/// On the socket that was `given`, else on one of our own.
pub async fn gateway(settings: &Settings, given: Option<UnixListener>, bus: Bus) -> Result<gateway::Bound> {
    let config = gateway_config(settings)?;
    let bound = match given {
        Some(given) => gateway::adopt(config, given, bus).await,
        None => gateway::bind(config, bus).await,
    };
    bound.context("the gateway cannot start")
}

/// The API key is read again, too.
pub fn gateway_config(settings: &Settings) -> Result<gateway::Config> {
    let values = &settings.values;
    let uids = values.list("gateway.allowed_uids").into_iter().map(|uid| {
        uid.parse::<u32>()
            .with_context(|| format!("gateway.allowed_uids holds {uid:?}, which is no uid"))
    });
    let mut tenants = BTreeMap::<u32, Vec<String>>::new();
    for entry in values.list("gateway.tenants") {
        let (uid, tenant) = uid_and_tenant(&entry).with_context(|| format!("gateway.tenants holds {entry:?}"))?;
        tenants.entry(uid).or_default().push(tenant.into());
    }
    Ok(gateway::Config {
        tenants,
        socket: values.path("gateway.socket"),
        max_connections: values.count("gateway.max_connections"),
        max_connections_per_user: values
            .maybe_number("gateway.max_connections_per_user")
            .map(|n| usize::try_from(n).expect("at most a hundred thousand")),
        max_in_flight: values.count("gateway.max_in_flight"),
        max_in_flight_per_user: values
            .maybe_number("gateway.max_in_flight_per_user")
            .map(|n| usize::try_from(n).expect("at most a million")),
        max_in_flight_v1: values.count("gateway.max_in_flight_v1"),
        max_in_flight_v2: values.count("gateway.max_in_flight_v2"),
        read_timeout: values.duration("gateway.read_timeout"),
        write_timeout: values.duration("gateway.write_timeout"),
        request_timeout: values.duration("gateway.request_timeout"),
        max_deadline: values.duration("gateway.max_deadline"),
        receive_budget: values.count("gateway.receive_budget"),
        reply_budget: values.count("gateway.reply_budget"),
        drain_timeout: drain_timeout(values),
        allowed_uids: uids.collect::<Result<_>>()?,
        api_key: secrets::load_or_create(&values.path("data_dir"), secrets::API_KEY)?,
        ..gateway::Config::default()
    })
}
