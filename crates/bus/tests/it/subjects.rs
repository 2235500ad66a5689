//! Live subjects: wildcards, queue groups, requests.

use crate::{message, soon, text};
use bus::{Bus, Error, Headers, Message, Subscription};
use std::collections::BTreeSet;
use std::time::Duration;
use testkit::eventually;
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(60);

async fn next(subscription: &mut Subscription) -> Message {
    soon(subscription.next()).await.expect("the bus is open")
}

pub async fn wildcards_match_subjects(bus: Bus) {
    let subjects = ["a", "a.b", "a.b.c", "b.b"];
    let patterns: [(&str, &[&str]); 5] = [
        ("a.b", &["a.b"]),
        ("a.*", &["a.b"]),
        ("a.>", &["a.b", "a.b.c"]),
        ("*.b", &["a.b", "b.b"]),
        (">", &["a", "a.b", "a.b.c", "b.b"]),
    ];

    for (pattern, expected) in patterns {
        let mut subscription = bus.subscribe(pattern, None, 16).await.unwrap();
        for subject in subjects {
            bus.publish(message(subject, "")).await.unwrap();
        }
        // The health check flushes all connections, so "last" arrives after everything else.
        bus.health().await.unwrap();
        bus.publish(message("a.b", "last")).await.unwrap();

        let mut got = BTreeSet::new();
        loop {
            let message = next(&mut subscription).await;
            if text(&message) == "last" {
                break;
            }
            // On NATS, `>` also matches the replies to health checks.
            if !message.subject.starts_with("_INBOX.") {
                assert!(got.insert(message.subject.to_string()), "delivered once: {pattern}");
            }
        }
        assert!(got.iter().eq(expected), "{pattern}: {got:?}");
    }
}

pub async fn queue_group_shares_messages(bus: Bus) {
    let mut first = bus.subscribe("work", Some("group"), 256).await.unwrap();
    let mut second = bus.subscribe("work", Some("group"), 256).await.unwrap();
    let mut other = bus.subscribe("work", Some("other"), 256).await.unwrap();
    let mut all = bus.subscribe("*", None, 256).await.unwrap();
    for n in 0..100 {
        bus.publish(message("work", &n.to_string())).await.unwrap();
    }

    let mut shares = [BTreeSet::new(), BTreeSet::new()];
    for n in 0..100 {
        assert_eq!(text(&next(&mut all).await), n.to_string());
        assert_eq!(text(&next(&mut other).await), n.to_string());
        let (member, message) = soon(async {
            tokio::select! { m = first.next() => (0, m.unwrap()), m = second.next() => (1, m.unwrap()) }
        })
        .await;
        shares[member].insert(text(&message).to_string());
    }

    assert_eq!(shares[0].len() + shares[1].len(), 100, "each message goes to exactly one member");
    assert!(shares.iter().all(|share| !share.is_empty()), "both members receive messages");
}

pub async fn request_receives_its_reply(bus: Bus) {
    let mut server = bus.subscribe("echo", Some("servers"), 64).await.unwrap();
    let answers = async {
        for _ in 0..32 {
            let request = next(&mut server).await;
            let headers = request.headers.clone();
            let subject = request.reply.clone().expect("a request has a reply subject");
            bus.publish(Message { subject, headers, payload: request.payload, reply: None })
                .await
                .unwrap();
        }
    };
    let requests = async {
        for n in 0..32 {
            let headers = Headers::new()
                .with("trace_id", format!("t{n}"))
                .with("list", "1")
                .with("list", "2");
            let reply = bus.request("echo", headers, n.to_string().into(), LONG).await.unwrap();
            assert_eq!(text(&reply), n.to_string());
            assert_eq!(reply.headers.get("TRACE_ID"), Some(format!("t{n}").as_str()));
            let list: Vec<&str> = reply
                .headers
                .iter()
                .filter(|(name, _)| *name == "list")
                .map(|(_, v)| v)
                .collect();
            assert_eq!(list, ["1", "2"]);
        }
    };
    soon(async { tokio::join!(answers, requests) }).await;
}

pub async fn request_without_responders_fails_at_once(bus: Bus) {
    let outcome = soon(bus.request("nobody", Headers::new(), "x".into(), LONG)).await;
    assert!(matches!(outcome, Err(Error::NoResponders(subject)) if subject == "nobody"));
}

pub async fn late_reply_does_not_reach_the_next_request(bus: Bus) {
    let mut server = bus.subscribe("slow", None, 64).await.unwrap();
    let timed_out = bus
        .request("slow", Headers::new(), "first".into(), Duration::from_millis(50))
        .await;
    assert!(matches!(timed_out, Err(Error::Timeout(_))), "{timed_out:?}");
    let late = next(&mut server).await.reply.unwrap();

    let answer = async {
        let request = next(&mut server).await;
        bus.publish(message(&late, "late")).await.unwrap();
        bus.publish(message(&request.reply.unwrap(), "in time")).await.unwrap();
    };
    let request = bus.request("slow", Headers::new(), "second".into(), LONG);
    let (reply, ()) = soon(async { tokio::join!(request, answer) }).await;
    assert_eq!(text(&reply.unwrap()), "in time");
}

