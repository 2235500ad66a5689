//! Describes every metric, and registers counters without labels at 0, because an alert on an increase detects the
//! first event only if the counter was exported before it.

use anyhow::{Context, Result};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

/// Upper bounds of the histogram buckets in seconds: from a fast decision to a slow answer of a provider.
const BUCKETS: &[f64] = &[0.000_025, 0.000_1, 0.000_25, 0.001, 0.002_5, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0];

/// Name, whether the counter has labels, and help.
const COUNTERS: &[(&str, bool, &str)] = &[
    ("beamline_bus_bad_headers_total", false, "Headers omitted because the bus cannot carry them"),
    ("beamline_bus_dropped_total", false, "Messages dropped because a subscriber's queue was full"),
    ("beamline_bus_late_replies_total", false, "Replies that arrived after their request had timed out"),
    (
        "beamline_bus_message_ids_forgotten_total",
        false,
        "Message ids that the embedded bus evicted early for lack of room; it no longer deduplicates them",
    ),
    ("beamline_cluster_connects_total", false, "Connections that sent a valid connect command"),
    ("beamline_cluster_deliveries_total", false, "Publications queued for a connection"),
    ("beamline_cluster_disconnects_total", true, "Closed connections, by close code"),
    ("beamline_cluster_messages_in_total", false, "Commands received from clients"),
    ("beamline_cluster_publications_total", false, "Publications accepted"),
    ("beamline_cluster_refused_total", false, "Connections refused because the node was full"),
    (
        "beamline_dead_letters_total",
        false,
        "Messages that could not be handled; the streams DLQ and DLQ_UNREADABLE have them",
    ),
    (
        "beamline_gateway_breaker_transitions_total",
        true,
        "State changes of the gateway's breaker for the router, by new state",
    ),
    ("beamline_gateway_errors_total", true, "Requests refused, by error code"),
    (
        "beamline_gateway_held_back_total",
        false,
        "Decide requests shed by the gateway because the router reported overload",
    ),
    (
        "beamline_gateway_openai_abandoned_total",
        false,
        "Tasks of the OpenAI-compatible entry that were cancelled because their client did not wait for them",
    ),
    ("beamline_gateway_requests_total", false, "Requests received"),
    ("beamline_gateway_retries_total", false, "Requests retried at the router"),
    ("beamline_gateway_status_failures_total", false, "Polls of the router's load that got no answer"),
    (
        "beamline_log_dropped_total",
        true,
        "Log lines not written, by reason: full (stderr is too slow), failed (stderr failed) or limit (too many of one \
         message)",
    ),
    ("beamline_reloads_total", true, "Reloads by SIGHUP, by outcome: done or refused"),
    (
        "beamline_router_contract_violations_total",
        true,
        "Invalid request headers that were ignored, by name",
    ),
    ("beamline_router_decisions_total", true, "Decisions, by reason"),
    ("beamline_router_errors_total", true, "Requests refused, by error code"),
    ("beamline_router_results_total", true, "Results of tasks, by status"),
    (
        "beamline_router_rule_errors_total",
        true,
        "Policy conditions that failed to evaluate, by tenant, policy and rule",
    ),
    (
        "beamline_store_evicted_total",
        true,
        "Messages that a stream has evicted for their age or for lack of room, by store",
    ),
    (
        "beamline_unreadable_messages_total",
        false,
        "Messages that could not be read, or were of no known task; the stream DLQ_UNREADABLE has the newest",
    ),
    ("beamline_webapp_page_errors_total", false, "Page runs that failed"),
    ("beamline_worker_runs_total", true, "Task runs, by provider and status"),
];

const GAUGES: &[(&str, &str)] = &[
    ("beamline_cluster_channels", "Channels with subscribers on this node"),
    ("beamline_cluster_connections", "Open WebSocket connections of this node"),
    (
        "beamline_gateway_breaker_open",
        "1 while the gateway's breaker for the router is open and requests are refused at once",
    ),
    ("beamline_gateway_connections", "Open IPC connections"),
    ("beamline_gateway_held_back", "1 while the router reports overload"),
    ("beamline_gateway_in_flight", "Requests in flight"),
    ("beamline_process_resident_bytes", "Resident memory of the process"),
    (
        "beamline_router_policies_broken",
        "Policies whose file cannot be used; the last good version is in force, or none",
    ),
    ("beamline_store_bytes", "Size of a stream or bucket, by store"),
    (
        "beamline_store_level",
        "0, 1 (nearly full) or 2 (full), by store and by what it does when it is full: refuses new tasks, or evicts",
    ),
    ("beamline_store_max_bytes", "Limit of a stream or bucket, by store; 0: none"),
    ("beamline_store_messages", "Messages in a stream, or entries in a bucket, by store"),
    ("beamline_store_oldest_seconds", "Age of the oldest message or entry, by store"),
    ("beamline_runtime_tasks", "Async tasks of the process that have not ended"),
    ("beamline_webapp_sessions", "Page sessions in memory"),
];

const HISTOGRAMS: &[(&str, &str)] = &[
    (
        "beamline_cluster_publish_duration_seconds",
        "Time from a publication's arrival to the engine's acknowledgement",
    ),
    ("beamline_gateway_request_duration_seconds", "Time from a request to its last answer"),
    (
        "beamline_router_decide_duration_seconds",
        "Time from a decide request to its answer, including the stored assignment",
    ),
    ("beamline_webapp_run_duration_seconds", "Time of a page run"),
    ("beamline_worker_run_duration_seconds", "Time of a task run, by provider"),
];

pub fn install() -> Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new().set_buckets(BUCKETS)?.install_recorder();
    let handle = handle.context("cannot install the metrics recorder")?;

    for (name, labelled, help) in COUNTERS {
        ::metrics::describe_counter!(*name, *help);
        if !labelled {
            ::metrics::counter!(*name).increment(0);
        }
    }

    for (name, help) in GAUGES {
        ::metrics::describe_gauge!(*name, *help);
    }

    for (name, help) in HISTOGRAMS {
        ::metrics::describe_histogram!(*name, ::metrics::Unit::Seconds, *help);
    }
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn exactly_the_metrics_of_the_sources_are_described() {
        let mut used = std::collections::BTreeSet::new();
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("..")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    let macros = ["counter!(\"", "gauge!(\"", "histogram!(\""];
                    let found = macros.iter().flat_map(|name| text.split(name).skip(1));
                    used.extend(found.filter_map(|rest| Some(rest.split_once('"')?.0.to_string())));
                }
            }
        }

        used.retain(|name| name.starts_with("beamline_"));

        let names = COUNTERS.iter().map(|(name, _, _)| *name);
        let names = names
            .chain(GAUGES.iter().map(|(name, _)| *name))
            .chain(HISTOGRAMS.iter().map(|(name, _)| *name));
        let described: std::collections::BTreeSet<String> = names.map(String::from).collect();
        assert_eq!(used, described);
    }
}
