//! The typed settings: one table for each part, made from [`Tables`].
//!
//! A part's table is the part's own `Config`, as far as the settings determine it. The wiring adds values known only at
//! run time: secrets, bound addresses, the boot id.

use super::credentials::API_KEYS_FILE;
use super::namespaces;
use super::problems::Problems;
use super::roles::Role;
use super::tables::{Source, Tables, Values};
use super::value::{api_key, variable};
use crate::hosts::{Hosts, is_host};
use crate::proxies::{Network, Proxies};
use bus::local::Durability;
use bus::nats::NatsConfig;
use bus::streams::Sizes;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use wire::policy::CircuitBreaker;

/// The checked settings of a process.
#[derive(Clone)]
pub struct Settings {
    pub data_dir: PathBuf,
    /// In the order in which they were given.
    pub roles: Vec<Role>,
    pub http: Http,
    pub ops_listen: SocketAddr,
    /// Serves `/metrics` on the HTTP port to other machines too.
    pub metrics_public: bool,
    pub grpc_listen: SocketAddr,
    pub bus: Bus,
    /// Sizes of the bus's streams and buckets.
    pub sizes: Sizes,
    /// Without the API key.
    pub gateway: gateway::Config,
    /// Without the operators' secret.
    pub router: router::Config,
    pub worker: worker::Config,
    /// Without secrets, the node's address and the boot id.
    pub cluster: cluster::Config,
    /// Without the token secret.
    pub webapp: webapp::Config,
    /// Deadline of each stage of the drain.
    pub shutdown_deadline: Duration,
    pub log_format: LogFormat,
    pub log_access: Access,
    /// Directives of a `tracing_subscriber::EnvFilter`.
    pub log_level: String,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// Settings that are valid but probably not what was meant.
    pub warnings: Vec<String>,
    pub(super) tables: Tables,
}

#[derive(Debug, Clone)]
pub struct Http {
    pub listen: SocketAddr,
    pub max_connections: usize,
    /// Hosts that requests may name.
    pub hosts: Hosts,
    pub trusted_proxies: Proxies,
}

#[derive(Clone)]
pub enum Bus {
    Embedded(Durability),
    Nats(Box<NatsConfig>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Human,
    Json,
}

/// Which tasks have a line in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Off,
    /// All while they are few, else a sample; failures always.
    Sampled,
    All,
}

impl Settings {
    /// Converts every table. List items that cannot be parsed are reported and left out.
    pub(super) fn new(tables: Tables, problems: &mut Problems) -> Self {
        let values = &tables.values;
        let mut lists = Lists { tables: &tables, problems };

        let roles = roles(&mut lists);
        let origins = lists.parsed("http.origins", parse_origin);
        let http = http(&mut lists, &origins);
        let gateway = gateway(&mut lists);

        Self {
            bus: bus(values, &roles),
            sizes: sizes(values),
            roles,
            http,
            gateway,
            router: router(values),
            worker: worker(&tables),
            cluster: cluster(&tables, &origins),
            webapp: webapp(values, origins),
            data_dir: values.path("data_dir"),
            ops_listen: values.address("ops.listen"),
            metrics_public: values.flag("ops.metrics_public"),
            grpc_listen: values.address("grpc.listen"),
            shutdown_deadline: values.duration("shutdown.deadline"),
            log_format: log_format(values),
            log_access: log_access(values),
            log_level: values.text("log.level"),
            file: tables.file.clone(),
            warnings: tables.warnings.clone(),
            tables,
        }
    }

    pub fn has_role(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    /// Whether the bus reaches only the parts of this process.
    pub fn is_embedded(&self) -> bool {
        matches!(self.bus, Bus::Embedded(_))
    }

    /// Whether the setting `key` was left at its default.
    pub fn is_default(&self, key: &str) -> bool {
        self.tables.values.source(key) == Some(&Source::Default)
    }

    /// How long a part may take to finish its work in flight: shorter than the stage's deadline, so that abandoned work
    /// can still be reported.
    pub fn drain_timeout(&self) -> Duration {
        drain_timeout(&self.tables.values)
    }
}

/// Prints only the file, because the tables hold secrets.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

/// Parses the items of lists, and reports each item that is invalid.
struct Lists<'a> {
    tables: &'a Tables,
    problems: &'a mut Problems,
}

