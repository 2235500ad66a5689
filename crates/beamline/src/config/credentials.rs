//! Keys that the settings name instead of holding them: in a file or in a variable of the environment.

use super::problems::Problems;
use super::tables::{Tables, Values};
use super::value::api_key;
use std::collections::BTreeMap;
use std::path::Path;

/// The setting that names the file with the tenants' keys.
pub const API_KEYS_FILE: &str = "gateway.api_keys_file";
/// The keys of a provider that say where its bearer key is.
const SOURCES: [&str; 3] = ["api_key", "api_key_file", "api_key_env"];

/// Reads the keys that the settings name.
pub fn read(environment: &BTreeMap<String, String>, tables: &mut Tables, problems: &mut Problems) {
    for provider in &tables.providers {
        let place = tables.place_of("worker.providers", provider);
        match key_of(provider, environment) {
            Ok(None) => {}
            Ok(Some(key)) => {
                let name = provider.maybe_text("name").unwrap_or_default();
                tables.provider_keys.insert(name, key);
            }
            Err(what) => problems.add(place, what),
        }
    }

    if let Some(path) = tables.values.maybe_path(API_KEYS_FILE) {
        match keys_in(&path) {
            Ok(keys) => tables.key_lines = keys,
            Err(what) => problems.add(tables.place(API_KEYS_FILE), what),
        }
    }
}

fn key_of(provider: &Values, environment: &BTreeMap<String, String>) -> Result<Option<String>, String> {
    let name = provider.maybe_text("name").unwrap_or_default();
    let set: Vec<&str> = SOURCES.into_iter().filter(|key| provider.is_set(key)).collect();
    if let [first, second, ..] = set[..] {
        return Err(format!("{name} has {first} and {second}; choose one"));
    }

    let (key, source) = if let Some(path) = provider.maybe_path("api_key_file") {
        let text = std::fs::read_to_string(&path)
            .map_err(|error| format!("the api_key_file of {name}, {}, cannot be read: {error}", path.display()))?;
        (text.trim().to_string(), format!("the api_key_file of {name}, {},", path.display()))
    } else if let Some(variable) = provider.maybe_text("api_key_env") {
        let key = environment.get(&variable).cloned().unwrap_or_default();
        (key, format!("${variable}, the api_key_env of {name},"))
    } else {
        return Ok(None);
    };

    if key.is_empty() {
        return Err(format!("{source} is empty"));
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("{source} has characters that a header cannot carry; it must hold the key alone"));
    }
    Ok(Some(key))
}

/// The keys in a file, one `tenant=key` on each line; empty lines and lines that begin with `#` are skipped.
fn keys_in(path: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: cannot be read: {error}", path.display()))?;
    let lines = text.lines().map(str::trim).enumerate();
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(n, line)| match api_key(line) {
            Ok(_) => Ok(line.to_string()),
            Err(what) => Err(format!("{}:{}: {what}", path.display(), n + 1)),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::config::testing::{check_problems, load_all, load_file};

    const KEY: &str = "0123456789abcdef0123456789abcdef";

    fn model(settings: &crate::config::Settings) -> worker::Model {
        let kind = settings.worker.providers.iter().map(|provider| provider.kind.clone());
        let mut model = kind.filter_map(|kind| match kind {
            worker::Kind::OpenAi(model) => Some(model),
            _ => None,
        });
        model.next_back().unwrap()
    }

    #[test]
    fn key_of_a_provider_is_in_the_settings_a_file_or_a_variable() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, "from-file\n").unwrap();
        let provider = |line: &str| {
            let text = format!(
                "[[worker.providers]]\nname = \"m\"\nkind = \"openai\"\nbase_url = \"http://h/v1\"\nmodel = \"m\"\n{line}\n"
            );
            load_all(&text, &[("MODEL_KEY", "from-variable"), ("BAD_KEY", "a b")], &[])
        };
        let at_file = format!("api_key_file = {file:?}");
        for (line, expected) in [
            ("", None),
            ("api_key = \"k\"", Some("k")),
            (at_file.as_str(), Some("from-file")),
            ("api_key_env = \"MODEL_KEY\"", Some("from-variable")),
        ] {
            let settings = provider(line).unwrap();
            assert_eq!(model(&settings).api_key.as_deref(), expected, "{line}");
            assert!(!settings.show().contains("from-"), "{line}");
        }
        for (line, expected) in [
            ("api_key = \"k\"\napi_key_env = \"MODEL_KEY\"", "m has api_key and api_key_env; choose one"),
            ("api_key_file = \"/nowhere/key\"", "/nowhere/key, cannot be read"),
            ("api_key_env = \"UNSET_KEY\"", "$UNSET_KEY, the api_key_env of m, is empty"),
            ("api_key_env = \"BAD_KEY\"", "characters that a header cannot carry"),
        ] {
            check_problems(provider(line), &[expected]);
        }
    }

    #[test]
    fn keys_of_tenants_are_in_the_settings_and_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, format!("# two\n\nacme=2{KEY}\nbeta=3{KEY}\n")).unwrap();
        let text = format!("[gateway]\napi_keys = [\"acme=1{KEY}\"]\napi_keys_file = {file:?}\n");
        let mut settings = load_file(&text).unwrap();
        let tenants = |settings: &crate::config::Settings| {
            let keys = settings.gateway.tenant_keys.iter();
            keys.map(|(key, tenant)| format!("{tenant}{}", &key[..1]))
                .collect::<Vec<_>>()
        };
        assert_eq!(tenants(&settings), ["acme1", "acme2", "beta3"]);
        assert!(!settings.show().contains(KEY), "{}", settings.show());

        std::fs::write(&file, format!("gamma=4{KEY}\n")).unwrap();
        let changes = settings.renew(&load_file(&text).unwrap()).unwrap();
        assert_eq!(changes.applied, [super::API_KEYS_FILE]);
        assert_eq!(tenants(&settings), ["acme1", "gamma4"]);

        std::fs::write(&file, format!("no tenant={KEY}\n")).unwrap();
        let shown = check_problems(load_file(&text), &["keys:1: ", "tenant"]);
        assert!(!shown.contains(KEY), "{shown}");
        std::fs::write(&file, format!("beta=1{KEY}\n")).unwrap();
        let shown = check_problems(load_file(&text), &["the same key for acme and beta"]);
        assert!(!shown.contains(KEY), "{shown}");
        let short = check_problems(load_file("[gateway]\napi_keys = [\"acme=geheim\"]\n"), &["at least 32"]);
        assert!(!short.contains("geheim"), "{short}");
    }
}
