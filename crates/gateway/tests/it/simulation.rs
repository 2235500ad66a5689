//! Simulates one connection against the sans-IO session: bytes that arrive in arbitrary chunks, requests that end in
//! any order, timers, budgets and drains; then checks the invariants. Used by `simulations` and by fuzz/session.

use bytes::BytesMut;
use gateway::session::{Claim, Effect, Event, Exit, Finished, Reply, Request, Session, Share, Slot, Start};
use gateway::{Config, Shared};
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::ipc::{Decoder, Frame, FrameType, Version};

const BUDGET: usize = 64 * 1024;
/// Capacity of the channel between the requests and the session, in pieces of output.
const PIECES: usize = 4;
/// More rounds than any simulation needs; a session that takes more is stuck.
const ROUNDS_MAX: usize = 10_000;

#[derive(Debug, Clone)]
pub enum Step {
    /// The client writes a request: v2 with this id, or v1.
    Ask {
        v2: Option<u8>,
        what: What,
    },
    /// The client writes bytes that are not a frame.
    Break,
    /// This many of the written bytes arrive.
    Arrive(u16),
    /// The client closes its sending side, after all written bytes have arrived.
    EndOfFile,
    /// The client reads this many bytes.
    Read(u32),
    /// One of the running streams sends a piece of output.
    Piece {
        request: u8,
        size: u32,
    },
    /// One of the running requests ends with a reply of this size.
    Finish {
        request: u8,
        size: u32,
    },
    /// Other connections take the whole receive budget, or return it.
    Occupy(bool),
    /// This many milliseconds pass.
    Wait(u16),
    Drain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Ping,
    Capabilities,
    Submit {
        stream: bool,
        size: u32,
    },
    /// A request with an invalid payload.
    Unfit,
}

struct Asked {
    version: Version,
    what: What,
    /// Position of the end of the request's frame among all written bytes.
    end: usize,
}

struct Running {
    start: Start,
    /// The position of the request among all that were asked.
    number: usize,
    pieces: u64,
}

struct World {
    shared: Arc<Shared>,
    session: Session,
    now: Instant,
    asked: Vec<Asked>,
    /// Bytes that the client has written but that have not arrived.
    written: BytesMut,
    arrived: usize,
    ended: bool,
    received: BytesMut,
    running: Vec<Running>,
    /// Numbers of all requests that were started.
    started: Vec<usize>,
    pieces: VecDeque<(Slot, Reply)>,
    claim: Option<Claim>,
    others: Option<Share>,
    exit: Option<Exit>,
}

/// Plays the steps, then runs the connection to its end. Panics if an invariant is violated.
pub fn play(steps: &[Step]) {
    let mut world = World::new();
    for step in steps {
        if world.exit.is_none() {
            world.step(step);
            world.settle();
        }
    }
    world.run_to_the_end();
    world.judge();
}

impl World {
    fn new() -> Self {
        let config = Config {
            max_in_flight: 8,
            max_in_flight_v1: 4,
            max_in_flight_v2: 6,
            receive_budget: BUDGET,
            reply_budget: BUDGET,
            read_timeout: Duration::from_secs(1),
            write_timeout: Duration::from_secs(1),
            // Short, so that a stream may reach its deadline while it waits for its turn.
            max_deadline: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(1),
            ..Config::default()
        };
        let shared = Arc::new(Shared::new(config, 0));
        Self {
            session: Session::new(shared.clone(), 0),
            shared,
            now: Instant::now(),
            asked: Vec::new(),
            written: BytesMut::new(),
            arrived: 0,
            ended: false,
            received: BytesMut::new(),
            running: Vec::new(),
            started: Vec::new(),
            pieces: VecDeque::new(),
            claim: None,
            others: None,
            exit: None,
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Ask { v2, what } => self.ask(v2, what),
            Step::Break => self.written.extend_from_slice(&[0, 0, 0, 5, 1, 1]),
            Step::Arrive(bytes) => self.arrive(bytes.into()),
            Step::EndOfFile => self.end_of_file(),
            Step::Read(bytes) => self.read(bytes as usize),
            Step::Piece { request, size } => self.piece(request.into(), size as usize),
            Step::Finish { request, size } => self.finish(request.into(), size as usize),
            Step::Occupy(true) => {
                let budget = self.shared.admission.settings().receive.clone();
                self.others = self.others.take().or_else(|| budget.claim(BUDGET).try_take());
            }
            Step::Occupy(false) => self.others = None,
            Step::Wait(ms) => self.wait(Duration::from_millis(ms.into())),
            Step::Drain => self.session.handle(Event::Drain, self.now),
        }
    }

