//! The sources of settings, and how they are merged: defaults < file < environment < flags.

use super::credentials;
use super::file;
use super::keys::{KEYS, Key};
use super::problems::{Problems, did_you_mean};
use super::tables::{Source, Tables};
use super::value::{parse, variable};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Read where it exists, unless `--config` names another file.
const DEFAULT_FILE: &str = "beamline.toml";

/// The sources of the settings. SIGHUP reads the same layers again.
#[derive(Debug, Default)]
pub struct Layers {
    /// The file named by `--config`, which must exist. `None` means `beamline.toml`, which may be missing.
    pub file: Option<PathBuf>,
    pub environment: BTreeMap<String, String>,
    /// Pairs of key and value.
    pub flags: Vec<(&'static str, String)>,
}

impl Layers {
    /// The environment of this process, without a file or flags.
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    pub fn from_process() -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self { environment, ..Self::default() }
    }

    /// Reads each layer over the one before.
    pub(super) fn read(&self, problems: &mut Problems) -> Tables {
        let mut tables = Tables::of_defaults();

        self.read_file(&mut tables, problems);
        self.read_environment(&mut tables, problems);
        self.read_flags(&mut tables, problems);

        self.pass_on(&mut tables);
        credentials::read(&self.environment, &mut tables, problems);
        tables
    }

    fn read_file(&self, tables: &mut Tables, problems: &mut Problems) {
        let path = self.file.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
        match std::fs::read_to_string(path) {
            Ok(text) => {
                file::read(path, &text, tables, problems);
                tables.file = Some(path.into());
            }
            Err(e) if e.kind() == ErrorKind::NotFound && self.file.is_none() => {}
            Err(e) => problems.add(path.display(), format!("cannot be read: {e}")),
        }
    }

    fn read_environment(&self, tables: &mut Tables, problems: &mut Problems) {
        for key in KEYS {
            let ours = variable_of(key);
            for name in key.env.into_iter().chain([ours.as_str()]) {
                // An empty variable counts as unset, as service managers and containers use it.
                let Some(text) = self.environment.get(name).filter(|text| !text.is_empty()) else {
                    continue;
                };
                match parse(key.kind, text) {
                    Ok(value) => tables.values.set(key, value, Source::Environment(name.into())),
                    Err(what) => problems.add(format_args!("${name}"), what),
                }
            }
        }
        tables.warnings.extend(self.unknown_variables());
    }

    fn read_flags(&self, tables: &mut Tables, problems: &mut Problems) {
        for (name, text) in &self.flags {
            let key = KEYS
                .iter()
                .find(|key| key.name == *name)
                .expect("flags name keys of the table");
            match parse(key.kind, text) {
                Ok(value) => tables.values.set(key, value, Source::Flag),
                Err(what) => problems.add(format_args!("flag for {name}"), what),
            }
        }
    }

    /// Warns about variables that look like settings but are unknown. They are not errors, because an orchestrator may
    /// define variables such as `BEAMLINE_PORT` on its own.
    fn unknown_variables(&self) -> Vec<String> {
        let known: Vec<String> = KEYS.iter().map(variable_of).collect();
        let unknown = self
            .environment
            .keys()
            .filter(|name| name.starts_with("BEAMLINE_") && !known.contains(name));
        unknown
            .map(|name| {
                let hint = did_you_mean(known.iter().map(String::as_str), name);
                format!("${name} is not a setting{hint}")
            })
            .collect()
    }

    /// Keeps the variables that providers pass on to their programs.
    fn pass_on(&self, tables: &mut Tables) {
        for provider in &tables.providers {
            for item in provider.list("env") {
                let (name, None) = variable(&item) else { continue };
                if let Some(value) = self.environment.get(name) {
                    tables.passed_on.insert(name.into(), value.clone());
                    continue;
                }
                let provider = provider.maybe_text("name").unwrap_or_default();
                tables.warnings.push(format!(
                    "provider {provider} lists ${name} in env, but it is not set in the server's environment"
                ));
            }
        }
    }
}

/// The environment variable of a key: `BEAMLINE_HTTP_LISTEN` for `http.listen`.
fn variable_of(key: &Key) -> String {
    format!("BEAMLINE_{}", key.name.to_uppercase().replace('.', "_"))
}

#[cfg(test)]
mod tests {
    use crate::config::tables::Source;
    use crate::config::testing::{check_problems, load_all, load_file};
    use std::path::Path;

    #[test]
    fn flags_beat_the_environment_and_the_environment_beats_the_file() {
        let file = "[http]\nlisten = \"127.0.0.1:1\"\n[gateway]\nsocket = \"/a\"\n[ops]\nlisten = \"127.0.0.1:3\"\n";
        let environment = [("BEAMLINE_HTTP_LISTEN", "127.0.0.1:2"), ("IPC_SOCKET_PATH", "/b")];
        let settings = load_all(file, &environment, &[("gateway.socket", "/c")]).unwrap();
        assert_eq!(settings.http.listen.port(), 2);
        assert_eq!(settings.gateway.socket, Path::new("/c"));
        assert_eq!(settings.tables.values.source("ops.listen"), Some(&Source::File { line: 6 }));
    }

    #[test]
    fn every_problem_is_reported_with_its_line_and_the_nearest_key() {
        let file = "[http]\nlisten = 7\nlissten = \"x\"\n[gatway]\nsocket = \"/a\"\n[gateway]\nread_timeout = \"5 s\"\n\
                    [[worker.providers]]\nkind = \"command\"\n";
        let loaded = load_all(
            file,
            &[("BEAMLINE_LOG_FORMAT", "xml"), ("BEAMLINE_GATEWAY_TENANTS", "1000=acme,ann=acme")],
            &[("roles", "gateway,rooter")],
        );
        let expected = [
            "beamline.toml:2: http.listen is \"7\"",
            "beamline.toml:3: http.lissten is not a setting; did you mean http.listen?",
            "beamline.toml:5: gatway.socket is not a setting; did you mean gateway.socket?",
            "beamline.toml:7: gateway.read_timeout is \"5 s\"",
            "beamline.toml:9: worker.providers has no name",
            "gateway.tenants: \"ann=acme\" is not a numeric uid",
            "beamline.toml:9: worker.providers: a provider has no program",
            "$BEAMLINE_LOG_FORMAT: is \"xml\"",
            "roles: \"rooter\" is not a role",
        ];
        check_problems(loaded, &expected);
    }

    #[test]
    fn mistyped_variable_is_a_warning() {
        let environment = [("BEAMLINE_HTTP_LISEN", "x"), ("BEAMLINE_LOG_LEVEL", "warn"), ("PATH", "/bin")];
        let settings = load_all("", &environment, &[]).unwrap();
        assert_eq!(settings.warnings, ["$BEAMLINE_HTTP_LISEN is not a setting; did you mean BEAMLINE_HTTP_LISTEN?"]);
    }

    #[test]
    fn output_of_config_show_is_read_back_the_same() {
        let file = "[[worker.providers]]\nname = \"sh\"\nkind = \"command\"\nprogram = \"/bin/cat\"\n";
        let shown = load_file(file).unwrap().show();
        let again = load_file(&shown).unwrap_or_else(|e| panic!("{e}\n{shown}"));
        assert!(again.worker.providers.iter().any(|provider| provider.name == "sh"));
        assert_eq!(again.gateway.request_timeout.as_secs(), 5);
    }
}
