//! Policy files while the router runs.

use crate::{Router, SOON, request};
use serde_json::json;
use wire::policy::CircuitBreaker;

const A: &str = r#"{"version": "a", "providers": [{"name": "a", "weight": 1}]}"#;

async fn serves(router: &Router, version: &str) -> bool {
    router.decide(&request("r")).await["decision"]["policy_version"] == version
}

#[tokio::test]
async fn changed_file_serves_and_a_bad_one_does_not() {
    let router = Router::with_policies(&[("default/default.json", A)]).await;
    assert!(serves(&router, "a").await);
    router.policy("default/default.json", &A.replace("\"a\"", "\"b2\""));
    testkit::eventually(SOON, || serves(&router, "b2")).await;

    let unclosed = format!("{{\"providers\": {}", "[".repeat(50_000));
    let deep = "(".repeat(20_000) + "true" + &")".repeat(20_000);
    let deep = json!({"providers": [{"name": "a", "weight": 1}], "rules": [{"when": deep, "to": "a"}]}).to_string();
    for (bad, expected) in [
        ("{", "default.json:1: "),
        ("", "default.json:1: "),
        ("{\n\"providers\": [{\"name\": \"a\", \"weight\": 101}]}", "default.json:2: providers[0].weight"),
        ("{\n\n\"provider\": []}", "default.json:3: unknown field"),
        ("{\"providers\": []}", "default.json:1: providers"),
        (&unclosed, "default.json:1: "),
        (&deep, "default.json:1: rules[0].when"),
        (&" ".repeat(1024 * 1024 + 1), "a policy may have"),
    ] {
        router.policy("default/default.json", bad);
        let shown = |status: &serde_json::Value| {
            let error = status["policies"][0]["error"].as_str().unwrap_or_default();
            error.contains(expected)
        };
        let status = router.status(shown).await;
        assert_eq!(status["policies"][0]["version"], "b2", "{bad:.40}");
        assert!(serves(&router, "b2").await, "{bad:.40}");
    }

    router.policy("default/default.json", A);
    testkit::eventually(SOON, || serves(&router, "a")).await;
    let status = router.status(|status| status["policies"][0]["version"] == "a").await;
    assert_eq!(
        status["policies"],
        json!([{"tenant": "default", "policy": "default", "version": "a", "error": null}])
    );
}

#[tokio::test]
async fn tenants_own_policy_serves_that_tenant_only() {
    let router = Router::local().await;
    assert!(serves(&router, "built-in").await);
    router.policy("acme/default.yaml", &policy("mine"));
    testkit::eventually(SOON, || serves(&router, "mine")).await;

    // Once a policy directory exists, the built-in policy no longer applies to any tenant.
    assert_eq!(answer(&router, "other", "default").await, "policy_not_found");
    router.policy("default/default.yaml", &policy("all"));
    testkit::eventually(SOON, async || answer(&router, "other", "default").await == "all").await;
    assert_eq!(answer(&router, "acme", "default").await, "mine");
}

#[tokio::test]
async fn policy_that_was_never_usable_is_refused_by_name() {
    let router = Router::with_policies(&[
        ("default/default.json", A),
        ("acme/default.toml", "providers = 7"),
        ("twice/default.json", A),
        ("twice/default.yaml", &policy("b")),
    ])
    .await;
    assert_eq!(answer(&router, "other", "default").await, "a");
    for (tenant, expected) in [
        ("acme", "policy \"acme/default\" cannot be used: acme/default.toml:1: "),
        (
            "twice",
            "policy \"twice/default\" cannot be used: policy twice/default has several files (twice/default.json, ",
        ),
    ] {
        let refused = router.decide(&asking(tenant, "default")).await;
        assert_eq!(refused["error"]["code"], "decision_failed", "{refused}");
        let text = refused["error"]["message"].as_str().unwrap();
        assert!(text.starts_with(expected) && !text.contains(router.dir.path().to_str().unwrap()), "{text}");
    }

    let status = router.status(|_| true).await;
    assert!(
        status["policies"][0]["error"]
            .as_str()
            .unwrap()
            .contains("default.toml:1: "),
        "{status}"
    );

    std::fs::remove_file(router.dir.path().join("policies/twice/default.json")).unwrap();
    testkit::eventually(SOON, async || answer(&router, "twice", "default").await == "b").await;

    // After the only file of a policy is removed, no other policy replaces it.
    std::fs::remove_file(router.dir.path().join("policies/acme/default.toml")).unwrap();
    let gone = |status: &serde_json::Value| {
        status["policies"][0]["error"]
            .as_str()
            .is_some_and(|text| text.contains("never had"))
    };
    router.status(gone).await;
    assert_eq!(answer(&router, "acme", "default").await, "decision_failed");
}

