//! A provider that returns the task's payload. A prompt, or the last message of a conversation, is streamed word by word.

use super::{Job, Outcome, Output};
use std::collections::BTreeMap;
use wire::json::Json;

pub async fn run(job: &Job<'_>, output: &Output) -> Outcome {
    if let Some(prompt) = job.prompt() {
        for word in prompt.split_inclusive(' ') {
            output.push(word).await;
        }
        return Outcome::text(prompt);
    }

    Outcome::success(match &job.task.payload {
        Some(payload) => payload.clone().into(),
        None => Json::of(&BTreeMap::from([("payload_ref", &job.task.payload_ref)])),
    })
}