    fn ask(&mut self, v2: Option<u8>, what: What) {
        let number = self.asked.len();
        let version = v2.map_or(Version::V1, |id| Version::V2 { request_id: id.into(), deadline_ms: 0 });
        let (kind, payload) = match what {
            What::Ping => (FrameType::Ping, String::new()),
            What::Capabilities => (FrameType::Capabilities, String::new()),
            What::Unfit => (FrameType::TaskSubmit, "{}".into()),
            What::Submit { stream, size } => {
                let wait = if stream { "stream" } else { "decision" };
                let submit = json!({"command": "task_submit", "task_type": "t", "request_id": number.to_string(),
                    "wait": wait, "context": "x".repeat(size as usize)});
                (FrameType::TaskSubmit, submit.to_string())
            }
        };

        Frame::new(version, kind, payload).encode(&mut self.written);
        let end = self.arrived + self.written.len();
        self.asked.push(Asked { version, what, end });
    }

    fn arrive(&mut self, bytes: usize) {
        let bytes = bytes.min(self.written.len());
        if bytes > 0 && !self.ended && self.session.reads() {
            self.arrived += bytes;
            let bytes = self.written.split_to(bytes);
            self.session.handle(Event::Received(&bytes), self.now);
        }
    }

    fn end_of_file(&mut self) {
        self.arrive(usize::MAX);
        self.settle();
        if self.exit.is_none() && self.written.is_empty() && !self.ended && self.session.reads() {
            self.ended = true;
            self.session.handle(Event::EndOfFile, self.now);
        }
    }

    fn read(&mut self, bytes: usize) {
        let bytes = bytes.min(self.session.output().len());
        if bytes > 0 {
            self.received.extend_from_slice(&self.session.output()[..bytes]);
            self.session.handle(Event::Written(bytes), self.now);
        }
    }

    fn piece(&mut self, request: usize, size: usize) {
        let mut streams: Vec<&mut Running> = self
            .running
            .iter_mut()
            .filter(|running| running.start.request.is_stream())
            .collect();
        if streams.is_empty() || self.pieces.len() >= PIECES {
            return;
        }

        let at = request % streams.len();
        let stream = &mut streams[at];
        let piece = json!({"number": stream.number, "seq": stream.pieces, "data": "x".repeat(size)});
        stream.pieces += 1;
        let slot = stream.start.slot;
        self.pieces
            .push_back((slot, Reply::new(FrameType::StreamData, piece.to_string())));
    }

    fn finish(&mut self, request: usize, size: usize) {
        if self.running.is_empty() {
            return;
        }
        let Running { start, number, pieces } = self.running.remove(request % self.running.len());
        let payload = json!({"number": number, "pieces": pieces, "data": "x".repeat(size)}).to_string();
        let reply = if start.request.is_stream() {
            Reply::new(FrameType::StreamComplete, payload)
        } else {
            Reply::ok(payload)
        };

        let slot = start.slot;
        drop(start);
        self.session
            .handle(Event::Finished(Finished { slot, reply, pieces }), self.now);
    }

    fn wait(&mut self, duration: Duration) {
        let until = self.now + duration;
        for _ in 0..ROUNDS_MAX {
            let Some(timer) = self.session.timer().filter(|timer| *timer <= until) else {
                self.now = until;
                return;
            };
            self.now = self.now.max(timer);
            // Like the connection's loop, which delivers all pieces before a timer event.
            for (slot, piece) in std::mem::take(&mut self.pieces) {
                self.session.handle(Event::Piece(slot, piece), self.now);
            }
            self.session.handle(Event::Timer, self.now);
            self.settle();
            if self.exit.is_some() {
                return;
            }
        }
        panic!("the timer stays at {:?}", self.session.timer());
    }

