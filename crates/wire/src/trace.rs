//! W3C Trace Context: the header `traceparent`, `<version>-<trace id>-<span id>-<flags>` in lowercase hex.

use crate::id;
use std::num::NonZeroU64;

/// The trace id of a valid `traceparent`, `None` if the header is invalid and must be ignored.
///
/// Version 00 has exactly four fields. Later versions may append more, and the whole header keeps the rules for ids
/// ([`id::check`]), because it is passed on unchanged.
pub fn trace_id_of(traceparent: &str) -> Option<&str> {
    if !id::is_valid(traceparent) {
        return None;
    }

    let mut fields = traceparent.splitn(5, '-');
    let [version, trace_id, span_id, flags] = [fields.next()?, fields.next()?, fields.next()?, fields.next()?];
    let rest = fields.next();

    // Version ff and ids that consist of zeros are invalid by definition.
    let valid = is_hex(version, 2)
        && version != "ff"
        && is_trace_id(trace_id)
        && is_hex(span_id, 16)
        && !is_zero(span_id)
        && is_hex(flags, 2)
        && (version != "00" || rest.is_none());
    valid.then_some(trace_id)
}

/// A sampled `traceparent` of version 00 for the trace and the span; `None` unless `trace_id` is 32 hex digits or a
/// hyphenated UUID.
pub fn traceparent(trace_id: &str, span_id: NonZeroU64) -> Option<String> {
    let mut trace_id = trace_id.to_ascii_lowercase();
    if is_hyphenated(&trace_id) {
        trace_id.retain(|digit| digit != '-');
    }
    is_trace_id(&trace_id).then(|| format!("00-{trace_id}-{span_id:016x}-01"))
}

fn is_trace_id(text: &str) -> bool {
    is_hex(text, 32) && !is_zero(text)
}

fn is_hyphenated(uuid: &str) -> bool {
    uuid.split('-').map(str::len).eq([8, 4, 4, 4, 12])
}

fn is_hex(field: &str, length: usize) -> bool {
    field.len() == length && field.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_zero(field: &str) -> bool {
    field.bytes().all(|byte| byte == b'0')
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    #[test]
    fn only_a_valid_traceparent_has_a_trace_id() {
        for (parent, expected) in [
            (format!("00-{TRACE}-{SPAN}-01"), Some(TRACE)),
            (format!("00-{TRACE}-{SPAN}-00"), Some(TRACE)),
            (format!("01-{TRACE}-{SPAN}-01-more-fields"), Some(TRACE)),
            (format!("00-{TRACE}-{SPAN}-01-more"), None),
            (format!("00-{TRACE}-{SPAN}-01\r\nx: y"), None),
            (format!("01-{TRACE}-{SPAN}-01-\r\nx: y"), None),
            (format!("00-{TRACE}"), None),
            (format!("ff-{TRACE}-{SPAN}-01"), None),
            (format!("00-{TRACE}-0000000000000000-01"), None),
            (format!("00-{}-{SPAN}-01", "0".repeat(32)), None),
            (format!("00-{}-{SPAN}-01", &TRACE[1..]), None),
            (format!("00-{}-{SPAN}-01", TRACE.to_uppercase()), None),
            (format!("01-{TRACE}-{SPAN}-01-{}", "x".repeat(128)), None),
            (String::new(), None),
        ] {
            assert_eq!(trace_id_of(&parent), expected, "{parent:?}");
        }
    }

    #[test]
    fn traceparent_needs_a_trace_id_of_w3c_form() {
        let span = NonZeroU64::new(0xb7ad_6b71_6920_3331).unwrap();
        let expected = format!("00-{TRACE}-{SPAN}-01");
        for trace_id in [TRACE, &TRACE.to_uppercase(), "0af76519-16cd-43dd-8448-eb211c80319c"] {
            let parent = traceparent(trace_id, span);
            assert_eq!(parent.as_ref(), Some(&expected), "{trace_id}");
            assert_eq!(trace_id_of(&expected), Some(TRACE));
        }

        for trace_id in
            ["", "mine", &TRACE[1..], "00000000-0000-0000-0000-000000000000", "0af7-651916cd43dd8448eb211c80319c"]
        {
            assert_eq!(traceparent(trace_id, span), None, "{trace_id:?}");
        }
        assert_eq!(traceparent(TRACE, NonZeroU64::MIN), Some(format!("00-{TRACE}-0000000000000001-01")));
    }
}
