//! The subjects, streams and buckets of the bus. v1 is frozen.

/// Decide requests: request/reply, answered by the queue group [`DECIDE_GROUP`].
pub const DECIDE: &str = "beamline.router.v1.decide";
/// Receives the reply to a decide request that names no reply inbox.
pub const DECIDE_REPLY: &str = "beamline.router.v1.decide.reply";
/// As [`DECIDE`], with strict headers ([`crate::router::headers`]) and an idempotency key in every request.
pub const DECIDE_V2: &str = "beamline.router.v2.decide";
/// As [`DECIDE_REPLY`], for [`DECIDE_V2`].
pub const DECIDE_V2_REPLY: &str = "beamline.router.v2.decide.reply";
/// Queue group of the routers that answer [`DECIDE`] and [`DECIDE_V2`].
pub const DECIDE_GROUP: &str = "router-decide-group";
/// Returns the state of a task: [`crate::router::TaskQuery`].
pub const GET_DECISION: &str = "beamline.router.v1.get_decision";
/// Cancels a task: [`crate::router::TaskQuery`].
pub const CANCEL: &str = "beamline.router.v1.cancel";
/// Returns the router's load: [`crate::router::BackpressureStatus`].
pub const BACKPRESSURE: &str = "beamline.router.v1.status.backpressure";
/// As [`BACKPRESSURE`]; the load is the same, and names [`DECIDE_V2`].
pub const BACKPRESSURE_V2: &str = "beamline.router.v2.status.backpressure";
/// For operators, who prove themselves ([`crate::router::admin`]): the state of every provider's circuit breaker.
pub const ADMIN_BREAKERS: &str = "beamline.router.v1.admin.get_circuit_breaker_states";
/// For operators: the state of every extension.
pub const ADMIN_EXTENSIONS: &str = "beamline.router.v1.admin.get_extension_health";
/// For operators: what a decide request would be answered.
pub const ADMIN_DRY_RUN: &str = "beamline.router.v1.admin.dry_run_pipeline";
/// For operators: how much of its limits a policy uses ([`crate::router::PolicyQuery`]).
pub const ADMIN_COMPLEXITY: &str = "beamline.router.v1.admin.get_pipeline_complexity";

/// The name of the routers as a service of NATS.
pub const SERVICE: &str = "beamline-router";

/// Where tools ask services (ADR-32): all of them, those of this name, and one instance. `verb` is `PING`, `INFO` or
/// `STATS`.
pub fn discovery(verb: &str, name: &str, id: &str) -> [String; 3] {
    [format!("$SRV.{verb}"), format!("$SRV.{verb}.{name}"), format!("$SRV.{verb}.{name}.{id}")]
}

/// Assignments, router → worker (stream [`STREAM_ASSIGN`]). Those for a provider that a live worker listens for are on
/// [`assign_to`] instead.
pub const ASSIGN: &str = "caf.exec.assign.v1";
/// Results, worker → router and waiting clients (stream [`STREAM_RESULT`]).
pub const RESULT: &str = "caf.exec.result.v1";
/// Where a gateway or web app receives the results that it waits for, core: it names its subject in the request, and
/// the worker or the router publishes a copy of the result there. The rest is one token, the instance's own.
pub const RESULT_COPY_PREFIX: &str = "beamline.result.v1.";
/// Header of a message on [`RESULT`]: the subject to which the worker itself publishes a copy.
pub const RESULT_COPY_HEADER: &str = "result_subject";
/// Stops a running assignment: router → all workers, core: [`crate::router::CancelRun`].
pub const CONTROL_CANCEL: &str = "caf.exec.cancel.v1";
/// Status of each router, core, every second: [`crate::status::RouterStatus`].
pub const ROUTER_STATUS: &str = "beamline.router.v1.status.live";
/// Status of each gateway, core, every second: [`crate::status::GatewayStatus`].
pub const GATEWAY_STATUS: &str = "beamline.gateway.v1.status.live";
/// Outcomes of assignments for the circuit breakers, core, router → all routers: [`crate::router::ProviderOutcome`].
pub const OUTCOMES: &str = "beamline.router.v1.outcomes";
/// Liveness and load of each worker, core, every 5 s: [`crate::status::Heartbeat`].
pub const HEARTBEAT: &str = "caf.status.heartbeat.v1";
/// Metered usage, router → billing (stream [`STREAM_USAGE`]).
pub const USAGE: &str = "beamline.usage.v1.metered";