    /// Carries out all effects, and delivers pieces and budget as long as the session accepts them.
    fn settle(&mut self) {
        for _ in 0..ROUNDS_MAX {
            if self.exit.is_some() {
                return;
            }
            if let Some(share) = self.claim.as_ref().and_then(Claim::try_take) {
                self.claim = None;
                self.session.handle(Event::Budget(share), self.now);
            }
            while self.session.has_room()
                && let Some((slot, piece)) = self.pieces.pop_front()
            {
                self.session.handle(Event::Piece(slot, piece), self.now);
            }
            let Some(effect) = self.session.effect() else { return };
            self.carry_out(effect);
        }
        panic!("the session keeps returning effects");
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Start(start) => {
                let Request::Submit(submit) = &start.request else {
                    panic!("only submits are asked")
                };
                let number: usize = submit.request_id.as_ref().unwrap().parse().unwrap();
                assert!(!self.started.contains(&number), "request {number} is started twice");
                let same_slot = |running: &Running| running.start.slot == start.slot;
                assert!(!self.running.iter().any(same_slot), "{:?} is in use", start.slot);
                self.started.push(number);
                self.running.push(Running { start, number, pieces: 0 });
            }
            Effect::AwaitBudget(claim) => {
                assert!(self.claim.is_none(), "one frame is unfinished at a time");
                self.claim = Some(claim);
            }
            Effect::StopAwaitingBudget => assert!(self.claim.take().is_some(), "no share was awaited"),
            Effect::Abandon => self.running.clear(),
            Effect::ReadOnce => {
                if self.ended || self.written.is_empty() {
                    self.session.handle(Event::NothingToRead, self.now);
                } else {
                    self.arrive(usize::MAX);
                }
            }
            Effect::End(exit) => self.exit = Some(exit),
        }
    }

    /// The client reads everything, requests end, and time passes.
    fn run_to_the_end(&mut self) {
        self.others = None;
        for _ in 0..ROUNDS_MAX {
            self.settle();
            if self.exit.is_some() {
                return;
            }
            self.end_of_file();
            self.finish(0, 0);
            self.settle();
            self.read(usize::MAX);
            if self.running.is_empty() && self.session.output().is_empty() {
                self.wait(Duration::from_millis(10));
            }
        }
        panic!("the session does not end");
    }

    fn judge(mut self) {
        let exit = self.exit.expect("the session has ended");
        let (answers, rest) = answers(std::mem::take(&mut self.received));
        let cut = exit == Exit::WriteTimeout;
        assert!(cut || rest.is_empty(), "the output ends within a frame: {exit:?}");

        let mut asked: BTreeMap<Option<u64>, Vec<(usize, &Asked)>> = BTreeMap::new();
        for (number, ask) in self.asked.iter().enumerate() {
            asked.entry(key(ask.version)).or_default().push((number, ask));
        }
        for (key, answers) in &answers {
            let asked = asked.get(key).map_or(&[][..], Vec::as_slice);
            self.judge_key(*key, asked, answers, exit);
        }
        for (key, asked) in asked {
            let answered = answers.get(&key).map_or(0, Vec::len);
            let (started, arrived) = self.due(key, &asked);
            assert!(cut || answered >= started, "{key:?}: {started} started, {answered} answered: {exit:?}");
            let all = exit == Exit::ClientClosed;
            assert!(!all || answered == arrived, "{key:?}: {arrived} arrived, {answered} answered");
        }

        let Self { shared, session, running, claim, .. } = self;
        assert!(exit != Exit::ReadTimeout || claim.is_none(), "a closed session still waits for the budget");
        drop((session, running, claim));
        let settings = shared.admission.settings();
        assert_eq!(shared.admission.requests_held(), 0, "a permit leaked");
        assert_eq!((settings.receive.left(), settings.replies.left()), (BUDGET, BUDGET), "a budget leaks");
    }

    fn judge_key(&self, key: Option<u64>, asked: &[(usize, &Asked)], answers: &[Answer], exit: Exit) {
        for (at, answer) in answers.iter().enumerate() {
            let fits = |(number, ask): &(usize, &Asked)| answer.fits(*number, ask.what);
            // v1 replies come in order. For a reused v2 id, only the number shows which request was answered.
            let fits = match key {
                None => asked.get(at).is_some_and(fits),
                Some(_) => at < asked.len() && asked.iter().any(fits),
            };
            // A framing violation or an incomplete frame gets one final v1 error.
            let lost = matches!(exit, Exit::FramingLost | Exit::ReadTimeout | Exit::Drained | Exit::WriteTimeout);
            let farewell = key.is_none() && lost && at + 1 == answers.len() && answer.code().is_some();
            assert!(fits || farewell, "answer {at} of {key:?} does not fit: {answer:?}, {exit:?}");
        }

        let mut numbers: Vec<u64> = answers.iter().filter_map(Answer::number).collect();
        numbers.sort_unstable();
        assert!(numbers.windows(2).all(|pair| pair[0] != pair[1]), "a request is answered twice: {numbers:?}");
    }

    /// How many answers are due: to requests that were started, and to all that have arrived.
    fn due(&self, key: Option<u64>, asked: &[(usize, &Asked)]) -> (usize, usize) {
        let started = |(number, _): &&(usize, &Asked)| self.started.contains(number);
        let started = match key {
            None => asked.iter().rposition(|ask| started(&ask)).map_or(0, |at| at + 1),
            Some(_) => asked.iter().filter(started).count(),
        };
        let arrived = asked.iter().filter(|(_, ask)| ask.end <= self.arrived).count();
        (started, arrived)
    }
}

