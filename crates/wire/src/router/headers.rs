//! Headers of v2 messages. A request must have the first three; the others are optional, and checked where present.

/// Identifies the trace.
pub const TRACE_ID: &str = "x_trace_id";
pub const TENANT_ID: &str = "x_tenant_id";
/// Always [`CONTRACT_V2`].
pub const CONTRACT_VERSION: &str = "x_contract_version";
pub const CONTRACT_V2: &str = "v2";

/// Identifies an event, however often it is published.
pub const MSG_ID: &str = "x_msg_id";
pub const REQUEST_ID: &str = "x_request_id";
pub const ASSIGNMENT_ID: &str = "x_assignment_id";
/// How often the sender has sent this message before.
pub const RETRY_COUNT: &str = "x_retry_count";
/// Milliseconds since the epoch.
pub const SENT_AT_MS: &str = "x_sent_at_ms";
/// The program that sent the message, and the schema of its payload.
pub const PRODUCER: &str = "x_producer";
pub const SCHEMA_ID: &str = "x_schema_id";

/// Why a message became a dead letter, and where it was published.
pub const DLQ_REASON: &str = "x_dlq_reason";
pub const ORIGINAL_SUBJECT: &str = "x_original_subject";
