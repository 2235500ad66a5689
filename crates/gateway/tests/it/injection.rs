//! JSON that two parsers could read differently: the router reads exactly what the gateway checked, or the request is
//! refused.

use crate::Fixture;
use serde_json::{Value, json};
use wire::ipc::{FrameType, Version};
use wire::router::DecideRequest;
use wire::subjects;

/// Checks the tenant that reaches the router in the header and in the payload, or the error that the client gets.
async fn check(cases: &[(&str, String, Result<&str, u64>)]) {
    let fixture = Fixture::start(|_| {}).await;
    let mut wire = fixture.bus.subscribe(subjects::DECIDE, None, 64).await.unwrap();
    fixture.echo_router().await;
    for version in [Version::V1, Version::V2 { request_id: 7, deadline_ms: 0 }] {
        let mut raw = fixture.connect().await;
        for (name, payload, expected) in cases {
            raw.frame(version, FrameType::TaskSubmit, payload).await;
            let (kind, answer) = raw.answer().await;
            match expected {
                Err(code) => assert_eq!(answer["error"]["code"], *code, "{name}: {answer}"),
                Ok(tenant) => {
                    assert_eq!(kind, FrameType::ResponseOk, "{name}: {answer}");
                    let message = wire.next().await.unwrap();
                    // The parser rejects duplicate fields, so the payload can be read in only one way.
                    let request: DecideRequest = serde_json::from_slice(&message.payload).unwrap();

                    let tenants: Vec<&str> = message
                        .headers
                        .iter()
                        .filter(|(key, _)| *key == "tenant_id")
                        .map(|(_, value)| value)
                        .collect();
                    assert_eq!((&*request.tenant_id, &tenants[..]), (*tenant, &[*tenant][..]), "{name}");

                    let fields: Value = serde_json::from_slice(&message.payload).unwrap();
                    let known = ["version", "request_id", "tenant_id", "task", "trace_id"];
                    let unknown = fields.as_object().unwrap().keys().find(|key| !known.contains(&&***key));
                    assert_eq!(unknown, None, "{name}");
                    assert!(request.task.payload_ref.is_none() && request.task.task_type == "t", "{name}");
                }
            }
        }
    }
}

