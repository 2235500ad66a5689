//! When a request ends, at the latest.

use crate::Config;
use crate::forward::Request;
use std::time::{Duration, Instant};
use wire::ipc::Wait;

/// An assignment may take this long at most (contract: its deadline is clamped to 60 s).
const RESULT_MAX: Duration = Duration::from_secs(60);

/// When a request ends, at the latest.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    pub at: Instant,
    /// What the client asked for, within what the gateway allows.
    pub own: Option<Duration>,
}

impl Deadline {
    /// Of a request that arrives now: its frame's (0: none), else its payload's, else the default for what it waits for.
    /// None is longer than [`Config::max_deadline`].
    pub fn of(request: &Request, frame_ms: u32, config: &Config) -> Self {
        let of_frame = (frame_ms > 0).then(|| Duration::from_millis(frame_ms.into()));
        let (own, waits) = match request {
            Request::Submit(submit) => {
                (of_frame.or(submit.timeout_ms.map(Duration::from_millis)), submit.wait != Wait::Decision)
            }
            Request::Query(_) | Request::Cancel(_) => (of_frame, false),
            Request::Subscribe(_) => (of_frame, true),
        };
        let own = own.map(|own| own.min(config.max_deadline));
        let default = if waits {
            config.request_timeout + RESULT_MAX
        } else {
            config.request_timeout
        };
        Self {
            at: Instant::now() + own.unwrap_or(default.min(config.max_deadline)),
            own,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::ipc::FrameType;

    #[test]
    fn no_deadline_is_longer_than_the_maximum() {
        let config = Config { max_deadline: Duration::from_secs(10), ..Config::default() };
        let submit = |fields: &str| {
            let payload = format!(r#"{{"command":"task_submit","task_type":"t"{fields}}}"#);
            Request::parse(FrameType::TaskSubmit, payload.as_bytes()).ok().unwrap()
        };
        let subscribe = Request::parse(FrameType::StreamSubscribe, br#"{"task_id":"t"}"#)
            .ok()
            .unwrap();
        for (request, frame_ms, expected_s) in [
            (submit(""), 0, 5),
            (submit(""), 7000, 7),
            (submit(r#","timeout_ms":7000"#), 0, 7),
            (submit(r#","timeout_ms":86400000"#), 0, 10),
            (submit(r#","timeout_ms":18446744073709551615"#), 0, 10),
            (submit(r#","timeout_ms":7000"#), u32::MAX, 10),
            (submit(r#","wait":"result""#), 0, 10),
            (subscribe, 0, 10),
        ] {
            let before = Instant::now();
            let deadline = Deadline::of(&request, frame_ms, &config);
            let (least, most) =
                (before + Duration::from_secs(expected_s), Instant::now() + Duration::from_secs(expected_s));
            assert!((least..=most).contains(&deadline.at), "{frame_ms} {expected_s}");
            assert!(deadline.own.is_none_or(|own| own == Duration::from_secs(expected_s)), "also for the worker");
        }
    }
}
