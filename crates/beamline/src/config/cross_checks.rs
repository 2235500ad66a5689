//! Checks across settings: problems for settings that contradict each other, warnings for probable mistakes.

use super::problems::Problems;
use super::roles;
use super::settings::Settings;
use super::tables::Values;
use std::collections::BTreeSet;
use std::time::Duration;

/// The longest breaker timeout that a policy may set; the same bound applies to the setting.
const BREAKER_TIMEOUT_MAX: Duration = Duration::from_secs(86_400);

pub fn check(settings: &Settings, problems: &mut Problems) {
    let mut checks = Checks { settings, values: &settings.tables.values, problems };
    checks.roles_find_each_other();
    checks.listeners_have_different_addresses();
    checks.nats_client_certificate_has_its_key();
    checks.one_way_to_sign_in_to_nats();
    checks.usage_consumers_can_read();
    checks.pong_is_due_before_the_next_ping();
    checks.breaker_timeout_is_within_policies_bound();
    checks.names_are_unique();
    checks.api_keys_fit_into_a_header();
    checks.app_channels_stay_closed();
}

pub fn warnings(settings: &Settings) -> Vec<String> {
    let mut warnings = open_channels(settings);
    if settings.is_embedded() {
        warnings.extend(roles::warnings(&settings.roles));
    }
    warnings.extend(no_host_names(settings));
    warnings
}

struct Checks<'a> {
    settings: &'a Settings,
    values: &'a Values,
    problems: &'a mut Problems,
}

impl Checks<'_> {
    fn problem(&mut self, key: &str, what: impl Into<String>) {
        self.problems.add(self.settings.tables.place(key), what);
    }

    fn problem_of(&mut self, table: &str, entry: &Values, what: impl Into<String>) {
        self.problems.add(self.settings.tables.place_of(table, entry), what);
    }

    fn roles_find_each_other(&mut self) {
        let unmet = if self.settings.is_embedded() {
            roles::problems(&self.settings.roles)
        } else {
            Vec::new()
        };
        for problem in unmet {
            self.problem("roles", problem);
        }
    }

    fn listeners_have_different_addresses(&mut self) {
        for (a, b) in [("http.listen", "ops.listen"), ("http.listen", "grpc.listen"), ("ops.listen", "grpc.listen")] {
            let (first, second) = (self.values.address(a), self.values.address(b));
            // Each listener on port 0 gets a free port of its own.
            if first == second && first.port() != 0 {
                self.problem(b, format!("is {second}, the same as {a}"));
            }
        }
    }

    fn nats_client_certificate_has_its_key(&mut self) {
        let set = self.set_of(&["nats.tls_certificate", "nats.tls_key"]);
        if let [one] = set[..] {
            self.problem(one, "is of no use alone: set nats.tls_certificate and nats.tls_key");
        }
    }

    fn one_way_to_sign_in_to_nats(&mut self) {
        let set = self.set_of(&["nats.user", "nats.token", "nats.nkey", "nats.credentials"]);
        if let [first, second, ..] = set[..] {
            self.problem(second, format!("and {first} are two ways to sign in to NATS: choose one"));
        }
    }

    fn usage_consumers_can_read(&mut self) {
        let names = self.values.list("bus.usage_consumers");
        if self.settings.is_embedded() && !names.is_empty() {
            self.problem(
                "bus.usage_consumers",
                "needs nats.url: no program can read the embedded bus, so it would fill up",
            );
        }
        for name in names {
            let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if !name.chars().all(fits) {
                self.problem("bus.usage_consumers", format!("holds {name:?}; a name has letters, digits, - and _"));
            }
        }
    }

    fn pong_is_due_before_the_next_ping(&mut self) {
        if self.settings.cluster.pong_timeout >= self.settings.cluster.ping_interval {
            self.problem("cluster.pong_timeout", "must be shorter than cluster.ping_interval");
        }
    }

    fn breaker_timeout_is_within_policies_bound(&mut self) {
        if self.values.duration("router.circuit_breaker.timeout") > BREAKER_TIMEOUT_MAX {
            self.problem("router.circuit_breaker.timeout", "must be at most 1d");
        }
    }

    fn names_are_unique(&mut self) {
        let tables = &self.settings.tables;
        for (table, entries) in [("worker.providers", &tables.providers), ("cluster.namespaces", &tables.namespaces)] {
            let mut seen = BTreeSet::new();
            for entry in entries {
                let Some(name) = entry.maybe_text("name") else { continue };
                if !seen.insert(name.clone()) {
                    self.problem_of(table, entry, format!("{name} is there twice"));
                }
            }
        }
    }

    fn api_keys_fit_into_a_header(&mut self) {
        for provider in &self.settings.tables.providers {
            let key = provider.maybe_text("api_key").unwrap_or_default();
            if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                let name = provider.maybe_text("name").unwrap_or_default();
                let what = format!("the api_key of {name} has characters that a header cannot carry; is it whole?");
                self.problem_of("worker.providers", provider, what);
            }
        }
    }

    /// Pages trust every publication in `app` as the server's, so clients must never be able to publish there.
    fn app_channels_stay_closed(&mut self) {
        if published_by_clients(self.settings).any(|name| name == "app") {
            let what = "app may not have publish = true: its channels are other people's pages; remove the line";
            self.problem("cluster.namespaces", what);
        }
    }

    fn set_of<'k>(&self, keys: &[&'k str]) -> Vec<&'k str> {
        keys.iter().copied().filter(|key| self.values.is_set(key)).collect()
    }
}

