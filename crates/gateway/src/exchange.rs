//! The exchange of one client request with the router.

use crate::Gateway;
use crate::deadline::Deadline;
use crate::failure::Failure;
use crate::reply::{PAYLOAD_MAX, Reply};
use crate::upstream::{self, Answer};
use bus::Headers;
use std::sync::Arc;
use std::time::Instant;
use wire::ipc::{ErrorCode, ExchangeContext, TaskRef, TaskSubmit, Wait};
use wire::router::{
    AnswerContext, DEFAULT_TENANT, DecideRequest, ErrorBody, RequestOptions, Task, TaskAnswer, TaskQuery, TaskState,
    VERSION,
};
use wire::{subjects, trace};

/// A request in flight, with the ids that its messages, errors and log lines carry.
pub struct Exchange {
    pub gateway: Arc<Gateway>,
    /// The user on this host; `None` for the holder of a key, whose tenant is the key's.
    uid: Option<u32>,
    pub request_id: String,
    trace_id: String,
    /// W3C trace context; `None` if the trace id is not 32 hex digits.
    traceparent: Option<String>,
    pub tenant_id: String,
    pub deadline: Deadline,
}

impl Exchange {
    pub fn of_submit(
        gateway: Arc<Gateway>,
        uid: impl Into<Option<u32>>,
        submit: &TaskSubmit,
        deadline: Deadline,
    ) -> Self {
        // The trace id in a well-formed traceparent takes precedence over the separate trace id.
        let given = submit.traceparent.as_deref();
        let given = given.and_then(|parent| Some((parent, trace::trace_id_of(parent)?)));

        let trace_id = match (given, &submit.trace_id) {
            (Some((_, trace_id)), _) => trace_id.to_string(),
            (None, Some(trace_id)) => trace_id.clone(),
            (None, None) => upstream::new_trace_id(),
        };

        let request_id = submit.request_id.clone();
        Self {
            gateway,
            uid: uid.into(),
            request_id: request_id.unwrap_or_else(|| uuid::Uuid::now_v7().to_string()),
            traceparent: match given {
                Some((parent, _)) => Some(parent.into()),
                None => trace::traceparent(&trace_id, rand::random()),
            },
            trace_id,
            tenant_id: submit.tenant_id.clone().unwrap_or_else(|| DEFAULT_TENANT.into()),
            deadline,
        }
    }

    /// An exchange about a task that exists already.
    pub fn about(gateway: Arc<Gateway>, uid: u32, task: &TaskRef, deadline: Deadline) -> Self {
        let trace_id = upstream::new_trace_id();
        Self {
            gateway,
            uid: Some(uid),
            request_id: task.task_id.clone(),
            traceparent: trace::traceparent(&trace_id, rand::random()),
            trace_id,
            tenant_id: task.tenant_id.clone().unwrap_or_else(|| DEFAULT_TENANT.into()),
            deadline,
        }
    }

    /// Sends the submit to the router.
    pub async fn decide(&self, submit: TaskSubmit) -> Result<Answer, Failure> {
        let request = self.decide_request(submit);
        let request = serde_json::to_vec(&request).map_err(|e| Failure::new(ErrorCode::Internal, e.to_string()))?;
        let Gateway { shared, bus, .. } = &*self.gateway;
        let decided = shared.upstream.decide(bus, self.headers(), request.into(), self.due());
        Ok(decided.await?)
    }

    /// The id of the request that was the first with the idempotency key, if that was not this one.
    pub fn first_of_key(&self, decided: &[u8]) -> Option<String> {
        let answer = serde_json::from_slice::<AnswerContext>(decided).ok()?;
        answer.context.request_id.filter(|first| *first != self.request_id)
    }

    fn decide_request(&self, submit: TaskSubmit) -> DecideRequest {
        let waits = submit.wait != Wait::Decision;
        let payload = submit.payload();

        // The client does not wait past its own deadline, so the task need not run any longer.
        let options = self.deadline.own.filter(|_| waits).map(|own| RequestOptions {
            deadline_ms: Some(u64::try_from(own.as_millis()).unwrap_or(u64::MAX)),
            ..RequestOptions::default()
        });

        DecideRequest {
            version: VERSION.into(),
            request_id: self.request_id.clone(),
            tenant_id: self.tenant_id.clone(),
            task: Task { task_type: submit.task_type, payload: Some(payload), payload_ref: None },
            policy_id: submit.policy_id,
            trace_id: Some(self.trace_id.clone()),
            constraints: None,
            metadata: None,
            push_assignment: waits || submit.push_assignment,
            assignment_subject: None,
            options,
            run_id: None,
            flow_id: None,
            step_id: None,
            idempotency_key: submit.idempotency_key,
            deadline: None,
            result_subject: waits.then(|| self.gateway.result_subject.clone()),
        }
    }

    /// Finds the task: of the tenant that the client names, else of the first of the user's tenants that has a task
    /// with this id. Sets the exchange's tenant to that one. With a `result_subject`, the router also notes it.
    pub async fn find(&mut self, named: Option<String>, result_subject: Option<String>) -> Result<TaskAnswer, Failure> {
        let tenants = match (named, self.uid) {
            (Some(tenant), _) => vec![tenant],
            (None, Some(uid)) => self.gateway.shared.admission.settings().tenants_of(uid),
            (None, None) => vec![self.tenant_id.clone()],
        };
        // A user without any tenant gets the same refusal as on a submit.
        self.check_tenant(tenants.first().map_or(DEFAULT_TENANT, String::as_str))?;

        let mut found = Err(Failure::rejected(ErrorBody::unknown_task(&self.request_id)));
        for tenant in tenants {
            self.tenant_id = tenant;
            found = self.ask(subjects::GET_DECISION, result_subject.clone()).await;
            if !found.as_ref().is_err_and(Failure::is_not_found) {
                break;
            }
        }
        found
    }

