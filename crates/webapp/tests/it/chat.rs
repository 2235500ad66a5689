//! The chat. Acknowledged messages are durable, and every answer ends.

use crate::rig::{Home, Kind, PATIENCE, Rig, decided, router};
use bus::{Bus, Message};
use parking_lot::Mutex;
use rstest::rstest;
use serde_json::{Value, json};
use sqlx::{Connection, Executor};
use tokio_util::sync::CancellationToken;
use wire::subjects;

pub const ROOM: &str = "chat:general";

pub fn send(text: &str, nonce: &str) -> Value {
    json!({"room": "general", "text": text, "nonce": nonce})
}

fn ended(request_id: &str, status: &str, output: Value) -> Value {
    json!({
        "version": "1", "assignment_id": format!("a-{request_id}"), "request_id": request_id, "status": status,
        "provider_id": "ops", "job": {"type": "chat"}, "output": output,
    })
}

/// Sends a copy of the result to the web app that asked last.
pub async fn result(bus: &Bus, seen: &Mutex<Vec<bytes::Bytes>>, request_id: &str, status: &str, output: Value) {
    let asked = seen.lock().last().cloned().unwrap();
    let asked: Value = serde_json::from_slice(&asked).unwrap();
    let message = Message {
        subject: asked["result_subject"].as_str().unwrap().into(),
        payload: ended(request_id, status, output).to_string().into(),
        ..Message::default()
    };
    bus.publish(message).await.unwrap();
}

/// Answers looks at the record of every task with this state and result.
pub async fn records(bus: &Bus, status: &'static str) -> tokio::task::JoinHandle<()> {
    let mut looks = bus
        .subscribe(subjects::GET_DECISION, Some("records"), 64)
        .await
        .unwrap();
    let bus = bus.clone();
    tokio::spawn(async move {
        while let Some(look) = looks.next().await {
            let query: Value = serde_json::from_slice(&look.payload).unwrap();
            let (id, tenant) = (query["request_id"].as_str().unwrap(), &query["tenant_id"]);
            let task = json!({"task_id": id, "state": "completed", "tenant_id": tenant,
                "result": ended(id, status, json!("hello"))});
            let payload = json!({"ok": true, "task": task}).to_string().into();
            bus.publish(Message { subject: look.reply.unwrap(), payload, ..Message::default() })
                .await
                .unwrap();
        }
    })
}

async fn output(bus: &Bus, request_id: &str, attempt: u32, seq: u64, text: &str) {
    let chunk = json!({"request_id": request_id, "assignment_id": "a", "attempt": attempt, "seq": seq, "data": text});
    let message = Message {
        subject: subjects::output(request_id).into(),
        payload: chunk.to_string().into(),
        ..Message::default()
    };
    bus.publish(message).await.unwrap();
}

pub fn is_answer(state: &'static str) -> impl Fn(&Value) -> bool {
    move |event| event["message"]["user"] == "assistant" && event["message"]["state"] == state
}

