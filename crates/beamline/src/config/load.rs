//! Reads the layers into [`Settings`], collecting every problem on the way.

use super::keys::{KEYS, Key, NAMESPACE, PROVIDER};
use super::value::{Kind, list, parse, variable as variable_of};
use super::{Settings, Source, Values, roles};
use crate::hosts::is_host;
use crate::proxies::Network;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::de::{DeTable, DeValue};

/// As in a policy: a provider that is out for longer is taken out of the policies.
const BREAKER_TIMEOUT_MAX: Duration = Duration::from_secs(86_400);

/// What the settings are read from.
#[derive(Debug, Default)]
pub struct Layers {
    /// Named by `--config`: must exist. Otherwise `beamline.toml` is read where it exists.
    pub file: Option<PathBuf>,
    pub environment: BTreeMap<String, String>,
    /// By key name.
    pub flags: Vec<(&'static str, String)>,
}

impl Layers {
    /// This process's environment, and nothing else yet.
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    pub fn from_process() -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self { environment, ..Self::default() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub at: String,
    pub what: String,
}

/// All that is wrong with the settings.
#[derive(Debug, Default)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let many = if self.0.len() == 1 {
            "1 problem".to_string()
        } else {
            format!("{} problems", self.0.len())
        };
        writeln!(f, "the settings have {many}; nothing was started:")?;
        for problem in &self.0 {
            writeln!(f, "  {}: {}", problem.at, problem.what)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

pub fn load(layers: &Layers) -> Result<Settings, Problems> {
    let mut reader = Reader::default();
    let mut settings = Settings::default();
    let values = &mut settings.values;

    for key in KEYS {
        if let Some(default) = key.default {
            let value = parse(key.kind, default).unwrap_or_else(|e| panic!("default of {}: {e}", key.name));
            values.0.insert(key.name, (value, Source::Default));
        }
    }

    let path = layers.file.clone().unwrap_or_else(|| "beamline.toml".into());
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            reader.file(&path, &text, &mut settings);
            settings.file = Some(path);
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && layers.file.is_none() => {}
        Err(e) => reader.problem(path.display(), format!("cannot be read: {e}")),
    }

    let values = &mut settings.values;
    for key in KEYS {
        let ours = variable(key);
        for name in key.env.into_iter().chain([ours.as_str()]) {
            if let Some(text) = layers.environment.get(name).filter(|text| !text.is_empty()) {
                match parse(key.kind, text) {
                    Ok(value) => {
                        _ = values
                            .0
                            .insert(key.name, (value, Source::Environment(name.to_string())))
                    }
                    Err(what) => reader.problem(format_args!("${name}"), what),
                }
            }
        }
    }
    settings.warnings.extend(strangers(&layers.environment));
    pass_on(&layers.environment, &mut settings);
    let values = &mut settings.values;
    for (name, text) in &layers.flags {
        let key = KEYS
            .iter()
            .find(|key| key.name == *name)
            .expect("flags name keys of the table");
        match parse(key.kind, text) {
            Ok(value) => _ = values.0.insert(key.name, (value, Source::Flag)),
            Err(what) => reader.problem(format_args!("flag for {name}"), what),
        }
    }

    reader.relations(&settings);
    reader.open_namespaces(&mut settings);
    settings.warnings.extend(roles::warnings(&settings));
    settings.warnings.extend(unnamed(&settings.values));
    for problem in &mut reader.problems.0 {
        if let (Some(Source::File { line }), Some(file)) = (settings.values.source(&problem.at), &settings.file) {
            problem.at = format!("{}:{line}: {}", file.display(), problem.at);
        }
    }
    if reader.problems.0.is_empty() {
        Ok(settings)
    } else {
        Err(reader.problems)
    }
}

fn variable(key: &Key) -> String {
    format!("BEAMLINE_{}", key.name.to_uppercase().replace('.', "_"))
}

/// Variables that look like ours and set nothing. No error: an orchestrator may put `BEAMLINE_PORT` there by itself.
fn strangers(environment: &BTreeMap<String, String>) -> Vec<String> {
    let known: Vec<String> = KEYS.iter().map(variable).collect();
    let ours = environment
        .keys()
        .filter(|name| name.starts_with("BEAMLINE_") && !known.contains(name));
    ours.map(|name| format!("${name} is not a setting{}", did_you_mean(known.iter().map(String::as_str), name)))
        .collect()
}

/// Keeps the variables that providers pass on to their programs.
fn pass_on(environment: &BTreeMap<String, String>, settings: &mut Settings) {
    for provider in &settings.providers {
        for item in provider.list("env") {
            let (name, None) = variable_of(&item) else { continue };
            match environment.get(name) {
                Some(value) => _ = settings.passed.insert(name.into(), value.clone()),
                None => {
                    let provider = provider.maybe_text("name").unwrap_or_default();
                    let told = format!(
                        "provider {provider} lists ${name} in env, but it is not set in the server's environment"
                    );
                    settings.warnings.push(told);
                }
            }
        }
    }
}

/// Who listens for other machines is usually called by a name, and answers to none that it was not given.
fn unnamed(values: &Values) -> Option<String> {
    let listen = values.address("http.listen");
    let named = !values.list("http.hosts").is_empty() || values.list("http.origins").iter().any(|origin| origin != "*");
    (!listen.ip().is_loopback() && !named).then(|| {
        format!(
            "http.listen is {listen}, and http.hosts is empty: requests are answered under this machine's addresses and \
             localhost, and refused (421) under any other name; put the names that people use into http.hosts"
        )
    })
}

fn did_you_mean<'a>(known: impl Iterator<Item = &'a str>, name: &str) -> String {
    let near = known
        .map(|known| (strsim::damerau_levenshtein(known, name), known))
        .filter(|(distance, near)| *distance <= near.len().max(name.len()) / 2)
        .min();
    near.map_or(String::new(), |(_, near)| format!("; did you mean {near}?"))
}

