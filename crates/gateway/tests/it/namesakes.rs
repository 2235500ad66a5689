//! Tasks of two tenants with the same request id: their output and results share subjects.

use crate::{Fixture, task};
use bus::{Bus, Message};
use serde_json::{Value, json};
use wire::ipc::{FrameType, Version};
use wire::subjects;

async fn publish(bus: &Bus, subject: &str, what: Value) {
    let payload = what.to_string().into();
    bus.publish(Message { subject: subject.into(), payload, ..Message::default() })
        .await
        .unwrap();
}

/// Publishes one piece of output and the result of the tenant's task `same`, with or without naming the tenant.
async fn work(bus: &Bus, result_subject: &str, tenant: &str, names_it: bool) {
    let assignment_id = format!("a-{tenant}");
    let mut chunk =
        json!({"request_id": "same", "assignment_id": assignment_id, "attempt": 1, "seq": 0, "data": tenant});
    let mut result = json!({"version": "1", "assignment_id": assignment_id, "request_id": "same", "status": "success",
        "provider_id": "p", "job": {"type": "t"}, "chunks": 1});
    if names_it {
        (chunk["tenant_id"], result["tenant_id"]) = (json!(tenant), json!(tenant));
    }
    publish(bus, &subjects::output("same"), chunk).await;
    publish(bus, result_subject, result).await;
}

#[tokio::test]
async fn task_of_another_tenant_with_the_same_id_neither_feeds_nor_ends_a_wait() {
    for names_it in [true, false] {
        let fixture = Fixture::start(|_| {}).await;

        let bus = fixture.bus.clone();
        fixture
            .router(move |request, _| {
                let bus = bus.clone();
                async move {
                    let tenant = request["tenant_id"].as_str().unwrap().to_string();
                    let other = if tenant == "acme" { "beta" } else { "acme" };
                    // Output and results may precede the decision.
                    let to = request["result_subject"].as_str().unwrap();
                    work(&bus, to, other, names_it).await;
                    work(&bus, to, &tenant, names_it).await;
                    work(&bus, to, other, names_it).await;
                    Some(json!({"ok": true, "decision": {}, "context": {}, "assignment_id": format!("a-{tenant}")}))
                }
            })
            .await;
        // If the worker names no tenant, the waiter may keep the wrong result until the decision; the record has the
        // right one.
        let mut records = fixture.bus.subscribe(subjects::GET_DECISION, None, 64).await.unwrap();

        let bus = fixture.bus.clone();
        tokio::spawn(async move {
            while let Some(message) = records.next().await {
                let tenant = message.headers.get("tenant_id").unwrap();
                let assignment_id = format!("a-{tenant}");
                let result = json!({"version": "1", "assignment_id": assignment_id, "request_id": "same",
                    "status": "success", "provider_id": "p", "job": {"type": "t"}, "chunks": 1});
                let task = json!({"task_id": "same", "state": "completed", "tenant_id": tenant,
                    "assignment_id": assignment_id, "result": result});
                publish(&bus, &message.reply.unwrap(), json!({"ok": true, "task": task})).await;
            }
        });

        let mut raw = fixture.connect().await;
        for (id, tenant, wait) in
            [(1, "acme", "stream"), (2, "beta", "stream"), (3, "acme", "result"), (4, "beta", "result")]
        {
            raw.submit_v2(id, json!({"request_id": "same", "tenant_id": tenant, "wait": wait}))
                .await;
        }

        let mut streamed = [Vec::new(), Vec::new()];
        let mut ended = [Value::Null, Value::Null, Value::Null, Value::Null];
        while ended.iter().any(Value::is_null) {
            let frame = raw.next().await.unwrap();
            let Version::V2 { request_id, .. } = frame.version else {
                panic!("{frame:?}")
            };
            let answer: Value = serde_json::from_slice(&frame.payload).unwrap();
            let index = usize::try_from(request_id).unwrap() - 1;
            match frame.frame_type().unwrap() {
                FrameType::StreamData => streamed[index].push(answer["data"].clone()),
                FrameType::StreamComplete => ended[index] = answer["result"]["assignment_id"].clone(),
                FrameType::ResponseOk => ended[index] = answer["assignment_id"].clone(),
                other => panic!("{other:?} {answer}"),
            }
        }
        assert_eq!(ended, ["a-acme", "a-beta", "a-acme", "a-beta"], "{names_it}");
        // Two tasks of each tenant ran; each piece is delivered once.
        assert_eq!(streamed, [["acme"], ["beta"]], "{names_it}");
    }
}

#[tokio::test]
async fn reference_to_a_task_names_its_tenant() {
    let fixture = Fixture::start(|_| {}).await;
    let mut queries = fixture.bus.subscribe(subjects::GET_DECISION, None, 8).await.unwrap();
    let mut raw = fixture.connect().await;
    for (tenant, expected) in [(Some("acme"), "acme"), (None, "default")] {
        let mut reference = json!({"task_id": "t"});
        if let Some(tenant) = tenant {
            reference["tenant_id"] = json!(tenant);
        }
        raw.frame(Version::V1, FrameType::TaskQuery, &reference.to_string())
            .await;

        let asked = queries.next().await.unwrap();
        assert_eq!(asked.headers.get("tenant_id"), Some(expected));
        // Like a router of the previous version, which looks up the task by its id alone.
        let known = json!({"ok": true, "task": {"task_id": "t", "state": "queued", "tenant_id": "acme"}});
        publish(&fixture.bus, &asked.reply.unwrap(), known).await;

        let (kind, answer) = raw.answer().await;
        match tenant {
            Some(_) => assert_eq!((kind, &answer["state"]), (FrameType::ResponseOk, &json!("queued"))),
            None => assert_eq!((&answer["error"]["code"], &answer["error"]["status"]), (&json!(12), &json!(404))),
        }
        assert!(!answer.to_string().contains("acme"), "{answer}");
    }
    raw.frame(Version::V1, FrameType::TaskQuery, r#"{"task_id":"t","tenant_id":"a/b"}"#)
        .await;
    assert_eq!(raw.error_code().await, 4);
    raw.frame(Version::V1, FrameType::TaskSubmit, &task(json!({"tenant_id": "a/b"})))
        .await;
    assert_eq!(raw.error_code().await, 4);
}
