//! Policy files while the router runs.

use crate::{Router, SOON, request};
use serde_json::json;

const A: &str = r#"{"version": "a", "providers": [{"name": "a", "weight": 1}]}"#;

async fn serves(router: &Router, version: &str) -> bool {
    router.decide(&request("r")).await["decision"]["policy_version"] == version
}

#[tokio::test]
async fn a_changed_file_serves_and_a_bad_one_does_not() {
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
        (&" ".repeat(1024 * 1024 + 1), "more than a policy may"),
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
    assert_eq!(status["policies"], json!([{"tenant": "default", "policy": "default", "version": "a", "error": null}]));
}

#[tokio::test]
async fn a_tenants_own_file_serves_it_alone_and_comes_and_goes() {
    let router = Router::local().await;
    assert!(serves(&router, "built-in").await);
    router.policy("acme/default.yaml", "version: mine\nproviders:\n  - {name: a, weight: 1}\n");
    testkit::eventually(SOON, || serves(&router, "mine")).await;
    let other = crate::changed(request("r"), json!({"tenant_id": "other"}));
    assert_eq!(router.decide(&other).await["decision"]["policy_version"], "built-in");
    std::fs::remove_file(router.dir.path().join("policies/acme/default.yaml")).unwrap();
    testkit::eventually(SOON, || serves(&router, "built-in")).await;
}

#[tokio::test]
async fn a_router_starts_beside_a_bad_file() {
    let router = Router::with_policies(&[("default/default.toml", "providers = 7"), ("acme/x.json", A)]).await;
    assert!(serves(&router, "built-in").await);
    let status = router.status(|_| true).await;
    let broken = &status["policies"][1];
    assert!(broken["error"].as_str().unwrap().contains("default.toml:1: "), "{status}");
    assert_eq!(status["policies"][0]["version"], "a");
}
