//! Answers of web apps that are killed.

use crate::chat::{ROOM, asked, is_answer, records, result, send};
use crate::rig::{Home, Kind, PATIENCE, decided, router};
use rstest::rstest;
use serde_json::{Value, json};

/// Nothing else may differ between repeats of a request.
fn without_result_subject(request: &[u8]) -> Value {
    let mut request: Value = serde_json::from_slice(request).unwrap();
    assert!(request["result_subject"].take().is_string());
    request
}

/// A web app that was killed is told nothing; the next one finds the result in the task's record.
#[test]
fn result_that_came_while_no_web_app_ran_is_found() {
    let home = until_killed(Home::new(Kind::Sqlite));
    until_killed(async {
        let rig = home.start().await;
        let (_router, seen) = router(&rig.bus, decided).await;
        rig.chat("ann", "chat.send", send("@assistant hi", "n")).await.unwrap();
        asked(&seen).await;
    });
    until_killed(async {
        let rig = home.start().await;
        let _router = router(&rig.bus, decided).await;
        let _records = records(&rig.bus, "success").await;
        let done = rig.event(ROOM, is_answer("done")).await;
        assert_eq!(done["message"]["text"], "hello");
    });
}

/// Runs a web app, then drops its tasks at any point, as SIGKILL would.
fn until_killed<T>(life: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let lived = runtime.block_on(life);
    runtime.shutdown_timeout(PATIENCE);
    lived
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
fn answer_is_requested_after_a_kill_before_the_request(#[case] kind: Kind) {
    let home = until_killed(Home::new(kind));
    until_killed(async {
        let rig = home.start().await;
        // There is no router, so the message is acknowledged but its answer cannot be requested.
        rig.chat("ann", "chat.send", send("@assistant status", "n"))
            .await
            .unwrap();
    });

    let first = until_killed(async {
        let rig = home.start().await;
        let (_router, seen) = router(&rig.bus, decided).await;
        asked(&seen).await;
        without_result_subject(&seen.lock()[0])
    });

    until_killed(async {
        let rig = home.start().await;
        let (_router, seen) = router(&rig.bus, decided).await;
        let request_id = asked(&seen).await;
        let again = without_result_subject(&seen.lock()[0]);
        assert_eq!(again, first, "the same request, so the router accepts it once");
        result(&rig.bus, &seen, &request_id, "success", json!({"text": "fine"})).await;
        rig.event(ROOM, is_answer("done")).await;
    });
}
