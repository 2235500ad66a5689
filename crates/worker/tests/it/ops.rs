//! The ops provider: questions about the deployment, answered from the status messages of its parts.

use crate::{Place, SOON, chunk};
use bus::Message;
use serde_json::{Value, json};
use wire::subjects;
use worker::Config;

async fn say(place: &Place, subject: &str, status: Value) {
    let payload = status.to_string().into();
    place
        .bus
        .publish(Message { subject: subject.into(), payload, ..Message::default() })
        .await
        .unwrap();
}

/// Publishes the status of a node, a router and a gateway, and an invalid node status.
async fn deployment(place: &Place) {
    let node = json!({"node": "n1", "address": "127.0.0.1:8000", "connections": 41, "users": 17, "channels": 5,
        "deliveries_total": 99, "rss_bytes": 52_428_800, "uptime_s": 3700});
    say(place, subjects::NODE_STATUS, node).await;

    let router = json!({"router": "ro1", "decisions_total": 1234, "decide_us": {"p50": 4.0, "p99": 21.0},
        "breakers": [{"provider": "big", "state": "open"}, {"provider": "fast", "state": "closed"}]});
    say(place, subjects::ROUTER_STATUS, router).await;
    say(place, subjects::GATEWAY_STATUS, json!({"gateway": "g1", "requests_total": 77})).await;
    say(place, subjects::NODE_STATUS, json!("nonsense")).await;
}

async fn ask(place: &Place, id: &str, payload: Value) -> String {
    let mut results = place.results().await;
    place.assign(id, "ops", payload).await;
    let result = results.next().await;
    result.output.expect("an answer").value()["text"]
        .as_str()
        .unwrap()
        .into()
}

#[tokio::test]
async fn questions_are_answered_from_live_numbers() {
    let place = Place::local().await;
    let _worker = place.worker(Config::default()).await;

    // Repeat until the answer includes the worker itself and the other parts of the deployment.
    testkit::eventually(SOON, || async {
        deployment(&place).await;
        let id = uuid::Uuid::now_v7().to_string();
        let answer = ask(&place, &id, json!({"prompt": "status"})).await;
        answer.contains("1 node ")
            && answer.contains("1 worker ")
            && answer.contains("1 router")
            && answer.contains("1 gateway")
    })
    .await;

    for (n, (prompt, expected)) in [
        (
            "status",
            vec![
                "41 open connections",
                "99 deliveries",
                "1234 decisions",
                "4 µs at p50, 21 µs at p99",
                "77 requests",
                "big (open)",
            ],
        ),
        ("How are the nodes?", vec!["| n1 | 127.0.0.1:8000 | 41 | 17 | 5 | 50 MiB | 1 h 1 min |"]),
        ("which providers are there", vec!["| echo | echo | ", "| ops | ops | "]),
        ("help", vec!["`status`", "`nodes`", "`providers`", "`who`"]),
        ("who", vec!["Ask me in a room"]),
        ("tell me a joke", vec!["connect a model", "`help`"]),
    ]
    .into_iter()
    .enumerate()
    {
        deployment(&place).await;
        let answer = ask(&place, &format!("q{n}"), json!({"prompt": prompt})).await;
        for part in expected {
            assert!(answer.contains(part), "{prompt}: {answer}");
        }
    }
}

#[tokio::test]
async fn who_lists_the_rooms_presence() {
    let place = Place::local().await;
    let _worker = place.worker(Config::default()).await;
    let asked = json!({"prompt": "who is here?", "room": "lobby"});
    let nobody_to_ask = ask(&place, "q1", asked.clone()).await;
    assert!(nobody_to_ask.contains("cannot see who is here"), "{nobody_to_ask}");

    let mut requests = place.bus.subscribe(subjects::CHANNELS_PRESENCE, None, 8).await.unwrap();
    let bus = place.bus.clone();
    tokio::spawn(async move {
        let mut answers = [
            json!({"ok": true, "result": {"presence": {"c1": {"client": "c1", "user": "zoe"}, "c2": {"client": "c2", "user": "ann"}, "c3": {"client": "c3", "user": "zoe"}}}}),
            json!({"ok": false, "error": {"code": 108, "message": "not available"}}),
            json!("nonsense"),
        ]
        .into_iter();
        while let (Some(request), Some(answer)) = (requests.next().await, answers.next()) {
            let asked: Value = serde_json::from_slice(&request.payload).unwrap();
            assert_eq!(asked, json!({"channel": "chat:lobby"}));
            let (subject, payload) = (request.reply.unwrap(), answer.to_string().into());
            bus.publish(Message { subject, payload, ..Message::default() })
                .await
                .unwrap();
        }
    });

    assert_eq!(ask(&place, "q2", asked.clone()).await, "In this room now: ann, zoe.\n");
    assert!(
        ask(&place, "q3", asked.clone())
            .await
            .contains("cannot see who is here: not available")
    );
    assert!(ask(&place, "q4", asked).await.contains("cannot see who is here"));
}

#[tokio::test]
async fn ops_answers_are_streamed_line_by_line() {
    let place = Place::local().await;
    let _worker = place.worker(Config::default()).await;
    let mut output = place.output("q").await;
    let answer = ask(&place, "q", json!({"prompt": "help"})).await;

    let mut streamed = String::new();
    while streamed.len() < answer.len() {
        let piece = chunk(&mut output).await.data.string().unwrap();
        assert!(piece.ends_with('\n') && piece.lines().count() == 1, "{piece:?}");
        streamed.push_str(&piece);
    }
    assert_eq!(streamed, answer);
}