impl Lists<'_> {
    fn parsed<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let mut parsed = Vec::new();
        for item in self.tables.values.list(key) {
            match parse(&item) {
                Ok(item) => parsed.push(item),
                Err(what) => self.problems.add(self.tables.place(key), what),
            }
        }
        parsed
    }
}

fn roles(lists: &mut Lists<'_>) -> Vec<Role> {
    if lists.tables.values.list("roles").is_empty() {
        let what = format!("is empty; the roles are {}", Role::names());
        lists.problems.add(lists.tables.place("roles"), what);
    }
    lists.parsed("roles", Role::parse)
}

fn http(lists: &mut Lists<'_>, origins: &[String]) -> Http {
    let hosts = lists.parsed("http.hosts", parse_host);
    let proxies = lists.parsed("http.trusted_proxies", parse_proxy);
    let values = &lists.tables.values;
    Http {
        listen: values.address("http.listen"),
        max_connections: values.number("http.max_connections"),
        hosts: Hosts::new(&hosts, origins),
        trusted_proxies: Proxies::new(proxies),
    }
}

fn durability(values: &Values, key: &str) -> Durability {
    match values.text(key).as_str() {
        "process" => Durability::Process,
        "power" => Durability::Power,
        other => unreachable!("the table of keys has no durability {other}"),
    }
}

fn bus(values: &Values, roles: &[Role]) -> Bus {
    let Some(url) = values.maybe_text("nats.url") else {
        return Bus::Embedded(durability(values, "bus.durability"));
    };

    let roles: Vec<String> = roles.iter().map(Role::to_string).collect();
    Bus::Nats(Box::new(NatsConfig {
        url,
        name: format!("beamline {}", roles.join(",")),
        user: values.maybe_text("nats.user"),
        password: values.maybe_text("nats.password"),
        token: values.maybe_text("nats.token"),
        nkey: values.maybe_path("nats.nkey"),
        credentials: values.maybe_path("nats.credentials"),
        tls_ca: values.maybe_path("nats.tls_ca"),
        tls_certificate: values.maybe_path("nats.tls_certificate"),
        tls_key: values.maybe_path("nats.tls_key"),
        tls_first: values.flag("nats.tls_first"),
        connections: values.maybe_number("nats.connections"),
        replicas: values.maybe_text("nats.replicas").and_then(|count| count.parse().ok()),
        sizes: sizes(values),
    }))
}

fn sizes(values: &Values) -> Sizes {
    Sizes {
        assignments: values.number("bus.assignments_size"),
        results: values.number("bus.results_size"),
        usage: values.number("bus.usage_size"),
        usage_max_age: values.duration("bus.usage_max_age"),
        usage_consumers: values.list("bus.usage_consumers"),
        dead_letters: values.number("bus.dead_letters_size"),
        tasks: values.number("bus.tasks_size"),
        keys: values.number("bus.keys_size"),
        message_ids: values.number("bus.message_ids_size"),
    }
}

