//! The NATS services protocol (ADR-32): what a service answers on `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Who answers. Part of every answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Service {
    /// The kind of the service; all instances share it.
    pub name: String,
    /// The instance.
    pub id: String,
    /// A semantic version.
    pub version: String,
    pub metadata: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ping {
    #[serde(rename = "type")]
    pub kind: PingType,
    #[serde(flatten)]
    pub service: Service,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    #[serde(rename = "type")]
    pub kind: InfoType,
    #[serde(flatten)]
    pub service: Service,
    pub description: String,
    pub endpoints: Vec<EndpointInfo>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EndpointInfo {
    pub name: String,
    pub subject: String,
    pub queue_group: String,
    pub metadata: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stats {
    #[serde(rename = "type")]
    pub kind: StatsType,
    #[serde(flatten)]
    pub service: Service,
    /// RFC 3339.
    pub started: String,
    pub endpoints: Vec<EndpointStats>,
}

/// Times are in nanoseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EndpointStats {
    pub name: String,
    pub subject: String,
    pub queue_group: String,
    pub num_requests: u64,
    pub num_errors: u64,
    /// The status and code of the latest error, as `404:not_found`; empty if there was none.
    pub last_error: String,
    pub processing_time: u64,
    pub average_processing_time: u64,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum PingType {
    #[serde(rename = "io.nats.micro.v1.ping_response")]
    V1,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum InfoType {
    #[serde(rename = "io.nats.micro.v1.info_response")]
    V1,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum StatsType {
    #[serde(rename = "io.nats.micro.v1.stats_response")]
    V1,
}