#[tokio::test]
async fn requests_are_refused_while_the_directory_was_never_readable() {
    let dir = tempfile::tempdir().unwrap();
    crate::write(dir.path(), "default/default.json", A);

    // A symbolic link to itself exists but cannot be read.
    let locked = dir.path().join("policies/locked");
    std::os::unix::fs::symlink(&locked, &locked).unwrap();
    let router = Router::with(dir, None).await;
    assert_eq!(answer(&router, "locked", "default").await, "decision_failed");
    assert_eq!(answer(&router, "other", "default").await, "a");
}

#[tokio::test]
async fn failing_rule_is_counted_and_an_unknown_name_is_a_warning() {
    let rules = "providers:\n  - {name: a, weight: 1}\nrules:\n  - {when: \"task.type / 2 == 1\", to: a}\n  - {when: \"taks.type == 't'\", to: a}\n";
    let router = Router::with_policies(&[("acme/default.yaml", rules)]).await;
    for _ in 0..3 {
        assert_eq!(router.decide(&request("r")).await["decision"]["reason"], "weighted");
    }

    let status = router
        .status(|status| status["policies"][0]["rule_errors"][0]["count"] == 3)
        .await;
    let policy = &status["policies"][0];
    assert_eq!(policy["rule_errors"], json!([{"rule": 0, "count": 3, "last": "cannot div a string and a int"}]));
    let warning = policy["warnings"][0].as_str().unwrap();
    assert!(warning.starts_with("acme/default.yaml:5: rules[1].when: unknown variable \"taks\""), "{warning}");
    assert_eq!(policy["warnings"].as_array().unwrap().len(), 1, "{policy}");
}

pub async fn broken_policy_serves_its_last_good_version_after_a_restart(router: Router) {
    router.policy("default/default.json", &policy_json("all"));
    router.policy("acme/default.json", &policy_json("mine"));
    testkit::eventually(SOON, || serves(&router, "mine")).await;
    let router = router.restart().await;
    router.policy("acme/default.json", "{\n\"providers\": [{]}");
    let router = router.restart().await;
    assert_eq!(answer(&router, "acme", "default").await, "mine");
    let status = router.status(|_| true).await;
    let error = status["policies"][0]["error"].as_str().unwrap();
    assert!(
        error.starts_with("acme/default.json:2: ") && error.contains("the last good version, \"mine\" of "),
        "{error}"
    );

    router.policy("acme/default.json", &policy_json("mended"));
    testkit::eventually(SOON, || serves(&router, "mended")).await;
}

pub async fn policies_of_a_vanished_directory_serve_after_a_restart(router: Router) {
    router.policy("default/default.json", &policy_json("all"));
    router.policy("acme/default.json", &policy_json("mine"));
    router.policy("acme/other.json", &policy_json("other"));
    testkit::eventually(SOON, async || answer(&router, "acme", "other").await == "other").await;
    let all = [("acme", "default", "mine"), ("acme", "other", "other"), ("nobody", "default", "all")];
    let mut router = router;
    for vanished in ["policies/acme", "policies"] {
        let (path, aside) = (router.dir.path().join(vanished), router.dir.path().join("aside"));
        std::fs::rename(&path, &aside).unwrap();
        router
            .status(|status| {
                status["policies"][0]["error"]
                    .as_str()
                    .is_some_and(|e| e.contains("is gone"))
            })
            .await;
        for restart in [false, true] {
            if restart {
                router = router.restart().await;
            }
            for (tenant, policy, expected) in all {
                assert_eq!(answer(&router, tenant, policy).await, expected, "{vanished} {restart}");
            }
            assert_eq!(answer(&router, "nobody", "other").await, "policy_not_found");
        }
        std::fs::rename(router.dir.path().join("aside"), router.dir.path().join(vanished)).unwrap();
        router.status(|status| status["policies"][0]["error"].is_null()).await;
    }
}

