//! A provider that returns the task's payload. A prompt is streamed word by word.

use super::{Job, Outcome, Output};
use serde_json::{Map, Value};

pub async fn run(job: &Job<'_>, output: &Output) -> Outcome {
    if let Some(prompt) = job.text("prompt") {
        for word in prompt.split_inclusive(' ') {
            output.push(word).await;
        }
        return Outcome::text(prompt);
    }

    match (&job.task.payload, &job.task.payload_ref) {
        (Some(payload), _) => Outcome::success(Value::Object(payload.clone())),
        (None, Some(reference)) => {
            let fields = Map::from_iter([("payload_ref".into(), reference.as_str().into())]);
            Outcome::success(Value::Object(fields))
        }
        (None, None) => Outcome::success(Value::Null),
    }
}
