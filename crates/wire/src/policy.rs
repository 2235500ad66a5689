//! A policy as people write it, in JSON, YAML or TOML.

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
    /// Legacy: name → share 0 … 1.
    #[serde(default)]
    pub weights: BTreeMap<String, f64>,
    #[serde(default)]
    pub sticky: Option<Sticky>,
    /// The first whose condition holds decides.
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
    /// 0 … 100, relative; 0 is never drawn, but a rule may name it.
    #[serde(default)]
    pub weight: u32,
    #[serde(default)]
    pub priority: Option<u32>,
    #[serde(default)]
    pub cost: Option<f64>,
    /// Expected until real results are known.
    #[serde(default)]
    pub latency_ms: Option<f64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sticky {
    #[serde(default = "yes")]
    pub enabled: bool,
    /// A field of `metadata`.
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
    /// The first of these that can take it; one may be written by itself.
    #[serde(deserialize_with = "one_or_many")]
    pub to: Vec<String>,
}

/// When a provider is left out of the draw, and how it comes back.
fn one_or_many<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a provider's name, or a list of them")]
    enum Names {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Names::deserialize(deserializer)? {
        Names::One(name) => vec![name],
        Names::Many(names) => names,
    })
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CircuitBreaker {
    /// Failures in a row.
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