#[derive(Default)]
struct Reader {
    problems: Problems,
}

impl Reader {
    fn problem(&mut self, at: impl fmt::Display, what: impl Into<String>) {
        self.problems.0.push(Problem { at: at.to_string(), what: what.into() });
    }

    fn file(&mut self, path: &Path, text: &str, settings: &mut Settings) {
        let (document, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let line = error.span().map_or(1, |span| line_of(text, span.start));
            self.problem(format_args!("{}:{line}", path.display()), error.message().trim());
        }
        let scope = Scope { path, text };
        for (name, value) in document.get_ref() {
            let (head, line) = (name.get_ref().as_ref(), scope.line(name.span()));
            match value.get_ref() {
                DeValue::Table(table) => {
                    for (name, value) in table {
                        let (full, line) = (format!("{head}.{}", name.get_ref()), scope.line(name.span()));
                        match (full.as_str(), value.get_ref()) {
                            ("worker.providers", DeValue::Array(items)) => {
                                for item in items.iter() {
                                    let values = self.table(&scope, &full, PROVIDER, item.get_ref(), line, true);
                                    settings.providers.extend(values);
                                }
                            }
                            ("cluster.namespaces", DeValue::Array(items)) => {
                                for item in items.iter() {
                                    let values = self.table(&scope, &full, NAMESPACE, item.get_ref(), line, true);
                                    settings.namespaces.extend(values);
                                }
                            }
                            ("cluster.defaults", table @ DeValue::Table(_)) => {
                                settings.namespace_defaults = self.table(&scope, &full, NAMESPACE, table, line, false);
                            }
                            // A table in a table: `[router.circuit_breaker]`.
                            (_, DeValue::Table(inner)) if KEYS.iter().any(|key| is_in(key, &full)) => {
                                for (name, value) in inner {
                                    let (name, line) = (name.get_ref(), scope.line(name.span()));
                                    let full = format!("{full}.{name}");
                                    self.set(&scope, KEYS, &full, value.get_ref(), line, &mut settings.values);
                                }
                            }
                            (_, value) => self.set(&scope, KEYS, &full, value, line, &mut settings.values),
                        }
                    }
                }
                value => self.set(&scope, KEYS, head, value, line, &mut settings.values),
            }
        }
    }

