//! The operations console: live figures of every part, from the channel `ops:live`.

use super::sidebar::sidebar;
use crate::app::{Column, PageError, Series, Ui};
use wire::console::CHANNEL;

pub fn page(ui: &mut Ui<'_>) -> Result<(), PageError> {
    ui.page("Console", |ui| {
        sidebar(ui);
        ui.main(|ui| {
            let window = ui.row(|ui| {
                ui.heading(1, "Console");
                ui.selectbox(
                    "Time range",
                    &[("60", "Last minute"), ("300", "Last 5 minutes"), ("900", "Last 15 minutes")],
                )
            });
            let window = window.parse().unwrap_or(60);

            ui.tabs(&["Overview", "Providers", "Nodes", "Queues"], |ui, tab| match tab {
                0 => overview(ui, window),
                1 => providers(ui, window),
                2 => nodes(ui, window),
                _ => queues(ui, window),
            });
        });
    });
    Ok(())
}

fn overview(ui: &mut Ui<'_>, window: u32) {
    ui.row(|ui| {
        let metric =
            |ui: &mut Ui<'_>, path, label, rate, unit| ui.live_metric(CHANNEL, unit, Series { path, label, rate }, 0);
        metric(ui, "totals.connections", "Connections", false, "");
        metric(ui, "totals.users", "People", false, "");
        metric(ui, "totals.deliveries", "Deliveries", true, "/s");
        metric(ui, "totals.requests", "Requests", true, "/s");
        metric(ui, "totals.decisions", "Decisions", true, "/s");
        metric(ui, "totals.errors", "Errors", true, "/s");
    });

    ui.columns(&[1, 1], |ui| {
        ui.column(|ui| {
            let series = [
                Series { path: "totals.connections", label: "connections", rate: false },
                Series { path: "totals.users", label: "people", rate: false },
            ];
            ui.live_line_chart(CHANNEL, "Connections", "", &series, window);
            ui.live_breakdown(CHANNEL, "Decisions by provider", "decisions_by_provider", true, window);
        });
        ui.column(|ui| {
            let series = [
                Series { path: "totals.deliveries", label: "deliveries", rate: true },
                Series { path: "totals.publications", label: "publications", rate: true },
            ];
            ui.live_line_chart(CHANNEL, "Deliveries a second", "/s", &series, window);

            let series = [
                Series { path: "forward_us.p50", label: "request p50", rate: false },
                Series { path: "forward_us.p99", label: "request p99", rate: false },
                Series { path: "decide_us.p50", label: "decide p50", rate: false },
                Series { path: "decide_us.p99", label: "decide p99", rate: false },
            ];
            ui.live_line_chart(CHANNEL, "Latency", "us", &series, window);
        });
    });
}

fn providers(ui: &mut Ui<'_>, window: u32) {
    ui.live_breakdown(CHANNEL, "Decisions by provider", "decisions_by_provider", true, window);

    ui.card("Providers", "what the workers offer", |ui| {
        let columns = [
            column("name", "Provider", ""),
            column("kind", "Kind", ""),
            column("worker", "Worker", ""),
            column("running", "Running", "int"),
            column("completed_total", "Completed", "int"),
            column("failed_total", "Failed", "int"),
            column("p50", "p50", "ms"),
            column("p95", "p95", "ms"),
        ];
        ui.live_table(CHANNEL, "providers", &columns, "No worker has reported. Start one with --roles worker.");
    });

    let about = "a provider that fails gets no tasks for a while: from anybody, or under one policy";
    ui.card("Breakers", about, |ui| {
        let columns = [
            column("provider", "Provider", ""),
            column("tenant", "Tenant", ""),
            column("policy", "Policy", ""),
            column("state", "State", "badge"),
            column("failures", "Failures", "int"),
            column("calls", "Calls", "int"),
            column("cooling_down_ms", "Cools down for", "ms"),
        ];
        ui.live_table(CHANNEL, "breakers", &columns, "No provider has been called yet.");
    });

    ui.card(
        "Policies",
        "files that are broken or missing, conditions that fail, names that are probably mistyped",
        |ui| {
            let columns = [
                column("policy", "Policy", ""),
                column("version", "Version", ""),
                column("failed", "Failed conditions", "int"),
                column("problem", "Problem", ""),
            ];
            ui.live_table(CHANNEL, "policies", &columns, "All policies are in order.");
        },
    );
}

fn nodes(ui: &mut Ui<'_>, window: u32) {
    ui.card("WebSocket nodes", "", |ui| {
        let columns = [
            column("node", "Node", ""),
            column("address", "Address", ""),
            column("engine", "Engine", ""),
            column("connections", "Connections", "int"),
            column("channels", "Channels", "int"),
            column("deliveries_total", "Deliveries", "int"),
            column("slow_disconnects_total", "Too slow", "int"),
            column("rss_bytes", "Memory", "bytes"),
            column("cpu", "CPU", "percent"),
            column("uptime_s", "Up", "duration"),
            column("draining", "Draining", ""),
        ];
        ui.live_table(CHANNEL, "nodes", &columns, "No node has reported.");
    });

    ui.card("Routers", "", |ui| {
        let columns = [
            column("router", "Router", ""),
            column("decisions_total", "Decisions", "int"),
            column("in_flight", "In flight", "int"),
            column("uptime_s", "Up", "duration"),
        ];
        ui.live_table(CHANNEL, "routers", &columns, "No router has reported.");
    });

    ui.card("Gateways", "", |ui| {
        let columns = [
            column("gateway", "Gateway", ""),
            column("breaker", "Breaker", "badge"),
            column("socket", "Socket", ""),
            column("connections", "Connections", "int"),
            column("in_flight", "In flight", "int"),
            column("requests_total", "Requests", "int"),
            column("uptime_s", "Up", "duration"),
        ];
        ui.live_table(CHANNEL, "gateways", &columns, "No gateway has reported.");
    });

    ui.card("Workers", "", |ui| {
        let columns = [
            column("worker_id", "Worker", ""),
            column("status", "Status", "badge"),
            column("load", "Load", "percent"),
            column("running", "Running", "int"),
            column("completed_total", "Completed", "int"),
            column("failed_total", "Failed", "int"),
        ];
        ui.live_table(CHANNEL, "workers", &columns, "No worker has reported.");
    });

    let series = [Series { path: "totals.channels", label: "channels", rate: false }];
    ui.live_line_chart(CHANNEL, "Channels", "", &series, window);
}

fn queues(ui: &mut Ui<'_>, window: u32) {
    ui.live_breakdown(CHANNEL, "Waiting in streams", "streams", false, window);
    ui.muted("ASSIGN holds tasks that no worker has finished; DLQ holds messages that could not be handled.");
}

fn column(key: &'static str, label: &'static str, format: &'static str) -> Column {
    Column { key, label, format }
}
