//! The rules of channels that result from the settings, and how `config show` prints them.

use super::keys::NAMESPACE;
use super::tables::{Source, Tables, Values};
use super::value::{Value, render};
use cluster::{Namespace, Overrides, Rules};
use std::fmt::Write;

/// The rules of channels without a namespace.
pub fn defaults(tables: &Tables) -> Rules {
    let given = tables.namespace_defaults.as_ref().map(overrides).unwrap_or_default();
    given.over(&Rules::default())
}

/// The built-in namespaces with the overrides of the settings, then the namespaces that only the settings have.
pub fn effective(tables: &Tables) -> Vec<Namespace> {
    let entries: Vec<_> = tables
        .namespaces
        .iter()
        .filter_map(|values| Some((values.maybe_text("name")?, overrides(values))))
        .collect();
    cluster::namespaces(&entries, &defaults(tables))
}

/// Appends the effective rules in the form of the settings file, with the line of each key that the file sets.
pub fn show(cluster: &cluster::Config, tables: &Tables, out: &mut String) {
    show_rules(out, "[cluster.defaults]", None, &cluster.defaults, tables.namespace_defaults.as_ref());
    for Namespace { name, rules } in &cluster.namespaces {
        let given = tables
            .namespaces
            .iter()
            .find(|values| values.maybe_text("name").as_ref() == Some(name));
        show_rules(out, "[[cluster.namespaces]]", Some(name), rules, given);
    }
}

/// The keys that an entry sets; the others keep their values in the namespace that it overrides.
fn overrides(values: &Values) -> Overrides {
    Overrides {
        history_size: values.maybe_number("history_size"),
        history_ttl: values.maybe_duration("history_ttl"),
        presence: values.maybe_flag("presence"),
        join_leave: values.maybe_flag("join_leave"),
        recovery: values.maybe_flag("recovery"),
        publish: values.maybe_flag("publish"),
    }
}

fn show_rules(out: &mut String, head: &str, name: Option<&str>, rules: &Rules, given: Option<&Values>) {
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

#[cfg(test)]
mod tests {
    use crate::config::Settings;
    use crate::config::testing::load_file;
    use std::time::Duration;

    #[test]
    fn one_key_of_a_built_in_namespace_leaves_the_others() {
        let file = "[cluster.defaults]\npublish = false\n[[cluster.namespaces]]\nname = \"chat\"\nhistory_size = 7\n\
                    [[cluster.namespaces]]\nname = \"app\"\npresence = true\n[[cluster.namespaces]]\nname = \"news\"\n\
                    history_ttl = \"1h\"\n";
        let settings = load_file(file).unwrap();
        let check = |settings: &Settings| {
            let namespaces = &settings.cluster.namespaces;
            let rules = |name: &str| &namespaces.iter().find(|known| known.name == name).unwrap().rules;
            assert_eq!(namespaces.len(), 4);
            assert!(namespaces.iter().all(|namespace| !namespace.rules.publish), "{namespaces:?}");
            assert_eq!((rules("chat").history_size, rules("chat").join_leave), (7, true));
            assert!(rules("app").user_limited && rules("app").presence && !rules("app").durable);
            assert_eq!((rules("app").history_size, rules("ops").history_size), (512, 300));
            assert_eq!(rules("news").history_ttl, Duration::from_secs(3600));
        };
        check(&settings);

        // `config show` prints the effective rules; reading its output gives the same ones.
        let shown = settings.show();
        for expected in
            ["name = \"app\"", "history_size = 7  # line 5", "publish = false  # line 2", "history_size = 300\n"]
        {
            assert!(shown.contains(expected), "{expected:?} is missing in:\n{shown}");
        }
        let again = load_file(&shown).unwrap_or_else(|e| panic!("{e}\n{shown}"));
        check(&again);
    }
}