fn gateway(lists: &mut Lists<'_>) -> gateway::Config {
    let mut tenants = BTreeMap::<u32, Vec<String>>::new();
    for (uid, tenant) in lists.parsed("gateway.tenants", parse_tenant) {
        tenants.entry(uid).or_default().push(tenant);
    }
    let allowed_uids = lists.parsed("gateway.allowed_uids", parse_uid);
    let tenant_keys = tenant_keys(lists);

    let values = &lists.tables.values;
    gateway::Config {
        tenants,
        allowed_uids,
        tenant_keys,
        max_in_flight_per_tenant: values.maybe_number("gateway.max_in_flight_per_tenant"),
        socket: values.path("gateway.socket"),
        max_connections: values.number("gateway.max_connections"),
        max_connections_per_user: values.maybe_number("gateway.max_connections_per_user"),
        max_in_flight: values.number("gateway.max_in_flight"),
        max_in_flight_per_user: values.maybe_number("gateway.max_in_flight_per_user"),
        max_in_flight_v1: values.number("gateway.max_in_flight_v1"),
        max_in_flight_v2: values.number("gateway.max_in_flight_v2"),
        read_timeout: values.duration("gateway.read_timeout"),
        write_timeout: values.duration("gateway.write_timeout"),
        request_timeout: values.duration("gateway.request_timeout"),
        max_deadline: values.duration("gateway.max_deadline"),
        receive_budget: values.number("gateway.receive_budget"),
        reply_budget: values.number("gateway.reply_budget"),
        drain_timeout: drain_timeout(values),
        ..gateway::Config::default()
    }
}

/// The tenants' keys of the settings and of the file that they name. A key belongs to one tenant.
fn tenant_keys(lists: &mut Lists<'_>) -> BTreeMap<String, String> {
    let mut keys = BTreeMap::<String, String>::new();
    let listed = lists.tables.values.maybe_list("gateway.api_keys").unwrap_or_default();
    let sources = [("gateway.api_keys", &listed), (API_KEYS_FILE, &lists.tables.key_lines)];
    for (setting, items) in sources {
        for (tenant, key) in items.iter().filter_map(|item| api_key(item).ok()) {
            let known = keys.entry(key.into()).or_insert_with(|| tenant.into());
            if known != tenant {
                let what = format!("has the same key for {known} and {tenant}; a key belongs to one tenant");
                lists.problems.add(lists.tables.place(setting), what);
            }
        }
    }
    keys
}

fn router(values: &Values) -> router::Config {
    router::Config {
        policies: values.path("router.policies"),
        max_in_flight: values.number("router.max_in_flight"),
        drain_timeout: drain_timeout(values),
        circuit_breaker: CircuitBreaker {
            failure_threshold: values.number("router.circuit_breaker.failure_threshold"),
            error_rate_threshold: values.share("router.circuit_breaker.error_rate_threshold"),
            min_calls: values.number("router.circuit_breaker.min_calls"),
            timeout_ms: milliseconds(values.duration("router.circuit_breaker.timeout")),
            half_open_max_calls: values.number("router.circuit_breaker.half_open_max_calls"),
            success_threshold: values.number("router.circuit_breaker.success_threshold"),
        },
        ..router::Config::default()
    }
}

fn worker(tables: &Tables) -> worker::Config {
    let mut config = worker::Config {
        slots: tables.values.number("worker.slots"),
        drain_timeout: drain_timeout(&tables.values),
        ..worker::Config::default()
    };

    for provider in &tables.providers {
        let Some(provider) = self::provider(provider, &tables.passed_on, &tables.provider_keys) else {
            continue;
        };
        // An entry named `echo` or `ops` replaces the built-in provider.
        config.providers.retain(|known| known.name != provider.name);
        config.providers.push(provider);
    }
    config
}

