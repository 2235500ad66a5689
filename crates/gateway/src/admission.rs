//! Admission: which users may use the gateway, for which tenants, and how many requests and connections each may have.

use crate::Config;
use crate::byte_budget::Budget;
use crate::in_flight::{Full, Permit, Permits};
use crate::keys::Keys;
use arc_swap::{ArcSwap, Guard};
use std::collections::BTreeSet;
use std::sync::Arc;
use wire::router::DEFAULT_TENANT;

/// The current settings, and what is left of their limits.
pub struct Admission {
    live: ArcSwap<Live>,
    /// The user that this process runs as.
    uid: u32,
    connections: Arc<Permits>,
    in_flight: Arc<Permits>,
    /// Requests of the OpenAI-compatible entry, by tenant.
    of_tenants: Arc<Permits<Arc<str>>>,
}

/// Settings, and the limits derived from them. A reload replaces both at once.
pub struct Live {
    config: Config,
    /// Requests in flight that one user may have.
    pub share: usize,
    /// Connections that one user may have.
    pub connection_share: usize,
    /// The keys of the OpenAI-compatible entry.
    pub keys: Keys,
    /// Requests of the OpenAI-compatible entry that one tenant may have in flight.
    tenant_share: usize,
    /// The free part of [`Config::receive_budget`].
    pub receive: Budget,
    /// The free part of [`Config::reply_budget`].
    pub replies: Budget,
}

impl Admission {
    /// `uid` is the user that this process runs as.
    pub fn new(config: Config, uid: u32) -> Self {
        let (receive, replies) = (Budget::new(config.receive_budget), Budget::new(config.reply_budget));
        Self {
            live: ArcSwap::from_pointee(Live::new(config, uid, receive, replies)),
            uid,
            connections: Arc::default(),
            in_flight: Arc::default(),
            of_tenants: Arc::default(),
        }
    }

    /// The current settings. Callers read them at each use, so that a reload takes effect.
    pub fn settings(&self) -> Guard<Arc<Live>> {
        self.live.load()
    }

    /// Replaces the settings. Shares of a resized budget stay valid until they are returned.
    pub fn reload(&self, config: Config) {
        let before = self.live.load();
        let receive = before.receive.resized(config.receive_budget);
        let replies = before.replies.resized(config.reply_budget);
        self.live.store(Arc::new(Live::new(config, self.uid, receive, replies)));
    }

    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Whether this user may use the gateway.
    pub fn admits(&self, uid: u32) -> bool {
        uid == 0 || uid == self.uid || self.settings().allowed_uids.contains(&uid)
    }

    /// Takes a permit for one request of this user. The error names the limit that is reached.
    pub fn request(&self, uid: u32) -> Result<Permit, Full> {
        let settings = self.settings();
        self.in_flight.take(uid, settings.max_in_flight, settings.share)
    }

    /// Takes permits for one request of this tenant over HTTP, which counts as the user that this process runs as.
    pub fn request_of_tenant(&self, tenant: &Arc<str>) -> Result<(Permit, Permit<Arc<str>>), Full> {
        let settings = self.settings();
        let of_tenant = self
            .of_tenants
            .take(tenant.clone(), settings.max_in_flight, settings.tenant_share)?;
        Ok((self.request(self.uid)?, of_tenant))
    }

    /// Takes a permit for one connection of this user. The error names the limit that is reached.
    pub fn connection(&self, uid: u32) -> Result<Permit, Full> {
        let settings = self.settings();
        self.connections
            .take(uid, settings.max_connections, settings.connection_share)
    }

    pub fn requests_held(&self) -> u64 {
        self.in_flight.held()
    }

    pub fn connections_held(&self) -> u64 {
        self.connections.held()
    }
}

impl Live {
    fn new(config: Config, uid: u32, receive: Budget, replies: Budget) -> Self {
        let keys = Keys::new(&config);
        let tenant_share = config
            .max_in_flight_per_tenant
            .unwrap_or(config.max_in_flight / keys.tenants().max(1));
        Self {
            keys,
            tenant_share: tenant_share.max(1),
            share: config.share(config.max_in_flight, config.max_in_flight_per_user, uid),
            connection_share: config.share(config.max_connections, config.max_connections_per_user, uid),
            receive,
            replies,
            config,
        }
    }
}

impl std::ops::Deref for Live {
    type Target = Config;

    fn deref(&self) -> &Config {
        &self.config
    }
}

