//! The rules of channels, by namespace.

use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Publications kept for each channel; 0 keeps none.
    pub history_size: usize,
    pub history_ttl: Duration,
    /// Subscribers may query who is subscribed.
    pub presence: bool,
    /// Joins and leaves are announced to subscribers.
    pub join_leave: bool,
    /// A client that resubscribes gets the publications that it missed. Requires a history.
    pub recovery: bool,
    /// Clients may publish.
    pub publish: bool,
    /// Every channel must name its users (`name#user1,user2`).
    pub user_limited: bool,
    /// The memory engine keeps the history across restarts.
    pub durable: bool,
}

impl Default for Rules {
    /// The rules of channels without a namespace, permissive enough to experiment with.
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
    /// Whether publications get an offset and are kept.
    pub fn keeps_history(&self) -> bool {
        self.history_size > 0 && !self.history_ttl.is_zero()
    }

    /// Whether a client that resubscribes can recover the publications that it missed.
    pub fn recovers(&self) -> bool {
        self.recovery && self.keeps_history()
    }
}

/// The rules that settings may override; `None` keeps the base. `user_limited` and `durable` cannot be set, because the
/// product's own apps rely on them.
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
    /// `base` with these overrides applied.
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

/// The built-in namespaces, then those that only the settings have. An entry of the settings overrides the built-in
/// namespace of its name, or else `defaults`.
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

/// The namespaces of the product's own apps. Only services publish there.
pub fn built_in() -> Vec<Namespace> {
    let closed = Rules { publish: false, presence: false, ..Rules::default() };
    let namespace = |name: &str, rules| Namespace { name: name.into(), rules };
    vec![
        // A page session starts over after a restart, so its deltas need not be kept.
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

/// The rules of a channel; `None` if its namespace is unknown.
pub fn of<'a>(channel: &str, namespaces: &'a [Namespace], defaults: &'a Rules) -> Option<&'a Rules> {
    let Some(name) = namespace_of(channel) else {
        return Some(defaults);
    };

    // Searched from the end, so that a later namespace overrides an earlier one of the same name.
    namespaces
        .iter()
        .rev()
        .find(|known| known.name == name)
        .map(|namespace| &namespace.rules)
}

/// The namespace in a channel's name, if it has one.
pub fn namespace_of(channel: &str) -> Option<&str> {
    // The `$` of a private channel comes before its namespace.
    let channel = channel.strip_prefix('$').unwrap_or(channel);
    channel.split_once(':').map(|(namespace, _)| namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_overrides_the_built_in_namespace_or_the_defaults() {
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