/// Returns `None` if the provider lacks a required key, which was reported when the file was read.
fn provider(
    values: &Values,
    passed_on: &BTreeMap<String, String>,
    keys: &BTreeMap<String, String>,
) -> Option<worker::ProviderConfig> {
    let kind = match values.maybe_text("kind")?.as_str() {
        "echo" => worker::Kind::Echo,
        "ops" => worker::Kind::Ops,
        "command" => worker::Kind::Command {
            program: values.maybe_path("program")?,
            args: values.list("args"),
            env: program_environment(values, passed_on),
            output_max: values.number("output_max"),
        },
        "openai" => worker::Kind::OpenAi(worker::Model {
            api_key: values
                .maybe_text("api_key")
                .or_else(|| keys.get(&values.maybe_text("name")?).cloned()),
            system: values.maybe_text("system"),
            include_usage: values.flag("include_usage"),
            first_token_timeout: values.maybe_duration("first_token_timeout"),
            requests_per_minute: values.maybe_number("requests_per_minute"),
            tokens_per_minute: values.maybe_number("tokens_per_minute"),
            ..worker::Model::new(values.maybe_text("base_url")?, values.maybe_text("model")?)
        }),
        other => unreachable!("the table of keys has no provider kind {other}"),
    };

    Some(worker::ProviderConfig {
        name: values.maybe_text("name")?,
        kind,
        timeout: values.duration("timeout"),
    })
}

fn program_environment(provider: &Values, passed_on: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let set = |item: &String| {
        let (name, value) = variable(item);
        let value = value.or_else(|| passed_on.get(name).map(String::as_str))?;
        Some((name.to_string(), value.to_string()))
    };
    provider.list("env").iter().filter_map(set).collect()
}

fn cluster(tables: &Tables, origins: &[String]) -> cluster::Config {
    let values = &tables.values;
    let defaults = cluster::Config::default();
    let urls = values.list("redis.urls");
    let engine = if urls.is_empty() {
        cluster::EngineConfig::Memory {
            dir: values.path("data_dir"),
            boot_id: String::new(),
            durability: durability(values, "cluster.durability"),
        }
    } else {
        cluster::EngineConfig::Redis { url: urls.join(",") }
    };

    cluster::Config {
        node: values.maybe_text("cluster.node").unwrap_or(defaults.node),
        max_connections: values.number("cluster.max_connections"),
        ping_interval: values.duration("cluster.ping_interval"),
        pong_timeout: values.duration("cluster.pong_timeout"),
        origins: origins.to_vec(),
        client_queue: values.number("cluster.client_queue"),
        drain_period: values.duration("cluster.drain_period"),
        namespaces: namespaces::effective(tables),
        defaults: namespaces::defaults(tables),
        engine,
        ..cluster::Config::default()
    }
}

fn webapp(values: &Values, origins: Vec<String>) -> webapp::Config {
    webapp::Config {
        data_dir: values.path("data_dir"),
        database_url: values.maybe_text("database.url"),
        token_ttl: values.duration("auth.token_ttl"),
        signup: values.flag("auth.signup"),
        origins,
        operators: values
            .list("auth.operators")
            .iter()
            .map(|name| name.to_lowercase())
            .collect(),
        quotas: webapp::Quotas {
            runs_at_once: values.number("webapp.runs_at_once"),
            runs_per_minute: values.number("webapp.runs_per_minute"),
            runs_per_day: values.number("webapp.runs_per_day"),
            messages_per_minute: values.number("webapp.messages_per_minute"),
            messages_per_day: values.number("webapp.messages_per_day"),
            rooms_per_day: values.number("webapp.rooms_per_day"),
        },
        ..webapp::Config::default()
    }
}

fn log_format(values: &Values) -> LogFormat {
    match values.text("log.format").as_str() {
        "human" => LogFormat::Human,
        "json" => LogFormat::Json,
        other => unreachable!("the table of keys has no log format {other}"),
    }
}

fn log_access(values: &Values) -> Access {
    match values.text("log.access").as_str() {
        "off" => Access::Off,
        "sampled" => Access::Sampled,
        "all" => Access::All,
        other => unreachable!("the table of keys has no log access {other}"),
    }
}

fn drain_timeout(values: &Values) -> Duration {
    values.duration("shutdown.deadline") * 3 / 4
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).expect("durations of settings are bounded by years")
}

