//! Every setting in one table: the only source of the names, kinds, defaults and help of settings.

use super::url;
use super::value::Kind;

/// One setting.
#[derive(Debug)]
pub struct Key {
    /// Dotted name, as in `beamline.toml`.
    pub name: &'static str,
    pub kind: Kind,
    /// In the syntax of the file; `None` leaves the setting unset.
    pub default: Option<&'static str>,
    /// A well-known environment variable besides `BEAMLINE_<TABLE>_<KEY>`.
    pub env: Option<&'static str>,
    /// Whether SIGHUP reloads it; other settings need a restart.
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
    Address, ApiKeys, Bool, Choice, Count, Duration, List, LogFilter, Path, Pause, Secret, SecretUrl, Share, Size,
    SocketPath, Text, Url, Urls, Variables,
};

/// The settings of the process.
pub const KEYS: &[Key] = &[
    key(
        "data_dir",
        Path,
        "data",
        "directory for everything stored on this machine: streams, history, accounts, secrets",
    ),
    key("roles", List, "gateway,router,worker,cluster,webapp", "parts that this process runs"),
    key("http.listen", Address, "127.0.0.1:8000", "address of pages, WebSocket and server API"),
    key("http.origins", List, "", "additional origins whose pages may connect, as https://host; *: any"),
    key(
        "http.hosts",
        List,
        "",
        "names that this server accepts besides localhost, its addresses and the hosts of http.origins; *: any",
    ),
    key(
        "http.trusted_proxies",
        List,
        "",
        "addresses or networks of reverse proxies whose X-Forwarded-For is believed",
    ),
    key(
        "http.max_connections",
        Count(1, 1_000_000),
        "20000",
        "limit of open HTTP connections; cluster.max_connections limits WebSockets",
    ),
    key("ops.listen", Address, "127.0.0.1:9090", "address of /metrics, /healthz and /readyz"),
    key("ops.metrics_public", Bool, "false", "serve /metrics on http.listen to other machines too"),
    key("grpc.listen", Address, "127.0.0.1:9000", "address of the gRPC health service"),
    env(
        key(
            "gateway.socket",
            SocketPath,
            "/tmp/beamline-gateway.sock",
            "path of the gateway's Unix socket, at most 107 bytes",
        ),
        "IPC_SOCKET_PATH",
    ),
    live(key("gateway.max_connections", Count(1, 100_000), "1024", "limit of open IPC connections")),
    live(unset(
        "gateway.max_connections_per_user",
        Count(1, 100_000),
        "limit for each user; unset: an equal share for each user who may connect",
    )),
    live(key(
        "gateway.max_in_flight",
        Count(1, 1_000_000),
        "1000",
        "limit of requests in flight on all connections",
    )),
    live(unset(
        "gateway.max_in_flight_per_user",
        Count(1, 1_000_000),
        "limit for each user; unset: an equal share for each user who may connect",
    )),
    live(key(
        "gateway.max_in_flight_v1",
        Count(1, 100_000),
        "10",
        "limit of requests in flight on a v1 connection",
    )),
    live(key(
        "gateway.max_in_flight_v2",
        Count(1, 100_000),
        "256",
        "limit of requests in flight on a v2 connection",
    )),
    live(key(
        "gateway.read_timeout",
        Duration,
        "10s",
        "time within which a frame that has begun must be complete",
    )),
    live(key(
        "gateway.write_timeout",
        Duration,
        "10s",
        "time within which a client must read some of its queued answers",
    )),
    live(key("gateway.request_timeout", Duration, "5s", "deadline of requests that set none")),
    live(key(
        "gateway.max_deadline",
        Duration,
        "10m",
        "longest deadline of a request; longer ones are shortened to it",
    )),
    live(key("gateway.receive_budget", Size, "64MiB", "memory for unfinished frames of all connections")),
    live(key("gateway.reply_budget", Size, "64MiB", "memory for unread answers of all connections")),
    live(key(
        "gateway.allowed_uids",
        List,
        "",
        "uids that may connect besides root and the server's own user",
    )),
    live(key(
        "gateway.tenants",
        List,
        "",
        "tenants that a uid may act for, as 1000=acme or 1001=*; empty: all users act for default",
    )),
    live(unset(
        "gateway.api_keys",
        ApiKeys,
        "keys of the OpenAI-compatible entry, as acme=KEY; a tenant may have several",
    )),
    live(unset("gateway.api_keys_file", Path, "file with more of them, one on each line")),
    live(unset(
        "gateway.max_in_flight_per_tenant",
        Count(1, 1_000_000),
        "limit of the OpenAI-compatible entry for each tenant; unset: an equal share for each tenant with a key",
    )),
    key("router.policies", Path, "policies", "directory of policies, <tenant>/<policy>.{json,yaml,toml}"),
    key(
        "router.max_in_flight",
        Count(1, 1_000_000),
        "10000",
        "limit of decisions that wait for the bus to acknowledge their assignment",
    ),
    key(
        "router.circuit_breaker.failure_threshold",
        Count(1, 10_000),
        "5",
        "consecutive failures that open a provider's breaker for all policies",
    ),
    key(
        "router.circuit_breaker.error_rate_threshold",
        Share,
        "0.5",
        "share of failures among the last 50 calls (or min_calls, if that is more) that opens the breaker",
    ),
    key(
        "router.circuit_breaker.min_calls",
        Count(1, 10_000),
        "10",
        "minimum number of calls before the share counts",
    ),
    key(
        "router.circuit_breaker.timeout",
        Duration,
        "60s",
        "how long the breaker stays open before the provider is probed; at most 1d",
    ),
    key(
        "router.circuit_breaker.half_open_max_calls",
        Count(1, 10_000),
        "3",
        "limit of concurrent probes, for each router",
    ),
    key(
        "router.circuit_breaker.success_threshold",
        Count(1, 10_000),
        "2",
        "successful probes that close the breaker",
    ),
    key("worker.slots", Count(1, 10_000), "16", "limit of assignments that run at once"),
    key(
        "bus.durability",
        Choice(&["process", "power"]),
        "process",
        "what an acknowledged write to the embedded bus survives: a crash of the process, or also a power failure",
    ),
    key(
        "bus.assignments_size",
        Size,
        "512MiB",
        "size of the stream of assignments; when it is full, new tasks are refused",
    ),
    key(
        "bus.results_size",
        Size,
        "1GiB",
        "size of the stream of results that no router has recorded yet; when it is nearly full, new tasks are refused",
    ),
    key("bus.usage_size", Size, "1GiB", "size of the stream of usage events"),
    key("bus.usage_max_age", Duration, "30d", "how long usage events are kept, without bus.usage_consumers"),
    key(
        "bus.usage_consumers",
        List,
        "",
        "durable consumers of usage on NATS: an event is kept until each of them has acknowledged it",
    ),
    key(
        "bus.dead_letters_size",
        Size,
        "512MiB",
        "size of the streams of dead letters; an eighth is for messages that cannot be read",
    ),
    key("bus.tasks_size", Size, "1GiB", "size of the records of tasks; beyond it, the oldest are evicted"),
    key(
        "bus.keys_size",
        Size,
        "256MiB",
        "size of the idempotency keys of the last hour; when it is nearly full, new keys are refused",
    ),
    key(
        "bus.message_ids_size",
        Size,
        "64MiB",
        "memory for the message ids of each stream of the embedded bus, at 100 bytes each",
    ),
    env(unset("nats.url", Url(url::nats), "NATS server to use instead of the embedded bus"), "NATS_URL"),
    unset("nats.connections", Count(1, 8), "number of connections to NATS; unset: one per core, at most 8"),
    unset(
        "nats.replicas",
        Choice(&["1", "3", "5"]),
        "replicas of each stream and bucket; unset: 1 for new ones, and as many as the others have",
    ),
    unset("nats.user", Text, "user for NATS"),
    unset("nats.password", Secret, "password for NATS"),
    unset("nats.token", Secret, "token for NATS"),
    unset("nats.nkey", Path, "file with the seed of an nkey for NATS"),
    unset("nats.credentials", Path, ".creds file for NATS"),
    unset(
        "nats.tls_ca",
        Path,
        "PEM file of the authorities that may sign the server's certificate; unset: those that the system trusts",
    ),
    unset("nats.tls_certificate", Path, "PEM file of the client certificate, for a server that requires one"),
    unset("nats.tls_key", Path, "PEM file of the client certificate's private key"),
    key("nats.tls_first", Bool, "false", "start with the TLS handshake, for a server with handshake_first"),
    env(
        key(
            "redis.urls",
            Urls(url::redis),
            "",
            "Redis to use instead of the memory engine; several URLs make a cluster",
        ),
        "REDIS_URL",
    ),
    env(
        unset(
            "database.url",
            SecretUrl(url::database),
            "database, as sqlite://… or postgres://…; unset: SQLite in data_dir",
        ),
        "DATABASE_URL",
    ),
    unset("cluster.node", Text, "name of this node; unset: generated at startup"),
    key(
        "cluster.durability",
        Choice(&["process", "power"]),
        "process",
        "what an acknowledged publication to channels.db survives: a crash of the process, or also a power failure",
    ),
    key(
        "cluster.max_connections",
        Count(1, 1_000_000),
        "10000",
        "limit of WebSocket connections to this node",
    ),
    key("cluster.ping_interval", Duration, "25s", "interval of the server's pings"),
    key(
        "cluster.pong_timeout",
        Duration,
        "8s",
        "time within which a client must answer a ping; shorter than ping_interval",
    ),
    key(
        "cluster.client_queue",
        Size,
        "1MiB",
        "memory for messages that a slow client has not read; a client that exceeds it is disconnected",
    ),
    key(
        "cluster.drain_period",
        Pause,
        "2s",
        "time over which a shutdown spreads the disconnects of its clients",
    ),
    key("auth.token_ttl", Duration, "15m", "lifetime of a connection token"),
    key("auth.signup", Bool, "true", "allow people to create their own accounts"),
    key("auth.operators", List, "admin", "accounts that may stop any answer and delete any room"),
    key("webapp.runs_at_once", Count(1, 1_000), "3", "assistant answers that one user may have in progress"),
    key("webapp.runs_per_minute", Count(1, 100_000), "10", "assistant answers that one user may ask for"),
    key("webapp.runs_per_day", Count(1, 10_000_000), "300", "assistant answers that one user may ask for"),
    key("webapp.messages_per_minute", Count(1, 100_000), "60", "messages that one user may send"),
    key("webapp.messages_per_day", Count(1, 10_000_000), "3000", "messages that one user may send"),
    key("webapp.rooms_per_day", Count(1, 1_000), "20", "rooms that one user may create"),
    key("shutdown.deadline", Duration, "10s", "deadline of each stage of the drain"),
    key("log.format", Choice(&["human", "json"]), "human", "format of the log lines on stderr"),
    live(key(
        "log.access",
        Choice(&["off", "sampled", "all"]),
        "sampled",
        "a line for each task where it ends; sampled: for all while they are few, then for 1 in 100 and for failures",
    )),
    live(key(
        "log.level",
        LogFilter,
        "info",
        "error, warn, info, debug, trace, or a filter such as info,cluster=debug",
    )),
];

