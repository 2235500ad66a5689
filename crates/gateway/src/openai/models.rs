//! The models of a tenant: the policies that it may name, its own and those of the tenant `default`.

use super::refusal::Refusal;
use crate::Gateway;
use crate::failure::Failure;
use serde::Serialize;
use std::collections::BTreeMap;
use wire::policy::Index;
use wire::router::DEFAULT_TENANT;
use wire::subjects::{BUCKET_POLICIES, POLICIES_INDEX};

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Debug, Serialize, PartialEq, Eq)]
struct Model {
    id: String,
    object: &'static str,
    /// When its policy was read, in seconds since the epoch.
    created: u64,
    /// The tenant whose policy it is.
    owned_by: String,
}

pub async fn list(gateway: &Gateway, tenant: &str) -> Result<Vec<u8>, Refusal> {
    let data = models(gateway, tenant).await?;
    Ok(serde_json::to_vec(&List { object: "list", data }).expect("a list of models serializes to JSON"))
}

pub async fn show(gateway: &Gateway, tenant: &str, model: &str) -> Result<Vec<u8>, Refusal> {
    let models = models(gateway, tenant).await?;
    let found = models.into_iter().find(|known| known.id == model);
    let found = found.ok_or_else(|| Refusal::unknown_model(model))?;
    Ok(serde_json::to_vec(&found).expect("a model serializes to JSON"))
}

/// Reads the index that the routers keep of their policies.
async fn models(gateway: &Gateway, tenant: &str) -> Result<Vec<Model>, Refusal> {
    let stored = gateway
        .bus
        .kv_get(BUCKET_POLICIES, POLICIES_INDEX)
        .await
        .map_err(Failure::from)?;
    let Some((bytes, _)) = stored else {
        return Ok(of(None, tenant));
    };
    let index = serde_json::from_slice(&bytes)
        .map_err(|error| Refusal::internal(format!("the index of policies cannot be read: {}", wire::unfit(&error))))?;
    Ok(of(Some(&index), tenant))
}

/// Without an index there has never been a policy directory, and the built-in policy serves.
fn of(index: Option<&Index>, tenant: &str) -> Vec<Model> {
    let model = |id: &str, owner: &str, at_ms: u64| Model {
        id: id.into(),
        object: "model",
        created: at_ms / 1000,
        owned_by: owner.into(),
    };
    let Some(index) = index else {
        return vec![model("default", DEFAULT_TENANT, 0)];
    };

    // The tenant's own policies come last, because they replace those of the same name.
    let mut models = BTreeMap::new();
    for owner in [DEFAULT_TENANT, tenant] {
        for (name, entry) in &index.policies {
            let Some((named, policy)) = name.split_once('/') else {
                continue;
            };
            if named == owner && !entry.deleted && !entry.hash.is_empty() {
                models.insert(policy.to_string(), model(policy, owner, entry.at_ms));
            }
        }
    }
    models.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::policy::Entry;

    #[test]
    fn models_are_the_policies_that_the_tenant_may_name() {
        let entry = |hash: &str, at_ms, deleted| Entry { hash: hash.into(), at_ms, deleted };
        let policies = [
            ("default/default", entry("1", 1000, false)),
            ("default/big", entry("2", 2000, false)),
            ("acme/big", entry("3", 3000, false)),
            ("acme/gone", entry("", 4000, true)),
            ("acme/never-usable", entry("", 4000, false)),
            ("beta/secret", entry("5", 5000, false)),
        ];
        let index = Index { policies: policies.map(|(name, entry)| (name.to_string(), entry)).into() };
        let names = |index, tenant| {
            let models = of(index, tenant);
            models
                .into_iter()
                .map(|model| (model.id, model.owned_by, model.created))
                .collect::<Vec<_>>()
        };
        let own = |name: &str, tenant: &str, created| (name.to_string(), tenant.to_string(), created);
        assert_eq!(names(Some(&index), "acme"), [own("big", "acme", 3), own("default", "default", 1)]);
        assert_eq!(names(Some(&index), "default"), [own("big", "default", 2), own("default", "default", 1)]);
        let empty = Index::default();
        assert_eq!(names(Some(&empty), "acme"), []);
        assert_eq!(names(None, "acme"), [own("default", "default", 0)]);
    }
}
