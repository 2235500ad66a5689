//! Which providers are eligible now: breakers in two layers, and cool-downs. Sans-IO: time is an argument.
//!
//! Each provider has a breaker that all tenants share, with the operator's rules. A policy with its own
//! `circuit_breaker` has a second breaker for each of its providers. Only tasks that the policy decided feed that
//! breaker, and it keeps the provider from these tasks only. A provider is eligible if both breakers let a call through
//! and it is not cooling down.

use crate::breaker::{Breaker, Outcome, State, View};
use parking_lot::Mutex;
use std::collections::HashMap;
use wire::limits::COOL_DOWN_MAX_S;
use wire::policy::CircuitBreaker;
use wire::router::{Choice, ProviderOutcome, Verdict};
use wire::status::BreakerStatus;

/// The state, in a status, of a closed breaker whose provider's endpoint asked for a pause.
const COOLING_DOWN: &str = "cooling_down";

/// The policy that decides: the tenant's own, or that of tenant `default`.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// The tenant that owns the policy.
    pub tenant: &'a str,
    pub policy: &'a str,
    /// The policy's own breaker rules, if it has any.
    pub rules: Option<CircuitBreaker>,
}

impl Scope<'_> {
    /// Unambiguous, because a tenant's id has no slash.
    fn key(&self) -> String {
        format!("{}/{}", self.tenant, self.policy)
    }
}

/// Whether a provider can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Eligible,
    /// The provider's endpoint asked for a pause, of which this much is left.
    CoolingDown {
        ms: u64,
    },
    /// A breaker is open, or half open without a free place.
    Out,
}

#[derive(Debug)]
pub struct Breakers {
    /// The operator's rules, for the shared breakers.
    rules: CircuitBreaker,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    providers: HashMap<String, Provider>,
    /// By [`Scope::key`], then by provider.
    policies: HashMap<String, HashMap<String, Breaker>>,
}

#[derive(Debug, Default)]
struct Provider {
    breaker: Breaker,
    cool_down: CoolDown,
}

#[derive(Debug, Clone, Copy, Default)]
struct CoolDown {
    /// How many cool-downs there have been; of two routers, the one with more of them is up to date.
    count: u64,
    until_ms: u64,
}

impl CoolDown {
    fn left_ms(&self, now_ms: u64) -> u64 {
        self.until_ms.saturating_sub(now_ms)
    }
}

impl Table {
    fn standing(&self, rules: &CircuitBreaker, provider: &str, scope: &Scope<'_>, now_ms: u64) -> Standing {
        let shared = self.providers.get(provider);
        let closed = shared.is_none_or(|known| known.breaker.lets_through(rules, now_ms));
        let allowed = scope.rules.is_none_or(|rules| {
            let own = self
                .policies
                .get(&scope.key())
                .and_then(|providers| providers.get(provider));
            own.is_none_or(|breaker| breaker.lets_through(&rules, now_ms))
        });

        match shared.map_or(0, |known| known.cool_down.left_ms(now_ms)) {
            _ if !(closed && allowed) => Standing::Out,
            0 => Standing::Eligible,
            ms => Standing::CoolingDown { ms },
        }
    }
}

impl Breakers {
    pub fn new(rules: CircuitBreaker) -> Self {
        Self { rules, table: Mutex::default() }
    }

    pub fn standing(&self, provider: &str, scope: &Scope<'_>, now_ms: u64) -> Standing {
        self.table.lock().standing(&self.rules, provider, scope, now_ms)
    }

