//! Refusals of an endpoint: what they mean for the task and the provider, and what of them may be shown to whom.

use reqwest::StatusCode;
use reqwest::header::{self, HeaderMap};
use serde_json::Value;
use std::time::SystemTime;
use wire::limits::{COOL_DOWN_DEFAULT_S, COOL_DOWN_MAX_S};

/// Characters of an error's message that the task's result quotes.
const ERROR_SHOWN_MAX: usize = 300;
/// An error's name in the log, in bytes.
const ERROR_NAME_MAX: usize = 48;

/// The cool-down that a busy endpoint asks for, in seconds; `None` if it is not busy. 429 always means busy, 503 only
/// with `Retry-After`, which is a number of seconds or a date (RFC 9110, 10.2.3).
pub fn cool_down(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Option<u64> {
    let given = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let seconds = given.map(str::trim).and_then(|text| {
        let until = |date: SystemTime| {
            date.duration_since(now)
                .map_or(0, |left| left.as_millis().div_ceil(1000) as u64)
        };
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // A number that does not fit is a long time, too.
        let number = digits.then(|| text.parse().unwrap_or(u64::MAX));
        number.or_else(|| httpdate::parse_http_date(text).ok().map(until))
    });

    let seconds = match status {
        StatusCode::TOO_MANY_REQUESTS => seconds.unwrap_or(COOL_DOWN_DEFAULT_S),
        StatusCode::SERVICE_UNAVAILABLE => seconds?,
        _ => return None,
    };
    Some(seconds.clamp(1, COOL_DOWN_MAX_S))
}

/// Whether the status blames the request. The endpoint works, and other tasks may succeed.
pub fn is_of_the_task(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::BAD_REQUEST
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::UNPROCESSABLE_ENTITY
            | StatusCode::URI_TOO_LONG
    )
}

/// The message of an error in one of the API's usual forms; the start of the body if it has another form.
pub fn message_of(text: &str) -> String {
    let body: Value = serde_json::from_str(text).unwrap_or_default();
    let message = body["error"]["message"]
        .as_str()
        .or(body["error"].as_str())
        .unwrap_or(text);
    message.chars().take(ERROR_SHOWN_MAX).collect()
}

/// The code or type of an error, for the log; `None` unless it has the form of a name, so that no part of a prompt gets
/// through.
pub fn name_of(text: &str) -> Option<String> {
    let body: Value = serde_json::from_str(text).unwrap_or_default();
    let names = [&body["error"]["code"], &body["error"]["type"]];
    let is_name = |name: &&str| {
        (1..=ERROR_NAME_MAX).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
    };

    names
        .into_iter()
        .filter_map(Value::as_str)
        .find(is_name)
        .map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn cool_down_follows_status_and_retry_after() {
        let check = |status: u16, retry_after: Option<&str>, expected: Option<u64>| {
            let mut headers = HeaderMap::new();
            if let Some(text) = retry_after {
                headers.insert(header::RETRY_AFTER, text.parse().unwrap());
            }
            // Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110.
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
            let found = cool_down(StatusCode::from_u16(status).unwrap(), &headers, now);
            assert_eq!(found, expected, "{status} {retry_after:?}");
        };
        check(429, Some("7"), Some(7));
        check(429, Some(" 7 "), Some(7));
        check(503, Some("120"), Some(120));
        check(429, Some("Sun, 06 Nov 1994 08:50:07 GMT"), Some(30));
        check(429, Some("Sunday, 06-Nov-94 08:50:07 GMT"), Some(30));
        check(429, Some("Sun, 06 Nov 1994 08:00:00 GMT"), Some(1));
        check(429, Some("0"), Some(1));
        check(429, Some("999999999"), Some(COOL_DOWN_MAX_S));
        check(429, Some("99999999999999999999999"), Some(COOL_DOWN_MAX_S));
        check(503, Some("Fri, 31 Dec 2100 00:00:00 GMT"), Some(COOL_DOWN_MAX_S));
        check(429, None, Some(COOL_DOWN_DEFAULT_S));
        check(429, Some("soon"), Some(COOL_DOWN_DEFAULT_S));
        check(503, None, None);
        check(503, Some("soon"), None);
        check(500, Some("7"), None);
        check(200, Some("7"), None);
    }
}