/// The subject of a request's streamed output, core.
pub fn output(request_id: &str) -> String {
    format!("{OUTPUT_PREFIX}{}", token(request_id))
}
/// Prefix of [`output`] subjects; `caf.exec.output.v1.*` matches all of them.
pub const OUTPUT_PREFIX: &str = "caf.exec.output.v1.";

/// The subject on which an instance receives results; `instance` is random.
pub fn result_copy(instance: u64) -> String {
    format!("{RESULT_COPY_PREFIX}{instance:016x}")
}

/// Whether copies of results may be published to `subject`.
pub fn is_result_copy(subject: &str) -> bool {
    let instance = subject.strip_prefix(RESULT_COPY_PREFIX).unwrap_or_default();
    (1..=64).contains(&instance.len())
        && instance
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// The subject of the assignments for one provider, in the stream of [`ASSIGN`]. `None` if the provider's name is not 1
/// to 64 of the characters `A-Za-z0-9_-`, or has another meaning below [`ASSIGN`].
pub fn assign_to(provider: &str) -> Option<String> {
    let is_token = (1..=64).contains(&provider.len())
        && provider
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    (is_token && !["ack", "dlq"].contains(&provider)).then(|| format!("{ASSIGN}.{provider}"))
}

/// Whether assignments travel on this subject: [`ASSIGN`], or [`assign_to`] a provider.
pub fn is_assign(subject: &str) -> bool {
    let below = subject.strip_prefix(ASSIGN).and_then(|rest| rest.strip_prefix('.'));
    subject == ASSIGN || below.and_then(assign_to).is_some()
}

/// Where a bus asks whether a stream has seen a message id. Nothing is ever stored there.
pub fn seen(stream: &str) -> String {
    format!("beamline.bus.v1.seen.{stream}")
}

/// Where it is noted that a result was billed although its task is not known. No tenant begins with `$`.
pub fn billed_key(assignment_id: &str) -> String {
    format!("$billed/{assignment_id}")
}

/// The dead-letter subject of `subject`.
pub fn dead_letter(subject: &str) -> String {
    format!("{subject}.dlq")
}

/// The subject of dead letters whose message came by v2 (stream [`STREAM_DLQ`]).
pub const DEAD_LETTER_V2: &str = "beamline.router.dlq.v2";

/// The subject for messages of `subject` that cannot be read (stream [`STREAM_UNREADABLE`]).
pub fn unreadable(subject: &str) -> String {
    format!("{subject}.dlq.unreadable")
}

pub const STREAM_ASSIGN: &str = "ASSIGN";
pub const STREAM_RESULT: &str = "RESULT";
pub const STREAM_USAGE: &str = "USAGE";
pub const STREAM_DLQ: &str = "DLQ";
pub const STREAM_UNREADABLE: &str = "DLQ_UNREADABLE";

/// Key-value bucket of task states, by [`task_key`], and of their assignments, by [`assignment_key`].
pub const BUCKET_TASKS: &str = "TASKS";
/// Key-value bucket of policies, whose entries never expire: the last good version of each as a
/// [`crate::policy::Stored`] under `<tenant>/<policy>`, and a [`crate::policy::Index`] of them under
/// [`POLICIES_INDEX`].
pub const BUCKET_POLICIES: &str = "POLICIES";
pub const POLICIES_INDEX: &str = "index";
/// Key-value bucket of idempotency keys: a [`crate::router::KeyRecord`] under [`idempotency_key`].
pub const BUCKET_KEYS: &str = "IDEMPOTENCY";

/// Where a tenant's idempotency key is. A tenant's name has no `/`, so no two pairs share an entry.
pub fn idempotency_key(tenant_id: &str, key: &str) -> String {
    format!("{tenant_id}/{key}")
}

/// Where a task's record is: request ids are unique within a tenant, whose name has no `/`.
pub fn task_key(tenant_id: &str, request_id: &str) -> String {
    format!("{tenant_id}/{request_id}")
}

/// Where the task of an assignment is named (a [`crate::router::TaskQuery`]), for results that name no tenant. No
/// tenant begins with `@`.
pub fn assignment_key(assignment_id: &str) -> String {
    format!("@{assignment_id}")
}

/// Channel operations, answered by the nodes' queue group [`NODES_GROUP`].
pub const CHANNELS_PUBLISH: &str = "beamline.channels.v1.publish";
pub const CHANNELS_BROADCAST: &str = "beamline.channels.v1.broadcast";
pub const CHANNELS_HISTORY: &str = "beamline.channels.v1.history";
pub const CHANNELS_PRESENCE: &str = "beamline.channels.v1.presence";
pub const CHANNELS_DISCONNECT: &str = "beamline.channels.v1.disconnect";
/// Queue group of the nodes that answer channel operations.
pub const NODES_GROUP: &str = "nodes";
/// Status of each node, core, every second: [`crate::status::NodeStatus`].
pub const NODE_STATUS: &str = "beamline.nodes.v1.status";

/// Prefix of the RPCs that clients call: `beamline.rpc.v1.<method>`.
pub const RPC_PREFIX: &str = "beamline.rpc.v1.";

/// The subject of an RPC method. Returns `None` unless the method has 1 to 128 bytes of `A-Za-z0-9_-` in parts
/// separated by dots.
pub fn rpc(method: &str) -> Option<String> {
    let fits = !method.is_empty()
        && method.len() <= 128
        && method.split('.').all(|part| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        });
    fits.then(|| format!("{RPC_PREFIX}{method}"))
}

