//! The deadline of a request.

use crate::Config;
use crate::request::Request;
use std::time::{Duration, Instant};
use wire::ipc::Wait;

/// The longest time that an assignment may take (contract: its deadline is clamped to 60 s).
const RESULT_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    pub at: Instant,
    /// The time that the client asked for, at most [`Config::max_deadline`]; `None` if the gateway's default applies.
    pub own: Option<Duration>,
}

impl Deadline {
    /// The deadline of a request that arrives at `now`: that of its frame (`frame_ms`, 0 for none), else that of its
    /// payload, else the default for the request's kind. No deadline exceeds [`Config::max_deadline`].
    pub fn of(request: &Request, frame_ms: u32, config: &Config, now: Instant) -> Self {
        let of_frame = (frame_ms > 0).then(|| Duration::from_millis(frame_ms.into()));
        let (own, waits) = match request {
            Request::Submit(submit) => {
                let of_payload = submit.timeout_ms.map(Duration::from_millis);
                (of_frame.or(of_payload), submit.wait != Wait::Decision)
            }
            Request::Query(_) | Request::Cancel(_) => (of_frame, false),
            Request::Subscribe(_) => (of_frame, true),
        };

        let own = own.map(|own| own.min(config.max_deadline));
        let default = if waits {
            // The time for the decision, then that for the task.
            config.request_timeout + RESULT_MAX
        } else {
            config.request_timeout
        };

        Self { at: now + own.unwrap_or(default.min(config.max_deadline)), own }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::ipc::FrameType;

    #[test]
    fn no_deadline_exceeds_the_maximum() {
        let config = Config { max_deadline: Duration::from_secs(10), ..Config::default() };
        let parse = |kind, payload: &str| Request::parse(kind, payload.as_bytes()).ok().unwrap();
        let submit = |fields: &str| {
            let payload = format!(r#"{{"command":"task_submit","task_type":"t"{fields}}}"#);
            parse(FrameType::TaskSubmit, &payload)
        };
        let subscribe = parse(FrameType::StreamSubscribe, r#"{"task_id":"t"}"#);

        let now = Instant::now();

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
            let deadline = Deadline::of(&request, frame_ms, &config, now);

            let expected = Duration::from_secs(expected_s);
            assert_eq!(deadline.at - now, expected, "{frame_ms}");
            assert!(deadline.own.is_none_or(|own| own == expected), "the worker gets the same deadline");
        }
    }
}