    /// Permission to call a provider, with a place in each of its half-open breakers. `None` if the provider is not
    /// eligible, for example because another request has just taken the last place.
    pub fn reserve(&self, provider: &str, scope: &Scope<'_>, holder: &str, now_ms: u64) -> Option<Place<'_>> {
        let mut table = self.table.lock();
        if table.standing(&self.rules, provider, scope, now_ms) != Standing::Eligible {
            return None;
        }

        // A breaker that does not exist yet is closed, at generation 0.
        let (mut generation, mut policy_generation) = (0, scope.rules.map(|_| 0));
        let mut timeout_ms = None;
        if let Some(known) = table.providers.get_mut(provider) {
            known.breaker.enter(holder, &self.rules, now_ms);
            generation = known.breaker.generation();
            timeout_ms = (known.breaker.state() == State::HalfOpen).then_some(self.rules.timeout_ms);
        }

        let policy = scope.rules.map(|_| scope.key());
        let own = policy
            .as_ref()
            .and_then(|key| table.policies.get_mut(key)?.get_mut(provider));
        if let (Some(breaker), Some(rules)) = (own, &scope.rules) {
            breaker.enter(holder, rules, now_ms);
            policy_generation = Some(breaker.generation());
            let half_open = breaker.state() == State::HalfOpen;
            timeout_ms = timeout_ms
                .into_iter()
                .chain(half_open.then_some(rules.timeout_ms))
                .min();
        }

        let held = timeout_ms.map(|timeout_ms| Held {
            breakers: self,
            provider: provider.into(),
            policy,
            holder: holder.into(),
            timeout_ms,
        });
        Some(Place { held, generation, policy_generation })
    }

    /// Applies the outcome of an assignment. `policy_rules` are the breaker rules of the policy that decided it, if the
    /// policy still exists and has its own.
    pub fn ended(&self, ended: &ProviderOutcome, policy_rules: Option<&CircuitBreaker>, now_ms: u64) {
        let outcome = match ended.verdict {
            Verdict::Success => Outcome::Success,
            Verdict::Failed => Outcome::Failure,
            Verdict::CoolDown { .. } | Verdict::Neutral => Outcome::Neutral,
        };
        let (provider, holder, choice) = (&ended.provider_id, &ended.assignment_id, &ended.choice);
        let mut table = self.table.lock();

        let known = table.providers.entry(provider.clone()).or_default();
        if let Verdict::CoolDown { retry_after_seconds } = ended.verdict {
            let until_ms = now_ms + retry_after_seconds.min(COOL_DOWN_MAX_S) * 1000;
            known.cool_down.count = known.cool_down.count.saturating_add(1);
            known.cool_down.until_ms = known.cool_down.until_ms.max(until_ms);
            tracing::warn!(provider, retry_after_seconds, "the provider's endpoint is busy; the provider cools down");
        }
        logged(provider, None, &mut known.breaker, |breaker| {
            breaker.ended(holder, choice.generation, outcome, &self.rules, now_ms);
        });

        if let (Some(rules), Some(generation)) = (policy_rules, choice.policy_generation) {
            let key = scope_of(choice).key();
            let breaker = table
                .policies
                .entry(key.clone())
                .or_default()
                .entry(provider.clone())
                .or_default();
            logged(provider, Some(&key), breaker, |breaker| {
                breaker.ended(holder, generation, outcome, rules, now_ms);
            });
        }
    }

    /// Adopts newer states from another router's status, for a router that started later or missed an outcome. `rules`
    /// returns the rules of a breaker, or `None` if no such breaker may exist here.
    pub fn adopt(
        &self,
        theirs: &[BreakerStatus],
        now_ms: u64,
        rules: impl Fn(&BreakerStatus) -> Option<CircuitBreaker>,
    ) {
        let mut table = self.table.lock();
        for status in theirs {
            let (Some(rules), Some(view)) = (rules(status), view_of(status)) else {
                continue;
            };

            let provider = &status.provider;
            let Some((tenant, policy)) = status.tenant.as_ref().zip(status.policy.as_ref()) else {
                let known = table.providers.entry(provider.clone()).or_default();
                logged(provider, None, &mut known.breaker, |breaker| breaker.adopt(&view, &rules, now_ms));
                if status.cool_downs > known.cool_down.count {
                    let until_ms = now_ms + status.cooling_down_ms.min(COOL_DOWN_MAX_S * 1000);
                    known.cool_down.count = status.cool_downs;
                    known.cool_down.until_ms = known.cool_down.until_ms.max(until_ms);
                }
                continue;
            };

            let key = Scope { tenant, policy, rules: None }.key();
            let breaker = table
                .policies
                .entry(key.clone())
                .or_default()
                .entry(provider.clone())
                .or_default();
            logged(provider, Some(&key), breaker, |breaker| breaker.adopt(&view, &rules, now_ms));
        }
    }

    /// Forgets the breakers for which `exists` is false: those of policies that are gone, and of providers that no
    /// policy names any more.
    pub fn retain(&self, exists: impl Fn(&BreakerStatus) -> bool) {
        let mut table = self.table.lock();
        table
            .providers
            .retain(|provider, _| exists(&BreakerStatus { provider: provider.clone(), ..BreakerStatus::default() }));
        table.policies.retain(|key, providers| {
            providers.retain(|provider, _| exists(&named(provider, key)));
            !providers.is_empty()
        });
    }

    /// Every breaker: the shared ones, then those of policies, both sorted by name.
    pub fn status(&self, now_ms: u64) -> Vec<BreakerStatus> {
        let table = self.table.lock();
        let shared = table.providers.iter().map(|(provider, known)| {
            let cooling_down_ms = known.cool_down.left_ms(now_ms);
            let mut status = BreakerStatus {
                provider: provider.clone(),
                cool_downs: known.cool_down.count,
                cooling_down_ms,
                ..status_of(&known.breaker.view(now_ms))
            };
            if cooling_down_ms > 0 && known.breaker.state() == State::Closed {
                status.state = COOLING_DOWN.into();
            }
            status
        });

        let own = table.policies.iter().flat_map(|(key, providers)| {
            providers.iter().map(move |(provider, breaker)| {
                let BreakerStatus { provider, tenant, policy, .. } = named(provider, key);
                BreakerStatus { provider, tenant, policy, ..status_of(&breaker.view(now_ms)) }
            })
        });

        let mut all: Vec<_> = shared.chain(own).collect();
        all.sort_by(|a, b| (&a.tenant, &a.policy, &a.provider).cmp(&(&b.tenant, &b.policy, &b.provider)));
        all
    }
}

fn scope_of(choice: &Choice) -> Scope<'_> {
    Scope { tenant: &choice.policy_tenant, policy: &choice.policy_id, rules: None }
}