/// Waits for the first decide request, and returns its id.
pub async fn asked(seen: &Mutex<Vec<bytes::Bytes>>) -> String {
    testkit::eventually(PATIENCE, async || !seen.lock().is_empty()).await;
    let request: Value = serde_json::from_slice(&seen.lock()[0]).unwrap();
    request["request_id"].as_str().unwrap().to_string()
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn answer_streams_and_ends(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    let (_router, seen) = router(&rig.bus, decided).await;
    let sent = rig
        .chat("ann", "chat.send", send("@assistant how is it going?", "n"))
        .await
        .unwrap();
    let request_id = asked(&seen).await;
    let request: Value = serde_json::from_slice(&seen.lock()[0]).unwrap();
    assert_eq!(request["task"]["payload"]["prompt"], "how is it going?");
    assert_eq!((&request["push_assignment"], &request["task"]["type"]), (&json!(true), &json!("chat")));

    output(&rig.bus, &request_id, 1, 0, "It ").await;
    output(&rig.bus, &request_id, 1, 1, "goes").await;
    output(&rig.bus, &request_id, 1, 1, "goes").await;
    rig.event(ROOM, |event| event["type"] == "delta" && event["seq"] == 2)
        .await;

    let history = rig
        .chat("bob", "chat.history", json!({"room": "general"}))
        .await
        .unwrap();
    let half = &history["messages"][1];
    assert_eq!((&half["text"], &half["seq"], &half["state"]), (&json!("It goes"), &json!(2), &json!("streaming")));

    result(&rig.bus, &seen, &request_id, "success", json!({"text": "It goes well."})).await;
    let done = rig.event(ROOM, is_answer("done")).await;
    assert_eq!(
        (&done["message"]["text"], &done["message"]["reply_to"]),
        (&json!("It goes well."), &sent["message"]["id"])
    );
    let deltas = rig.events(ROOM).iter().filter(|event| event["type"] == "delta").count();
    assert_eq!(deltas, 2, "a repeated piece is published once");

    // A repeated result and late pieces change nothing.
    result(&rig.bus, &seen, &request_id, "error", json!({"text": "other"})).await;
    output(&rig.bus, &request_id, 2, 0, "again").await;
    rig.chat("ann", "chat.send", send("next", "n2")).await.unwrap();
    let history = rig
        .chat("bob", "chat.history", json!({"room": "general"}))
        .await
        .unwrap();
    assert_eq!(history["messages"][1]["text"], "It goes well.");
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn nul_in_an_answer_is_replaced(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    let (_router, seen) = router(&rig.bus, decided).await;
    rig.chat("ann", "chat.send", send("@assistant hi", "n")).await.unwrap();
    let request_id = asked(&seen).await;
    result(&rig.bus, &seen, &request_id, "success", json!({"text": "a\0b"})).await;
    let done = rig.event(ROOM, is_answer("done")).await;
    assert_eq!(done["message"]["text"], "a\u{fffd}b");
}

#[tokio::test]
async fn result_survives_a_database_outage() {
    let mut home = Home::new(Kind::Postgres).await;
    let rig = home.start().await;
    let (_router, seen) = router(&rig.bus, decided).await;
    rig.chat("ann", "chat.send", send("@assistant hi", "n")).await.unwrap();
    let request_id = asked(&seen).await;

    let postgres = home.postgres.as_mut().unwrap();
    postgres.kill();
    let _records = records(&rig.bus, "success").await;
    result(&rig.bus, &seen, &request_id, "success", json!("hello")).await;
    let (code, _) = rig.chat("ann", "chat.send", send("lost?", "n2")).await.unwrap_err();
    assert_eq!(code, 100, "the caller gets an error");

    postgres.restart().await;
    let done = rig.event(ROOM, is_answer("done")).await;
    assert_eq!(done["message"]["text"], "hello");
    rig.chat("ann", "chat.send", send("lost?", "n2")).await.unwrap();
    rig.stop().await;
}

#[tokio::test]
async fn web_app_ends_if_it_cannot_start() {
    let mut home = Home::new(Kind::Postgres).await;
    let bus = bus::local::Local::open(home.dir.path()).await.unwrap();
    let bound = webapp::bind(home.config(), bus).await.unwrap();
    home.postgres.as_mut().unwrap().kill();
    let ended = tokio::time::timeout(2 * PATIENCE, bound.run(CancellationToken::new())).await;
    let error = ended.expect("the web app ends by itself").unwrap_err().to_string();
    assert!(error.contains("the database"), "{error}");
}

#[tokio::test]
async fn hanging_web_app_does_not_block_the_others() {
    let home = Home::new(Kind::Postgres).await;
    let rig = home.start().await;
    // Acts as a web app that hangs between taking a message's id and the commit.
    sqlx::any::install_default_drivers();
    let mut hanging = sqlx::AnyConnection::connect(&home.config().database_url.unwrap())
        .await
        .unwrap();
    hanging
        .execute("SET idle_in_transaction_session_timeout = '5s'; BEGIN")
        .await
        .unwrap();
    hanging.execute("UPDATE message_ids SET last = last + 1").await.unwrap();

    let sent = testkit::eventually(PATIENCE, async || rig.chat("ann", "chat.send", send("hi", "n")).await.is_ok());
    // Reads need no lock, so they are answered meanwhile.
    let read = async || {
        rig.chat("bob", "chat.history", json!({"room": "general"}))
            .await
            .unwrap()
    };
    tokio::join!(sent, read());
    assert_eq!(read().await["messages"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn page_of_history_is_bounded_in_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    let (_router, seen) = router(&rig.bus, decided).await;
    for n in 0..5 {
        rig.chat("ann", "chat.send", send("@assistant tell", &n.to_string()))
            .await
            .unwrap();
        testkit::eventually(PATIENCE, async || seen.lock().len() == n + 1).await;
        let request: Value = serde_json::from_slice(&seen.lock()[n]).unwrap();
        result(&rig.bus, &seen, request["request_id"].as_str().unwrap(), "success", json!("x".repeat(300_000))).await;
        testkit::eventually(PATIENCE, async || rig.events(ROOM).iter().filter(|e| is_answer("done")(e)).count() > n)
            .await;
    }

    let mut seen = Vec::new();
    let mut before = Value::Null;
    loop {
        let page = rig
            .chat("bob", "chat.history", json!({"room": "general", "before": before}))
            .await
            .unwrap();
        assert!(page.to_string().len() < 300_000);
        let messages = page["messages"].as_array().unwrap();
        seen.extend(messages.iter().rev().map(|message| message["id"].as_i64().unwrap()));
        before = messages[0]["id"].clone();
        if page["more"] == false {
            break;
        }
    }
    assert_eq!(seen, (1..=10).rev().collect::<Vec<_>>(), "the pages have all messages");
}

#[tokio::test]
async fn answer_is_requested_even_if_the_room_cannot_be_notified() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    let (_router, seen) = router(&rig.bus, decided).await;
    rig.refuse_publications(true);
    let (code, text) = rig
        .chat("ann", "chat.send", send("@assistant hi", "n"))
        .await
        .unwrap_err();
    assert!(code == 100 && text.contains("the message is stored"), "{code} {text}");

    let request_id = asked(&seen).await;
    result(&rig.bus, &seen, &request_id, "success", json!("hello")).await;
    let ended = async || {
        let history = rig
            .chat("ann", "chat.history", json!({"room": "general"}))
            .await
            .unwrap();
        history["messages"][1]["state"] == "done"
    };
    testkit::eventually(PATIENCE, ended).await;

    rig.refuse_publications(false);
    rig.event(ROOM, is_answer("done")).await;
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn refused_request_fails_the_answer_which_can_be_retried(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    let refuse = |request: &Value| {
        let error = json!({"code": "policy_not_found", "message": "there is no such policy"});
        json!({"ok": false, "error": error, "context": {"request_id": request["request_id"]}})
    };
    let (first_router, _) = router(&rig.bus, refuse).await;
    rig.chat("ann", "chat.send", send("@assistant hi", "n")).await.unwrap();
    let failed = rig.event(ROOM, is_answer("failed")).await;
    assert_eq!(failed["message"]["error"], "there is no such policy");
    drop(first_router);

    let (_router, seen) = router(&rig.bus, decided).await;
    let id = failed["message"]["id"].clone();
    rig.chat("ann", "chat.retry", json!({"message": id})).await.unwrap();
    let request_id = asked(&seen).await;
    assert_eq!(
        rig.chat("ann", "chat.retry", json!({"message": id}))
            .await
            .unwrap_err()
            .0,
        107,
        "it is still streaming"
    );
    result(&rig.bus, &seen, &request_id, "success", json!({"text": "hello"})).await;
    let done = rig.event(ROOM, is_answer("done")).await;
    assert_eq!((&done["message"]["id"], &done["message"]["text"]), (&id, &json!("hello")));
    let (code, _) = rig.chat("ann", "chat.retry", json!({"message": id})).await.unwrap_err();
    assert_eq!(code, 107, "a complete answer is kept");
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn stopped_answer_keeps_its_output(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    let (_router, seen) = router(&rig.bus, decided).await;
    rig.chat("ann", "chat.send", send("@assistant tell", "n"))
        .await
        .unwrap();
    let request_id = asked(&seen).await;
    output(&rig.bus, &request_id, 1, 0, "Once upon").await;
    let delta = rig.event(ROOM, |event| event["type"] == "delta").await;

    // No router answers the cancel, so the web app ends the answer itself.
    rig.chat("ann", "chat.stop", json!({"message": delta["id"]}))
        .await
        .unwrap();
    let stopped = rig.event(ROOM, is_answer("stopped")).await;
    assert_eq!(stopped["message"]["text"], "Once upon");
    rig.chat("ann", "chat.stop", json!({"message": delta["id"]}))
        .await
        .unwrap();
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn repeated_message_is_published_once(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    let first = rig.chat("ann", "chat.send", send("hello", "n")).await.unwrap();
    let again = rig.chat("ann", "chat.send", send("hello", "n")).await.unwrap();
    assert_eq!(first["message"], again["message"]);
    assert_eq!(rig.events(ROOM).len(), 1);
    let other = rig.chat("bob", "chat.send", send("hello", "n")).await.unwrap();
    assert_ne!(first["message"]["id"], other["message"]["id"], "nonces of different senders are independent");
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn room_is_created_once_and_announced(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    let made = rig
        .chat("ann", "chat.create_room", json!({"name": "#Release Planning"}))
        .await
        .unwrap();
    assert_eq!(made["room"], json!({"id": "release-planning", "name": "Release Planning"}));
    assert_eq!(
        rig.chat("bob", "chat.create_room", json!({"name": "release planning"}))
            .await
            .unwrap(),
        made
    );
    rig.event("chat:lobby", |event| event["room"]["id"] == "release-planning")
        .await;

    let rooms = rig.chat("bob", "chat.rooms", json!({})).await.unwrap();
    let ids: Vec<&str> = rooms["rooms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|room| room["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["general", "random", "release-planning"]);
}

/// Starts a web app with these quotas and the operator olga.
async fn start_with(home: &Home, quotas: webapp::Quotas) -> Rig {
    let config = webapp::Config { quotas, operators: vec!["olga".into()], ..home.config() };
    home.start_as(config).await
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn only_asker_creator_and_operator_manage_an_answer(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = start_with(&home, webapp::Quotas::default()).await;
    let (_router, seen) = router(&rig.bus, decided).await;
    rig.chat("max", "chat.create_room", json!({"name": "den"}))
        .await
        .unwrap();
    let ask = json!({"room": "den", "text": "@assistant tell", "nonce": "n"});
    rig.chat("ann", "chat.send", ask).await.unwrap();
    asked(&seen).await;
    let answer = rig.event("chat:den", is_answer("streaming")).await["message"].clone();
    assert_eq!(answer["asker"], "ann");
    let this = json!({"message": answer["id"]});

    let (code, text) = rig.chat("bob", "chat.stop", this.clone()).await.unwrap_err();
    assert!(code == 103 && text.contains("operator"), "{code} {text}");
    rig.chat("max", "chat.stop", this.clone())
        .await
        .expect("the room's creator may stop");
    rig.event("chat:den", is_answer("stopped")).await;
    for user in ["bob", "max"] {
        assert_eq!(rig.chat(user, "chat.retry", this.clone()).await.unwrap_err().0, 103, "{user}");
    }
    rig.chat("ann", "chat.retry", this.clone()).await.unwrap();
    rig.chat("olga", "chat.stop", this.clone())
        .await
        .expect("an operator may stop");
    rig.chat("olga", "chat.retry", this.clone())
        .await
        .expect("an operator may retry");
    rig.chat("ann", "chat.stop", this).await.unwrap();
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn quotas_count_by_user_and_survive_a_restart(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let quotas = webapp::Quotas {
        runs_at_once: 2,
        runs_per_minute: 100,
        runs_per_day: 3,
        messages_per_minute: 100,
        messages_per_day: 6,
        rooms_per_day: 1,
    };
    let ask = |n: u32| send("@assistant tell", &n.to_string());
    let rig = start_with(&home, quotas).await;
    let (router_task, _) = router(&rig.bus, decided).await;
    rig.chat("ann", "chat.send", ask(1)).await.unwrap();
    rig.chat("ann", "chat.send", ask(2)).await.unwrap();
    rig.chat("ann", "chat.send", ask(2))
        .await
        .expect("a repeat is not charged");
    let (code, text) = rig.chat("ann", "chat.send", ask(3)).await.unwrap_err();
    assert!(code == 111 && text.contains("2 answers streaming"), "{code} {text}");
    rig.chat("bob", "chat.send", ask(3))
        .await
        .expect("another user has a separate quota");

    let streaming = rig
        .events(ROOM)
        .into_iter()
        .find(|event| event["message"]["asker"] == "ann")
        .unwrap();
    let first = json!({"message": streaming["message"]["id"]});
    rig.chat("ann", "chat.stop", first.clone()).await.unwrap();
    rig.chat("ann", "chat.send", ask(4)).await.expect("an answer has ended");
    rig.chat("ann", "chat.stop", first.clone()).await.unwrap();

    rig.chat("ann", "chat.create_room", json!({"name": "one"}))
        .await
        .unwrap();
    rig.chat("ann", "chat.create_room", json!({"name": "one"}))
        .await
        .expect("the room exists already");
    rig.chat("ann", "chat.delete_room", json!({"room": "one"}))
        .await
        .unwrap();
    drop(router_task);
    rig.stop().await;

    let rig = start_with(&home, webapp::Quotas { runs_at_once: 100, ..quotas }).await;
    for (method, request, what) in [
        ("chat.send", ask(5), "3 times a day"),
        ("chat.retry", first, "3 times a day"),
        ("chat.create_room", json!({"name": "two"}), "1 times a day"),
        ("chat.create_room", json!({"name": "one"}), "1 times a day"),
    ] {
        let (code, text) = rig.chat("ann", method, request).await.unwrap_err();
        assert!(code == 106 && text.contains(what), "{method}: {code} {text}");
    }
    for n in 4..=6 {
        rig.chat("ann", "chat.send", send("plain", &format!("p{n}")))
            .await
            .unwrap();
    }
    let (code, text) = rig.chat("ann", "chat.send", send("plain", "p7")).await.unwrap_err();
    assert!(code == 106 && text.contains("6 times a day"), "{code} {text}");
    rig.chat("bob", "chat.send", send("plain", "p7")).await.unwrap();
}

#[tokio::test]
async fn rooms_created_concurrently_cannot_exceed_the_daily_quota() {
    const CALLS: i64 = 4;
    let home = Home::new(Kind::Postgres).await;
    let rig = start_with(&home, webapp::Quotas { rooms_per_day: 1, ..webapp::Quotas::default() }).await;
    // Lets quotas be read but not written, until all calls are waiting.
    let mut holder = sqlx::AnyConnection::connect(&home.postgres.as_ref().unwrap().url())
        .await
        .unwrap();
    let mut held = holder.begin().await.unwrap();
    held.execute("LOCK TABLE quota_spent IN SHARE MODE").await.unwrap();
    let release = async {
        let mut waiting = 0;
        while waiting < CALLS {
            let count = sqlx::query_as("SELECT COUNT(*) FROM pg_locks WHERE NOT granted");
            (waiting,) = count.fetch_one(&mut *held).await.unwrap();
        }
        held.commit().await.unwrap();
    };

    let name = |n: i64| json!({"name": format!("room {n}")});
    let calls = futures_util::future::join_all((0..CALLS).map(|n| rig.chat("ann", "chat.create_room", name(n))));
    let (made, released) = tokio::join!(calls, tokio::time::timeout(PATIENCE, release));
    released.expect("all calls wait for the quota");
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1, "{made:?}");
    assert!(
        made.iter()
            .filter_map(|made| made.as_ref().err())
            .all(|(code, _)| *code == 106),
        "{made:?}"
    );
    let rooms = rig.chat("ann", "chat.rooms", json!({})).await.unwrap();
    assert_eq!(rooms["rooms"].as_array().unwrap().len(), 3, "the two initial rooms and a new one");
}

#[tokio::test]
async fn repeats_do_not_use_up_the_quota_per_minute() {
    let home = Home::new(Kind::Sqlite).await;
    let quotas = webapp::Quotas { messages_per_minute: 2, runs_per_minute: 1, ..webapp::Quotas::default() };
    let rig = start_with(&home, quotas).await;
    let (_router, _) = router(&rig.bus, decided).await;
    let ask = |nonce: &str| send("@assistant hi", nonce);
    let first = rig.chat("ann", "chat.send", ask("n")).await.unwrap();
    for _ in 0..3 {
        let again = rig.chat("ann", "chat.send", ask("n")).await.unwrap();
        assert_eq!(again["message"], first["message"]);
    }
    rig.chat("ann", "chat.send", send("hi", "n2"))
        .await
        .expect("the repeats were not charged");
    assert_eq!(rig.chat("ann", "chat.send", send("hi", "n3")).await.unwrap_err().0, 111);
}

#[tokio::test]
async fn messages_and_typing_notices_are_rate_limited() {
    let home = Home::new(Kind::Sqlite).await;
    let rig = start_with(&home, webapp::Quotas { messages_per_minute: 3, ..webapp::Quotas::default() }).await;
    for n in 0..3 {
        rig.chat("ann", "chat.send", send("hi", &n.to_string())).await.unwrap();
    }
    let (code, text) = rig.chat("ann", "chat.send", send("hi", "3")).await.unwrap_err();
    assert!(code == 111 && text.contains("3 times a minute; try again in"), "{code} {text}");
    rig.chat("bob", "chat.send", send("hi", "3")).await.unwrap();

    for _ in 0..50 {
        rig.chat("ann", "chat.typing", json!({"room": "general"}))
            .await
            .unwrap();
    }
    let typing = rig
        .events(ROOM)
        .iter()
        .filter(|event| event["type"] == "typing")
        .count();
    assert!(typing < 20, "{typing} typing notices");
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn creator_deletes_a_room_with_its_messages(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = start_with(&home, webapp::Quotas::default()).await;
    let (_router, seen) = router(&rig.bus, decided).await;
    let mut cancels = rig.bus.subscribe(subjects::CANCEL, None, 8).await.unwrap();
    let (den, here) = (json!({"name": "Den"}), json!({"room": "den"}));
    rig.chat("ann", "chat.create_room", den.clone()).await.unwrap();
    rig.chat("bob", "chat.send", json!({"room": "den", "text": "@assistant secret", "nonce": "n"}))
        .await
        .unwrap();
    let request_id = asked(&seen).await;
    for (user, room) in [("bob", &here), ("ann", &json!({"room": "general"}))] {
        let (code, text) = rig.chat(user, "chat.delete_room", room.clone()).await.unwrap_err();
        assert!(code == 103 && text.contains("its creator"), "{user} {room}: {code} {text}");
    }

    let (deleted, cancelled) = tokio::join!(rig.chat("ann", "chat.delete_room", here.clone()), cancels.next());
    deleted.unwrap();
    let cancelled: Value = serde_json::from_slice(&cancelled.unwrap().payload).unwrap();
    assert_eq!(cancelled["request_id"], request_id, "the task of the streaming answer is cancelled");
    for channel in ["chat:lobby", "chat:den"] {
        rig.event(channel, |event| *event == json!({"type": "gone", "room": "den"}))
            .await;
    }
    for method in ["chat.history", "chat.typing", "chat.delete_room"] {
        assert_eq!(rig.chat("bob", method, here.clone()).await.unwrap_err().0, 107, "{method}");
    }
    // Late output and results are ignored.
    output(&rig.bus, &request_id, 1, 0, "late").await;
    result(&rig.bus, &seen, &request_id, "success", json!("late")).await;

    // A new room with the same name is empty, and belongs to its new creator.
    rig.chat("bob", "chat.create_room", den).await.unwrap();
    let history = rig.chat("ann", "chat.history", here.clone()).await.unwrap();
    assert_eq!(history["messages"], json!([]));
    assert_eq!(rig.chat("ann", "chat.delete_room", here.clone()).await.unwrap_err().0, 103);
    rig.chat("olga", "chat.delete_room", here)
        .await
        .expect("an operator may delete");
    rig.chat("olga", "chat.delete_room", json!({"room": "random"}))
        .await
        .expect("an operator may delete rooms without a creator");
}

#[tokio::test]
async fn database_errors_are_hidden_behind_a_trace_id() {
    let mut home = Home::new(Kind::Postgres).await;
    let rig = home.start().await;
    let (_router, seen) = router(&rig.bus, decided).await;
    // Wait until the web app has started: one that cannot start ends.
    rig.chat("ann", "chat.send", send("@assistant hi", "first"))
        .await
        .unwrap();
    asked(&seen).await;

    home.postgres.as_mut().unwrap().kill();
    for (method, request) in [
        ("chat.send", send("hi", "n")),
        ("chat.history", json!({"room": "general"})),
        ("chat.create_room", json!({"name": "new"})),
        ("chat.stop", json!({"message": 1})),
    ] {
        let (code, text) = rig.chat("ann", method, request).await.unwrap_err();
        assert_eq!(code, 100, "{method}");
        assert!(text.contains("(trace ") && text.contains("went wrong"), "{method}: {text}");
        for inside in ["database", "pool", "connect", "127.0.0.1", "postgres", "sql"] {
            assert!(!text.to_lowercase().contains(inside), "{method}: {text}");
        }
    }
    let say = wire::app::Said::Rerun(wire::app::Rerun { path: "/".into(), query: String::new(), reset: true });
    let (code, text) = rig
        .say("ann", "00112233445566778899aabbccddeeff", say)
        .await
        .unwrap_err();
    assert!(code == 100 && text.contains("(trace ") && !text.contains("database"), "{code} {text}");
}

#[tokio::test]
async fn invalid_requests_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    let long = "x".repeat(8 * 1024 + 1);
    let bad = [
        ("chat.send", send("", "n")),
        ("chat.send", send("   ", "n")),
        ("chat.send", send(&long, "n")),
        ("chat.send", send("x", "")),
        ("chat.send", send("x\0y", "n")),
        ("chat.send", send("x", "n\0")),
        ("chat.send", send("x", &"n".repeat(65))),
        ("chat.send", json!({"room": "nowhere", "text": "x", "nonce": "n"})),
        ("chat.send", json!({"text": "x"})),
        ("chat.history", json!({"room": "nowhere"})),
        ("chat.history", json!([])),
        ("chat.create_room", json!({"name": "!!!"})),
        ("chat.create_room", json!({"name": "lobby"})),
        ("chat.create_room", json!({"name": "a\0b"})),
        ("chat.create_room", json!({"name": "x".repeat(49)})),
        ("chat.typing", json!({"room": "nowhere"})),
        ("chat.stop", json!({"message": 999})),
        ("chat.retry", json!({"message": "1"})),
    ];
    for (method, request) in bad {
        let (code, text) = rig.chat("ann", method, request.clone()).await.expect_err("refused");
        assert!(code == 107 && !text.is_empty(), "{method} {request}: {code} {text}");
    }

    let (code, _) = rig.rpc("ann", "chat.send", &b"\xff not json"[..]).await.unwrap_err();
    assert_eq!(code, 107);
    assert_eq!(rig.events(ROOM), Vec::<Value>::new());
}
