//! Records of pushed tasks in the bucket TASKS: what routers and workers know of a task by its tenant and request id.

use crate::{Bus, Error, Result, Write};
use bytes::Bytes;
use wire::limits::ID_MAX;
use wire::router::{ExecResult, TaskQuery, TaskState};
use wire::subjects::{BUCKET_TASKS, assignment_key, billed_key, task_key};

/// A task's record as it was read.
#[derive(Debug)]
pub struct Record {
    pub task: TaskState,
    key: String,
    revision: u64,
}

impl Record {
    /// The write of [`Record::save`], for a batch.
    pub fn into_write<'a>(self) -> Write<'a> {
        let value = encode(&self.task);
        Write::Put {
            bucket: BUCKET_TASKS,
            key: self.key,
            value,
            expected: Some(self.revision),
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
    let mut record = read(bus, task_key(tenant_id, request_id)).await?;
    if record.is_none() {
        // The previous version kept it under the request id alone; such records live for a day.
        record = read(bus, request_id.into()).await?;
    }
    Ok(record.filter(|record| record.task.tenant() == tenant_id && record.task.task_id == request_id))
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
        None => read(bus, request_id.clone()).await?,
    };
    Ok(record.filter(is_its))
}

/// The writes that make the record of a new task: the first fails with [`Error::WrongRevision`] if there is one.
pub fn create<'a>(task: &TaskState) -> Vec<Write<'a>> {
    let record = Write::Put {
        bucket: BUCKET_TASKS,
        key: task_key(task.tenant(), &task.task_id),
        value: encode(task),
        expected: Some(0),
    };
    std::iter::once(record).chain(note_assignment(task)).collect()
}

/// The write that notes whose task an assignment is of, for a result that does not name its tenant.
pub fn note_assignment<'a>(task: &TaskState) -> Option<Write<'a>> {
    let assignment_id = task.assignment_id.as_ref()?;
    let named = TaskQuery {
        request_id: task.task_id.clone(),
        tenant_id: Some(task.tenant().into()),
        result_subject: None,
    };
    let value = serde_json::to_vec(&named).expect("a query is JSON").into();
    Some(Write::Put {
        bucket: BUCKET_TASKS,
        key: assignment_key(assignment_id),
        value,
        expected: None,
    })
}

/// The write that notes that the result of an unknown task was billed.
pub fn note_billed<'a>(result: &ExecResult, sequence: u64) -> Write<'a> {
    Write::Put {
        bucket: BUCKET_TASKS,
        key: billed_key(&result.assignment_id),
        value: sequence.to_string().into(),
        expected: None,
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

async fn read(bus: &Bus, key: String) -> Result<Option<Record>> {
    let Some((bytes, revision)) = bus.kv_get(BUCKET_TASKS, &key).await? else {
        return Ok(None);
    };
    match serde_json::from_slice(&bytes) {
        Ok(task) => Ok(Some(Record { task, key, revision })),
        // A request id that looks like the key of an assignment.
        Err(_) if key.starts_with('@') => Ok(None),
        Err(error) => {
            tracing::error!(%error, key, "a task's record cannot be read");
            Ok(None)
        }
    }
}