/// Names a policy's breaker for a provider; `key` is a [`Scope::key`].
fn named(provider: &str, key: &str) -> BreakerStatus {
    let (tenant, policy) = key.split_once('/').expect("a key has a slash");
    let (tenant, policy) = (Some(tenant.into()), Some(policy.into()));
    BreakerStatus { provider: provider.into(), tenant, policy, ..BreakerStatus::default() }
}

fn status_of(view: &View) -> BreakerStatus {
    BreakerStatus {
        state: view.state.as_str().into(),
        failures: view.failures,
        calls: view.calls,
        generation: view.generation,
        open_ms: view.open_ms,
        ..BreakerStatus::default()
    }
}

/// `None` if this version does not know the state.
fn view_of(status: &BreakerStatus) -> Option<View> {
    let state = match &*status.state {
        "open" => State::Open,
        "half_open" => State::HalfOpen,
        "closed" | COOLING_DOWN => State::Closed,
        _ => return None,
    };
    let BreakerStatus { generation, open_ms, failures, calls, .. } = *status;
    Some(View { generation, state, open_ms, failures, calls })
}

/// Does a step of a breaker and logs it if the breaker's state changed.
fn logged(provider: &str, policy: Option<&str>, breaker: &mut Breaker, step: impl FnOnce(&mut Breaker)) {
    let (before, generation) = (breaker.state(), breaker.generation());
    step(breaker);
    let after = breaker.state();
    if before != after || generation != breaker.generation() {
        tracing::warn!(provider, policy, from = before.as_str(), to = after.as_str(), "circuit breaker");
    }
}

