//! Reads the settings file into [`Tables`].

use super::keys::{KEYS, Key, NAMESPACE, PROVIDER};
use super::problems::{Problems, did_you_mean};
use super::tables::{Source, Tables, Values};
use super::value::{Kind, list, parse};
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// Parses `text`, the content of the file `path`, into `tables`.
pub fn read(path: &Path, text: &str, tables: &mut Tables, problems: &mut Problems) {
    let (document, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader { path, text, problems };

    for error in errors {
        let line = reader.line(error.span().unwrap_or_default());
        reader.problem(line, error.message().trim());
    }

    for (name, value) in document.get_ref() {
        let line = reader.line(name.span());
        match value.get_ref() {
            DeValue::Table(table) => reader.table(name.get_ref(), table, tables),
            value => reader.set(KEYS, name.get_ref(), value, line, &mut tables.values),
        }
    }
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    problems: &'a mut Problems,
}

/// An entry of a repeated table.
struct Entry<'a> {
    values: Values,
    table: &'a DeTable<'a>,
    /// The line of its first key.
    line: usize,
}

impl Entry<'_> {
    /// Whether the entry sets this key, even to an invalid value.
    fn gives(&self, key: &str) -> bool {
        self.table.keys().any(|name| name.get_ref() == key)
    }
}

impl Reader<'_> {
    /// A top-level table: `[gateway]`.
    fn table(&mut self, head: &str, table: &DeTable<'_>, tables: &mut Tables) {
        for (name, value) in table {
            let name_in_full = format!("{head}.{}", name.get_ref());
            let line = self.line(name.span());

            match (name_in_full.as_str(), value.get_ref()) {
                ("worker.providers", DeValue::Array(items)) => {
                    let entries = items.iter().filter_map(|item| self.provider(item.get_ref(), line));
                    tables.providers.extend(entries);
                }
                ("cluster.namespaces", DeValue::Array(items)) => {
                    let entries = items.iter().filter_map(|item| self.namespace(item.get_ref(), line));
                    tables.namespaces.extend(entries);
                }
                ("cluster.defaults", table @ DeValue::Table(_)) => {
                    let entry = self.entry("cluster.defaults", NAMESPACE, table, line);
                    tables.namespace_defaults = entry.map(|entry| entry.values);
                }
                // A table in a table: `[router.circuit_breaker]`.
                (name, DeValue::Table(inner)) if KEYS.iter().any(|key| is_within(key, name)) => {
                    for (last, value) in inner {
                        let line = self.line(last.span());
                        let name = format!("{name}.{}", last.get_ref());
                        self.set(KEYS, &name, value.get_ref(), line, &mut tables.values);
                    }
                }
                (name, value) => self.set(KEYS, name, value, line, &mut tables.values),
            }
        }
    }

    fn provider(&mut self, value: &DeValue<'_>, line: usize) -> Option<Values> {
        const TABLE: &str = "worker.providers";
        let entry = self.named_entry(TABLE, PROVIDER, value, line)?;

        let name = entry.values.maybe_text("name").unwrap_or_else(|| "a provider".into());
        for key in required(&entry.values).iter().filter(|key| !entry.gives(key)) {
            let at = format!("{}: {TABLE}", self.place(entry.line));
            self.problems.add(at, format!("{name} has no {key}"));
        }
        Some(entry.values)
    }

    fn namespace(&mut self, value: &DeValue<'_>, line: usize) -> Option<Values> {
        let entry = self.named_entry("cluster.namespaces", NAMESPACE, value, line)?;
        Some(entry.values)
    }

    fn named_entry<'v>(
        &mut self,
        head: &str,
        keys: &'static [Key],
        value: &'v DeValue<'v>,
        line: usize,
    ) -> Option<Entry<'v>> {
        let entry = self.entry(head, keys, value, line)?;
        if !entry.gives("name") {
            self.problem(entry.line, format!("{head} has no name; add name = \"…\""));
        }
        Some(entry)
    }

    /// Reads an entry of a repeated table; keys that it does not set have their defaults.
    fn entry<'v>(
        &mut self,
        head: &str,
        keys: &'static [Key],
        value: &'v DeValue<'v>,
        line: usize,
    ) -> Option<Entry<'v>> {
        let DeValue::Table(table) = value else {
            self.problem(line, format!("{head} is not a table; write [[{head}]] above its keys"));
            return None;
        };

        let mut values = Values::of_defaults(keys);
        for (name, value) in table {
            let line = self.line(name.span());
            self.set(keys, name.get_ref(), value.get_ref(), line, &mut values);
        }

        let line = table.keys().map(|name| self.line(name.span())).min().unwrap_or(line);
        Some(Entry { values, table, line })
    }

    fn set(&mut self, keys: &'static [Key], name: &str, value: &DeValue<'_>, line: usize, values: &mut Values) {
        let Some(key) = keys.iter().find(|key| key.name == name) else {
            let hint = did_you_mean(keys.iter().map(|key| key.name), name);
            return self.problem(line, format!("{name} is not a setting{hint}"));
        };

        let parsed = match value {
            DeValue::String(text) => parse(key.kind, text),
            DeValue::Integer(number) if number.radix() == 10 => parse(key.kind, number.as_str()),
            DeValue::Float(number) => parse(key.kind, number.as_str()),
            DeValue::Boolean(flag) => parse(key.kind, &flag.to_string()),
            DeValue::Array(items)
                if matches!(key.kind, Kind::List | Kind::ApiKeys | Kind::Urls(_) | Kind::Variables) =>
            {
                items
                    .iter()
                    .map(|item| item.get_ref().as_str().map(String::from))
                    .collect::<Option<Vec<_>>>()
                    .ok_or_else(|| "is not a list of strings".into())
                    .and_then(|items| list(key.kind, items))
            }
            other => Err(format!("cannot be of type {}", other.type_str())),
        };

        match parsed {
            Ok(value) => values.set(key, value, Source::File { line }),
            Err(what) => self.problem(line, format!("{name} {what}")),
        }
    }

    fn problem(&mut self, line: usize, what: impl Into<String>) {
        let place = self.place(line);
        self.problems.add(place, what);
    }

    fn place(&self, line: usize) -> String {
        format!("{}:{line}", self.path.display())
    }

    /// The number of the line on which `span` begins, from 1.
    fn line(&self, span: std::ops::Range<usize>) -> usize {
        let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    }
}

