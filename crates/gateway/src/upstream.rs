//! Access to the router: load shedding, the circuit breaker, and bounded retries.

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

/// The gateway's access to the router, shared by all requests.
pub struct Access {
    breaker: Mutex<Breaker>,
    retries: Mutex<Budget>,
    pressure: Arc<Pressure>,
    min_timeout_counted_us: AtomicU64,
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

    /// Returns the router's answer byte for byte. A request that fails because the bus is disconnected or the router
    /// is unavailable is retried until `due`, within the retry budget. Retrying is safe: the router deduplicates
    /// requests by their id.
    pub async fn ask(
        &self,
        bus: &Bus,
        subject: &str,
        headers: Headers,
        payload: Bytes,
        due: Instant,
    ) -> Result<Bytes, Refused> {
        // Only decide requests are shed: queries cost an overloaded router little, and cancelling tasks helps it.
        if subject == subjects::DECIDE {
            self.pressure.check().map_err(Refused::Router)?;
        }

        self.retries.lock().request(Instant::now());
        let mut previous = None;
        loop {
            let refused = match self.attempt(bus, subject, headers.clone(), payload.clone(), due).await {
                Ok(answer) => return Ok(answer),
                // If an earlier attempt opened the breaker, report the error of that attempt: it names the cause.
                Err(refused @ Refused::Open { .. }) => return Err(previous.unwrap_or(refused)),
                Err(refused) => refused,
            };

            let temporary = match &refused {
                Refused::Bus(bus::Error::Disconnected(_)) => true,
                Refused::Router(error) => error.code == RouterCode::Unavailable,
                _ => false,
            };

            // Jitter spreads the retries of requests that failed together.
            let pause = RETRY_PAUSE.mul_f64(0.5 + rand::random::<f64>());
            let now = Instant::now();
            if !temporary || now + pause >= due || !self.retries.lock().take(now) {
                return Err(refused);
            }

            metrics::counter!("beamline_gateway_retries_total").increment(1);
            previous = Some(refused);
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(
        &self,
        bus: &Bus,
        subject: &str,
        headers: Headers,
        payload: Bytes,
        due: Instant,
    ) -> Result<Bytes, Refused> {
        let call = self.call()?;
        let began = Instant::now();
        let left = due.saturating_duration_since(began);

        let mut answer = match bus.request(subject, headers, payload, left).await {
            Ok(Message { payload, .. }) => read(payload),
            Err(bus::Error::NoResponders(_)) => Err(Refused::NoResponders { retry_after: Duration::ZERO }),
            Err(error) => Err(Refused::Bus(error)),
        };

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

fn read(payload: Bytes) -> Result<Bytes, Refused> {
    let head: AnswerHead = serde_json::from_slice(&payload).map_err(|e| Refused::Unreadable(wire::unfit(&e)))?;
    match head.error {
        None if head.ok => Ok(payload),
        Some(error) => Err(Refused::Router(error)),
        None => Err(Refused::Unreadable("ok is false, but there is no error".into())),
    }
}
