//! The policy file as users write it, in JSON, YAML or TOML, and the last good version of it that routers share.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    #[serde(default = "first_version")]
    pub version: String,
    #[serde(default)]
    pub providers: Vec<Provider>,
    /// Legacy form of `providers`: name → share from 0 to 1.
    #[serde(default)]
    pub weights: BTreeMap<String, f64>,
    #[serde(default)]
    pub sticky: Option<Sticky>,
    /// The first rule whose condition holds decides.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Additional breaker rules for the tasks of this policy. The operator's rules apply to all tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<PolicyBreaker>,
}

fn first_version() -> String {
    "1.0".into()
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    pub name: String,
    /// Relative weight from 0 to 100. A provider of weight 0 is never drawn, but a rule may name it.
    #[serde(default)]
    pub weight: u32,
    #[serde(default)]
    pub priority: Option<u32>,
    /// What a task costs whose tokens are not known or have no `price`.
    #[serde(default)]
    pub cost: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<Price>,
    /// Expected latency, used until real results are known.
    #[serde(default)]
    pub latency_ms: Option<f64>,
}

/// What a million of a model's tokens cost, as [`crate::openai::Price`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    pub input: f64,
    pub output: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_input: Option<f64>,
}

impl From<Price> for crate::openai::Price {
    fn from(Price { input, output, cached_input }: Price) -> Self {
        Self { input, output, cached_input }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sticky {
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Name of the `metadata` field that identifies a session.
    pub session_key: String,
    #[serde(default)]
    pub ttl: Option<String>,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A CEL expression, or the legacy JSON form.
    pub when: Value,
    /// Providers in order of preference; the first eligible one is chosen. A single name needs no list.
    #[serde(deserialize_with = "one_or_many")]
    pub to: Vec<String>,
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a provider name, or a list of provider names")]
    enum Names {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Names::deserialize(deserializer)? {
        Names::One(name) => vec![name],
        Names::Many(names) => names,
    })
}

/// When a provider is excluded from the draw, and how it becomes eligible again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CircuitBreaker {
    /// Consecutive failures that open the breaker.
    pub failure_threshold: u32,
    /// Share of failures that opens the breaker, above 0 and at most 1; applies from `min_calls` calls on.
    pub error_rate_threshold: f64,
    pub min_calls: u32,
    /// How long the breaker stays open.
    pub timeout_ms: u64,
    /// While half open: the number of concurrent calls let through and, in `success_threshold`, how many must succeed.
    pub half_open_max_calls: u32,
    pub success_threshold: u32,
}

impl Default for CircuitBreaker {
    fn default() -> Self {
        Self {
            failure_threshold: 5,
            error_rate_threshold: 0.5,
            min_calls: 10,
            timeout_ms: 60_000,
            half_open_max_calls: 3,
            success_threshold: 2,
        }
    }
}

/// A policy's own breaker rules. A missing field defaults to the operator's rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyBreaker {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_threshold: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_rate_threshold: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_calls: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub half_open_max_calls: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_threshold: Option<u32>,
}

impl PolicyBreaker {
    /// Completes these rules with those of the operator.
    pub fn over(&self, rules: &CircuitBreaker) -> CircuitBreaker {
        CircuitBreaker {
            failure_threshold: self.failure_threshold.unwrap_or(rules.failure_threshold),
            error_rate_threshold: self.error_rate_threshold.unwrap_or(rules.error_rate_threshold),
            min_calls: self.min_calls.unwrap_or(rules.min_calls),
            timeout_ms: self.timeout_ms.unwrap_or(rules.timeout_ms),
            half_open_max_calls: self.half_open_max_calls.unwrap_or(rules.half_open_max_calls),
            success_threshold: self.success_threshold.unwrap_or(rules.success_threshold),
        }
    }
}

/// The last good version of a policy, in the bucket [`crate::subjects::BUCKET_POLICIES`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    pub format: Format,
    /// The file, as it was.
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Json,
    Yaml,
    Toml,
}

/// Every policy that there has ever been, by `<tenant>/<policy>`, under [`crate::subjects::POLICIES_INDEX`]. The first
/// router that finds a policy directory makes it: from then on the built-in policy serves nobody.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    pub policies: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// SHA-1 of format and text, in hex. Empty: no version could be used yet, and none is stored.
    pub hash: String,
    /// When a router read that version, or when the policy was deleted: milliseconds since the epoch.
    pub at_ms: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
}

/// `<tenant>/<policy>.deleted` in a policy directory: whatever was read of the policy before is deleted for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// Milliseconds since the epoch.
    pub deleted_ms: u64,
    /// Who did it, for people to read.
    #[serde(default)]
    pub by: String,
}
