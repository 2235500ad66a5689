//! Records of pushed tasks in the bucket TASKS: what routers and workers know of a task by its tenant and request id.

use crate::{Bus, Error, Result, Write};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use wire::limits::ID_MAX;
use wire::router::{ExecAssignment, ExecResult, TaskHead, TaskQuery, TaskState};
use wire::subjects::{BUCKET_TASKS, assignment_key, billed_key, task_key};

/// A task's record as it was read.
#[derive(Debug)]
pub struct Record {
    pub task: TaskState,
    key: String,
    revision: u64,
}

impl Record {
    /// The record of a new task after [`create`] has written it.
    pub fn written(task: TaskState, revision: u64) -> Self {
        let key = task_key(task.tenant(), &task.task_id);
        Self { task, key, revision }
    }

    /// The write of [`Record::save`], for a batch.
    pub fn write<'a>(&self) -> Write<'a> {
        let value = encode(&self.task);
        Write::Put {
            bucket: BUCKET_TASKS,
            key: self.key.clone(),
            value,
            expected: Some(self.revision),
            done: self.task.state.is_final(),
        }
    }

    /// Writes the record back; [`Error::WrongRevision`] if somebody else has changed it meanwhile.
    pub async fn save(&self, bus: &Bus) -> Result<()> {
        let value = encode(&self.task);
        bus.kv_put(BUCKET_TASKS, &self.key, value, Some(self.revision))
            .await
            .map(drop)
    }
}

/// The record of a tenant's task. One that cannot be read is logged, and as good as none.
pub async fn load(bus: &Bus, tenant_id: &str, request_id: &str) -> Result<Option<Record>> {
    let found = find(bus, tenant_id, request_id).await?;
    let record = found.and_then(|found| found.decode().map(|task| found.into_record(task)));
    Ok(record.filter(|record| record.task.tenant() == tenant_id && record.task.task_id == request_id))
}

/// Whether the task of this assignment still has to run, without what takes time to decode; `None` if the task has no
/// record, or one of another assignment.
pub async fn head(bus: &Bus, assignment: &ExecAssignment) -> Result<Option<TaskHead>> {
    let ExecAssignment { tenant_id, request_id, assignment_id, .. } = assignment;
    let found = find(bus, tenant_id, request_id).await?;
    let head = found.and_then(|found| found.decode::<TaskHead>());
    Ok(head.filter(|head| {
        head.tenant() == tenant_id && head.task_id == *request_id && head.assignment_id.as_ref() == Some(assignment_id)
    }))
}

/// The record of the task whose assignment this result is of. The assignment is the proof: what the result says of its
/// tenant is only where to look first.
pub async fn of_result(bus: &Bus, result: &ExecResult) -> Result<Option<Record>> {
    let is_its = |record: &Record| record.task.assignment_id.as_ref() == Some(&result.assignment_id);
    let request_id = &result.request_id;
    if let Some(tenant_id) = result.tenant_id.as_deref().filter(|tenant| tenant.len() <= ID_MAX)
        && let Some(record) = load(bus, tenant_id, request_id).await?.filter(is_its)
    {
        return Ok(Some(record));
    }

    let named = bus.kv_get(BUCKET_TASKS, &assignment_key(&result.assignment_id)).await?;
    let named = named.and_then(|(bytes, _)| serde_json::from_slice::<TaskQuery>(&bytes).ok());
    let record = match named.and_then(|named| named.tenant_id) {
        Some(tenant_id) => load(bus, &tenant_id, request_id).await?,
        None => {
            let found = read(bus, request_id.clone()).await?;
            found.and_then(|found| found.decode().map(|task| found.into_record(task)))
        }
    };
    Ok(record.filter(is_its))
}

/// The write that makes the record of a new task. It fails with [`Error::WrongRevision`] if there is one.
pub fn create<'a>(task: &TaskState) -> Write<'a> {
    Write::Put {
        bucket: BUCKET_TASKS,
        key: task_key(task.tenant(), &task.task_id),
        value: encode(task),
        expected: Some(0),
        done: false,
    }
}

/// The write that notes whose task an assignment is of. A worker on the common subject may have been written by
/// somebody else, and its result need not name the tenant.
pub fn note_assignment<'a>(assignment: &ExecAssignment) -> Write<'a> {
    let named = TaskQuery {
        request_id: assignment.request_id.clone(),
        tenant_id: Some(assignment.tenant_id.clone()),
        result_subject: None,
    };
    Write::Put {
        bucket: BUCKET_TASKS,
        key: assignment_key(&assignment.assignment_id),
        value: serde_json::to_vec(&named).expect("a query is JSON").into(),
        expected: None,
        // Only results without a tenant need it, and our workers name the tenant.
        done: true,
    }
}

/// The write that notes that the result of an unknown task was billed.
pub fn note_billed<'a>(result: &ExecResult, sequence: u64) -> Write<'a> {
    Write::Put {
        bucket: BUCKET_TASKS,
        key: billed_key(&result.assignment_id),
        value: sequence.to_string().into(),
        expected: None,
        done: true,
    }
}

/// Whether another message with the result of this unknown task was billed: not the one of this sequence.
pub async fn was_billed(bus: &Bus, result: &ExecResult, sequence: u64) -> Result<bool> {
    let noted = bus.kv_get(BUCKET_TASKS, &billed_key(&result.assignment_id)).await?;
    Ok(noted.is_some_and(|(value, _)| value != sequence.to_string()))
}

/// Changes a task's record; tries again where another writer came between. `None`: there is no such task.
pub async fn update(
    bus: &Bus,
    tenant_id: &str,
    request_id: &str,
    change: impl Fn(&mut TaskState),
) -> Result<Option<TaskState>> {
    for _ in 0..16 {
        let Some(mut record) = load(bus, tenant_id, request_id).await? else {
            return Ok(None);
        };
        change(&mut record.task);
        match record.save(bus).await {
            Ok(()) => return Ok(Some(record.task)),
            Err(Error::WrongRevision(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Error::WrongRevision(request_id.into()))
}

fn encode(task: &TaskState) -> Bytes {
    serde_json::to_vec(task).expect("a task is JSON").into()
}

/// A record as it is stored.
struct Found {
    bytes: Bytes,
    key: String,
    revision: u64,
}

impl Found {
    fn decode<T: DeserializeOwned>(&self) -> Option<T> {
        match serde_json::from_slice(&self.bytes) {
            Ok(task) => Some(task),
            // A request id that looks like the key of an assignment.
            Err(_) if self.key.starts_with('@') => None,
            Err(error) => {
                tracing::error!(%error, key = self.key, "a task's record cannot be read");
                None
            }
        }
    }

    fn into_record(self, task: TaskState) -> Record {
        let Self { key, revision, .. } = self;
        Record { task, key, revision }
    }
}

async fn find(bus: &Bus, tenant_id: &str, request_id: &str) -> Result<Option<Found>> {
    match read(bus, task_key(tenant_id, request_id)).await? {
        // An earlier version kept it under the request id alone; such records live for a day.
        None => read(bus, request_id.into()).await,
        found => Ok(found),
    }
}

async fn read(bus: &Bus, key: String) -> Result<Option<Found>> {
    let found = bus.kv_get(BUCKET_TASKS, &key).await?;
    Ok(found.map(|(bytes, revision)| Found { bytes, key, revision }))
}