/// Parses an origin in the form that browsers send: no path, no trailing slash. With `*`, every page may connect, but
/// only the server's own pages may sign in.
fn parse_origin(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let fits = host.is_some_and(|host| {
        !host.is_empty() && !host.contains(['/', '?', '#', '@', ' ']) && !host.contains(char::is_uppercase)
    });
    if text == "*" || fits {
        return Ok(text.into());
    }
    Err(format!("holds {text:?}; an origin is https://host or https://host:port"))
}

fn parse_host(text: &str) -> Result<String, String> {
    if is_host(text) {
        return Ok(text.into());
    }
    Err(format!("holds {text:?}; a host is a name or an address, without https:// or port"))
}

fn parse_proxy(text: &str) -> Result<Network, String> {
    Network::parse(text).ok_or_else(|| {
        format!("holds {text:?}; a proxy is an address such as 10.0.0.7 or a network such as 10.0.0.0/8")
    })
}

fn parse_uid(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("{text:?} is not a numeric uid"))
}

/// `1000=acme`, or `1001=*` for every tenant.
fn parse_tenant(text: &str) -> Result<(u32, String), String> {
    let parsed = text.split_once('=').and_then(|(uid, tenant)| {
        let tenant = tenant.trim();
        let uid = uid.trim().parse().ok()?;
        (!tenant.is_empty()).then(|| (uid, tenant.to_string()))
    });
    parsed.ok_or_else(|| format!("{text:?} is not a numeric uid, = and a tenant, such as 1000=acme"))
}

#[cfg(test)]
mod tests {
    use crate::config::testing::{check_problems, load_all, load_file};

    #[test]
    fn uids_and_tenants_are_parsed() {
        let file = "[gateway]\nallowed_uids = [\"7\"]\ntenants = [\"1=acme\", \"1 = default\", \"2=*\"]\n";
        let gateway = load_file(file).unwrap().gateway;
        assert_eq!(gateway.allowed_uids, [7]);
        let of = |tenants: &[&str]| tenants.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(gateway.tenants, [(1, of(&["acme", "default"])), (2, of(&["*"]))].into());

        let file = "[gateway]\nallowed_uids = [\"ann\"]\ntenants = [\"1=\"]\n";
        let expected = [
            "beamline.toml:2: gateway.allowed_uids: \"ann\" is not a numeric uid",
            "beamline.toml:3: gateway.tenants: \"1=\" is not a numeric uid, = and a tenant",
        ];
        check_problems(load_file(file), &expected);
    }

    #[test]
    fn providers_get_their_kind_and_replace_built_in_ones() {
        let file = "[[worker.providers]]\nname = \"echo\"\nkind = \"command\"\nprogram = \"/bin/cat\"\n\
                    env = [\"HOME\", \"MISSING\", \"A=b\"]\n";
        let settings = load_all(file, &[("HOME", "/h"), ("OTHER", "x")], &[]).unwrap();
        let [ops, echo] = &settings.worker.providers[..] else {
            panic!("{:?}", settings.worker.providers)
        };
        assert!(matches!(ops.kind, worker::Kind::Ops));
        let worker::Kind::Command { program, env, output_max, .. } = &echo.kind else {
            panic!("{echo:?}")
        };
        let expected = [("A", "b"), ("HOME", "/h")].map(|(name, value)| (name.to_string(), value.to_string()));
        assert_eq!((program.to_str(), output_max), (Some("/bin/cat"), &(1 << 20)));
        assert_eq!(env, &expected.into());
        assert!(settings.warnings.concat().contains("lists $MISSING in env"), "{:?}", settings.warnings);
    }

    #[test]
    fn invalid_hosts_and_proxies_are_problems() {
        let file = "[http]\nhosts = [\"chat.example\", \"https://x.example\"]\n\
                    trusted_proxies = [\"10.0.0.0/8\", \"proxy\"]\n";
        let expected = [
            "beamline.toml:2: http.hosts: holds \"https://x.example\"",
            "beamline.toml:3: http.trusted_proxies: holds \"proxy\"",
        ];
        check_problems(load_file(file), &expected);
    }
}
