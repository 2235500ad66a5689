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

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    pub name: String,
    pub rules: Rules,
}

/// Those that the product's own apps use; settings may replace them.
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
    let Some(name) = namespace_of(channel) else { return Some(defaults) };
    namespaces.iter().rev().find(|known| known.name == name).map(|namespace| &namespace.rules)
}

/// The namespace in a channel's name, if it has one.
pub fn namespace_of(channel: &str) -> Option<&str> {
    let channel = channel.strip_prefix('$').unwrap_or(channel);
    channel.split_once(':').map(|(namespace, _)| namespace)
}
