//! Idempotency keys: whoever sends a request again with its key gets the first answer, from any router, for an hour.
//!
//! The keys are in a bucket on the bus, which all routers share. A key belongs to the first request that creates its
//! entry, and every later request with it stands for that one. A plain decision has no effect, so its entry is created
//! with the answer. A push works in two phases. The entry is created first and names the request: the key is reserved.
//! Then the task is stored ([`crate::assign`]), and the answer is committed to the entry with the same batch. If a router
//! ends in between, the entry leads to the first request's id, and the rule that a task exists once for its request id
//! does the rest: the next router finds the task, or creates it. Nothing waits for a router that has ended.
//!
//! A request that is refused takes no key, unless storing its task failed; so it can be corrected and sent again.

use crate::Router;
use crate::assign;
use crate::intake::Request;
use bus::Write;
use wire::router::{DecideRequest, Decision, ErrorBody, KeyAnswer, KeyRecord, RouterCode, TaskState};
use wire::subjects::{BUCKET_KEYS, idempotency_key};

/// What a request is answered.
pub struct Answer {
    /// The first request with the key; without a key, the request itself.
    pub request_id: String,
    pub decision: Decision,
    pub assignment_id: Option<String>,
    /// Where a copy of the result will go.
    pub result_subject: Option<String>,
}

/// A key that is reserved for a push.
pub struct Reserved {
    entry: String,
    revision: u64,
    digest: String,
}

impl Reserved {
    /// The write that commits the task's answer to the key.
    pub fn commit(&self, task: &TaskState) -> Option<Write<'static>> {
        let answer = KeyAnswer {
            decision: task.decision.clone()?,
            assignment_id: task.assignment_id.clone(),
        };
        let record = KeyRecord {
            request_id: task.task_id.clone(),
            digest: self.digest.clone(),
            answer: Some(answer),
        };
        Some(Write::Put {
            bucket: BUCKET_KEYS,
            key: self.entry.clone(),
            value: encode(&record),
            expected: Some(self.revision),
            done: false,
        })
    }
}

/// Decides a request that is pushed, or has an idempotency key, or both.
pub async fn answer(router: &Router, request: &Request) -> Result<Answer, ErrorBody> {
    match request.key() {
        None => {
            let task = assign::push(router, request, None).await?;
            of_task(task, request)
        }
        Some(key) if request.push_assignment => push(router, request, key).await,
        Some(key) => decide(router, request, key).await,
    }
}

async fn decide(router: &Router, request: &Request, key: &str) -> Result<Answer, ErrorBody> {
    let key = Key::of(request, key);
    if let Some(found) = key.find(router).await? {
        return found.answer(router, request).await;
    }

    // The provider is not called, so its place in a half-open breaker is released at once.
    let holder = uuid::Uuid::now_v7().to_string();
    let decision = router.decide(request, &holder)?.decision;
    let answer = KeyAnswer { decision, assignment_id: None };
    match key.create(router, &request.request_id, Some(answer.clone())).await? {
        Some(_) => Ok(of_key(request.request_id.clone(), answer)),
        None => key.found_by_another(router).await?.answer(router, request).await,
    }
}

async fn push(router: &Router, request: &Request, key: &str) -> Result<Answer, ErrorBody> {
    let key = Key::of(request, key);
    let found = match key.find(router).await? {
        Some(found) => found,
        None => {
            let prepared = assign::prepare(router, request)?;
            match key.create(router, &request.request_id, None).await? {
                Some(revision) => {
                    let reserved = key.reserved(revision);
                    let task = assign::store(router, request, prepared, Some(&reserved)).await?;
                    return of_task(task, request);
                }
                // Another router was quicker.
                None => key.found_by_another(router).await?,
            }
        }
    };
    if found.record.answer.is_some() {
        return found.answer(router, request).await;
    }

    // The router that reserved the key has not stored the task yet, or ended before that, or before it committed.
    let mut first = request.clone();
    first.asked.request_id.clone_from(&found.record.request_id);
    let reserved = key.reserved(found.revision);
    let task = assign::push(router, &first, Some(&reserved)).await?;
    of_task(task, &first)
}

fn of_task(task: TaskState, request: &Request) -> Result<Answer, ErrorBody> {
    let result_subject = request.result_subject.clone();
    let result_subject = result_subject.filter(|subject| task.will_tell(subject));
    let decision = task.decision;
    Ok(Answer {
        request_id: task.task_id,
        decision: decision.ok_or_else(|| ErrorBody::new(RouterCode::Internal, "the task's record has no decision"))?,
        assignment_id: task.assignment_id,
        result_subject,
    })
}

