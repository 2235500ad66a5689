//! Carries out requests: a few exchanges with the router each, then following the task if the client waits for it.

use crate::Gateway;
use crate::deadline::Deadline;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::follow::{Follow, complete};
use crate::output::Pieces;
use crate::reply::Reply;
use crate::request::Request;
use crate::waiters::Finished;
use std::sync::Arc;
use std::time::Instant;
use wire::ipc::TaskSubmit;
use wire::router::{TaskAnswer, TaskState};

/// Carries out the request. Returns the last frame of its answer; the frames before it go to `pieces`.
pub async fn run(gateway: Arc<Gateway>, uid: u32, request: Request, deadline: Deadline, pieces: &mut Pieces) -> Reply {
    let started = Instant::now();
    // The futures of the larger, rarer kinds are boxed, so that they do not inflate the future of a submit.
    let (exchange, outcome) = match request {
        Request::Submit(submit) => {
            let mut exchange = Exchange::of_submit(gateway, uid, &submit, deadline);
            let outcome = self::submit(&mut exchange, submit, pieces).await;
            (exchange, outcome)
        }

        Request::Query(task) => {
            let mut exchange = Exchange::about(gateway, uid, &task, deadline);
            let found = exchange.find(task.tenant_id, None).await;
            (exchange, found.map(|found| state(found.task)))
        }

        Request::Cancel(task) => {
            let mut exchange = Exchange::about(gateway, uid, &task, deadline);
            let cancelled = Box::pin(exchange.cancel(task.tenant_id)).await;
            (exchange, cancelled.map(state))
        }

        Request::Subscribe(task) => {
            let mut exchange = Exchange::about(gateway, uid, &task, deadline);
            let outcome = Box::pin(subscribe(&mut exchange, task.tenant_id, pieces)).await;
            (exchange, outcome)
        }
    };
    exchange.end(outcome, started)
}

/// Sends a task to the router, and follows it if the client waits for more than the decision.
pub async fn submit(exchange: &mut Exchange, submit: Box<TaskSubmit>, pieces: &mut Pieces) -> Result<Reply, Failure> {
    exchange.check_tenant(&exchange.tenant_id)?;
    exchange.check_time()?;
    exchange.log_accepted(&submit);

    // Subscribed before the request is sent, so that neither output nor result is missed.
    let (wait, has_key) = (submit.wait, submit.idempotency_key.is_some());
    let mut follow = Follow::new(exchange, wait).await?;
    let decided = exchange.decide(*submit).await?;

    // The answer to a repeat is that of the first request with the key, and so is the task to follow.
    if has_key && let Some(first) = exchange.first_of_key(&decided.payload) {
        exchange.request_id = first;
        follow = Follow::new(exchange, wait).await?;
    }
    let Some(follow) = follow else {
        return Ok(Reply::ok(decided.payload));
    };
    // Boxed: most requests wait only for the decision.
    Box::pin(follow.run(exchange, decided.assignment_id, decided.result_subject, pieces)).await
}

async fn subscribe(exchange: &mut Exchange, tenant: Option<String>, pieces: &mut Pieces) -> Result<Reply, Failure> {
    exchange.check_time()?;
    // Subscribed before the lookup, so that a task that ends in between is not missed.
    let follow = Follow::stream(exchange).await?;
    let ours = exchange.gateway.result_subject.clone();
    let TaskAnswer { task, result_subject, .. } = exchange.find(tenant, Some(ours)).await?;
    match &task.result {
        Some(result) => complete(&exchange.request_id, &Finished::from_result(result)),
        None => follow.run(exchange, task.assignment_id, result_subject, pieces).await,
    }
}

/// The answer to a query or a cancel.
fn state(task: TaskState) -> Reply {
    let answer = wire::ipc::TaskAnswer {
        task_id: task.task_id,
        state: task.state,
        decision: task.decision,
        result: task.result,
    };
    Reply::ok(serde_json::to_vec(&answer).expect("an answer is JSON"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use bus::Message;
    use serde_json::Value;
    use wire::ipc::TaskRef;
    use wire::router::TaskQuery;
    use wire::subjects;

    /// The uids are made up, because root may act for every tenant.
    #[tokio::test]
    async fn task_of_another_tenant_is_answered_like_an_unknown_one() {
        let dir = tempfile::tempdir().unwrap();
        let bus = bus::local::Local::open(dir.path()).await.unwrap();
        let config = Config { socket: dir.path().join("s"), ..Config::default() };
        let gateway = crate::bind(config, bus.clone()).await.unwrap().gateway;

        let mut queries = bus.subscribe(subjects::GET_DECISION, None, 8).await.unwrap();
        let mut cancels = bus.subscribe(subjects::CANCEL, None, 8).await.unwrap();

        tokio::spawn(async move {
            loop {
                let (message, state) = tokio::select! {
                    Some(message) = queries.next() => (message, "assigned"),
                    Some(message) = cancels.next() => (message, "cancelled"),
                };

                let query: TaskQuery = serde_json::from_slice(&message.payload).unwrap();
                // Like a router of the previous version, which looks up the task by its id alone.
                let task =
                    serde_json::json!({"task_id": query.request_id, "state": state, "tenant_id": query.request_id});

                let payload = serde_json::json!({"ok": true, "task": task}).to_string().into();
                bus.publish(Message { subject: message.reply.unwrap(), payload, ..Message::default() })
                    .await
                    .unwrap();
            }
        });

        let answer = async |uid: u32, named: Option<&str>, owner: &str, name: &str| {
            let task = TaskRef { command: None, task_id: owner.into(), tenant_id: named.map(String::from) };
            let request = match name {
                "query" => Request::Query(task),
                "cancel" => Request::Cancel(task),
                _ => Request::Subscribe(task),
            };

            let deadline = Deadline::of(&request, 0, &gateway.shared.admission.settings(), Instant::now());
            let reply = run(gateway.clone(), uid, request, deadline, &mut Pieces::disconnected()).await;
            let mut answer: Value = serde_json::from_slice(&reply.payload).unwrap();
            answer["context"] = Value::Null;
            answer
        };

        for (uid, named, owner) in [(0, Some("acme"), "acme"), (0, None, "default"), (1000, None, "default")] {
            assert_eq!(answer(uid, named, owner, "query").await["state"], "assigned", "{uid} {named:?}");
            assert_eq!(answer(uid, named, owner, "cancel").await["state"], "cancelled", "{uid} {named:?}");
        }

        for name in ["query", "cancel", "subscribe"] {
            for (uid, named) in [(1000, None), (0, None), (0, Some("beta"))] {
                let unknown = serde_json::json!({"ok": false, "context": null, "error": {"code": 12, "status": 404,
                    "reason": "not_found", "message": "no task \"acme\" was pushed in the last day"}});
                assert_eq!(answer(uid, named, "acme", name).await, unknown, "{name} by {uid} for {named:?}");
            }

            let forbidden = answer(1000, Some("acme"), "acme", name).await;
            assert_eq!(forbidden["error"]["code"], 13, "{name}: forbidden whether or not the task exists");
        }
    }
}