impl Config {
    /// Whether the user may act for this tenant: root for every tenant, other users only for those of their own.
    pub(crate) fn may_act_for(&self, uid: u32, tenant: &str) -> bool {
        if uid == 0 {
            return true;
        }
        if self.tenants.is_empty() {
            return tenant == DEFAULT_TENANT;
        }
        let mut own = self.tenants.get(&uid).into_iter().flatten();
        own.any(|own| own == "*" || own == tenant)
    }

    /// The tenants to search for a task, in order, when the user names none: `default` first if the user may act for
    /// it, because submits without a tenant go there; then the user's other tenants in the order of the settings.
    pub(crate) fn tenants_of(&self, uid: u32) -> Vec<String> {
        if uid == 0 || self.tenants.is_empty() {
            return vec![DEFAULT_TENANT.into()];
        }

        let own = self.tenants.get(&uid).into_iter().flatten();
        let others = own
            .filter(|tenant| !["*", DEFAULT_TENANT].contains(&tenant.as_str()))
            .cloned();
        let default = self
            .may_act_for(uid, DEFAULT_TENANT)
            .then(|| DEFAULT_TENANT.to_string());
        default.into_iter().chain(others).collect()
    }

    /// One user's share of the limit `all`: `set`, or an equal share for each user who may connect, root aside. `own`
    /// is the user that this process runs as.
    fn share(&self, all: usize, set: Option<usize>, own: u32) -> usize {
        let others: BTreeSet<u32> = self
            .allowed_uids
            .iter()
            .copied()
            .filter(|uid| ![0, own].contains(uid))
            .collect();
        let equal = (all / (1 + others.len())).max(1);
        set.unwrap_or(equal).min(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_who_may_connect_has_an_equal_share() {
        let share = |all, allowed_uids: &[u32], set| {
            Config { allowed_uids: allowed_uids.to_vec(), ..Config::default() }.share(all, set, 999)
        };
        assert_eq!(share(1000, &[], None), 1000, "no other user may connect");
        assert_eq!(share(1000, &[0, 999], None), 1000, "root and the gateway's own user get no separate share");
        assert_eq!(share(1000, &[1000], None), 500);
        assert_eq!(share(1000, &[1000, 1001, 1000], None), 333);
        assert_eq!(share(2, &[1000, 1001, 1002], None), 1);
        assert_eq!((share(1000, &[1000], Some(700)), share(10, &[], Some(700))), (700, 10));
    }

    #[test]
    fn user_at_its_share_of_connections_leaves_the_rest_to_others() {
        const OWN: u32 = 999;
        let config = Config { max_connections: 4, allowed_uids: vec![70_001], ..Config::default() };
        let admission = Admission::new(config.clone(), OWN);
        let greedy = [(); 2].map(|()| admission.connection(70_001).unwrap());
        assert_eq!(admission.connection(70_001).unwrap_err(), Full::User);
        let own = [(); 2].map(|()| admission.connection(OWN).unwrap());
        assert_eq!(admission.connection(70_001).unwrap_err(), Full::All);

        drop((greedy, own));
        admission.reload(Config { max_connections_per_user: Some(1), ..config });
        let _one = admission.connection(70_001).unwrap();
        assert_eq!(admission.connection(70_001).unwrap_err(), Full::User);
    }

    #[test]
    fn user_speaks_only_for_its_own_tenants() {
        let mut config = Config::default();
        let may = |config: &Config, uid, tenant| config.may_act_for(uid, tenant);
        assert!(may(&config, 0, "acme") && may(&config, 1000, "default") && !may(&config, 1000, "acme"));

        config.tenants = [(1000, vec!["acme".into(), "beta".into()]), (1001, vec!["*".into()])].into();
        assert!(may(&config, 1000, "acme") && may(&config, 1000, "beta") && !may(&config, 1000, "default"));
        assert!(may(&config, 1001, "anything") && !may(&config, 1002, "default") && may(&config, 0, "acme"));
    }

    #[test]
    fn lookup_without_a_tenant_covers_the_tenants_of_the_user() {
        let mut config = Config::default();
        assert_eq!((config.tenants_of(0), config.tenants_of(1000)), (vec!["default".into()], vec!["default".into()]));

        config.tenants = [(1000, vec!["acme".into(), "beta".into()]), (1001, vec!["acme".into(), "*".into()])].into();
        assert_eq!(config.tenants_of(0), ["default"]);
        assert_eq!(config.tenants_of(1000), ["acme", "beta"]);
        assert_eq!(config.tenants_of(1001), ["default", "acme"]);
        assert_eq!(config.tenants_of(1002), [""; 0]);

        config.tenants.insert(1003, vec!["acme".into(), "default".into()]);
        assert_eq!(config.tenants_of(1003), ["default", "acme"], "submits without a tenant go to `default`");
    }
}