/// Keys of each `[[worker.providers]]`.
pub const PROVIDER: &[Key] = &[
    unset("name", Text, "name by which policies select it"),
    unset("kind", Choice(&["echo", "command", "openai", "ops"]), "how it runs a task"),
    unset("program", Path, "command: the program; the task is its standard input"),
    key("args", List, "", "command: arguments"),
    key(
        "env",
        Variables,
        "",
        "command: its environment; NAME passes on a variable of the server, NAME=value sets one",
    ),
    key("output_max", Size, "1MiB", "command: limit of the output; a run that exceeds it ends"),
    key("timeout", Duration, "60s", "time limit of a run"),
    unset("base_url", Url(url::endpoint), "openai: base URL, for example http://127.0.0.1:11434/v1"),
    unset("api_key", Secret, "openai: bearer key"),
    unset("api_key_file", Path, "openai: file with the bearer key"),
    unset("api_key_env", Text, "openai: variable of the server's environment with the bearer key"),
    unset("model", Text, "openai: model name"),
    unset("system", Text, "openai: system prompt"),
    key("include_usage", Bool, "true", "openai: ask for the token usage of streamed answers"),
    unset("first_token_timeout", Duration, "openai: time limit of the first token of a chat completion"),
    unset(
        "requests_per_minute",
        Count(1, 1_000_000_000),
        "openai: limit of the requests that each worker sends",
    ),
    unset(
        "tokens_per_minute",
        Count(1, 1_000_000_000_000),
        "openai: limit of the tokens that each worker uses",
    ),
];

/// Keys of each `[[cluster.namespaces]]` and, except for the name, of `[cluster.defaults]`. No key has a default here:
/// a key that an entry does not set keeps its value in the namespace that the entry overrides.
pub const NAMESPACE: &[Key] = &[
    unset("name", Text, "the rules apply to channels <name>:…"),
    unset("history_size", Count(0, 100_000), "publications kept for each channel; 0: none"),
    unset("history_ttl", Duration, "how long publications are kept"),
    unset("presence", Bool, "clients may ask who is present"),
    unset("join_leave", Bool, "joins and leaves are published"),
    unset("recovery", Bool, "a client that reconnects receives what it missed"),
    unset("publish", Bool, "clients may publish"),
];
