//! Every setting in one table: it reads the file, the environment and the flags, prints `config show` and the help.

use super::url;
use super::value::Kind;

/// One setting.
#[derive(Debug)]
pub struct Key {
    /// Dotted name, as in `beamline.toml`.
    pub name: &'static str,
    pub kind: Kind,
    /// As it would be written in the file; `None`: unset.
    pub default: Option<&'static str>,
    /// A well-known variable beside `BEAMLINE_<TABLE>_<KEY>`.
    pub env: Option<&'static str>,
    /// SIGHUP changes it; others need a restart.
    pub live: bool,
    pub help: &'static str,
}

const fn key(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Key {
    Key { name, kind, default: Some(default), env: None, live: false, help }
}

const fn unset(name: &'static str, kind: Kind, help: &'static str) -> Key {
    Key { name, kind, default: None, env: None, live: false, help }
}

const fn env(mut key: Key, name: &'static str) -> Key {
    key.env = Some(name);
    key
}

const fn live(mut key: Key) -> Key {
    key.live = true;
    key
}

use Kind::{
    Address, Bool, Choice, Count, Duration, List, Path, Pause, Secret, SecretUrl, Share, Size, Text, Url, Urls,
    Variables,
};

/// Settings of the process.
pub const KEYS: &[Key] = &[
    key("data_dir", Path, "data", "everything the embedded mode keeps: streams, history, accounts, secrets"),
    key("roles", List, "gateway,router,worker,cluster,webapp", "parts this process runs"),
    key("http.listen", Address, "127.0.0.1:8000", "pages, WebSocket and server API"),
    key("http.origins", List, "", "origins besides our own that pages may connect from, as https://…"),
    key(
        "http.hosts",
        List,
        "",
        "names this server answers to, besides localhost, its addresses and the hosts of http.origins; *: any",
    ),
    key(
        "http.trusted_proxies",
        List,
        "",
        "addresses or networks of reverse proxies whose X-Forwarded-For counts",
    ),
    key(
        "http.max_connections",
        Count(1, 1_000_000),
        "20000",
        "open HTTP connections; WebSockets count in cluster.max_connections",
    ),
    key("ops.listen", Address, "127.0.0.1:9090", "/metrics, /healthz, /readyz"),
    key("ops.metrics_public", Bool, "false", "serve /metrics on http.listen to other than loopback peers"),
    key("grpc.listen", Address, "127.0.0.1:9000", "gRPC"),
    env(
        key(
            "gateway.socket",
            Path,
            "/tmp/beamline-gateway.sock",
            "Unix socket of the gateway, at most 107 bytes",
        ),
        "IPC_SOCKET_PATH",
    ),
    live(key("gateway.max_connections", Count(1, 100_000), "1024", "open IPC connections")),
    live(unset(
        "gateway.max_connections_per_user",
        Count(1, 100_000),
        "of these, what one user may have; unset: an equal part for each user who may connect",
    )),
    live(key("gateway.max_in_flight", Count(1, 1_000_000), "1000", "requests in flight over all connections")),
    live(unset(
        "gateway.max_in_flight_per_user",
        Count(1, 1_000_000),
        "of these, what one user may have; unset: an equal part for each user who may connect",
    )),
    live(key("gateway.max_in_flight_v1", Count(1, 100_000), "10", "requests in flight on one v1 connection")),
    live(key("gateway.max_in_flight_v2", Count(1, 100_000), "256", "requests in flight on one v2 connection")),
    live(key("gateway.read_timeout", Duration, "10s", "a frame that has begun must be complete within")),
    live(key("gateway.write_timeout", Duration, "10s", "a client must take an answer within")),
    live(key("gateway.request_timeout", Duration, "5s", "a request without its own deadline")),
    live(key("gateway.max_deadline", Duration, "10m", "a longer deadline of a request counts as this")),
    live(key("gateway.receive_budget", Size, "64MiB", "unfinished frames, all connections together")),
    live(key(
        "gateway.reply_budget",
        Size,
        "64MiB",
        "finished answers that wait for their readers, all connections",
    )),
    live(key("gateway.allowed_uids", List, "", "uids besides our own and root that may connect")),
    live(key(
        "gateway.tenants",
        List,
        "",
        "tenants a uid may speak for, as 1000=acme or 1001=*; empty: default for all",
    )),
    key("router.policies", Path, "policies", "directory of <tenant>/<policy>.{json,yaml,toml}"),
    key("router.max_in_flight", Count(1, 1_000_000), "10000", "decisions waiting for an acknowledgement"),
    key(
        "router.circuit_breaker.failure_threshold",
        Count(1, 10_000),
        "5",
        "failures in a row that take a provider from everybody",
    ),
    key(
        "router.circuit_breaker.error_rate_threshold",
        Share,
        "0.5",
        "share of failures among the last 50 calls (or min_calls, if that is more) that does so too",
    ),
    key("router.circuit_breaker.min_calls", Count(1, 10_000), "10", "calls from which on that share counts"),
    key(
        "router.circuit_breaker.timeout",
        Duration,
        "60s",
        "a provider is left alone for this long, then probed",
    ),
    key(
        "router.circuit_breaker.half_open_max_calls",
        Count(1, 10_000),
        "3",
        "probes at once, for each router",
    ),
    key("router.circuit_breaker.success_threshold", Count(1, 10_000), "2", "probes that must succeed"),
    key("worker.slots", Count(1, 10_000), "16", "assignments that run at once"),
    key(
        "bus.durability",
        Choice(&["process", "power"]),
        "process",
        "what an acknowledged write to the embedded bus survives: the death of the process, or a power failure too",
    ),
    env(unset("nats.url", Url(url::nats), "use this NATS server in place of the embedded bus"), "NATS_URL"),
    unset("nats.connections", Count(1, 8), "connections to NATS; unset: one a core, at most 8"),
    unset("nats.user", Text, "NATS user"),
    unset("nats.password", Secret, "NATS password"),
    unset("nats.token", Secret, "NATS token"),
    unset("nats.nkey", Path, "file with an nkey's seed"),
    unset("nats.credentials", Path, "NATS .creds file"),
    unset(
        "nats.tls_ca",
        Path,
        "PEM file of who may sign the server's certificate; unset: whom the system trusts",
    ),
    unset("nats.tls_certificate", Path, "PEM file of our certificate, for a server that asks for one"),
    unset("nats.tls_key", Path, "PEM file of its private key"),
    key("nats.tls_first", Bool, "false", "the server speaks only after the TLS handshake (handshake_first)"),
    env(
        key(
            "redis.urls",
            Urls(url::redis),
            "",
            "use this Redis in place of the memory engine; several make a cluster",
        ),
        "REDIS_URL",
    ),
    env(
        unset("database.url", SecretUrl(url::database), "sqlite://… or postgres://…; unset: SQLite in data_dir"),
        "DATABASE_URL",
    ),
    unset("cluster.node", Text, "name of this node; unset: chosen at start"),
    key("cluster.max_connections", Count(1, 1_000_000), "10000", "WebSocket connections of this node"),
    key("cluster.ping_interval", Duration, "25s", "server pings"),
    key("cluster.pong_timeout", Duration, "8s", "a client must answer a ping within"),
    key("cluster.client_queue", Size, "1MiB", "bytes that may wait for one slow client"),
    key("cluster.drain_period", Pause, "2s", "clients are moved over this long at a shutdown"),
    key("auth.token_ttl", Duration, "15m", "life of a connection token"),
    key("auth.signup", Bool, "true", "people may create an account themselves"),
    key("auth.operators", List, "admin", "accounts that may stop any answer and delete any room"),
    key(
        "webapp.runs_at_once",
        Count(1, 1_000),
        "3",
        "answers of the assistant that come to one user at the same time",
    ),
    key("webapp.runs_per_minute", Count(1, 100_000), "10", "answers that one user may ask for"),
    key("webapp.runs_per_day", Count(1, 10_000_000), "300", "answers that one user may ask for"),
    key("webapp.messages_per_minute", Count(1, 100_000), "60", "messages that one user may send"),
    key("webapp.messages_per_day", Count(1, 10_000_000), "3000", "messages that one user may send"),
    key("webapp.rooms_per_day", Count(1, 1_000), "20", "rooms that one user may make"),
    key("shutdown.deadline", Duration, "10s", "each stage of the drain"),
    key("log.format", Choice(&["human", "json"]), "human", "form of the log lines on stderr"),
    live(key(
        "log.level",
        Text,
        "info",
        "error, warn, info, debug, trace, or a filter such as info,cluster=debug",
    )),
];

/// Keys of each `[[worker.providers]]`.
pub const PROVIDER: &[Key] = &[
    unset("name", Text, "what policies call it"),
    unset("kind", Choice(&["echo", "command", "openai", "ops"]), "how it runs a task"),
    unset("program", Path, "command: the program; the task is its standard input"),
    key("args", List, "", "command: arguments"),
    key(
        "env",
        Variables,
        "",
        "command: its environment; NAME passes a variable of the server's on, NAME=value sets one",
    ),
    key("output_max", Size, "1MiB", "command: output beyond this ends the run"),
    key("timeout", Duration, "60s", "a run may take"),
    unset("base_url", Url(url::endpoint), "openai: for example http://127.0.0.1:11434/v1"),
    unset("api_key", Secret, "openai: bearer key"),
    unset("model", Text, "openai: model name"),
    unset("system", Text, "openai: system prompt"),
];

/// Keys of each `[[cluster.namespaces]]`, and of `[cluster.defaults]` but for the name. None has a default here: a key that
/// is not given stays as it is in the namespace that the entry changes.
pub const NAMESPACE: &[Key] = &[
    unset("name", Text, "channels <name>:… follow it"),
    unset("history_size", Count(0, 100_000), "publications kept a channel; 0: none"),
    unset("history_ttl", Duration, "how long they are kept"),
    unset("presence", Bool, "who is there can be asked"),
    unset("join_leave", Bool, "comings and goings are published"),
    unset("recovery", Bool, "a client that was away gets what it missed"),
    unset("publish", Bool, "clients may publish"),
];