    /// One `[[…]]` entry, its defaults filled in.
    fn table(
        &mut self,
        scope: &Scope<'_>,
        head: &str,
        keys: &'static [Key],
        value: &DeValue<'_>,
        line: usize,
        named: bool,
    ) -> Option<Values> {
        let DeValue::Table(table) = value else {
            self.problem(scope.at(line), format!("{head} is not a table; write [[{head}]] above its keys"));
            return None;
        };
        let mut values = Values::default();
        for key in keys {
            if let Some(default) = key.default {
                let value = parse(key.kind, default).unwrap_or_else(|e| panic!("default of {}: {e}", key.name));
                values.0.insert(key.name, (value, Source::Default));
            }
        }
        for (name, value) in table {
            let line = scope.line(name.span());
            self.set(scope, keys, name.get_ref(), value.get_ref(), line, &mut values);
        }

        let first = table.keys().map(|name| scope.line(name.span())).min().unwrap_or(line);
        let given = |key: &str| table.keys().any(|name| name.get_ref() == key);
        if named && !given("name") {
            self.problem(scope.at(first), format!("{head} has no name; add name = \"…\""));
        }
        if head == "worker.providers" {
            let name = values.maybe_text("name").unwrap_or_else(|| "a provider".into());
            for need in needs(&values).iter().filter(|need| !given(need)) {
                self.problem(format_args!("{}: {head}", scope.at(first)), format!("{name} has no {need}"));
            }
        }
        Some(values)
    }

    fn set(
        &mut self,
        scope: &Scope<'_>,
        keys: &'static [Key],
        name: &str,
        value: &DeValue<'_>,
        line: usize,
        values: &mut Values,
    ) {
        let Some(key) = keys.iter().find(|key| key.name == name) else {
            let hint = did_you_mean(keys.iter().map(|key| key.name), name);
            return self.problem(scope.at(line), format!("{name} is not a setting{hint}"));
        };
        let text = match value {
            DeValue::String(text) => text.to_string(),
            DeValue::Integer(number) if number.radix() == 10 => number.as_str().to_string(),
            DeValue::Float(number) => number.as_str().to_string(),
            DeValue::Boolean(flag) => flag.to_string(),
            DeValue::Array(items) if matches!(key.kind, Kind::List | Kind::Urls(_) | Kind::Variables) => {
                let texts: Option<Vec<_>> = items
                    .iter()
                    .map(|item| item.get_ref().as_str().map(String::from))
                    .collect();
                let texts = texts.ok_or_else(|| "is not a list of strings".to_string());
                match texts.and_then(|texts| list(key.kind, texts)) {
                    Ok(value) => _ = values.0.insert(key.name, (value, Source::File { line })),
                    Err(what) => self.problem(scope.at(line), format!("{name} {what}")),
                }
                return;
            }
            other => {
                return self
                    .problem(scope.at(line), format!("{name} is of type {}, which it cannot be", other.type_str()));
            }
        };
        match parse(key.kind, &text) {
            Ok(value) => _ = values.0.insert(key.name, (value, Source::File { line })),
            Err(what) => self.problem(scope.at(line), format!("{name} {what}")),
        }
    }

