//! Results of assignments, in the current format and in those that older workers send.

use super::VERSION;
use crate::json::Json;
use memchr::memmem;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum ResultStatus {
    Success,
    Error,
    Timeout,
    Cancelled,
}

impl ResultStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The result that a worker publishes for the router and all waiting clients. [`ExecResult::decode`] also accepts the
/// legacy formats.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecResult {
    #[serde(default = "version")]
    pub version: String,
    pub assignment_id: String,
    pub request_id: String,
    pub status: ResultStatus,
    pub provider_id: String,
    pub job: JobType,
    #[serde(default)]
    pub latency_ms: u64,
    #[serde(default)]
    pub cost: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Json>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    /// Milliseconds since the epoch or RFC 3339, passed through unchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_code: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_message: Option<String>,
    /// The number of output chunks that the last attempt published; tells readers when they have all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<u64>,
    /// For an error `rate_limited`: the time in seconds after which the provider's endpoint accepts requests again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u64>,
}

/// The [`ExecResult::output`] of a run that produced text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TextOutput {
    pub text: String,
}

impl From<TextOutput> for Json {
    fn from(output: TextOutput) -> Self {
        Self::of(&output)
    }
}

fn version() -> String {
    VERSION.into()
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JobType {
    #[serde(rename = "type")]
    pub job_type: String,
}

impl ExecResult {
    /// This result without its output, for a destination that the output does not fit: an error with the code `output`.
    #[must_use]
    pub fn without_output(&self, why: String) -> Self {
        Self {
            status: ResultStatus::Error,
            output: None,
            error_code: Some("output".into()),
            error_message: Some(why),
            ..self.clone()
        }
    }

    /// Decodes a result in the current format or a legacy one: in an envelope `{kind:"exec_result",data}`, or with
    /// `job_type` for `job.type`, `result` for `output`, `completed_at` for `timestamp`. The error is for the log: it
    /// quotes nothing of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        // Most results have the current format, and need no tree. A field of another format may also stand in the output.
        let may_be_legacy = Form::LEGACY
            .iter()
            .any(|field| memmem::find(bytes, field.as_bytes()).is_some());
        if !may_be_legacy
            && let Ok(result) = serde_json::from_slice::<Self>(bytes)
            && result.version == VERSION
        {
            return Ok(result);
        }
        if serde_json::from_slice::<Form>(bytes).is_ok_and(|form| form.is_current()) {
            return serde_json::from_slice(bytes)
                .map_err(|e| format!("the result does not fit the schema: {}", crate::unfit(&e)));
        }

        let mut value: Value = serde_json::from_slice(bytes).map_err(|e| format!("the result is not JSON: {e}"))?;
        if value.get("kind").is_some() {
            if value["kind"] != "exec_result" {
                return Err("the envelope has another kind than \"exec_result\"".into());
            }
            value = value["data"].take();
        }

        // Move the fields of legacy formats to their current places.
        let object = value.as_object_mut().ok_or("the result is not an object")?;
        if !object.contains_key("job") {
            let job_type = object.remove("job_type").unwrap_or_else(|| "unknown".into());
            object.insert("job".into(), Value::Object(Map::from_iter([("type".into(), job_type)])));
        }
        for (old, new) in [("result", "output"), ("completed_at", "timestamp")] {
            if let Some(found) = object.remove(old) {
                object.entry(new).or_insert(found);
            }
        }

        match object.get("version").and_then(Value::as_str) {
            None | Some("1" | "1.0" | "v1") => {}
            Some(_) => return Err("the result's version is unknown; use \"1\"".into()),
        }
        object.insert("version".into(), VERSION.into());
        serde_json::from_value(value).map_err(|e| format!("the result does not fit the schema: {}", crate::unfit(&e)))
    }
}

/// The fields that distinguish the formats of results.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Form {
    version: Option<String>,
    kind: Option<IgnoredAny>,
    job: Option<IgnoredAny>,
    result: Option<IgnoredAny>,
    completed_at: Option<IgnoredAny>,
}

impl Form {
    /// The fields that only other formats have, as they are written; `version` is optional there.
    const LEGACY: [&str; 4] = ["\"kind\"", "\"result\"", "\"completed_at\"", "\"job_type\""];

    fn is_current(&self) -> bool {
        let legacy = self.kind.is_some() || self.result.is_some() || self.completed_at.is_some();
        !legacy && self.job.is_some() && self.version.as_deref() == Some(VERSION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_decodes_from_current_and_legacy_formats() {
        let plain = r#"{"assignment_id":"a","request_id":"r","status":"success","provider_id":"p","job":{"type":"t"},"latency_ms":5,"cost":0.1}"#;
        let flat = r#"{"version":"1.0","assignment_id":"a","request_id":"r","status":"success","provider_id":"p","job_type":"t","result":{"x":1},"completed_at":"2026-01-01T00:00:00Z"}"#;
        let envelope = format!(r#"{{"version":"v1","kind":"exec_result","data":{plain}}}"#);
        for text in [plain, flat, &envelope] {
            let result = ExecResult::decode(text.as_bytes()).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert_eq!((&*result.request_id, &*result.job.job_type), ("r", "t"));
        }
        assert_eq!(ExecResult::decode(flat.as_bytes()).unwrap().output.unwrap().value()["x"], 1);
        for bad in ["", "[]", "{}", r#"{"kind":"other","data":{}}"#, r#"{"version":"2","status":"success"}"#] {
            assert!(ExecResult::decode(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
