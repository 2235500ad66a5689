//! Discovery: what tools of NATS see of the routers.

use crate::{Router, SOON, changed, push, request};
use bus::Message;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tempfile::TempDir;
use wire::policy::CircuitBreaker;
use wire::subjects;

const INBOX: &str = "tool.inbox";

/// All answers to a question, of which at least `count` must come.
async fn answers(router: &Router, subject: &str, count: usize) -> Vec<Value> {
    let mut inbox = router.bus.subscribe(INBOX, None, 64).await.unwrap();
    let asked = Message { subject: subject.into(), reply: Some(INBOX.into()), ..Message::default() };
    router.bus.publish(asked).await.unwrap();

    let mut answers = Vec::new();
    for _ in 0..count {
        let answer = tokio::time::timeout(SOON, inbox.next())
            .await
            .expect("an answer")
            .unwrap();
        answers.push(serde_json::from_slice(&answer.payload).unwrap());
    }
    answers
}

fn endpoint<'a>(stats: &'a Value, name: &str) -> &'a Value {
    let endpoints = stats["endpoints"].as_array().unwrap();
    endpoints.iter().find(|endpoint| endpoint["name"] == name).unwrap()
}

pub async fn tools_find_every_router_and_its_counts(router: Router) {
    for (asked, ok) in [
        (request("r1"), true),
        (push("r2"), true),
        (changed(request("r3"), json!({"policy_id": "none"})), false),
        (json!({}), false),
    ] {
        assert_eq!(router.decide(&asked).await["ok"], ok);
    }
    router.task("r2").await;
    router.task("nobody's").await;
    router.ask(subjects::ADMIN_BREAKERS, &json!({})).await;

    let [stats] = &answers(&router, "$SRV.STATS.beamline-router", 1).await[..] else {
        unreachable!("one router runs")
    };
    let id = stats["id"].as_str().unwrap();
    let who = json!({"name": "beamline-router", "id": id, "version": env!("CARGO_PKG_VERSION"), "metadata": {}});
    assert_eq!(stats["type"], "io.nats.micro.v1.stats_response");
    assert!(stats["started"].as_str().unwrap().ends_with('Z'), "{stats}");
    for (name, requests, errors, last_error) in [
        ("decide", 4, 2, "400:invalid_request"),
        ("decide_v2", 0, 0, ""),
        ("get_decision", 2, 1, "404:not_found"),
        ("cancel", 0, 0, ""),
        ("get_circuit_breaker_states", 1, 1, "401:unauthorized"),
    ] {
        let counts = endpoint(stats, name);
        let counted = (&counts["num_requests"], &counts["num_errors"], &counts["last_error"]);
        assert_eq!(counted, (&json!(requests), &json!(errors), &json!(last_error)), "{name}");
        let (total, average) = (counts["processing_time"].as_u64().unwrap(), &counts["average_processing_time"]);
        assert_eq!(average, &json!(total.checked_div(requests).unwrap_or(0)), "{name}");
        assert_eq!(total > 0, requests > 0, "{name}");
    }

    let expected = |kind: &str| changed(who.clone(), json!({"type": kind}));
    for subject in ["$SRV.PING", "$SRV.PING.beamline-router", &format!("$SRV.PING.beamline-router.{id}")] {
        assert_eq!(answers(&router, subject, 1).await, [expected("io.nats.micro.v1.ping_response")], "{subject}");
    }

    let info = answers(&router, &format!("$SRV.INFO.beamline-router.{id}"), 1)
        .await
        .remove(0);
    for (name, value) in expected("io.nats.micro.v1.info_response").as_object().unwrap() {
        assert_eq!(&info[name], value, "{info}");
    }
    assert_eq!(
        endpoint(&info, "decide"),
        &json!({"name": "decide", "subject": subjects::DECIDE, "queue_group": subjects::DECIDE_GROUP, "metadata": {}})
    );
    let listed = |answer: &Value| -> BTreeSet<String> {
        let endpoints = answer["endpoints"].as_array().unwrap().iter();
        endpoints
            .map(|endpoint| endpoint["subject"].as_str().unwrap().to_string())
            .collect()
    };
    assert_eq!(listed(&info), listed(stats));
    assert_eq!(listed(&info).len(), 10);

    let beside = Router::beside(TempDir::new().unwrap(), router.bus.clone(), CircuitBreaker::default()).await;
    let ids: BTreeSet<String> = answers(&router, "$SRV.PING", 2)
        .await
        .iter()
        .map(|answer| answer["id"].as_str().unwrap().to_string())
        .collect();
    assert_eq!(ids.len(), 2, "each router answers");
    beside.stop().await;
}

#[tokio::test]
async fn router_that_may_not_be_discovered_serves_all_the_same() {
    let users = r#"{user: r, password: p, permissions: {subscribe: {deny: ["$SRV.>"]}}}, {user: tool, password: t}"#;
    let server = testkit::NatsServer::start_with(&format!("authorization {{ users: [{users}] }}")).await;
    let connect = async |user: &str, password: &str| {
        let (user, password) = (Some(user.to_string()), Some(password.to_string()));
        let config = bus::nats::NatsConfig { url: server.url(), user, password, ..Default::default() };
        bus::nats::Nats::connect(config).await.unwrap()
    };
    let router = Router::beside(TempDir::new().unwrap(), connect("r", "p").await, CircuitBreaker::default()).await;
    for n in 0..20 {
        assert_eq!(router.decide(&push(&format!("r{n}"))).await["ok"], true);
    }

    let tool = connect("tool", "t").await;
    let asked = tool.request("$SRV.PING", bus::Headers::new(), "".into(), SOON).await;
    assert!(matches!(asked, Err(bus::Error::NoResponders(_))), "{asked:?}");
    router.stop().await;
}