/// Encodes an opaque id as a single subject token; characters with a meaning in subjects are percent-encoded.
pub fn token(id: &str) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b'.' | b'*' | b'>' | b'%') {
            out.push(byte as char);
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opaque_id_becomes_a_single_token() {
        assert_eq!(token("abc-1"), "abc-1");
        assert_eq!(token("a.b *>%é"), "a%2Eb%20%2A%3E%25%C3%A9");
        assert_eq!(output("a.b"), "caf.exec.output.v1.a%2Eb");
    }

    #[test]
    fn copies_of_results_go_to_one_token_below_their_prefix() {
        assert!(is_result_copy(&result_copy(7)) && is_result_copy("beamline.result.v1.a-B_0"));
        let long = format!("{RESULT_COPY_PREFIX}{}", "x".repeat(65));
        for bad in ["", RESULT, "beamline.result.v1.", "beamline.result.v1.a.b", "beamline.result.v1.>", &long] {
            assert!(!is_result_copy(bad), "{bad}");
        }
    }

    #[test]
    fn assignments_travel_on_the_common_subject_and_one_token_below() {
        assert_eq!(assign_to("gpu-1").as_deref(), Some("caf.exec.assign.v1.gpu-1"));
        assert!(is_assign(ASSIGN) && is_assign("caf.exec.assign.v1.gpu-1"));

        let long = "x".repeat(65);
        for bad in ["", "ack", "dlq", "a.b", "*", ">", "a b", "é", "$x", &long] {
            assert_eq!(assign_to(bad), None, "{bad:?}");
            assert!(!is_assign(&format!("{ASSIGN}.{bad}")), "{bad:?}");
        }
        for bad in ["", "caf.exec.assign.v2", "caf.exec.assign.v1x", "caf.exec.result.v1"] {
            assert!(!is_assign(bad), "{bad:?}");
        }
    }

    #[test]
    fn method_with_characters_outside_a_subject_is_refused() {
        assert_eq!(rpc("app.event").as_deref(), Some("beamline.rpc.v1.app.event"));
        for bad in ["", "a..b", "a.*", "a b", ">"] {
            assert_eq!(rpc(bad), None, "{bad}");
        }
    }
}
