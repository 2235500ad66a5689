//! A scripted router whose behaviour is encoded in the task id: `Answered-2-17` is answered, with two pieces of output.

use bus::{Bus, Message};
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use wire::subjects;

/// The deadline of requests that must time out.
pub const SHORT: Duration = Duration::from_millis(30);
const LATE: Duration = Duration::from_millis(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Answered,
    /// Answered once the case releases it.
    Held,
    /// Never answered.
    Silent,
    /// Answered after [`SHORT`].
    Late,
    /// Decided, but never completed.
    Forgotten,
    Refused,
    Nonsense,
}

impl Fate {
    pub const ALL: [Self; 7] =
        [Self::Answered, Self::Held, Self::Silent, Self::Late, Self::Forgotten, Self::Refused, Self::Nonsense];

    /// Whether the request may end by its deadline.
    pub fn runs_out(self) -> bool {
        matches!(self, Self::Silent | Self::Late | Self::Forgotten)
    }
}

pub fn task_id(fate: Fate, chunks: u8, number: u64) -> String {
    format!("{fate:?}-{chunks}-{number}")
}

fn read(task_id: &str) -> Option<(Fate, u64)> {
    let mut parts = task_id.split('-');
    let name = parts.next()?;
    let fate = Fate::ALL.into_iter().find(|fate| format!("{fate:?}") == name)?;
    Some((fate, parts.next()?.parse().ok()?))
}

#[derive(Clone)]
pub struct Script {
    bus: Bus,
    case: Arc<Mutex<Case>>,
}

/// State that one test case shares with the router.
#[derive(Clone)]
pub struct Case {
    /// Each permit releases one held reply.
    pub replies: Arc<Semaphore>,
    /// Ids of the tasks that have reached the router.
    pub arrived: Arc<Mutex<BTreeSet<String>>>,
}

impl Case {
    fn new() -> Self {
        Self { replies: Arc::new(Semaphore::new(0)), arrived: Arc::default() }
    }
}

impl Script {
    /// Serves until it is stopped.
    pub async fn start(bus: &Bus, stop: &CancellationToken) -> Self {
        let script = Self { bus: bus.clone(), case: Arc::new(Mutex::new(Case::new())) };
        for subject in [subjects::DECIDE, subjects::GET_DECISION, subjects::CANCEL] {
            let mut requests = bus.subscribe(subject, None, 4096).await.unwrap();
            let (script, stop) = (script.clone(), stop.clone());
            tokio::spawn(stop.run_until_cancelled_owned(async move {
                while let Some(message) = requests.next().await {
                    let (script, case) = (script.clone(), script.case.lock().clone());
                    tokio::spawn(async move { script.act(subject, message, case).await });
                }
            }));
        }
        script
    }

    pub fn next_case(&self) -> Case {
        let case = Case::new();
        *self.case.lock() = case.clone();
        case
    }

    async fn act(&self, subject: &str, message: Message, case: Case) {
        let request: Value = serde_json::from_slice(&message.payload).unwrap();
        let id = request["request_id"].as_str().unwrap();
        case.arrived.lock().insert(id.into());

        let (fate, chunks) = read(id).expect("the task id is one of the script's");
        match fate {
            Fate::Silent => return,
            Fate::Held => case.replies.acquire().await.unwrap().forget(),
            Fate::Late => tokio::time::sleep(LATE).await,
            _ => {}
        }

        let answer = match fate {
            Fate::Nonsense => "nonsense".into(),
            Fate::Refused => {
                let error = json!({"code": "policy_not_found", "message": "none"});
                json!({"ok": false, "error": error, "context": {"request_id": id}}).to_string()
            }
            _ if subject == subjects::DECIDE => {
                json!({"ok": true, "decision": {}, "context": {"request_id": id}}).to_string()
            }
            _ => {
                let task = json!({"task_id": id, "state": "assigned", "tenant_id": "default"});
                json!({"ok": true, "task": task}).to_string()
            }
        };

        self.publish(&message.reply.unwrap(), answer).await;
        // Whoever names a subject waits for the result there.
        if let Some(result_subject) = request["result_subject"].as_str()
            && matches!(fate, Fate::Answered | Fate::Held)
        {
            self.work(id, chunks, result_subject).await;
        }
    }

    async fn work(&self, id: &str, chunks: u64, result_subject: &str) {
        for seq in 0..chunks {
            let chunk = json!({"request_id": id, "assignment_id": "a", "attempt": 1, "seq": seq, "data": seq});
            self.publish(&subjects::output(id), chunk.to_string()).await;
        }

        let result = json!({"version": "1", "assignment_id": "a", "request_id": id, "status": "success",
            "provider_id": "p", "job": {"type": "t"}, "chunks": chunks});
        self.publish(result_subject, result.to_string()).await;
    }

    async fn publish(&self, subject: &str, payload: String) {
        let message = Message {
            subject: subject.into(),
            payload: Bytes::from(payload),
            ..Message::default()
        };
        self.bus.publish(message).await.unwrap();
    }
}
