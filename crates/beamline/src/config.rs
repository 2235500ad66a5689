//! Settings: file < environment < flags. Every problem is reported at once, before a port is bound.
//!
//! The only place that reads the environment.

mod keys;
mod load;
mod namespaces;
mod renew;
mod roles;
mod url;
mod value;

pub use keys::KEYS;
pub use load::{Layers, Problems, load};
pub use renew::Changes;
pub use value::Value;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A duration written as in the file.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    match value::parse(value::Kind::Duration, text)? {
        Value::Duration(duration) => Ok(duration),
        other => unreachable!("a duration is not {other:?}"),
    }
}

/// An entry of `gateway.tenants`.
pub fn uid_and_tenant(entry: &str) -> Option<(u32, &str)> {
    let (uid, tenant) = entry.split_once('=')?;
    let tenant = tenant.trim();
    Some((uid.trim().parse().ok()?, tenant)).filter(|_| !tenant.is_empty())
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Default,
    File { line: usize },
    Environment(String),
    Flag,
}

/// One table of values, each of the kind its key says.
#[derive(Debug, Clone, Default)]
pub struct Values(BTreeMap<&'static str, (Value, Source)>);

/// The checked settings of a process.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    pub values: Values,
    pub providers: Vec<Values>,
    pub namespaces: Vec<Values>,
    pub namespace_defaults: Option<Values>,
    /// What is no problem, and probably not meant.
    pub warnings: Vec<String>,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// Of the process's environment, what providers pass on to their programs.
    passed: BTreeMap<String, String>,
}

/// A typed getter that gives `None` for an unset key; asking a key for another kind than its own is a bug of ours.
macro_rules! getter {
    ($maybe:ident, $name:ident, $variant:ident, $type:ty) => {
        pub fn $maybe(&self, key: &str) -> Option<$type> {
            match self.0.get(key) {
                None => None,
                Some((Value::$variant(value), _)) => Some(value.clone()),
                Some((other, _)) => panic!("setting {key} is {other:?}"),
            }
        }

        #[allow(dead_code)]
        pub fn $name(&self, key: &str) -> $type {
            self.$maybe(key)
                .unwrap_or_else(|| panic!("setting {key} has a default"))
        }
    };
}

impl Values {
    getter!(maybe_text, text, Text, String);
    getter!(maybe_path, path, Path, PathBuf);
    getter!(maybe_address, address, Address, SocketAddr);
    getter!(maybe_duration, duration, Duration, Duration);
    getter!(maybe_number, number, Number, u64);
    getter!(maybe_share, share, Share, f64);
    getter!(maybe_flag, flag, Bool, bool);
    getter!(maybe_list, list, List, Vec<String>);

    pub fn count(&self, key: &str) -> usize {
        usize::try_from(self.number(key)).expect("a 64-bit machine")
    }

    pub fn source(&self, key: &str) -> Option<&Source> {
        self.0.get(key).map(|(_, source)| source)
    }
}

impl Settings {
    pub fn has_role(&self, role: &str) -> bool {
        self.values.list("roles").iter().any(|r| r == role)
    }

    /// The environment that a provider's settings give its program.
    pub fn program_environment(&self, provider: &Values) -> BTreeMap<String, String> {
        let of = |item: &String| {
            let (name, value) = value::variable(item);
            Some((name.to_string(), value.or_else(|| self.passed.get(name).map(String::as_str))?.to_string()))
        };
        provider.list("env").iter().filter_map(of).collect()
    }

    /// The effective settings as a file, with where each value came from.
    pub fn show(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let mut table = "";
        for key in KEYS {
            let (head, name) = key.name.split_once('.').unwrap_or(("", key.name));
            if head != table {
                let _ = write!(out, "\n[{head}]\n");
                table = head;
            }
            match self.values.0.get(key.name) {
                Some((value, source)) => {
                    let from = match source {
                        Source::Default => String::new(),
                        Source::File { line } => format!("  # line {line}"),
                        Source::Environment(name) => format!("  # ${name}"),
                        Source::Flag => "  # flag".into(),
                    };
                    let _ = writeln!(out, "{name} = {}{from}", value::render(key.kind, value));
                }
                None => {
                    let _ = writeln!(out, "# {name} is unset: {}", key.help);
                }
            }
        }
        for values in &self.providers {
            let _ = write!(out, "\n[[worker.providers]]\n");
            for key in keys::PROVIDER {
                if let Some((value, _)) = values.0.get(key.name) {
                    let _ = writeln!(out, "{} = {}", key.name, value::render(key.kind, value));
                }
            }
        }
        self.show_channels(&mut out);
        out.trim_start().to_string()
    }
}
