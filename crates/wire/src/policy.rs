//! The policy file as users write it, in JSON, YAML or TOML.

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
    #[serde(default)]
    pub circuit_breaker: CircuitBreaker,
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
    #[serde(default)]
    pub cost: Option<f64>,
    /// Expected latency, used until real results are known.
    #[serde(default)]
    pub latency_ms: Option<f64>,
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
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CircuitBreaker {
    /// Consecutive failures.
    pub failure_threshold: u32,
    pub error_rate_threshold: f64,
    pub min_calls: u32,
    pub timeout_ms: u64,
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
