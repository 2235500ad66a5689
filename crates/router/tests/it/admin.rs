//! The subjects for operators: who may ask, and what they learn.

use crate::{OPERATOR_SECRET, Router, changed, operator, request, token};
use bus::Headers;
use serde_json::{Value, json};
use wire::subjects;

const ADMIN: [&str; 4] = [
    subjects::ADMIN_BREAKERS,
    subjects::ADMIN_EXTENSIONS,
    subjects::ADMIN_DRY_RUN,
    subjects::ADMIN_COMPLEXITY,
];

async fn ask(router: &Router, subject: &str, authorization: &str) -> Value {
    let headers = Headers::new().with("Authorization", authorization);
    router
        .ask_bytes(subject, headers, request("r").to_string().into())
        .await
}

pub async fn operators_only(router: Router) {
    let now = bus::clock::unix_seconds();
    let claims = json!({"sub": "ann", "aud": "beamline-operator", "role": "admin", "iat": now, "exp": now + 60});
    let signed = |fields: Value| token(OPERATOR_SECRET, &changed(claims.clone(), fields));
    let mut without_exp = claims.clone();
    without_exp.as_object_mut().unwrap().remove("exp");
    let unsigned = format!("eyJhbGciOiJub25lIn0.{}.", signed(json!({})).split('.').nth(1).unwrap());

    for subject in ADMIN {
        let refused = router.ask(subject, &request("r")).await;
        assert_eq!((&refused["ok"], &refused["error"]["code"]), (&json!(false), &json!("unauthorized")), "{refused}");
        assert!(
            refused["error"]["message"]
                .as_str()
                .unwrap()
                .contains("beamline operator-token"),
            "{refused}"
        );

        for (name, credentials) in [
            ("nothing", String::new()),
            ("no scheme", signed(json!({}))),
            ("another scheme", format!("Basic {}", signed(json!({})))),
            ("no token", "Bearer ".into()),
            ("another secret", format!("Bearer {}", token("another secret of 32 characters.", &claims))),
            ("without signature", format!("Bearer {unsigned}")),
            ("expired", format!("Bearer {}", signed(json!({"exp": now - 1})))),
            ("for ever", format!("Bearer {}", token(OPERATOR_SECRET, &without_exp))),
            ("for something else", format!("Bearer {}", signed(json!({"aud": "beamline"})))),
            ("no such role", format!("Bearer {}", signed(json!({"role": "root"})))),
            ("huge", format!("Bearer {}", "x".repeat(100_000))),
        ] {
            let refused = ask(&router, subject, &credentials).await;
            assert_eq!(refused["error"]["code"], "unauthorized", "{name}: {refused}");
        }
        for role in ["viewer", "operator", "admin"] {
            let answer = ask(&router, subject, &format!("bearer {}", operator(role))).await;
            let may = role != "viewer" || subject != subjects::ADMIN_DRY_RUN;
            assert_eq!(answer["success"] == true, may, "{role} {subject}: {answer}");
            let message = "the role viewer may not do this; operator may";
            assert!(may || answer["error"] == json!({"code": "forbidden", "message": message}), "{answer}");
        }
    }
}

#[tokio::test]
async fn without_a_secret_nobody_is_an_operator() {
    let dir = tempfile::tempdir().unwrap();
    let bus = crate::open(dir.path()).await;
    let bound = router::bind(router::Config::default(), bus.clone()).await.unwrap();
    let cancel = tokio_util::sync::CancellationToken::new();
    let running = tokio::spawn(bound.run(cancel.clone()));

    let claims = json!({"sub": "a", "aud": "beamline-operator", "role": "admin", "iat": 0, "exp": 9_999_999_999_u64});
    let headers = Headers::new().with("authorization", format!("Bearer {}", token("", &claims)));
    let answer = bus
        .request(subjects::ADMIN_BREAKERS, headers, "{}".into(), crate::SOON)
        .await
        .unwrap();
    let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!(answer["error"]["code"], "unauthorized");
    cancel.cancel();
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn extensions_are_an_empty_list() {
    let router = Router::local().await;
    let answer = router.ask_as("viewer", subjects::ADMIN_EXTENSIONS, &json!({})).await;
    assert_eq!(answer, json!({"data": {"extensions": []}, "success": true}));
}

#[tokio::test]
async fn dry_run_decides_as_in_earnest_and_leaves_no_trace() {
    let rules = r#"{"version": "7", "providers": [{"name": "a", "weight": 50}, {"name": "b", "weight": 50}],
        "rules": [{"when": "metadata.n / 0 > 1", "to": "a"}]}"#;
    let router = Router::with_policies(&[("acme/default.json", rules)]).await;
    let dry = |asked: Value| {
        let router = &router;
        async move { router.ask_as("operator", subjects::ADMIN_DRY_RUN, &asked).await }
    };

    for n in 0..20 {
        let asked = changed(
            request(&format!("r{n}")),
            json!({"metadata": {"n": 1}, "push_assignment": true, "idempotency_key": "k"}),
        );
        let tried = dry(asked).await;
        let earnest = router
            .decide(&changed(request(&format!("r{n}")), json!({"metadata": {"n": 2}})))
            .await;
        assert_eq!(tried["data"], json!({"decision": earnest["decision"]}), "{tried}");
    }
    let status = router.status(|status| status["decisions_total"] == 20).await;
    assert_eq!(status["policies"][0]["rule_errors"][0]["count"], 20, "those in earnest only: {status}");
    assert_eq!(router.bus.stream_info(subjects::STREAM_ASSIGN).await.unwrap().messages, 0);
    assert!(
        router
            .bus
            .kv_get(subjects::BUCKET_KEYS, "acme/k")
            .await
            .unwrap()
            .is_none()
    );

    let undecided = dry(changed(request("r"), json!({"policy_id": "none"}))).await;
    assert_eq!(
        (&undecided["success"], &undecided["data"]["error"]["code"]),
        (&json!(true), &json!("policy_not_found"))
    );
    let invalid = dry(json!({"version": "1"})).await;
    assert_eq!(invalid["error"]["intake_error_code"], "SCHEMA_VALIDATION_FAILED", "{invalid}");
}

#[tokio::test]
async fn complexity_names_the_policy_that_serves_and_its_limits() {
    let rules = r#"{"version": "7", "providers": [{"name": "a", "weight": 50}, {"name": "b"}],
        "rules": [{"when": "task.type == 'x' && metadata.n > 1", "to": "a"}, {"when": {"lang": ["go"]}, "to": "b"}]}"#;
    let router = Router::with_policies(&[("default/default.json", rules)]).await;
    let ask = |query: Value| {
        let router = &router;
        async move { router.ask_as("viewer", subjects::ADMIN_COMPLEXITY, &query).await }
    };

    let answer = ask(json!({"tenant_id": "acme"})).await;
    let steps = answer["data"]["condition_steps"].as_u64().unwrap();
    assert!((5..50).contains(&steps), "{answer}");
    let expected = json!({"policy_tenant": "default", "policy_id": "default", "policy_version": "7", "providers": 2,
        "rules": 2, "rules_max": 500, "condition_steps": steps, "condition_steps_max": 100_000, "extensions": 0});
    assert_eq!(answer, json!({"data": expected, "success": true}));

    for (query, code) in [
        (json!({"policy_id": "none"}), "policy_not_found"),
        (json!({"tenant_id": "a/b"}), "invalid_request"),
        (json!({"policy_id": 7}), "invalid_request"),
        (json!({"policy_id": ""}), "invalid_request"),
    ] {
        assert_eq!(ask(query.clone()).await["error"]["code"], code, "{query}");
    }
}