fn of_key(request_id: String, answer: KeyAnswer) -> Answer {
    let KeyAnswer { decision, assignment_id } = answer;
    Answer { request_id, decision, assignment_id, result_subject: None }
}

/// A request's key: where its entry is, and what the request asks for.
struct Key {
    entry: String,
    digest: String,
}

/// The entry of a key, which belongs to the same request or to a repeat of it.
struct Found {
    record: KeyRecord,
    revision: u64,
}

impl Key {
    fn of(request: &DecideRequest, key: &str) -> Self {
        // A client that repeats a request may number it anew.
        let asked = DecideRequest { request_id: String::new(), idempotency_key: None, ..request.clone() };
        Self {
            entry: idempotency_key(&request.tenant_id, key),
            digest: assign::digest(&asked),
        }
    }

    fn reserved(self, revision: u64) -> Reserved {
        let Self { entry, digest } = self;
        Reserved { entry, revision, digest }
    }

    /// The key's entry. A conflict if it belongs to another request.
    async fn find(&self, router: &Router) -> Result<Option<Found>, ErrorBody> {
        let stored = router.bus.kv_get(BUCKET_KEYS, &self.entry).await;
        let Some((bytes, revision)) = stored.map_err(unavailable)? else {
            return Ok(None);
        };
        let record: KeyRecord = serde_json::from_slice(&bytes).map_err(|error| {
            tracing::error!(%error, entry = self.entry, "the entry of an idempotency key cannot be read");
            ErrorBody::new(RouterCode::Internal, "the idempotency key's entry cannot be read; choose another key")
        })?;

        if record.digest != self.digest {
            let text = "a request with this idempotency_key and another body exists; choose another key";
            return Err(ErrorBody::new(RouterCode::IdempotencyConflict, text));
        }
        Ok(Some(Found { record, revision }))
    }

    /// Creates the key's entry and returns its revision; `None` if there is one.
    async fn create(
        &self,
        router: &Router,
        request_id: &str,
        answer: Option<KeyAnswer>,
    ) -> Result<Option<u64>, ErrorBody> {
        if let Some(refusal) = router.stores.key_refusal() {
            return Err(refusal);
        }
        let record = KeyRecord { request_id: request_id.into(), digest: self.digest.clone(), answer };
        match router
            .bus
            .kv_put(BUCKET_KEYS, &self.entry, encode(&record), Some(0))
            .await
        {
            Ok(revision) => Ok(Some(revision)),
            Err(bus::Error::WrongRevision(_)) => Ok(None),
            Err(error) => Err(unavailable(error)),
        }
    }

    /// The entry that another router created a moment ago.
    async fn found_by_another(&self, router: &Router) -> Result<Found, ErrorBody> {
        let expired = || ErrorBody::new(RouterCode::Unavailable, "the idempotency key expired just now; try again");
        self.find(router).await?.ok_or_else(expired)
    }
}

impl Found {
    /// The committed answer. If the client waits for the result, the task's record also names where it receives it.
    async fn answer(self, router: &Router, request: &Request) -> Result<Answer, ErrorBody> {
        let KeyRecord { request_id, answer, .. } = self.record;
        let missing = || ErrorBody::new(RouterCode::Internal, "the idempotency key's entry has no answer");
        let answer = of_key(request_id, answer.ok_or_else(missing)?);

        let waits = request
            .result_subject
            .as_ref()
            .filter(|_| answer.assignment_id.is_some());
        let Some(subject) = waits else {
            return Ok(answer);
        };
        let record = bus::tasks::load(&router.bus, &request.tenant_id, &answer.request_id).await;
        let task = record.map_err(unavailable)?.map(|record| record.task);
        // Records of ended tasks may be evicted; the answer stays.
        let Some(task) = task.filter(|task| task.assignment_id == answer.assignment_id) else {
            return Ok(answer);
        };
        let told = crate::results::tell(&router.bus, task, subject)
            .await
            .map_err(unavailable)?;
        let result_subject = Some(subject.clone()).filter(|subject| told.will_tell(subject));
        Ok(Answer { result_subject, ..answer })
    }
}

fn unavailable(error: bus::Error) -> ErrorBody {
    if let bus::Error::Full(_) = error {
        return crate::stores::no_room_for_keys(&error.to_string());
    }
    ErrorBody::new(RouterCode::Unavailable, format!("the idempotency key was not stored: {error}"))
}

fn encode(record: &KeyRecord) -> bytes::Bytes {
    serde_json::to_vec(record).expect("a key's record is JSON").into()
}
