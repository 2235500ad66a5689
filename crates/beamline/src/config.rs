//! Reads the settings, checks them, and produces a typed table for each part.
//!
//! A value comes from its default, the file, the environment or a flag; a later source overrides an earlier one.
//! [`load`] reports every problem at once, before any port is bound. Only this module reads the environment.
//!
//! A new setting is a row in `config/keys.rs` and a line in `config/settings.rs`.

mod credentials;
mod cross_checks;
mod file;
mod keys;
mod layers;
mod namespaces;
mod problems;
mod renew;
mod roles;
mod settings;
mod show;
mod tables;
mod url;
mod value;

pub use layers::Layers;
pub use problems::Problems;
pub use renew::Changes;
pub use roles::Role;
pub use settings::{Access, Bus, LogFormat, Settings};

use std::time::Duration;
use tables::Tables;

/// Reads the layers into typed settings. The error lists every problem.
pub fn load(layers: &Layers) -> Result<Settings, Problems> {
    let mut problems = Problems::default();
    let tables = layers.read(&mut problems);
    typed(tables, problems)
}

/// Turns tables into typed settings, unless there are `problems` already or the tables add some.
fn typed(tables: Tables, mut problems: Problems) -> Result<Settings, Problems> {
    let mut settings = Settings::new(tables, &mut problems);
    cross_checks::check(&settings, &mut problems);

    if !problems.0.is_empty() {
        return Err(problems);
    }
    settings.warnings.extend(cross_checks::warnings(&settings));
    Ok(settings)
}

/// Parses a duration as the settings file writes it, such as `250ms`, `15m` or `2h`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    match value::parse(value::Kind::Duration, text)? {
        value::Value::Duration(duration) => Ok(duration),
        other => unreachable!("a duration is not {other:?}"),
    }
}

#[cfg(test)]
mod testing {
    use super::*;

    /// Loads a settings file that holds `text`.
    pub fn load_file(text: &str) -> Result<Settings, Problems> {
        load_all(text, &[], &[])
    }

    pub fn load_all(
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
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect(),
            flags: flags.iter().map(|(name, value)| (*name, value.to_string())).collect(),
        })
    }

    /// Loads settings that have problems, and checks that the report contains all of `expected`.
    #[track_caller]
    pub fn check_problems(loaded: Result<Settings, Problems>, expected: &[&str]) -> String {
        let text = loaded.unwrap_err().to_string();
        for expected in expected {
            assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
        }
        text
    }
}
