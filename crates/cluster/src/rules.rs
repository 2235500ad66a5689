//! What a channel may do, by its namespace.

use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Publications kept a channel; 0: none.
    pub history_size: usize,
    pub history_ttl: Duration,
    /// Who is there can be asked.
    pub presence: bool,
    /// Comings and goings are published.
    pub join_leave: bool,
    /// A client that was away gets what it missed. Needs history.
    pub recovery: bool,
    /// Clients may publish.
    pub publish: bool,
    /// Only channels that name their users (`name#user1,user2`) exist.
    pub user_limited: bool,
    /// The memory engine keeps the history through a restart.
    pub durable: bool,
}

impl Default for Rules {
    /// Those of channels without a namespace: enough for the first hour.
    fn default() -> Self {
        Self {
            history_size: 100,
            history_ttl: Duration::from_secs(600),
            presence: true,
            join_leave: false,
            recovery: true,
            publish: true,
            user_limited: false,
            durable: true,
        }
    }
}

impl Rules {
    pub fn keeps_history(&self) -> bool {
        self.history_size > 0 && !self.history_ttl.is_zero()
    }

    pub fn recovers(&self) -> bool {
        self.recovery && self.keeps_history()
    }
}

/// What settings say of a channel's rules: what is `None` stays as it was. Who may be on a channel of the product's own
/// apps (`user_limited`), and what is kept of it, is no setting.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    pub history_size: Option<usize>,
    pub history_ttl: Option<Duration>,
    pub presence: Option<bool>,
    pub join_leave: Option<bool>,
    pub recovery: Option<bool>,
    pub publish: Option<bool>,
}

impl Overrides {
    pub fn over(&self, base: &Rules) -> Rules {
        Rules {
            history_size: self.history_size.unwrap_or(base.history_size),
            history_ttl: self.history_ttl.unwrap_or(base.history_ttl),
            presence: self.presence.unwrap_or(base.presence),
            join_leave: self.join_leave.unwrap_or(base.join_leave),
            recovery: self.recovery.unwrap_or(base.recovery),
            publish: self.publish.unwrap_or(base.publish),
            user_limited: base.user_limited,
            durable: base.durable,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    pub name: String,
    pub rules: Rules,
}

/// The built-in namespaces and those of the settings: each entry lies over the built-in namespace of its name, else over
/// `defaults`. The built-in ones come first.
pub fn namespaces(entries: &[(String, Overrides)], defaults: &Rules) -> Vec<Namespace> {
    let mut namespaces = built_in();
    for (name, overrides) in entries {
        match namespaces.iter_mut().find(|known| known.name == *name) {
            Some(known) => known.rules = overrides.over(&known.rules),
            None => namespaces.push(Namespace { name: name.clone(), rules: overrides.over(defaults) }),
        }
    }
    namespaces
}

/// Those that the product's own apps use. Only services publish there.
pub fn built_in() -> Vec<Namespace> {
    let closed = Rules { publish: false, presence: false, ..Rules::default() };
    let namespace = |name: &str, rules| Namespace { name: name.into(), rules };
    vec![
        // A restarted server sends a session's page anew: nothing to keep.
        namespace(
            "app",
            Rules {
                history_size: 512,
                history_ttl: Duration::from_secs(300),
                user_limited: true,
                durable: false,
                ..closed.clone()
            },
        ),
        namespace("chat", Rules { history_size: 200, presence: true, join_leave: true, ..closed.clone() }),
        namespace("ops", Rules { history_size: 300, durable: false, ..closed }),
    ]
}

/// The rules of a channel; `None` if its namespace is not known.
pub fn of<'a>(channel: &str, namespaces: &'a [Namespace], defaults: &'a Rules) -> Option<&'a Rules> {
    let Some(name) = namespace_of(channel) else {
        return Some(defaults);
    };
    namespaces
        .iter()
        .rev()
        .find(|known| known.name == name)
        .map(|namespace| &namespace.rules)
}

/// The namespace in a channel's name, if it has one.
pub fn namespace_of(channel: &str) -> Option<&str> {
    let channel = channel.strip_prefix('$').unwrap_or(channel);
    channel.split_once(':').map(|(namespace, _)| namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_an_entry_lie_over_the_built_in_namespace_or_the_defaults() {
        let defaults = Rules { publish: false, history_size: 7, ..Rules::default() };
        let entry = |name: &str| (name.to_string(), Overrides { history_size: Some(5), ..Overrides::default() });
        let namespaces = namespaces(&["chat", "app", "ops", "news"].map(entry), &defaults);
        let names: Vec<&str> = namespaces.iter().map(|namespace| namespace.name.as_str()).collect();
        assert_eq!(names, ["app", "chat", "ops", "news"]);

        for (namespace, built_in) in namespaces.iter().zip(built_in()) {
            assert_eq!(namespace.rules, Rules { history_size: 5, ..built_in.rules }, "{}", namespace.name);
            assert!(!namespace.rules.publish, "{}", namespace.name);
        }
        assert!(namespaces[0].rules.user_limited && !namespaces[0].rules.durable);
        assert_eq!(namespaces[3].rules, Rules { history_size: 5, ..defaults });
    }
}
