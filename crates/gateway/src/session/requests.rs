//! Frames from the client: decoding them and admitting their requests.

use super::{Effect, Exit, Session, Start, V1Stream};
use crate::deadline::Deadline;
use crate::in_flight::{Full, Permit};
use crate::reply::{Reply, Slot};
use crate::request::Request;
use std::time::{Duration, Instant};
use wire::ipc::{Capabilities, ErrorCode, Frame, FrameType, Limits, Version};
use wire::limits::IPC_FRAME_MAX;

impl Session {
    /// Decodes the frames in the input while the session accepts them.
    pub(super) fn decode(&mut self, now: Instant) {
        while self.takes_frames() {
            match self.input.frame() {
                Ok(Some(frame)) => self.frame(frame, now),
                Ok(None) => return self.await_rest(now),
                Err(violation) => {
                    // The version of a broken frame is unknown, and every client understands v1.
                    self.refuse(Version::V1, violation.code(), &violation.to_string());
                    self.close(Exit::FramingLost);
                }
            }
        }
        // A v1 stream stops reading for minutes: meanwhile no frame can time out, and an empty buffer is released.
        self.input.shrink();
        self.input.stop_clock();
    }

    /// Starts the timer of the unfinished frame, and charges the frame against the receive budget if it is large.
    fn await_rest(&mut self, now: Instant) {
        self.input.shrink();
        if !self.is_draining() {
            self.input
                .start_clock(now, || self.shared.admission.settings().read_timeout);
        }

        let claim = self.input.charge(|| self.shared.admission.settings().receive.clone());
        self.effects.extend(claim.map(Effect::AwaitBudget));
    }

    fn frame(&mut self, frame: Frame, now: Instant) {
        let version = frame.version;
        let Some(kind) = frame.frame_type().filter(|kind| kind.is_request()) else {
            return self.refuse(version, ErrorCode::InvalidType, "Unsupported message type");
        };

        if frame.flags != 0 {
            let text = format!("Unknown flags {:#06x}; they must be 0", frame.flags);
            return self.refuse(version, ErrorCode::InvalidPayload, &text);
        }

        if let Version::V2 { request_id, .. } = version
            && self.v2_open.contains_key(&request_id)
        {
            let text = format!("request_id {request_id} is still in flight on this connection");
            return self.refuse(version, ErrorCode::InvalidPayload, &text);
        }

        match kind {
            FrameType::Ping => self.answer(version, Reply::new(FrameType::Pong, "")),
            FrameType::Capabilities => {
                let capabilities = serde_json::to_vec(&self.capabilities()).expect("capabilities are JSON");
                self.answer(version, Reply::ok(capabilities));
            }
            // PING and CAPABILITIES, above, start no request, so they are answered during a drain too.
            _ if self.is_draining() => {
                self.refuse(version, ErrorCode::ConnectionClosed, "The gateway is shutting down");
            }
            _ => match Request::parse(kind, &frame.payload) {
                Ok(request) => self.admit(version, request, now),
                Err(text) => self.refuse(version, ErrorCode::InvalidPayload, &text),
            },
        }
    }

    /// Starts the request if the user and the limits allow it.
    fn admit(&mut self, version: Version, request: Request, now: Instant) {
        let admission = &self.shared.admission;
        if !admission.admits(self.uid) {
            return self.refuse(version, ErrorCode::Forbidden, crate::NOT_ADMITTED);
        }

        // `>=`, because a reload may have lowered the limits below the number in flight.
        let settings = admission.settings();
        let full = match version {
            Version::V1 => self.v1_open >= settings.max_in_flight_v1,
            Version::V2 { .. } => self.v2_open.len() >= settings.max_in_flight_v2,
        };

        if full {
            return self.overloaded(version, "Too many requests in flight on this connection");
        }

        let permit = match admission.request(self.uid) {
            Ok(permit) => permit,
            Err(Full::All) => return self.overloaded(version, "Too many requests in flight"),
            Err(Full::User) => {
                let text = format!(
                    "User {} has reached its share of requests in flight; gateway.max_in_flight_per_user sets it",
                    self.uid
                );
                return self.overloaded(version, &text);
            }
        };

        // Admitted: from here on the request gets exactly one answer.
        self.shared.stats.admitted();
        match version {
            Version::V1 => {
                self.v1_open += 1;
                let deadline = Deadline::of(&request, 0, &settings, now);
                // Pieces of a v1 stream carry no id, so no other reply may come between them.
                if request.is_stream() && !self.v1_order.is_empty() {
                    self.v1_stream = Some(V1Stream::Waiting { request, deadline, permit });
                } else {
                    self.start_v1(request, deadline, permit);
                }
            }
            Version::V2 { request_id, deadline_ms } => {
                self.v2_open.insert(request_id, 0);
                let deadline = Deadline::of(&request, deadline_ms, &settings, now);
                let slot = Slot::V2(request_id);
                self.effects
                    .push_back(Effect::Start(Start { slot, request, deadline, permit }));
            }
        }
    }

    pub(super) fn start_v1(&mut self, request: Request, deadline: Deadline, permit: Permit) {
        let position = self.v1_order.join();
        if request.is_stream() {
            self.v1_stream = Some(V1Stream::Running { position, pieces: 0 });
        }
        let slot = Slot::V1(position);
        self.effects
            .push_back(Effect::Start(Start { slot, request, deadline, permit }));
    }

    fn capabilities(&self) -> Capabilities {
        let settings = self.shared.admission.settings();
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);

        Capabilities {
            protocol_versions: vec![1, 2],
            message_types: FrameType::ALL.iter().map(|kind| *kind as u8).collect(),
            max_frame_size: IPC_FRAME_MAX,
            features: ["pipelining", "multiplexing", "streaming", "query", "cancel", "wait_result", "wait_stream"]
                .map(String::from)
                .to_vec(),
            breaker: self.shared.upstream.state().as_str().into(),
            limits: Limits {
                max_connections: settings.max_connections,
                max_in_flight: settings.max_in_flight,
                max_in_flight_v1: settings.max_in_flight_v1,
                max_in_flight_v2: settings.max_in_flight_v2,
                max_in_flight_per_user: settings.share,
                request_timeout_ms: ms(settings.request_timeout),
                max_deadline_ms: ms(settings.max_deadline),
            },
        }
    }
}
