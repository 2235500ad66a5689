//! Client requests: parsing and validating their payloads.

use crate::reply::shortened;
use serde::de::DeserializeOwned;
use wire::ipc::{FrameType, TaskRef, TaskSubmit, Wait};

/// A request with a valid payload.
pub enum Request {
    Submit(Box<TaskSubmit>),
    Query(TaskRef),
    Cancel(TaskRef),
    Subscribe(TaskRef),
}

impl Request {
    /// Parses the payload of a frame. The error is the text for the client and names the invalid field.
    pub fn parse(kind: FrameType, payload: &[u8]) -> Result<Self, String> {
        Self::read(kind, payload).map_err(shortened)
    }

    fn read(kind: FrameType, payload: &[u8]) -> Result<Self, String> {
        let request = match kind {
            FrameType::TaskSubmit => Self::Submit(Box::new(object(payload)?)),
            FrameType::TaskQuery => Self::Query(object(payload)?),
            FrameType::TaskCancel => Self::Cancel(object(payload)?),
            FrameType::StreamSubscribe => Self::Subscribe(object(payload)?),
            other => unreachable!("frames of type {other:?} carry no request"),
        };

        match &request {
            Self::Submit(submit) => check_submit(submit)?,
            Self::Query(task) | Self::Cancel(task) | Self::Subscribe(task) => {
                check_id("task_id", &task.task_id)?;
                check_tenant(task.tenant_id.as_deref())?;
            }
        }
        Ok(request)
    }

    /// Whether pieces of output precede the last frame of the answer.
    pub fn is_stream(&self) -> bool {
        match self {
            Self::Submit(submit) => submit.wait == Wait::Stream,
            Self::Subscribe(_) => true,
            Self::Query(_) | Self::Cancel(_) => false,
        }
    }
}

fn object<T: DeserializeOwned>(payload: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(payload).map_err(|e| format!("Payload is not UTF-8: {e}"))?;
    // Serde would also accept an array for a struct.
    if !text.trim_start().starts_with('{') {
        return Err("Payload is not a JSON object".into());
    }
    serde_json::from_str(text).map_err(|error| unfit::<T>(text, &error))
}

/// Parses once more to find the name of the field, which serde_json's own error lacks.
fn unfit<T: DeserializeOwned>(text: &str, error: &serde_json::Error) -> String {
    let json = &mut serde_json::Deserializer::from_str(text);
    match serde_path_to_error::deserialize::<_, T>(json) {
        Err(at) if at.path().iter().next().is_some() && error.is_data() => {
            format!("Payload does not fit: {}: {error}", at.path())
        }
        _ => format!("Payload does not fit: {error}"),
    }
}

fn check_submit(submit: &TaskSubmit) -> Result<(), String> {
    if submit.command != "task_submit" {
        return Err(format!("command is {:?}; TASK_SUBMIT carries \"task_submit\"", submit.command));
    }

    check_id("task_type", &submit.task_type)?;
    let optional =
        [("request_id", &submit.request_id), ("trace_id", &submit.trace_id), ("policy_id", &submit.policy_id)];
    for (field, value) in optional {
        if let Some(value) = value {
            check_id(field, value)?;
        }
    }
    check_tenant(submit.tenant_id.as_deref())
}

fn check_id(field: &str, value: &str) -> Result<(), String> {
    wire::id::check(value).map_err(|error| format!("{field} {error}"))
}

fn check_tenant(tenant_id: Option<&str>) -> Result<(), String> {
    match tenant_id {
        Some(tenant) => wire::id::check_tenant(tenant).map_err(|error| format!("tenant_id {error}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_names_the_field_that_does_not_fit() {
        for (field, payload) in [
            ("task_type", r#"{"command":"task_submit","task_type":5}"#),
            ("line", r#"{"command":"task_submit","task_type":"t","line":"a"}"#),
            ("params", r#"{"command":"task_submit","task_type":"t","params":[]}"#),
            ("wait", r#"{"command":"task_submit","task_type":"t","wait":"never"}"#),
            ("timeout_ms", r#"{"command":"task_submit","task_type":"t","timeout_ms":-1}"#),
            ("`task_type`", r#"{"command":"task_submit"}"#),
            ("`tenant_id`", r#"{"command":"task_submit","task_type":"t","tenant_id":"a","tenant_id":"b"}"#),
        ] {
            let error = Request::parse(FrameType::TaskSubmit, payload.as_bytes()).err().unwrap();
            assert!(error.starts_with("Payload does not fit: ") && error.contains(field), "{payload}: {error}");
        }
    }
}
