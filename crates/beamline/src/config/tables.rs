//! Settings as tables of values, each with its source: the step between the layers and the typed settings.

use super::keys::{KEYS, Key};
use super::value::{Value, parse};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Default,
    File { line: usize },
    Environment(String),
    Flag,
}

/// One table of values. Each value has the kind of its key in the table of keys.
#[derive(Clone, Default)]
pub struct Values(BTreeMap<&'static str, (Value, Source)>);

/// All values of the merged layers.
#[derive(Clone, Default)]
pub struct Tables {
    pub values: Values,
    /// `[[worker.providers]]`.
    pub providers: Vec<Values>,
    /// `[[cluster.namespaces]]`.
    pub namespaces: Vec<Values>,
    /// `[cluster.defaults]`.
    pub namespace_defaults: Option<Values>,
    /// The variables of this process's environment that providers pass on to their programs.
    pub passed_on: BTreeMap<String, String>,
    /// The bearer keys that providers take from a file or a variable, by the provider's name.
    pub provider_keys: BTreeMap<String, String>,
    /// The lines of `gateway.api_keys_file`.
    pub key_lines: Vec<String>,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    pub warnings: Vec<String>,
}

impl Tables {
    pub fn of_defaults() -> Self {
        Self { values: Values::of_defaults(KEYS), ..Self::default() }
    }

    /// Locates the setting `key` for a message: file and line if the file sets it.
    pub fn place(&self, key: &str) -> String {
        match (self.values.source(key), &self.file) {
            (Some(Source::File { line }), Some(file)) => format!("{}:{line}: {key}", file.display()),
            _ => key.into(),
        }
    }

    /// Locates an entry of the repeated table `table` for a message.
    pub fn place_of(&self, table: &str, entry: &Values) -> String {
        match (entry.first_line(), &self.file) {
            (Some(line), Some(file)) => format!("{}:{line}: {table}", file.display()),
            _ => table.into(),
        }
    }
}

/// Defines two typed getters: one returns `None` for an unset key, the other is for keys with a default. A getter of
/// the wrong kind for a key is a bug and panics.
macro_rules! getters {
    ($maybe:ident, $name:ident, $variant:ident, $type:ty) => {
        getters!($maybe, $variant, $type);

        pub fn $name(&self, key: &str) -> $type {
            self.$maybe(key)
                .unwrap_or_else(|| panic!("setting {key} has no default"))
        }
    };
    ($maybe:ident, $variant:ident, $type:ty) => {
        pub fn $maybe(&self, key: &str) -> Option<$type> {
            match self.value(key)? {
                Value::$variant(value) => Some(value.clone()),
                other => panic!("setting {key} is {other:?}"),
            }
        }
    };
}

impl Values {
    pub fn of_defaults(keys: &'static [Key]) -> Self {
        let mut values = Self::default();
        for key in keys {
            if let Some(default) = key.default {
                let value = parse(key.kind, default).unwrap_or_else(|e| panic!("default of {}: {e}", key.name));
                values.set(key, value, Source::Default);
            }
        }
        values
    }

    pub fn set(&mut self, key: &Key, value: Value, source: Source) {
        self.0.insert(key.name, (value, source));
    }

    /// Copies the value of `key` and its source from another table; a key that is unset there becomes unset.
    pub fn take_over(&mut self, key: &Key, from: &Self) {
        match from.0.get(key.name) {
            Some(value) => self.0.insert(key.name, value.clone()),
            None => self.0.remove(key.name),
        };
    }

    pub fn value(&self, key: &str) -> Option<&Value> {
        self.0.get(key).map(|(value, _)| value)
    }

    pub fn source(&self, key: &str) -> Option<&Source> {
        self.0.get(key).map(|(_, source)| source)
    }

    pub fn is_set(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// The values without their sources, by key.
    pub fn without_sources(&self) -> impl Iterator<Item = (&'static str, &Value)> {
        self.0.iter().map(|(name, (value, _))| (*name, value))
    }

    fn first_line(&self) -> Option<usize> {
        let lines = self.0.values().filter_map(|(_, source)| match source {
            Source::File { line } => Some(*line),
            _ => None,
        });
        lines.min()
    }

    getters!(maybe_text, text, Text, String);
    getters!(maybe_path, path, Path, PathBuf);
    getters!(maybe_address, address, Address, SocketAddr);
    getters!(maybe_duration, duration, Duration, Duration);
    getters!(maybe_share, share, Share, f64);
    getters!(maybe_flag, flag, Bool, bool);
    getters!(maybe_list, list, List, Vec<String>);
    getters!(maybe_u64, Number, u64);

    /// A number, as an integer type that covers the bounds in the table of keys.
    pub fn maybe_number<N: TryFrom<u64>>(&self, key: &str) -> Option<N> {
        let number = self.maybe_u64(key)?;
        Some(N::try_from(number).unwrap_or_else(|_| panic!("setting {key} does not fit its type: {number}")))
    }

    pub fn number<N: TryFrom<u64>>(&self, key: &str) -> N {
        self.maybe_number(key)
            .unwrap_or_else(|| panic!("setting {key} has no default"))
    }
}
