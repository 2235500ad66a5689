//! Access to the router: load shedding, the circuit breaker, and bounded retries.
//!
//! Queries about tasks have a path of their own. They neither pass the circuit breaker nor count for it, and use a retry
//! budget of their own: reading large records may be slow while decisions are fast.

use crate::breaker::{Breaker, Config, Outcome, Pass, State};
use crate::retry::Budget;
use crate::shedding::Pressure;
use bus::{Bus, Headers, Message};
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use wire::router::{AnswerHead, ErrorBody, RouterCode, VERSION};
use wire::subjects;

/// A timeout counts against the breaker only if the request had at least this much time, or 90 % of the request
/// timeout if that is less.
const MIN_TIMEOUT_COUNTED: Duration = Duration::from_millis(500);
/// The mean pause before a retry, with a jitter of half of it in either direction.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// When clients should repeat a query that no router answers.
const QUERY_RETRY_AFTER: Duration = Duration::from_millis(500);

/// The gateway's access to the router, shared by all requests.
pub struct Access {
    breaker: Mutex<Breaker>,
    retries: Mutex<Budget>,
    query_retries: Mutex<Budget>,
    pressure: Arc<Pressure>,
    min_timeout_counted_us: AtomicU64,
}

/// What the router answered.
pub struct Answer {
    /// The answer byte for byte.
    pub payload: Bytes,
    /// Of a pushed task: its assignment, and where a copy of its result will go.
    pub assignment_id: Option<String>,
    pub result_subject: Option<String>,
}

/// Why a request to the router failed.
#[derive(Debug)]
pub enum Refused {
    /// The breaker is open.
    Open {
        retry_after: Duration,
    },
    /// No router is running, which opens the breaker.
    NoResponders {
        retry_after: Duration,
    },
    Bus(bus::Error),
    /// The router rejected the request.
    Router(Box<ErrorBody>),
    /// The router's answer could not be parsed.
    Unreadable(String),
}

impl Access {
    pub fn new(config: Config, request_timeout: Duration) -> Self {
        Self {
            breaker: Mutex::new(Breaker::new(config)),
            retries: Mutex::new(Budget::new()),
            query_retries: Mutex::new(Budget::new()),
            pressure: Arc::default(),
            min_timeout_counted_us: min_timeout_counted_us(request_timeout).into(),
        }
    }

    pub fn configure(&self, config: Config, request_timeout: Duration) {
        self.breaker.lock().configure(config);
        self.min_timeout_counted_us
            .store(min_timeout_counted_us(request_timeout), Relaxed);
    }

    /// The state of the breaker as a request would find it now.
    pub fn state(&self) -> State {
        self.breaker.lock().state_at(Instant::now())
    }

    pub fn pressure(&self) -> Arc<Pressure> {
        self.pressure.clone()
    }

    /// Sends a decide request. Returns the router's answer.
    ///
    /// A request that fails because the bus is disconnected or the router is unavailable is retried until `due`, within
    /// the retry budget. Retrying is safe: the router deduplicates requests by their id.
    pub async fn decide(&self, bus: &Bus, headers: Headers, payload: Bytes, due: Instant) -> Result<Answer, Refused> {
        // Queries are not shed: they cost an overloaded router little, and cancelling tasks helps it.
        self.pressure.check().map_err(Refused::Router)?;

        let request = Request { bus, subject: subjects::DECIDE, headers, payload, due };
        self.retries.lock().request(Instant::now());
        let mut previous = None;
        loop {
            let refused = match self.attempt(&request).await {
                Ok(answer) => return Ok(answer),
                // If an earlier attempt opened the breaker, report the error of that attempt: it names the cause.
                Err(refused @ Refused::Open { .. }) => return Err(previous.unwrap_or(refused)),
                Err(refused) => refused,
            };
            if !may_retry(&self.retries, &refused, due).await {
                return Err(refused);
            }
            previous = Some(refused);
        }
    }

    /// Sends a query about a task, or its cancellation, which is idempotent. Returns the router's answer.
    pub async fn query(
        &self,
        bus: &Bus,
        subject: &str,
        headers: Headers,
        payload: Bytes,
        due: Instant,
    ) -> Result<Bytes, Refused> {
        let request = Request { bus, subject, headers, payload, due };
        self.query_retries.lock().request(Instant::now());
        loop {
            let refused = match request.send().await {
                Ok(answer) => return Ok(answer.payload),
                Err(Refused::NoResponders { .. }) => {
                    return Err(Refused::NoResponders { retry_after: QUERY_RETRY_AFTER });
                }
                Err(refused) => refused,
            };
            if !may_retry(&self.query_retries, &refused, due).await {
                return Err(refused);
            }
        }
    }