/// Permission to call a provider. Dropping it before the call returns its places in half-open breakers.
#[derive(Debug)]
#[must_use]
pub struct Place<'a> {
    held: Option<Held<'a>>,
    /// The generations at which the shared breaker and the policy's own let the call through.
    pub generation: u64,
    pub policy_generation: Option<u64>,
}

/// A place in one or both of the provider's breakers.
#[derive(Debug)]
struct Held<'a> {
    breakers: &'a Breakers,
    provider: String,
    policy: Option<String>,
    holder: String,
    /// The shorter timeout of these breakers.
    timeout_ms: u64,
}

impl Place<'_> {
    /// Keeps the place for a call that was made: until its outcome, but at most until its deadline or the breaker's
    /// timeout. So a lost call with a long deadline cannot hold a place forever.
    pub fn keep(mut self, deadline_ms: u64, now_ms: u64) {
        if let Some(held) = self.held.take() {
            let due_ms = now_ms + deadline_ms.min(held.timeout_ms);
            held.each(|breaker| breaker.keep(&held.holder, due_ms));
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(held) = &self.held {
            held.each(|breaker| breaker.leave(&held.holder));
        }
    }
}

impl Held<'_> {
    fn each(&self, step: impl Fn(&mut Breaker)) {
        let mut table = self.breakers.table.lock();
        let Table { providers, policies } = &mut *table;
        let shared = providers.get_mut(&self.provider).map(|known| &mut known.breaker);
        let own = self
            .policy
            .as_ref()
            .and_then(|key| policies.get_mut(key)?.get_mut(&self.provider));
        shared.into_iter().chain(own).for_each(step);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: CircuitBreaker = CircuitBreaker {
        failure_threshold: 3,
        error_rate_threshold: 0.5,
        min_calls: 10,
        timeout_ms: 1000,
        half_open_max_calls: 1,
        success_threshold: 1,
    };
    const STRICT: CircuitBreaker = CircuitBreaker { failure_threshold: 1, ..RULES };
    const ACME: Scope<'_> = Scope { tenant: "acme", policy: "p", rules: Some(STRICT) };
    const OTHER: Scope<'_> = Scope { tenant: "other", policy: "p", rules: None };

    fn outcome(scope: &Scope<'_>, generation: u64, verdict: Verdict) -> ProviderOutcome {
        ProviderOutcome {
            version: wire::router::VERSION.into(),
            assignment_id: "a".into(),
            provider_id: "m".into(),
            verdict,
            latency_ms: 1,
            choice: Choice {
                generation,
                policy_tenant: scope.tenant.into(),
                policy_id: scope.policy.into(),
                policy_generation: scope.rules.map(|_| generation),
                client_deadline: false,
            },
        }
    }

    fn end(breakers: &Breakers, scope: &Scope<'_>, verdict: Verdict, now_ms: u64) {
        breakers.ended(&outcome(scope, 0, verdict), scope.rules.as_ref(), now_ms);
    }

    /// Breakers in which the shared one of `m` tripped at 0.
    fn tripped() -> Breakers {
        let breakers = Breakers::new(RULES);
        (0..3).for_each(|_| end(&breakers, &OTHER, Verdict::Failed, 0));
        assert_eq!(breakers.standing("m", &OTHER, 999), Standing::Out);
        breakers
    }

    #[test]
    fn strict_policy_keeps_a_provider_from_its_own_tasks_only() {
        let breakers = Breakers::new(RULES);
        end(&breakers, &ACME, Verdict::Failed, 0);
        assert_eq!(breakers.standing("m", &ACME, 0), Standing::Out);
        assert_eq!(breakers.standing("m", &OTHER, 0), Standing::Eligible);
        let lax = Scope {
            rules: Some(CircuitBreaker { failure_threshold: 1000, ..RULES }),
            ..OTHER
        };
        (0..2).for_each(|_| end(&breakers, &lax, Verdict::Failed, 0));
        assert_eq!(breakers.standing("m", &lax, 0), Standing::Out, "the operator's rules apply to all tenants");
    }

    #[test]
    fn last_place_is_taken_once_and_returned_if_unused() {
        let breakers = tripped();
        let first = breakers.reserve("m", &OTHER, "a", 1000).unwrap();
        assert_eq!(first.generation, 1);
        assert!(breakers.reserve("m", &OTHER, "b", 1000).is_none(), "one place, one decision");
        drop(first);
        breakers.reserve("m", &OTHER, "b", 1000).unwrap().keep(300, 1000);
        assert!(breakers.reserve("m", &OTHER, "c", 1299).is_none(), "the assignment holds the place");
        assert!(breakers.reserve("m", &OTHER, "c", 1300).is_some(), "its deadline has passed");
    }

    #[test]
    fn place_expires_at_the_breakers_timeout_despite_a_long_deadline() {
        let breakers = tripped();
        breakers.reserve("m", &OTHER, "b", 1000).unwrap().keep(u64::MAX, 1000);
        assert!(breakers.reserve("m", &OTHER, "c", 1999).is_none());
        assert!(breakers.reserve("m", &OTHER, "c", 2000).is_some());
    }

    #[test]
    fn cool_down_does_not_count_as_failure_and_ends_by_itself() {
        let breakers = Breakers::new(RULES);
        for _ in 0..20 {
            end(&breakers, &OTHER, Verdict::CoolDown { retry_after_seconds: 7 }, 0);
        }
        assert_eq!(breakers.standing("m", &OTHER, 1000), Standing::CoolingDown { ms: 6000 });
        assert!(breakers.reserve("m", &OTHER, "a", 6999).is_none());
        let status = &breakers.status(1000)[0];
        assert_eq!((&*status.state, status.cooling_down_ms, status.calls), ("cooling_down", 6000, 0));
        assert_eq!(breakers.standing("m", &OTHER, 7000), Standing::Eligible);

        end(&breakers, &OTHER, Verdict::CoolDown { retry_after_seconds: u64::MAX }, 0);
        assert_eq!(
            breakers.standing("m", &OTHER, COOL_DOWN_MAX_S * 1000),
            Standing::Eligible,
            "the cool-down is bounded"
        );
    }

    #[test]
    fn late_router_adopts_breakers_and_cool_downs_of_what_it_serves() {
        let breakers = tripped();
        end(&breakers, &ACME, Verdict::Failed, 0);
        end(&breakers, &OTHER, Verdict::CoolDown { retry_after_seconds: 5 }, 0);
        let late = Breakers::new(RULES);
        late.adopt(&breakers.status(400), 70_000, |status| match status.tenant.as_deref() {
            None => Some(RULES),
            Some("acme") => Some(STRICT),
            Some(_) => None,
        });
        assert_eq!(late.status(70_000), breakers.status(400));
        assert_eq!(late.standing("m", &OTHER, 70_599), Standing::Out);
        assert_eq!(late.standing("m", &OTHER, 70_600), Standing::CoolingDown { ms: 4000 });

        let again = late.status(70_100);
        late.adopt(&again, 70_500, |_| Some(RULES));
        assert_eq!(late.status(70_600)[0].cooling_down_ms, 4000, "a known cool-down is not extended");
        let stranger = Breakers::new(RULES);
        stranger.adopt(&breakers.status(400), 0, |_| None);
        assert_eq!(stranger.status(0), []);
    }

    #[test]
    fn breakers_of_gone_policies_and_providers_are_forgotten() {
        let breakers = Breakers::new(RULES);
        end(&breakers, &ACME, Verdict::Failed, 0);
        breakers.retain(|status| status.tenant.is_none());
        assert_eq!(breakers.status(0).len(), 1);
        breakers.retain(|_| false);
        assert_eq!(breakers.status(0), []);
    }
}
