//! `config show`: the effective settings in the form of a settings file.

use super::keys::{KEYS, PROVIDER};
use super::namespaces;
use super::settings::Settings;
use super::tables::{Source, Values};
use super::value::render;
use std::fmt::Write;

impl Settings {
    /// Renders every setting, with where its value came from. Secrets are redacted.
    pub fn show(&self) -> String {
        let mut out = String::new();
        show_keys(&mut out, &self.tables.values);
        for provider in &self.tables.providers {
            show_provider(&mut out, provider);
        }
        namespaces::show(&self.cluster, &self.tables, &mut out);
        out.trim_start().to_string()
    }
}

fn show_keys(out: &mut String, values: &Values) {
    let mut table = "";
    for key in KEYS {
        let (head, name) = key.name.split_once('.').unwrap_or(("", key.name));
        if head != table {
            let _ = write!(out, "\n[{head}]\n");
            table = head;
        }

        let Some(value) = values.value(key.name) else {
            let _ = writeln!(out, "# {name} is unset: {}", key.help);
            continue;
        };
        let from = match values.source(key.name) {
            None | Some(Source::Default) => String::new(),
            Some(Source::File { line }) => format!("  # line {line}"),
            Some(Source::Environment(name)) => format!("  # ${name}"),
            Some(Source::Flag) => "  # flag".into(),
        };
        let _ = writeln!(out, "{name} = {}{from}", render(key.kind, value));
    }
}

fn show_provider(out: &mut String, provider: &Values) {
    let _ = write!(out, "\n[[worker.providers]]\n");
    for key in PROVIDER {
        if let Some(value) = provider.value(key.name) {
            let _ = writeln!(out, "{} = {}", key.name, render(key.kind, value));
        }
    }
}
