//! Gives the payload back; a prompt is streamed word by word.

use super::{Job, Outcome, Output};
use serde_json::Value;

pub async fn run(job: &Job<'_>, output: &Output) -> Outcome {
    if let Some(prompt) = job.text("prompt") {
        for word in prompt.split_inclusive(' ') {
            output.push(word).await;
        }
        return Outcome::text(prompt);
    }
    match (&job.task.payload, &job.task.payload_ref) {
        (Some(payload), _) => Outcome::success(Value::Object(payload.clone())),
        (None, Some(reference)) => Outcome::success(serde_json::json!({"payload_ref": reference})),
        (None, None) => Outcome::success(Value::Null),
    }
}
