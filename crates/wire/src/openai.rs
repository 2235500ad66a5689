//! What model providers return, in the terms of OpenAI's API, and the types of the tasks that the gateway's
//! OpenAI-compatible entry submits.

use crate::json::{Json, JsonObject};
use serde::{Deserialize, Serialize};

/// Task type of a chat completion. The payload's `params` are the body of the API's request.
pub const CHAT: &str = "chat.completions";
/// Task type of a request for embeddings; its payload is as for [`CHAT`].
pub const EMBEDDINGS: &str = "embeddings";

/// The output of a chat completion. A provider that is not a model returns the text alone.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Completion {
    pub text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<String>,
    /// The fields of the model's message besides `role` and a `content` that is text: `tool_calls`, `refusal`, ….
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<JsonObject>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Json>,
    /// The token usage as the endpoint reported it; see [`Tokens`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Json>,
    /// The model as the endpoint named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// A piece of a chat completion's output that is more than text. A piece that is text is a JSON string.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Delta {
    pub delta: JsonObject,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Json>,
}

/// The output of a request for embeddings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Embeddings {
    pub data: Json,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Json>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// The numbers of a token usage that determine the cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tokens {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub prompt_tokens_details: Option<PromptTokens>,
}

/// Part of [`Tokens`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptTokens {
    /// The prompt's tokens that the endpoint had in its cache.
    pub cached_tokens: Option<u64>,
}

impl Tokens {
    pub fn total(&self) -> u64 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }

    /// The cached tokens of the prompt, which are never more than the prompt has.
    pub fn cached(&self) -> u64 {
        let cached = self.prompt_tokens_details.and_then(|details| details.cached_tokens);
        cached.unwrap_or_default().min(self.prompt_tokens)
    }
}

/// What a million of a model's tokens cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Price {
    pub input: f64,
    pub output: f64,
    /// The price of tokens of the prompt that the endpoint had in its cache; without it, that of `input`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_input: Option<f64>,
}

impl Price {
    pub fn cost(&self, tokens: &Tokens) -> f64 {
        let cached = tokens.cached();
        let fresh = tokens.prompt_tokens - cached;
        let per_million = fresh as f64 * self.input
            + cached as f64 * self.cached_input.unwrap_or(self.input)
            + tokens.completion_tokens as f64 * self.output;
        per_million / 1e6
    }

    /// The name of a price that is not a number of 0 or more.
    pub fn invalid(&self) -> Option<&'static str> {
        let prices =
            [("input", self.input), ("output", self.output), ("cached_input", self.cached_input.unwrap_or(0.0))];
        let is_invalid = |(_, price): &(&str, f64)| !price.is_finite() || *price < 0.0;
        prices.into_iter().find(is_invalid).map(|(name, _)| name)
    }
}

/// The body of an error, as OpenAI's clients expect it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    pub error: ErrorDetail,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    pub message: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// The field of the request that the error is about.
    pub param: Option<String>,
    pub code: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_is_that_of_fresh_cached_and_written_tokens() {
        let price = Price { input: 2.0, output: 10.0, cached_input: Some(0.5) };
        let check = |usage: &str, price: Price, expected: f64| {
            let cost = price.cost(&serde_json::from_str(usage).unwrap());
            assert!((cost - expected).abs() < 1e-12, "{usage}: {cost}");
        };
        let usage = r#"{"prompt_tokens":1000,"completion_tokens":200,"total_tokens":1200}"#;
        check(usage, price, 0.004);
        check(usage, Price { output: 0.0, ..price }, 0.002);
        let cached = |tokens: &str| {
            format!(
                r#"{{"prompt_tokens":1000,"completion_tokens":0,"prompt_tokens_details":{{"cached_tokens":{tokens}}}}}"#
            )
        };
        check(&cached("400"), price, 0.0014);
        check(&cached("400"), Price { cached_input: None, ..price }, 0.002);
        check(&cached("99999"), price, 0.0005);
        check(&cached("null"), price, 0.002);
        check("{}", price, 0.0);
    }

    #[test]
    fn golden_outputs_encode_back_to_their_text() {
        fn again<T: Serialize + serde::de::DeserializeOwned>(text: &str) {
            let message: T = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(serde_json::to_string(&message).unwrap(), text);
        }
        #[derive(Deserialize)]
        struct Case {
            #[serde(rename = "type")]
            kind: String,
            text: String,
        }

        let cases: Vec<Case> = serde_json::from_str(include_str!("../../../fixtures/wire/openai.json")).unwrap();
        for case in &cases {
            match case.kind.as_str() {
                "completion" => again::<Completion>(&case.text),
                "delta" => again::<Delta>(&case.text),
                "embeddings" => again::<Embeddings>(&case.text),
                "error" => again::<ErrorReply>(&case.text),
                other => panic!("unknown type {other:?}"),
            }
        }
        assert_eq!(cases.len(), 6);
    }
}
