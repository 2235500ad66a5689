//! The rules of channels that the settings come to.

use super::keys::NAMESPACE;
use super::value::{Value, render};
use super::{Settings, Source, Values};
use cluster::{Namespace, Overrides, Rules};
use std::fmt::Write;

impl Settings {
    /// Of channels without a namespace.
    pub fn channel_defaults(&self) -> Rules {
        self.namespace_defaults
            .as_ref()
            .map(overrides)
            .unwrap_or_default()
            .over(&Rules::default())
    }

    /// The built-in namespaces with what the settings change of them, then the settings' own.
    pub fn channel_namespaces(&self) -> Vec<Namespace> {
        let entries = self
            .namespaces
            .iter()
            .filter_map(|values| Some((values.maybe_text("name")?, overrides(values))));
        cluster::namespaces(&entries.collect::<Vec<_>>(), &self.channel_defaults())
    }

    /// The effective rules as tables of the file, with the line of each key that the file gives.
    pub(super) fn show_channels(&self, out: &mut String) {
        show(out, "[cluster.defaults]", None, &self.channel_defaults(), self.namespace_defaults.as_ref());
        for Namespace { name, rules } in self.channel_namespaces() {
            let given = self
                .namespaces
                .iter()
                .find(|values| values.maybe_text("name").as_ref() == Some(&name));
            show(out, "[[cluster.namespaces]]", Some(&name), &rules, given);
        }
    }
}

/// Only the keys that are given.
fn overrides(values: &Values) -> Overrides {
    Overrides {
        history_size: values
            .maybe_number("history_size")
            .map(|n| usize::try_from(n).expect("a 64-bit machine")),
        history_ttl: values.maybe_duration("history_ttl"),
        presence: values.maybe_flag("presence"),
        join_leave: values.maybe_flag("join_leave"),
        recovery: values.maybe_flag("recovery"),
        publish: values.maybe_flag("publish"),
    }
}

fn show(out: &mut String, head: &str, name: Option<&str>, rules: &Rules, given: Option<&Values>) {
    let _ = write!(out, "\n{head}\n");
    if rules.user_limited {
        let _ = writeln!(out, "# only channels that name their users (name#user1,user2)");
    }
    for key in NAMESPACE {
        let value = match key.name {
            "name" => name.map(|name| Value::Text(name.into())),
            "history_size" => Some(Value::Number(rules.history_size as u64)),
            "history_ttl" => Some(Value::Duration(rules.history_ttl)),
            "presence" => Some(Value::Bool(rules.presence)),
            "join_leave" => Some(Value::Bool(rules.join_leave)),
            "recovery" => Some(Value::Bool(rules.recovery)),
            "publish" => Some(Value::Bool(rules.publish)),
            other => unreachable!("the namespace key {other} has no rule"),
        };
        let Some(value) = value else { continue };
        let from = match given.and_then(|values| values.source(key.name)) {
            Some(Source::File { line }) => format!("  # line {line}"),
            _ => String::new(),
        };
        let _ = writeln!(out, "{} = {}{from}", key.name, render(key.kind, &value));
    }
}