    /// What no single value shows.
    fn relations(&mut self, settings: &Settings) {
        for problem in roles::problems(settings) {
            self.problem("roles", problem);
        }
        for (a, b) in [("http.listen", "ops.listen"), ("http.listen", "grpc.listen"), ("ops.listen", "grpc.listen")] {
            let (first, second) = (settings.values.address(a), settings.values.address(b));
            if first == second && first.port() != 0 {
                self.problem(b, format!("is {second}, the same as {a}"));
            }
        }
        let set = |key: &&str| settings.values.source(key).is_some();
        if let [one] = ["nats.tls_certificate", "nats.tls_key"]
            .iter()
            .filter(|key| set(key))
            .collect::<Vec<_>>()[..]
        {
            self.problem(one, "is of no use alone: set nats.tls_certificate and nats.tls_key");
        }
        let ways = ["nats.user", "nats.token", "nats.nkey", "nats.credentials"];
        if let [first, second, ..] = ways.iter().filter(|key| set(key)).collect::<Vec<_>>()[..] {
            self.problem(second, format!("and {first} are two ways to sign in to NATS: choose one"));
        }
        if settings.values.duration("cluster.pong_timeout") >= settings.values.duration("cluster.ping_interval") {
            self.problem("cluster.pong_timeout", "must be shorter than cluster.ping_interval");
        }
        if settings.values.duration("router.circuit_breaker.timeout") > BREAKER_TIMEOUT_MAX {
            self.problem("router.circuit_breaker.timeout", "must be at most 1d");
        }
        for origin in settings
            .values
            .list("http.origins")
            .iter()
            .filter(|origin| !is_origin(origin))
        {
            self.problem("http.origins", format!("holds {origin:?}; an origin is https://host or https://host:port"));
        }
        for host in settings.values.list("http.hosts").iter().filter(|host| !is_host(host)) {
            self.problem(
                "http.hosts",
                format!("holds {host:?}; a host is a name or an address, without https:// or port"),
            );
        }
        for proxy in settings
            .values
            .list("http.trusted_proxies")
            .iter()
            .filter(|proxy| Network::parse(proxy).is_none())
        {
            self.problem(
                "http.trusted_proxies",
                format!("holds {proxy:?}; a proxy is an address such as 10.0.0.7 or a network such as 10.0.0.0/8"),
            );
        }
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(settings.values.text("log.level")) {
            self.problem("log.level", format!("is no filter: {error}"));
        }
        for (what, tables) in [("worker.providers", &settings.providers), ("cluster.namespaces", &settings.namespaces)]
        {
            let mut seen = BTreeSet::new();
            for (values, name) in tables
                .iter()
                .filter_map(|values| Some((values, values.maybe_text("name")?)))
            {
                if !seen.insert(name.clone()) {
                    self.problem(place(settings, what, values), format!("{name} is there twice"));
                }
            }
        }
        for provider in &settings.providers {
            let key = provider.maybe_text("api_key").unwrap_or_default();
            if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                let name = provider.maybe_text("name").unwrap_or_default();
                let text = format!("the api_key of {name} has characters that a header cannot carry; is it whole?");
                self.problem(place(settings, "worker.providers", provider), text);
            }
        }
        for entry in settings
            .values
            .list("gateway.tenants")
            .iter()
            .filter(|entry| super::uid_and_tenant(entry).is_none())
        {
            self.problem(
                "gateway.tenants",
                format!("{entry:?} is not a numeric uid, = and a tenant, such as 1000=acme"),
            );
        }
        for name in settings
            .values
            .list("gateway.allowed_uids")
            .iter()
            .filter(|uid| uid.parse::<u32>().is_err())
        {
            self.problem("gateway.allowed_uids", format!("{name:?} is not a numeric uid"));
        }
    }
}

/// Whether the key stands in this table.
fn is_in(key: &Key, table: &str) -> bool {
    key.name.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'))
}

impl Reader {
    /// Built-in namespaces that clients may publish to: a page takes what is said there for the server's word.
    fn open_namespaces(&mut self, settings: &mut Settings) {
        let mut warnings = Vec::new();
        for values in settings
            .namespaces
            .iter()
            .filter(|values| values.maybe_flag("publish") == Some(true))
        {
            let name = values.maybe_text("name").unwrap_or_default();
            match name.as_str() {
                "app" => self.problem(
                    "cluster.namespaces",
                    "app may not have publish = true: its channels are other people's pages; remove the line",
                ),
                "chat" | "ops" => warnings.push(format!(
                    "cluster.namespaces: {name} has publish = true, so that every client may publish what only services \
                     should; the pages ignore it, other programs may not. Remove the line unless you mean it"
                )),
                _ => {}
            }
        }
        settings.warnings.extend(warnings);
    }
}

/// Keys that a provider of this kind cannot do without.
fn needs(provider: &Values) -> &'static [&'static str] {
    match provider.maybe_text("kind").as_deref() {
        Some("command") => &["program"],
        Some("openai") => &["base_url", "model"],
        Some(_) => &[],
        None => &["kind"],
    }
}

/// An entry of a table that repeats, with its line.
fn place(settings: &Settings, table: &str, entry: &Values) -> String {
    let lines = entry.0.values().filter_map(|(_, source)| match source {
        Source::File { line } => Some(*line),
        _ => None,
    });
    match (lines.min(), &settings.file) {
        (Some(line), Some(file)) => format!("{}:{line}: {table}", file.display()),
        _ => table.into(),
    }
}

struct Scope<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Scope<'_> {
    fn line(&self, span: std::ops::Range<usize>) -> usize {
        line_of(self.text, span.start)
    }

    fn at(&self, line: usize) -> String {
        format!("{}:{line}", self.path.display())
    }
}