/// The names of the namespaces whose entry says `publish = true`.
fn published_by_clients(settings: &Settings) -> impl Iterator<Item = String> {
    let open = settings
        .tables
        .namespaces
        .iter()
        .filter(|entry| entry.maybe_flag("publish") == Some(true));
    open.filter_map(|entry| entry.maybe_text("name"))
}

fn open_channels(settings: &Settings) -> Vec<String> {
    published_by_clients(settings)
        .filter(|name| matches!(name.as_str(), "chat" | "ops"))
        .map(|name| {
            format!(
                "cluster.namespaces: {name} has publish = true, so every client may publish what only services should; the \
                 pages ignore such messages, other programs may not. Remove the line unless you mean it"
            )
        })
        .collect()
}

/// Warns if a server that listens for other machines has no host names: it refuses requests under any name not listed.
fn no_host_names(settings: &Settings) -> Option<String> {
    let listen = settings.http.listen;
    (!listen.ip().is_loopback() && !settings.http.hosts.has_names()).then(|| {
        format!(
            "http.listen is {listen}, and http.hosts is empty: requests are answered under this machine's addresses \
             and localhost, and refused (421) under any other name; put the names that people use into http.hosts"
        )
    })
}

#[cfg(test)]
mod tests {
    use crate::config::testing::{check_problems, load_file};

    #[test]
    fn conflicting_settings_of_nats_are_problems() {
        let check = |file: &str, at: Option<&str>| {
            let problems = load_file(&format!("[nats]\n{file}")).err().unwrap_or_default();
            let places: Vec<&str> = problems
                .0
                .iter()
                .map(|problem| problem.at.rsplit(": ").next().unwrap())
                .collect();
            assert_eq!(places, at.into_iter().collect::<Vec<_>>(), "{file}");
        };
        check("user = \"a\"\npassword = \"b\"", None);
        check("nkey = \"/seed\"\ntls_certificate = \"/c\"\ntls_key = \"/k\"", None);
        check("tls_certificate = \"/c\"", Some("nats.tls_certificate"));
        check("tls_key = \"/k\"", Some("nats.tls_key"));
        check("token = \"t\"\nnkey = \"/seed\"", Some("nats.nkey"));
        check("user = \"a\"\ncredentials = \"/c\"", Some("nats.credentials"));
    }

    #[test]
    fn settings_that_would_fail_later_are_problems_now() {
        let file = "[shutdown]\ndeadline = \"0s\"\n[auth]\ntoken_ttl = \"99999d\"\n\
                    [http]\norigins = [\"https://a.example/\"]\n\
                    [log]\nlevel = \"info,=,x=loud\"\n[database]\nurl = \"mysql://geheim\"\n\
                    [[cluster.namespaces]]\nname = \"a\"\n[[cluster.namespaces]]\nname = \"a\"\n";
        let expected = [
            "beamline.toml:2: shutdown.deadline is \"0s\", and must be from 1ms to 3650 days",
            "beamline.toml:4: auth.token_ttl is \"99999d\", and must be from 1ms to 3650 days",
            "http.origins: holds \"https://a.example/\"",
            "beamline.toml:8: log.level is not a log filter",
            "beamline.toml:10: database.url must begin with",
            "beamline.toml:14: cluster.namespaces: a is there twice",
        ];
        let text = check_problems(load_file(file), &expected);
        assert!(!text.contains("geheim"));

        let fine = "[http]\norigins = [\"https://a.example\", \"http://localhost:5173\"]\n";
        assert!(load_file(fine).is_ok());
    }

    #[test]
    fn listener_for_other_machines_without_a_name_is_a_warning() {
        let warned = |file: &str| load_file(&format!("[http]\n{file}")).unwrap().warnings.concat();
        assert!(warned("listen = \"0.0.0.0:8000\"").contains("http.hosts"));
        assert!(warned("listen = \"0.0.0.0:8000\"\norigins = \"*\"").contains("http.hosts"));
        for named in ["hosts = \"chat.example\"", "origins = \"https://chat.example\""] {
            assert_eq!(warned(&format!("listen = \"0.0.0.0:8000\"\n{named}")), "", "{named}");
        }
        assert_eq!(warned("listen = \"127.0.0.1:8000\""), "");
    }

    #[test]
    fn built_in_namespace_opens_only_by_an_explicit_key_and_app_never() {
        let open = |name: &str| load_file(&format!("[[cluster.namespaces]]\nname = \"{name}\"\npublish = true\n"));
        for name in ["chat", "ops"] {
            let settings = open(name).unwrap();
            assert_eq!(settings.warnings.len(), 1, "{name}: {:?}", settings.warnings);
            let namespaces = &settings.cluster.namespaces;
            assert!(namespaces.iter().any(|known| known.name == name && known.rules.publish));
        }
        assert!(open("news").unwrap().warnings.is_empty());
        check_problems(open("app"), &["app may not have publish = true"]);
    }
}
