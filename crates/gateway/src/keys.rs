//! The keys of the OpenAI-compatible entry, and whose they are.

use crate::Config;
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use wire::router::DEFAULT_TENANT;

/// Keys by their hash, so that the time of a look-up says nothing about them.
pub struct Keys(HashMap<[u8; 32], Arc<str>>);

impl Keys {
    pub fn new(config: &Config) -> Self {
        let others = config.tenant_keys.iter().map(|(key, tenant)| (key, tenant.as_str()));
        let keys = others.chain([(&config.api_key, DEFAULT_TENANT)]);
        let set = keys.filter(|(key, _)| !key.is_empty());
        Self(set.map(|(key, tenant)| (hash(key), tenant.into())).collect())
    }

    /// The tenant of this key.
    pub fn tenant(&self, key: &str) -> Option<Arc<str>> {
        self.0.get(&hash(key)).cloned()
    }

    /// How many tenants have keys.
    pub fn tenants(&self) -> usize {
        self.0.values().collect::<HashSet<_>>().len()
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_has_one_tenant_and_the_servers_own_is_of_the_default_one() {
        let tenant_keys = ["a1", "a2", ""].map(|key| (key.to_string(), "acme".to_string()));
        let config = Config { tenant_keys: tenant_keys.into(), ..Config::default() };
        let keys = Keys::new(&config);
        let tenant = |keys: &Keys, key: &str| keys.tenant(key).map(|tenant| tenant.to_string());
        assert_eq!((tenant(&keys, "a1"), tenant(&keys, "a2")), (Some("acme".into()), Some("acme".into())));
        assert_eq!((tenant(&keys, ""), tenant(&keys, "a"), keys.tenants()), (None, None, 1));

        let keys = Keys::new(&Config { api_key: "own".into(), ..config });
        assert_eq!((tenant(&keys, "own"), tenant(&keys, ""), keys.tenants()), (Some("default".into()), None, 2));
    }
}