/// As a browser writes it: no path, no slash at the end. `*` lets every page connect, and none but ours sign in.
fn is_origin(text: &str) -> bool {
    if text == "*" {
        return true;
    }
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    host.is_some_and(|host| {
        !host.is_empty() && !host.contains(['/', '?', '#', '@', ' ']) && !host.contains(char::is_uppercase)
    })
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())]
        .iter()
        .filter(|b| **b == b'\n')
        .count()
        + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file(
        text: &str,
        environment: &[(&str, &str)],
        flags: &[(&'static str, &str)],
    ) -> Result<Settings, Problems> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("beamline.toml");
        std::fs::write(&path, text).unwrap();
        load(&Layers {
            file: Some(path),
            environment: environment
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect(),
            flags: flags.iter().map(|(k, v)| (*k, v.to_string())).collect(),
        })
    }

    #[test]
    fn settings_of_nats_that_do_not_fit_together_are_told() {
        let check = |file: &str, at: Option<&str>| {
            let problems = with_file(&format!("[nats]\n{file}"), &[], &[])
                .err()
                .unwrap_or_default();
            let told: Vec<&str> = problems
                .0
                .iter()
                .map(|problem| problem.at.rsplit(": ").next().unwrap())
                .collect();
            assert_eq!(told, at.into_iter().collect::<Vec<_>>(), "{file}");
        };
        check("user = \"a\"\npassword = \"b\"", None);
        check("nkey = \"/seed\"\ntls_certificate = \"/c\"\ntls_key = \"/k\"", None);
        check("tls_certificate = \"/c\"", Some("nats.tls_certificate"));
        check("tls_key = \"/k\"", Some("nats.tls_key"));
        check("token = \"t\"\nnkey = \"/seed\"", Some("nats.nkey"));
        check("user = \"a\"\ncredentials = \"/c\"", Some("nats.credentials"));
    }

    #[test]
    fn flags_beat_the_environment_and_that_beats_the_file() {
        let file = "[http]\nlisten = \"127.0.0.1:1\"\n[gateway]\nsocket = \"/a\"\n[ops]\nlisten = \"127.0.0.1:3\"\n";
        let settings = with_file(
            file,
            &[("BEAMLINE_HTTP_LISTEN", "127.0.0.1:2"), ("IPC_SOCKET_PATH", "/b")],
            &[("gateway.socket", "/c")],
        )
        .unwrap();
        assert_eq!(settings.values.address("http.listen").port(), 2);
        assert_eq!(settings.values.path("gateway.socket"), PathBuf::from("/c"));
        assert_eq!(settings.values.source("ops.listen"), Some(&Source::File { line: 6 }));
    }

    #[test]
    fn every_problem_is_told_with_its_line_and_the_nearest_key() {
        let file = "[http]\nlisten = 7\nlissten = \"x\"\n[gatway]\nsocket = \"/a\"\n[gateway]\nread_timeout = \"5 s\"\n\
                    [[worker.providers]]\nkind = \"command\"\n";
        let problems = with_file(
            file,
            &[("BEAMLINE_LOG_FORMAT", "xml"), ("BEAMLINE_GATEWAY_TENANTS", "1000=acme,ann=acme")],
            &[("roles", "gateway,rooter")],
        )
        .unwrap_err();
        let text = problems.to_string();
        for expected in [
            "beamline.toml:2: http.listen is \"7\"",
            "beamline.toml:3: http.lissten is not a setting; did you mean http.listen?",
            "beamline.toml:5: gatway.socket is not a setting; did you mean gateway.socket?",
            "beamline.toml:7: gateway.read_timeout is \"5 s\"",
            "beamline.toml:9: worker.providers has no name",
            "gateway.tenants: \"ann=acme\" is not a numeric uid",
            "beamline.toml:9: worker.providers: a provider has no program",
            "$BEAMLINE_LOG_FORMAT: is \"xml\"",
            "roles: \"rooter\" is not a role",
        ] {
            assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
        }
    }

    #[test]
    fn what_would_fail_later_is_told_now() {
        let file = "[shutdown]\ndeadline = \"0s\"\n[auth]\ntoken_ttl = \"99999d\"\n[http]\norigins = [\"https://a.example/\"]\n\
                    [log]\nlevel = \"info,=,x=loud\"\n[database]\nurl = \"mysql://geheim\"\n\
                    [[cluster.namespaces]]\nname = \"a\"\n[[cluster.namespaces]]\nname = \"a\"\n";
        let text = with_file(file, &[], &[]).unwrap_err().to_string();
        for expected in [
            "beamline.toml:2: shutdown.deadline is \"0s\", and must be from 1ms to 3650 days",
            "beamline.toml:4: auth.token_ttl is \"99999d\", and must be from 1ms to 3650 days",
            "http.origins: holds \"https://a.example/\"",
            "beamline.toml:8: log.level: is no filter",
            "beamline.toml:10: database.url must begin with",
            "beamline.toml:14: cluster.namespaces: a is there twice",
        ] {
            assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
        }
        assert!(!text.contains("geheim"));
        let fine = "[http]\norigins = [\"https://a.example\", \"http://localhost:5173\"]\n";
        assert!(with_file(fine, &[], &[]).is_ok());
    }

    #[test]
    fn the_operators_breaker_rules_are_a_table_of_their_own() {
        let file = "[router.circuit_breaker]\nfailure_threshold = 9\nerror_rate_threshold = 0.25\ntimeout = \"2m\"\n";
        let settings = with_file(file, &[("BEAMLINE_ROUTER_CIRCUIT_BREAKER_MIN_CALLS", "20")], &[]).unwrap();
        let again = with_file(&settings.show(), &[], &[]).unwrap_or_else(|e| panic!("{e}\n{}", settings.show()));
        for values in [&settings.values, &again.values] {
            assert_eq!(values.number("router.circuit_breaker.failure_threshold"), 9);
            assert_eq!(values.share("router.circuit_breaker.error_rate_threshold"), 0.25);
            assert_eq!(values.number("router.circuit_breaker.min_calls"), 20);
            assert_eq!(values.number("router.circuit_breaker.success_threshold"), 2, "the others keep their defaults");
        }
        for (line, expected) in [
            ("error_rate_threshold = 0", "router.circuit_breaker.error_rate_threshold is \"0\""),
            ("min_calls = 0", "router.circuit_breaker.min_calls is \"0\""),
            ("timeout = \"2d\"", "router.circuit_breaker.timeout: must be at most 1d"),
            ("treshold = 1", "router.circuit_breaker.treshold is not a setting"),
        ] {
            let text = with_file(&format!("[router.circuit_breaker]\n{line}\n"), &[], &[])
                .unwrap_err()
                .to_string();
            assert!(text.contains(&format!("beamline.toml:2: {expected}")), "{text}");
        }
    }

    #[test]
    fn every_problem_of_a_provider_has_its_line() {
        let file = "[[worker.providers]]\nname = \"a\"\nkind = \"openai\"\nbase_url = \"127.0.0.1:11434/v1\"\n\
                    timeout = \"0s\"\napi_key = \"geheim\\nkey\"\n[[worker.providers]]\nname = \"b\"\n\
                    kind = \"command\"\nprogram = \"/bin/x\"\noutput_max = \"0\"\nenv = [\"A\", \"A=geheim\"]\n\
                    [nats]\nurl = \"http://n\"\n[redis]\nurls = [\"redis://a\", \"rediss://:geheim@b\"]\n";
        let text = with_file(file, &[("DATABASE_URL", "postgres://u:geheim@h:x/d")], &[])
            .unwrap_err()
            .to_string();
        for expected in [
            "beamline.toml:4: base_url is not a URL",
            "beamline.toml:5: timeout is \"0s\"",
            "beamline.toml:2: worker.providers: the api_key of a has characters",
            "beamline.toml:2: worker.providers: a has no model",
            "beamline.toml:11: output_max is \"0\"",
            "beamline.toml:12: env holds A twice",
            "beamline.toml:14: nats.url begins neither with nats:// nor with tls://",
            "beamline.toml:16: redis.urls asks for TLS",
            "$DATABASE_URL: is not a URL",
        ] {
            assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
        }
        assert!(!text.contains("geheim") && text.starts_with("the settings have 9 problems"), "{text}");
    }

    #[test]
    fn hosts_and_proxies_that_cannot_be_meant_are_told() {
        let file = "[http]\nhosts = [\"chat.example\", \"https://x.example\"]\ntrusted_proxies = [\"10.0.0.0/8\", \"proxy\"]\n";
        let text = with_file(file, &[], &[]).unwrap_err().to_string();
        for expected in [
            "beamline.toml:2: http.hosts: holds \"https://x.example\"",
            "beamline.toml:3: http.trusted_proxies: holds \"proxy\"",
        ] {
            assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
        }
    }

    #[test]
    fn listener_for_other_machines_without_a_name_is_warned_about() {
        let warned = |file: &str| {
            with_file(&format!("[http]\n{file}"), &[], &[])
                .unwrap()
                .warnings
                .concat()
        };
        assert!(warned("listen = \"0.0.0.0:8000\"").contains("http.hosts"));
        assert!(warned("listen = \"0.0.0.0:8000\"\norigins = \"*\"").contains("http.hosts"));
        for named in ["hosts = \"chat.example\"", "origins = \"https://chat.example\""] {
            assert_eq!(warned(&format!("listen = \"0.0.0.0:8000\"\n{named}")), "", "{named}");
        }
        assert_eq!(warned("listen = \"127.0.0.1:8000\""), "");
    }

    #[test]
    fn broken_toml_is_told_with_its_line() {
        let text = with_file("[http\nlisten = 1\n", &[], &[]).unwrap_err().to_string();
        assert!(text.contains("beamline.toml:1:"), "{text}");
    }

    #[test]
    fn what_config_show_prints_is_read_back_the_same() {
        let shown =
            with_file("[[worker.providers]]\nname = \"sh\"\nkind = \"command\"\nprogram = \"/bin/cat\"\n", &[], &[])
                .unwrap()
                .show();
        let again = with_file(&shown, &[], &[]).unwrap_or_else(|e| panic!("{e}\n{shown}"));
        assert_eq!(again.providers[0].text("name"), "sh");
        assert_eq!(again.values.duration("gateway.request_timeout").as_secs(), 5);
    }

    #[test]
    fn one_key_of_a_built_in_namespace_leaves_the_others() {
        let file = "[cluster.defaults]\npublish = false\n[[cluster.namespaces]]\nname = \"chat\"\nhistory_size = 7\n\
                    [[cluster.namespaces]]\nname = \"app\"\npresence = true\n[[cluster.namespaces]]\nname = \"news\"\n\
                    history_ttl = \"1h\"\n";
        let settings = with_file(file, &[], &[]).unwrap();
        let check = |settings: &Settings| {
            let namespaces = settings.channel_namespaces();
            let rules = |name: &str| &namespaces.iter().find(|known| known.name == name).unwrap().rules;
            assert_eq!(namespaces.len(), 4);
            assert!(namespaces.iter().all(|namespace| !namespace.rules.publish), "{namespaces:?}");
            assert_eq!((rules("chat").history_size, rules("chat").join_leave), (7, true));
            assert!(rules("app").user_limited && rules("app").presence && !rules("app").durable);
            assert_eq!((rules("app").history_size, rules("ops").history_size), (512, 300));
            assert_eq!(rules("news").history_ttl, Duration::from_secs(3600));
        };
        check(&settings);

        // `config show` prints the effective rules, which are read back as the same ones.
        let shown = settings.show();
        for expected in
            ["name = \"app\"", "history_size = 7  # line 5", "publish = false  # line 2", "history_size = 300\n"]
        {
            assert!(shown.contains(expected), "{expected:?} is missing in:\n{shown}");
        }
        let again = with_file(&shown, &[], &[]).unwrap_or_else(|e| panic!("{e}\n{shown}"));
        check(&again);
    }

    #[test]
    fn a_built_in_namespace_is_opened_only_by_an_explicit_key_and_app_never() {
        let open =
            |name: &str| with_file(&format!("[[cluster.namespaces]]\nname = \"{name}\"\npublish = true\n"), &[], &[]);
        for name in ["chat", "ops"] {
            let settings = open(name).unwrap();
            assert_eq!(settings.warnings.len(), 1, "{name}: {:?}", settings.warnings);
            assert!(
                settings
                    .channel_namespaces()
                    .iter()
                    .any(|known| known.name == name && known.rules.publish)
            );
        }
        assert!(open("news").unwrap().warnings.is_empty());
        let text = open("app").unwrap_err().to_string();
        assert!(text.contains("app may not have publish = true"), "{text}");
    }

    #[test]
    fn a_mistyped_variable_is_told_and_is_no_error() {
        let environment = [("BEAMLINE_HTTP_LISEN", "x"), ("BEAMLINE_LOG_LEVEL", "warn"), ("PATH", "/bin")];
        let settings = with_file("", &environment, &[]).unwrap();
        assert_eq!(settings.warnings, ["$BEAMLINE_HTTP_LISEN is not a setting; did you mean BEAMLINE_HTTP_LISTEN?"]);
    }
}