fn key(version: Version) -> Option<u64> {
    match version {
        Version::V1 => None,
        Version::V2 { request_id, .. } => Some(request_id),
    }
}

/// All frames that answer one request.
#[derive(Debug)]
struct Answer {
    pieces: u64,
    kind: FrameType,
    last: Value,
}

impl Answer {
    fn code(&self) -> Option<u64> {
        self.last["error"]["code"].as_u64()
    }

    fn number(&self) -> Option<u64> {
        self.last["number"].as_u64()
    }

    fn fits(&self, number: usize, what: What) -> bool {
        match (what, self.code()) {
            // The id is still in use by an earlier request.
            (_, Some(4)) if what != What::Unfit => self.pieces == 0,
            // Overload, and the drain. The last frame of a stream may be replaced after its output was sent.
            (What::Submit { .. }, Some(code)) => matches!(code, 6 | 10),
            (What::Unfit, code) => matches!(code, Some(4 | 6)),
            (_, Some(_)) => false,
            (What::Ping, None) => self.kind == FrameType::Pong,
            (What::Capabilities, None) => self.last["protocol_versions"] == json!([1, 2]),
            (What::Submit { .. }, None) => {
                self.number() == Some(number as u64) && self.last["pieces"].as_u64() == Some(self.pieces)
            }
        }
    }
}

/// The answers by id (`None`: v1) in the order of their last frames, and the bytes of an incomplete frame.
fn answers(mut received: BytesMut) -> (BTreeMap<Option<u64>, Vec<Answer>>, BytesMut) {
    let mut answers: BTreeMap<Option<u64>, Vec<Answer>> = BTreeMap::new();
    // Counted per request number, because errors about a reused id may come in between.
    let mut pieces: BTreeMap<u64, u64> = BTreeMap::new();
    while let Some(frame) = Decoder.decode(&mut received).expect("the session keeps its framing") {
        let kind = frame.frame_type().expect("the type is known");
        let last: Value = serde_json::from_slice(&frame.payload).unwrap_or_default();
        if kind == FrameType::StreamData {
            let number = last["number"].as_u64().unwrap();
            let seen = pieces.entry(number).or_default();
            assert_eq!(last["seq"].as_u64(), Some(*seen), "pieces come in order");
            *seen += 1;
            continue;
        }

        let pieces = last["number"].as_u64().and_then(|number| pieces.remove(&number));
        let answer = Answer { pieces: pieces.unwrap_or(0), kind, last };
        answers.entry(key(frame.version)).or_default().push(answer);
    }
    (answers, received)
}