pub async fn deleted_policy_stays_deleted_until_its_file_returns(router: Router) {
    router.policy("default/default.json", &policy_json("all"));
    router.policy("acme/default.json", &policy_json("mine"));
    testkit::eventually(SOON, || serves(&router, "mine")).await;
    delete(&router, "acme/default");
    testkit::eventually(SOON, || serves(&router, "all")).await;
    let router = router.restart().await;
    assert!(serves(&router, "all").await);

    router.policy("acme/default.json", &policy_json("mine"));
    testkit::eventually(SOON, || serves(&router, "mine")).await;

    // The tombstone of the earlier deletion does not apply to the policy stored since.
    std::fs::remove_file(router.dir.path().join("policies/acme/default.json")).unwrap();
    router
        .status(|status| {
            status["policies"][0]["error"]
                .as_str()
                .is_some_and(|e| e.contains("is gone"))
        })
        .await;
    let router = router.restart().await;
    assert!(serves(&router, "mine").await);
}

#[tokio::test]
async fn two_routers_share_versions_and_deletions() {
    let first = Router::nats().await;
    first.policy("default/default.json", &policy_json("all"));
    first.policy("acme/default.json", &policy_json("mine"));
    testkit::eventually(SOON, || serves(&first, "mine")).await;
    let url = first.server.as_ref().unwrap().url();
    let config = bus::nats::NatsConfig { url, name: "second".into(), ..Default::default() };
    let bus = bus::nats::Nats::connect(config).await.unwrap();

    // A router whose file is broken and one without a policy directory serve what the first router has stored.
    let dir = tempfile::tempdir().unwrap();
    crate::write(dir.path(), "acme/default.json", "{");
    let second = Router::beside(dir, bus.clone(), CircuitBreaker::default()).await;
    let third = Router::beside(tempfile::tempdir().unwrap(), bus.clone(), CircuitBreaker::default()).await;
    let serving = |version: &'static str| {
        let routers = [&first, &second, &third];
        async move {
            let mut seen = std::collections::BTreeMap::new();
            // Each router publishes the versions it serves once a second.
            let mut statuses = routers[0]
                .bus
                .subscribe(wire::subjects::ROUTER_STATUS, None, 64)
                .await
                .unwrap();
            while seen.len() < routers.len() || seen.values().any(|found| found != version) {
                let status = tokio::time::timeout(SOON, statuses.next())
                    .await
                    .expect("a status")
                    .unwrap();
                let status: serde_json::Value = serde_json::from_slice(&status.payload).unwrap();
                let policies = status["policies"].as_array().unwrap();
                let found = policies.iter().find(|policy| policy["tenant"] == "acme");
                let version = found.map_or("none", |policy| policy["version"].as_str().unwrap());
                seen.insert(status["router"].to_string(), version.to_string());
            }
        }
    };
    tokio::time::timeout(SOON, serving("mine"))
        .await
        .expect("all serve the stored version");

    // Running routers adopt the versions and deletions that another router stores.
    first.policy("acme/default.json", &policy_json("newer"));
    tokio::time::timeout(SOON, serving("newer"))
        .await
        .expect("all serve the newer version");

    std::fs::remove_file(second.dir.path().join("policies/acme/default.json")).unwrap();
    delete(&first, "acme/default");
    tokio::time::timeout(SOON, serving("none"))
        .await
        .expect("none serves the deleted policy");
    for _ in 0..12 {
        assert!(serves(&first, "all").await, "whichever router answers");
    }
}

fn delete(router: &Router, name: &str) {
    let deleted_ms = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_millis() as u64;
    let tombstone = wire::policy::Tombstone { deleted_ms, by: "test".into() };
    let name = router::PolicyName::parse(name).unwrap();
    let removed = router::delete_policy(&router.dir.path().join("policies"), &name, &tombstone).unwrap();
    assert_eq!(removed.len(), 1);
}

fn policy(version: &str) -> String {
    format!("version: {version}\nproviders:\n  - {{name: a, weight: 1}}\n")
}

fn policy_json(version: &str) -> String {
    json!({"version": version, "providers": [{"name": "a", "weight": 1}]}).to_string()
}

fn asking(tenant: &str, policy: &str) -> serde_json::Value {
    crate::changed(request("r"), json!({"tenant_id": tenant, "policy_id": policy}))
}

/// The version of the policy that decided, or the error code of the refusal.
async fn answer(router: &Router, tenant: &str, policy: &str) -> String {
    let answer = router.decide(&asking(tenant, policy)).await;
    let version = answer["decision"]["policy_version"].as_str();
    version.or(answer["error"]["code"].as_str()).unwrap().to_string()
}