    async fn attempt(&self, request: &Request<'_>) -> Result<Answer, Refused> {
        let call = self.call()?;
        let left = request.left();
        let mut answer = request.send().await;

        if matches!(&answer, Err(Refused::Router(error)) if error.code == RouterCode::Backpressure) {
            self.pressure.refused();
        }

        call.settle(match &answer {
            Ok(_) => Outcome::Answered,
            Err(Refused::Router(error)) => match error.code {
                RouterCode::Internal | RouterCode::Unavailable => Outcome::Failed,
                // The router is alive but sheds load, so the call is no reason to open or to close the breaker.
                _ if error.status() == 429 => Outcome::Neutral,
                _ => Outcome::Answered,
            },
            Err(Refused::Unreadable(_)) => Outcome::Failed,
            Err(Refused::NoResponders { .. }) => Outcome::NoResponders,
            Err(Refused::Bus(bus::Error::Timeout(_))) if left >= self.min_timeout_counted() => Outcome::Failed,
            Err(Refused::Bus(_) | Refused::Open { .. }) => Outcome::Neutral,
        });

        // Known only after the call is settled, which opens the breaker.
        if let Err(Refused::NoResponders { retry_after }) = &mut answer {
            *retry_after = self.breaker.lock().time_until_half_open(Instant::now());
        }
        answer
    }

    fn min_timeout_counted(&self) -> Duration {
        Duration::from_micros(self.min_timeout_counted_us.load(Relaxed))
    }

    fn call(&self) -> Result<Call<'_>, Refused> {
        let pass = self.transition(|breaker| breaker.pass(Instant::now()));
        match pass {
            Ok(pass) => Ok(Call { access: self, pass: Some(pass) }),
            Err(retry_after) => Err(Refused::Open { retry_after }),
        }
    }

    /// Runs `step` on the breaker, and logs a change of its state exactly once.
    fn transition<R>(&self, step: impl FnOnce(&mut Breaker) -> R) -> R {
        let mut breaker = self.breaker.lock();
        let before = breaker.state();
        let result = step(&mut breaker);
        let after = breaker.state();
        // Metrics and logs are written without the lock.
        drop(breaker);

        if before != after {
            let (from, to) = (before.as_str(), after.as_str());
            metrics::counter!("beamline_gateway_breaker_transitions_total", "to" => to).increment(1);
            tracing::warn!(from, to, "the circuit breaker for the router changed state");
        }
        result
    }
}

/// A request to the router that may be sent several times.
struct Request<'a> {
    bus: &'a Bus,
    subject: &'a str,
    headers: Headers,
    payload: Bytes,
    due: Instant,
}

impl Request<'_> {
    fn left(&self) -> Duration {
        self.due.saturating_duration_since(Instant::now())
    }

    async fn send(&self) -> Result<Answer, Refused> {
        let (headers, payload) = (self.headers.clone(), self.payload.clone());
        match self.bus.request(self.subject, headers, payload, self.left()).await {
            Ok(Message { payload, .. }) => read(payload),
            Err(bus::Error::NoResponders(_)) => Err(Refused::NoResponders { retry_after: Duration::ZERO }),
            Err(error) => Err(Refused::Bus(error)),
        }
    }
}

/// Whether a request that failed so may be sent again; if so, this waits before it. Takes the retry from the budget.
async fn may_retry(budget: &Mutex<Budget>, refused: &Refused, due: Instant) -> bool {
    let temporary = match refused {
        Refused::Bus(bus::Error::Disconnected(_)) => true,
        Refused::Router(error) => error.code == RouterCode::Unavailable,
        _ => false,
    };

    // Jitter spreads the retries of requests that failed together.
    let pause = RETRY_PAUSE.mul_f64(0.5 + rand::random::<f64>());
    let now = Instant::now();
    if !temporary || now + pause >= due || !budget.lock().take(now) {
        return false;
    }

    metrics::counter!("beamline_gateway_retries_total").increment(1);
    tokio::time::sleep(pause).await;
    true
}

fn min_timeout_counted_us(request_timeout: Duration) -> u64 {
    // At most MIN_TIMEOUT_COUNTED, which fits 64 bits.
    MIN_TIMEOUT_COUNTED.min(request_timeout.mul_f64(0.9)).as_micros() as u64
}

/// One call in flight. Dropping it settles the call as [`Outcome::Neutral`]: the caller was cancelled.
struct Call<'a> {
    access: &'a Access,
    pass: Option<Pass>,
}

impl Call<'_> {
    fn settle(mut self, outcome: Outcome) {
        self.report(outcome);
    }

    fn report(&mut self, outcome: Outcome) {
        if let Some(pass) = self.pass.take() {
            self.access
                .transition(|breaker| breaker.settle(pass, outcome, Instant::now()));
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.report(Outcome::Neutral);
    }
}

/// A random trace id of 32 hex digits.
pub fn new_trace_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// The headers of every request to the router.
pub fn headers(trace_id: Option<&str>, traceparent: Option<&str>, tenant_id: Option<&str>) -> Headers {
    let mut headers = Headers::new().with("version", VERSION);
    for (name, value) in [("trace_id", trace_id), ("tenant_id", tenant_id), ("traceparent", traceparent)] {
        if let Some(value) = value {
            headers.insert(name, value);
        }
    }
    headers
}

fn read(payload: Bytes) -> Result<Answer, Refused> {
    let head: AnswerHead = serde_json::from_slice(&payload).map_err(|e| Refused::Unreadable(wire::unfit(&e)))?;
    let AnswerHead { ok, error, assignment_id, result_subject } = head;
    match error {
        None if ok => Ok(Answer { payload, assignment_id, result_subject }),
        Some(error) => Err(Refused::Router(error)),
        None => Err(Refused::Unreadable("ok is false, but there is no error".into())),
    }
}