fn submit(fields: &str) -> String {
    format!(r#"{{"command":"task_submit","task_type":"t"{}{fields}}}"#, if fields.is_empty() { "" } else { "," })
}

#[tokio::test]
async fn duplicate_field_is_refused() {
    let mut cases = Vec::new();
    for (name, fields) in [
        ("tenant twice", r#""tenant_id":"a","tenant_id":"b""#),
        ("tenant twice, the other order", r#""tenant_id":"b","tenant_id":"a""#),
        ("the same tenant twice", r#""tenant_id":"a","tenant_id":"a""#),
        ("the second by an escape", r#""tenant_id":"a","tenant\u005fid":"b""#),
        ("the first by an escape", r#""tenant\u005fid":"b","tenant_id":"a""#),
        ("all by escapes", r#""\u0074enant_id":"b","tenant_i\u0064":"a""#),
        ("nothing, then a tenant", r#""tenant_id":null,"tenant_id":"b""#),
        ("a tenant, then nothing", r#""tenant_id":"b","tenant_id":null"#),
        ("far apart", r#""tenant_id":"a","params":{"tenant_id":"c"},"line":1,"tenant_id":"b""#),
        ("command", r#""command":"task_submit""#),
        ("task_type", r#""task_type":"u""#),
        ("request_id", r#""request_id":"a","request_id":"b""#),
        ("trace_id", r#""trace_id":"a","trace_id":"b""#),
        ("wait", r#""wait":"decision","wait":"stream""#),
        ("timeout_ms", r#""timeout_ms":1,"timeout_ms":2"#),
        ("push_assignment", r#""push_assignment":false,"push_assignment":true"#),
    ] {
        cases.push((name, submit(fields), Err(4)));
    }

    check(&cases).await;

    let fixture = Fixture::start(|_| {}).await;
    let mut raw = fixture.connect().await;
    for kind in [FrameType::TaskQuery, FrameType::TaskCancel, FrameType::StreamSubscribe] {
        raw.frame(Version::V1, kind, r#"{"task_id":"mine","task\u005fid":"theirs"}"#)
            .await;
        assert_eq!(raw.error_code().await, 4, "{kind:?}");
    }
}

#[tokio::test]
async fn lookalikes_of_a_field_are_ignored() {
    let mut cases = Vec::new();
    for (name, fields, tenant) in [
        ("plain", r#""tenant_id":"acme""#, "acme"),
        ("by an escape", r#""tenant\u005fid":"acme""#, "acme"),
        ("its value by escapes", r#""tenant_id":"a\u0063me""#, "acme"),
        ("none", "", "default"),
        ("null", r#""tenant_id":null"#, "default"),
        ("another case", r#""Tenant_Id":"evil""#, "default"),
        ("with a blank", r#""tenant_id ":"evil""#, "default"),
        ("with a zero", r#""tenant_id\u0000":"evil""#, "default"),
        ("a letter that looks alike", "\"tenаnt_id\":\"evil\"", "default"),
        ("inside params", r#""params":{"tenant_id":"evil","task":{"type":"u"}}"#, "default"),
        ("inside params twice", r#""params":{"tenant_id":"evil","tenant_id":"worse"}"#, "default"),
        ("inside context", r#""context":[{"tenant_id":"evil"}]"#, "default"),
        ("a text that would close the object", r#""file":"\"},\"tenant_id\":\"evil\",\"x\":{\"""#, "default"),
        (
            "a decide request around it",
            r#""version":"9","task":{"type":"u","payload_ref":"x"},"metadata":{"tenant_id":"evil"},"payload":{}"#,
            "default",
        ),
        (
            "an envelope around it",
            r#""kind":"task","data":{"command":"task_submit","tenant_id":"evil"}"#,
            "default",
        ),
        ("an answer", r#""ok":true,"decision":{"provider_id":"p"},"error":{"code":"none"}"#, "default"),
        ("fields of the other requests", r#""task_id":"theirs","state":"completed","seq":0"#, "default"),
    ] {
        cases.push((name, submit(fields), Ok(tenant)));
    }
    for (name, payload) in [
        (
            "an envelope",
            json!({"kind": "task", "data": {"command": "task_submit", "task_type": "t"}}).to_string(),
        ),
        ("a text", json!(submit("")).to_string()),
        ("two objects", submit("").repeat(2)),
        ("an object and a bracket", format!("{}}}", submit(""))),
        ("in an array", format!("[{}]", submit(""))),
        ("a byte order mark", format!("\u{feff}{}", submit(""))),
        ("a comment", format!("/**/{}", submit(""))),
        ("a zero at the end", format!("{}\0", submit(""))),
        ("a comma at the end", submit(r#""line":1,"#)),
        ("a key without quotes", submit("tenant_id:1")),
        ("half a surrogate", submit(r#""request_id":"\ud800""#)),
        ("a line break in a text", submit("\"request_id\":\"a\nb\"")),
    ] {
        cases.push((name, payload, Err(4)));
    }

    check(&cases).await;
}

#[tokio::test]
async fn extreme_numbers_and_depths_are_accepted_or_refused() {
    let nested = |depth: usize| submit(&format!(r#""context":{}{}"#, "[".repeat(depth), "]".repeat(depth)));
    let objects = |depth: usize| submit(&format!(r#""params":{}1{}"#, r#"{"a":"#.repeat(depth), "}".repeat(depth)));
    let accepted = [
        ("the largest line", submit(r#""line":9223372036854775807"#)),
        ("the smallest line", submit(r#""line":-9223372036854775808"#)),
        ("the largest timeout", submit(r#""timeout_ms":18446744073709551615"#)),
        ("a number near the end", submit(r#""context":[1e308,-1e308,5e-324,1e-999,18446744073709551615]"#)),
        ("as many digits as one likes", submit(&format!(r#""context":0.{}"#, "9".repeat(10_000)))),
        ("deep", nested(100)),
        ("deep objects", objects(100)),
        ("as many fields as one likes", {
            let many: Vec<String> = (0..10_000).map(|n| format!(r#""tenant_id{n}":"evil""#)).collect();
            submit(&many.join(","))
        }),
    ];
    let refused = [
        ("a larger line", submit(r#""line":9223372036854775808"#)),
        ("a line of another kind", submit(r#""line":1e3"#)),
        ("a larger timeout", submit(r#""timeout_ms":18446744073709551616"#)),
        ("a timeout before the beginning", submit(r#""timeout_ms":-1"#)),
        ("a timeout that is no whole number", submit(r#""timeout_ms":1.5"#)),
        ("a number beyond", submit(r#""context":1e309"#)),
        ("an integer beyond", submit(&format!(r#""context":{}"#, "9".repeat(400)))),
        ("no number", submit(r#""context":NaN"#)),
        ("deeper", nested(128)),
        ("deeper objects", objects(128)),
        ("as deep as a frame allows", submit(&format!(r#""context":{}"#, "[".repeat(1_000_000)))),
        (
            "as deep as a frame allows, objects",
            submit(&format!(r#""context":{}"#, r#"{"a":"#.repeat(500_000))),
        ),
    ];
    let accepted = accepted.map(|(name, payload)| (name, payload, Ok("default")));
    let refused = refused.map(|(name, payload)| (name, payload, Err(4)));
    check(&accepted.into_iter().chain(refused).collect::<Vec<_>>()).await;
}

#[tokio::test]
async fn ids_have_1_to_128_bytes_without_control_characters() {
    let of = |field: &str, id: &str| {
        let mut submit = json!({"command": "task_submit", "task_type": "t"});
        submit[field] = id.into();
        submit.to_string()
    };
    let mut cases = Vec::new();
    for field in ["request_id", "trace_id"] {
        for (id, ok) in [
            ("x".repeat(128), true),
            ("x".repeat(129), false),
            ("é".repeat(64), true),
            ("é".repeat(65), false),
            ("\u{1f600}".repeat(32), true),
            ("\0".repeat(128), false),
            ("a\nb".into(), false),
            ("\u{7f}".into(), false),
            ("a.b.*.>".into(), true),
            ("../../etc/passwd".into(), true),
            (String::new(), false),
        ] {
            cases.push((field, of(field, &id), if ok { Ok("default") } else { Err(4) }));
        }
    }

    let longest = "x".repeat(128);
    cases.push(("tenant_id", of("tenant_id", &longest), Ok(&longest)));
    for tenant in [&*"x".repeat(129), "é", "a b", "", "a\0", "a/b", "*"] {
        cases.push(("tenant_id", of("tenant_id", tenant), Err(4)));
    }

    check(&cases).await;
}

#[tokio::test]
async fn text_that_is_not_utf8_is_refused() {
    let fixture = Fixture::start(|_| {}).await;
    let mut raw = fixture.connect().await;
    let (before, after) = (&br#"{"command":"task_submit","task_type":"t","file":""#[..], &br#""}"#[..]);
    for bytes in [&b"\xff"[..], b"\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x28\xa1"] {
        for kind in [FrameType::TaskSubmit, FrameType::TaskQuery, FrameType::TaskCancel, FrameType::StreamSubscribe] {
            let payload = [before, bytes, after].concat();
            let mut frame = bytes::BytesMut::new();
            wire::ipc::Frame::new(Version::V1, kind, payload).encode(&mut frame);
            raw.send(&frame).await;
            let (_, answer) = raw.answer().await;
            assert_eq!(answer["error"]["code"], 4, "{kind:?} {bytes:x?}");
            assert!(answer["error"]["message"].as_str().unwrap().contains("UTF-8"), "{answer}");
        }
    }
}