/// Keys that a provider of this kind requires.
fn required(provider: &Values) -> &'static [&'static str] {
    match provider.maybe_text("kind").as_deref() {
        Some("command") => &["program"],
        Some("openai") => &["base_url", "model"],
        Some(_) => &[],
        None => &["kind"],
    }
}

fn is_within(key: &Key, table: &str) -> bool {
    key.name.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use crate::config::testing::{check_problems, load_all, load_file};

    #[test]
    fn syntax_error_has_its_line() {
        check_problems(load_file("[http\nlisten = 1\n"), &["beamline.toml:1:"]);
    }

    #[test]
    fn every_problem_of_a_provider_has_its_line() {
        let file = "[[worker.providers]]\nname = \"a\"\nkind = \"openai\"\nbase_url = \"127.0.0.1:11434/v1\"\n\
                    timeout = \"0s\"\napi_key = \"geheim\\nkey\"\n[[worker.providers]]\nname = \"b\"\n\
                    kind = \"command\"\nprogram = \"/bin/x\"\noutput_max = \"0\"\nenv = [\"A\", \"A=geheim\"]\n\
                    [nats]\nurl = \"http://n\"\n[redis]\nurls = [\"redis://a\", \"rediss://:geheim@b\"]\n";
        let text = check_problems(
            load_all(file, &[("DATABASE_URL", "postgres://u:geheim@h:x/d")], &[]),
            &[
                "beamline.toml:4: base_url is not a URL",
                "beamline.toml:5: timeout is \"0s\"",
                "beamline.toml:2: worker.providers: the api_key of a has characters",
                "beamline.toml:2: worker.providers: a has no model",
                "beamline.toml:11: output_max is \"0\"",
                "beamline.toml:12: env lists A twice",
                "beamline.toml:14: nats.url begins neither with nats:// nor with tls://",
                "beamline.toml:16: redis.urls asks for TLS",
                "$DATABASE_URL: is not a URL",
            ],
        );
        assert!(!text.contains("geheim") && text.starts_with("the settings have 9 problems"), "{text}");
    }

    #[test]
    fn table_within_a_table_sets_the_breakers_rules() {
        let file = "[router.circuit_breaker]\nfailure_threshold = 9\nerror_rate_threshold = 0.25\ntimeout = \"2m\"\n";
        let settings = load_all(file, &[("BEAMLINE_ROUTER_CIRCUIT_BREAKER_MIN_CALLS", "20")], &[]).unwrap();
        let again = load_file(&settings.show()).unwrap_or_else(|e| panic!("{e}\n{}", settings.show()));
        for settings in [&settings, &again] {
            let rules = &settings.router.circuit_breaker;
            assert_eq!(rules.failure_threshold, 9);
            assert_eq!(rules.error_rate_threshold, 0.25);
            assert_eq!((rules.min_calls, rules.timeout_ms), (20, 120_000));
            assert_eq!(rules.success_threshold, 2, "the others keep their defaults");
        }

        for (line, expected) in [
            ("error_rate_threshold = 0", "router.circuit_breaker.error_rate_threshold is \"0\""),
            ("min_calls = 0", "router.circuit_breaker.min_calls is \"0\""),
            ("timeout = \"2d\"", "router.circuit_breaker.timeout: must be at most 1d"),
            ("treshold = 1", "router.circuit_breaker.treshold is not a setting"),
        ] {
            let loaded = load_file(&format!("[router.circuit_breaker]\n{line}\n"));
            check_problems(loaded, &[&format!("beamline.toml:2: {expected}")]);
        }
    }
}