pub async fn full_queue_refuses_requests(bus: Bus) {
    let mut server = bus.subscribe("busy", Some("servers"), 2).await.unwrap();
    for n in 0..5 {
        bus.publish(message("busy", &n.to_string())).await.unwrap();
    }
    bus.health().await.unwrap();

    let refused = soon(bus.request("busy", Headers::new(), "x".into(), LONG)).await;
    assert!(matches!(refused, Err(Error::NoResponders(_))), "{refused:?}");

    // The queue holds what fitted; the rest was dropped.
    assert_eq!(text(&next(&mut server).await), "0");
    assert_eq!(text(&next(&mut server).await), "1");
    bus.publish(message("busy", "after")).await.unwrap();
    assert_eq!(text(&next(&mut server).await), "after");
}

pub async fn dropped_subscription_no_longer_responds(bus: Bus) {
    drop(bus.subscribe("gone", None, 4).await.unwrap());
    eventually(crate::SOON, || async {
        let outcome = bus
            .request("gone", Headers::new(), "x".into(), Duration::from_millis(100))
            .await;
        matches!(outcome, Err(Error::NoResponders(_)))
    })
    .await;
}

/// Answers requests with the member's name until the subscription ends.
async fn answer_as(bus: Bus, name: &'static str, mut requests: Subscription, close: CancellationToken) {
    while let Some(request) = requests.next_until(&close).await {
        // Slower than the requests arrive, so that some are queued when the subscription is closed.
        tokio::task::yield_now().await;
        bus.publish(message(&request.reply.unwrap(), name)).await.unwrap();
    }
}

pub async fn closed_subscription_answers_what_was_delivered_to_it(bus: Bus) {
    let forever = CancellationToken::new();
    let staying = bus.subscribe("work", Some("group"), 4096).await.unwrap();
    let staying = tokio::spawn(answer_as(bus.clone(), "staying", staying, forever.clone()));

    for round in 0..30 {
        let close = CancellationToken::new();
        let leaving = bus.subscribe("work", Some("group"), 4096).await.unwrap();
        let leaving = tokio::spawn(answer_as(bus.clone(), "leaving", leaving, close.clone()));
        let requests = (0..200).map(|n| {
            let (bus, close) = (bus.clone(), close.clone());
            tokio::spawn(async move {
                if n == 100 + round {
                    close.cancel();
                }
                bus.request("work", Headers::new(), "x".into(), LONG).await
            })
        });
        for answered in soon(futures_util::future::join_all(requests)).await {
            answered.unwrap().expect("a member answers");
        }

        soon(leaving).await.unwrap();
        let after = bus.request("work", Headers::new(), "x".into(), LONG).await.unwrap();
        assert_eq!(text(&after), "staying");
    }

    forever.cancel();
    soon(staying).await.unwrap();
    let after = soon(bus.request("work", Headers::new(), "x".into(), LONG)).await;
    assert!(matches!(after, Err(Error::NoResponders(_))), "{after:?}");
}

pub async fn closed_subscription_ends_after_its_last_message(bus: Bus) {
    let mut subscription = bus.subscribe("news", None, 16).await.unwrap();
    for n in 0..3 {
        bus.publish(message("news", &n.to_string())).await.unwrap();
    }
    // The health check flushes all connections.
    bus.health().await.unwrap();
    subscription.close();
    subscription.close();
    for n in 0..3 {
        assert_eq!(text(&next(&mut subscription).await), n.to_string());
    }
    assert!(soon(subscription.next()).await.is_none());
    assert!(soon(subscription.next_until(&CancellationToken::new())).await.is_none());
}

pub async fn invalid_subjects_and_oversized_messages_are_refused(bus: Bus) {
    for bad in ["", "a..b", ".a", "a.", "a b", "a\r\nPUB x 0", "a.*", "a.>"] {
        let published = bus.publish(message(bad, "")).await;
        assert!(matches!(published, Err(Error::InvalidSubject(_))), "{bad:?}: {published:?}");
        let requested = bus.request(bad, Headers::new(), "x".into(), LONG).await;
        assert!(matches!(requested, Err(Error::InvalidSubject(_))), "{bad:?}");
        let appended = bus.append(message(bad, ""), None).await;
        assert!(matches!(appended, Err(Error::InvalidSubject(_))), "{bad:?}");
    }
    for bad in ["", "a..b", "a.>.b", "a b"] {
        assert!(matches!(bus.subscribe(bad, None, 1).await, Err(Error::InvalidSubject(_))), "{bad:?}");
    }

    let huge = Message {
        payload: vec![0; wire::limits::BUS_MESSAGE_MAX + 1].into(),
        ..message("a", "")
    };
    assert!(matches!(bus.publish(huge).await, Err(Error::TooLarge { .. })));
    bus.health()
        .await
        .expect("the bus stays healthy after refusing messages");
}