    /// Reads the task's record.
    pub async fn record(&self) -> Result<TaskState, Failure> {
        Ok(self.ask(subjects::GET_DECISION, None).await?.task)
    }

    /// Cancels the task. The task is looked up first, because a router of the previous version ignores the tenant.
    pub async fn cancel(&mut self, named: Option<String>) -> Result<TaskState, Failure> {
        self.find(named, None).await?;
        Ok(self.ask(subjects::CANCEL, None).await?.task)
    }

    /// Sends a query about this tenant's task to the router.
    async fn ask(&self, subject: &str, result_subject: Option<String>) -> Result<TaskAnswer, Failure> {
        let query = TaskQuery { request_id: self.request_id.clone(), tenant_id: None, result_subject };
        let query = serde_json::to_vec(&query).expect("a query is JSON");
        let Gateway { shared, bus, .. } = &*self.gateway;
        let reply = shared
            .upstream
            .query(bus, subject, self.headers(), query.into(), self.due())
            .await?;

        let answer: TaskAnswer = serde_json::from_slice(&reply).map_err(|e| {
            Failure::new(ErrorCode::Internal, format!("The router's answer cannot be read: {}", wire::unfit(&e)))
        })?;
        // A router of the previous version answers with the task of any tenant.
        if answer.task.tenant() != self.tenant_id {
            return Err(Failure::rejected(ErrorBody::unknown_task(&self.request_id)));
        }
        Ok(answer)
    }

    fn headers(&self) -> Headers {
        upstream::headers(Some(&self.trace_id), self.traceparent.as_deref(), Some(&self.tenant_id))
    }

    /// When the router must have answered.
    fn due(&self) -> Instant {
        let timeout = self.gateway.shared.admission.settings().request_timeout;
        self.deadline.at.min(Instant::now() + timeout)
    }

    /// Refuses a request whose deadline passed while it waited for its turn.
    pub fn check_time(&self) -> Result<(), Failure> {
        if Instant::now() < self.deadline.at {
            return Ok(());
        }
        Err(Failure::new(ErrorCode::Timeout, "The deadline passed before the request could start"))
    }

    /// Refuses a tenant that the user may not act for.
    pub fn check_tenant(&self, tenant_id: &str) -> Result<(), Failure> {
        let Some(uid) = self.uid else {
            return Ok(());
        };
        if self.gateway.shared.admission.settings().may_act_for(uid, tenant_id) {
            return Ok(());
        }
        let text = format!("User {uid} may not act for tenant {tenant_id:?}; gateway.tenants says who may");
        Err(Failure::new(ErrorCode::Forbidden, text))
    }

    /// Logs a submit that is about to be sent to the router.
    pub fn log_accepted(&self, submit: &TaskSubmit) {
        tracing::debug!(
            trace_id = self.trace_id,
            request_id = self.request_id,
            tenant_id = self.tenant_id,
            task_type = submit.task_type,
            wait = ?submit.wait,
            "request accepted"
        );
    }

    /// Counts and logs the outcome. Returns the last frame of the answer.
    pub fn end(&self, outcome: Result<Reply, Failure>, started: Instant) -> Reply {
        self.settle(outcome, started)
            .unwrap_or_else(|failure| self.refuse(failure))
    }

    /// Counts and logs the outcome.
    pub fn settle(&self, outcome: Result<Reply, Failure>, started: Instant) -> Result<Reply, Failure> {
        let took = started.elapsed();
        self.gateway.shared.stats.completed(took);
        let took_us = took.as_micros() as u64;

        let failure = match outcome {
            Ok(reply) if reply.payload.len() <= PAYLOAD_MAX => {
                let (request_id, trace_id, tenant_id) = (&self.request_id, &self.trace_id, &self.tenant_id);
                tracing::debug!(trace_id, request_id, tenant_id, took_us, "request answered");
                return Ok(reply);
            }
            Ok(reply) => {
                let text = format!("The answer has {} bytes, more than a frame holds", reply.payload.len());
                let failure = Failure::new(ErrorCode::FrameTooLarge, text);
                if reply.ends_stream() {
                    failure.in_stream()
                } else {
                    failure
                }
            }
            Err(failure) => failure,
        };

        self.note(&failure, took_us);
        Err(failure)
    }

    /// Counts and logs a failure.
    fn note(&self, failure: &Failure, took_us: u64) {
        self.gateway.shared.stats.failed(failure.code);

        // A message about an invalid request quotes parts of the request, which must not reach the log.
        let error = failure.body();
        let reason = (failure.code == ErrorCode::Rejected).then(|| error.code.as_str());
        let why = if reason == Some("invalid_request") {
            "invalid request"
        } else {
            &error.message
        };

        let (request_id, trace_id, tenant_id) = (&self.request_id, &self.trace_id, &self.tenant_id);
        let error_code = failure.code.name();
        tracing::info!(trace_id, request_id, tenant_id, error_code, reason, took_us, "request failed: {why}");
    }

    /// The error frame for a failure.
    fn refuse(&self, failure: Failure) -> Reply {
        let in_stream = failure.in_stream;
        let mut payload = failure.into_payload();
        payload.context = Some(ExchangeContext {
            request_id: Some(self.request_id.clone()),
            trace_id: Some(self.trace_id.clone()),
        });

        let reply = Reply::from_payload(&mut payload);
        if in_stream { reply.in_stream() } else { reply }
    }
}
