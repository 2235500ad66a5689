//! Every message that crosses a process boundary, with its limits and error codes.
//!
//! This crate defines, encodes and decodes. It has no IO, async or clock: bytes and time are arguments.

pub mod app;
pub mod channels;
pub mod chat;
pub mod console;
pub mod id;
pub mod ipc;
pub mod json;
pub mod limits;
pub mod openai;
pub mod policy;
pub mod realtime;
pub mod router;
pub mod status;
pub mod subjects;
pub mod time;
pub mod trace;
pub mod websocket;

/// Describes a JSON error for logs, without the values of users that serde quotes.
pub fn unfit(error: &serde_json::Error) -> String {
    let text = error.to_string();
    // Syntax errors and missing fields quote nothing of the input.
    if !error.is_data() || text.starts_with("missing field ") {
        return text;
    }

    match text.rsplit_once(", expected ") {
        Some((_, expected)) => format!("a value does not fit, expected {expected}"),
        None => format!("a value does not fit at line {} column {}", error.line(), error.column()),
    }
}

#[cfg(test)]
mod tests {
    use super::unfit;

    #[test]
    fn unfit_json_is_described_without_its_values() {
        let check = |json: &str, expected: &str| {
            let error = serde_json::from_str::<crate::ipc::TaskSubmit>(json).unwrap_err();
            assert_eq!(unfit(&error), expected, "{json}");
        };
        check("{}", "missing field `command` at line 1 column 2");
        check("{\"a\": xyzzy}", "expected value at line 1 column 7");
        check("{\"command\": 7}", "a value does not fit, expected a string at line 1 column 13");
        check(
            "{\"command\":\"c\",\"timeout_ms\":\"xyzzy, expected xyzzy\"}",
            "a value does not fit, expected u64 at line 1 column 51",
        );
        check(
            "{\"wait\":\"xyzzy\"}",
            "a value does not fit, expected one of `decision`, `result`, `stream` at line 1 column 15",
        );
    }
}
