//! A compiled policy, and the decision that it makes for a request. Pure: what is known about providers is an argument,
//! and the draw is a hash.

mod condition;
mod rendezvous;

pub use condition::Stop;
use condition::{Condition, Payload, Scope};
use wire::openai::Price;
use wire::policy::{CircuitBreaker, Policy, PolicyBreaker};
use wire::router::{Complexity, Constraints, DecideRequest, Decision, Reason};

/// The expected latency of a provider that nothing is known about.
const LATENCY_UNKNOWN_MS: f64 = 1000.0;
const BREAKER_TIMEOUT_MAX_MS: u64 = 86_400_000;
/// Steps that all conditions of a policy together may take for one request. Each rule has an equal share, so a request
/// cannot use up the steps of later rules. The slowest step takes about 40 ns, so all together take less than 5 ms,
/// about as long as decoding a request of 1 MiB.
const STEPS_MAX: u64 = 100_000;
const RULES_MAX: usize = 500;

/// A policy whose rules are parsed and checked.
pub struct Compiled {
    pub id: String,
    pub version: String,
    /// The policy's own breaker rules; they take effect where they are stricter than the operator's.
    pub circuit_breaker: Option<PolicyBreaker>,
    providers: Vec<Candidate>,
    rules: Vec<Rule>,
    lints: Vec<String>,
    session_key: Option<String>,
}

struct Rule {
    condition: Condition,
    /// Indexes into the providers, in order of preference.
    to: Vec<usize>,
}

struct Candidate {
    name: String,
    weight: f64,
    priority: u32,
    cost: f64,
    price: Option<Price>,
    latency_ms: Option<f64>,
}

/// What is known about the providers at this moment.
pub trait World {
    /// Whether the provider may be called: its breakers let a call through, and it is not cooling down.
    fn is_available(&self, provider: &str) -> bool;
    /// The observed latency in ms; `None` before the first result.
    fn latency_ms(&self, provider: &str) -> Option<f64>;
    /// Reports that the condition of a rule, counted from 0, could not be evaluated. It counts as false.
    fn rule_failed(&self, rule: usize, why: &Stop);
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Undecided {
    #[error("out of service for now, after failures: {}", .0.join(", "))]
    AllOpen(Vec<String>),
    #[error("no provider can meet the constraints; relax max_latency_ms or max_cost")]
    Constrained,
    #[error("the policy has no provider to draw from: all weights are 0")]
    NoWeight,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {what}")]
pub struct Invalid {
    /// For example `rules[2].when`.
    pub field: String,
    pub what: String,
}

impl Compiled {
    pub fn new(id: &str, policy: &Policy) -> Result<Self, Invalid> {
        let invalid = |field: String, what: &str| Invalid { field, what: what.into() };

        let mut providers: Vec<Candidate> = Vec::new();
        for (n, provider) in policy.providers.iter().enumerate() {
            if let Err(error) = wire::id::check(&provider.name) {
                return Err(invalid(format!("providers[{n}].name"), &error.to_string()));
            }
            if provider.weight > 100 {
                return Err(invalid(format!("providers[{n}].weight"), "must be from 0 to 100"));
            }
            if provider.priority.is_some_and(|priority| priority > 100) {
                return Err(invalid(format!("providers[{n}].priority"), "must be from 0 to 100"));
            }
            for (field, number) in [("cost", provider.cost), ("latency_ms", provider.latency_ms)] {
                if number.is_some_and(|number| !number.is_finite() || number < 0.0) {
                    return Err(invalid(format!("providers[{n}].{field}"), "must be a number, 0 or more"));
                }
            }
            let price = provider.price.map(Price::from);
            if let Some(field) = price.and_then(|price| price.invalid()) {
                return Err(invalid(format!("providers[{n}].price.{field}"), "must be a number, 0 or more"));
            }
            if providers.iter().any(|known| known.name == provider.name) {
                return Err(invalid(format!("providers[{n}].name"), "is used by two providers"));
            }
            providers.push(Candidate {
                name: provider.name.clone(),
                weight: f64::from(provider.weight),
                priority: provider.priority.unwrap_or(50),
                cost: provider.cost.unwrap_or(0.0),
                price,
                latency_ms: provider.latency_ms,
            });
        }

        // The legacy form: weights from 0 to 1, which add providers of the new form that have the same scale.
        for (name, weight) in &policy.weights {
            if !(0.0..=1.0).contains(weight) {
                return Err(invalid(format!("weights.{name}"), "must be from 0 to 1"));
            }
            if !providers.iter().any(|known| known.name == *name) {
                let (name, weight) = (name.clone(), weight * 100.0);
                providers.push(Candidate { name, weight, priority: 50, cost: 0.0, price: None, latency_ms: None });
            }
        }
        if providers.is_empty() {
            return Err(invalid("providers".into(), "names no provider"));
        }

        policy
            .circuit_breaker
            .map_or(Ok(()), |own| check(&own.over(&CircuitBreaker::default())))?;
        let (rules, lints) = rules(policy, &providers)?;
        let session_key = policy
            .sticky
            .as_ref()
            .filter(|sticky| sticky.enabled)
            .map(|sticky| sticky.session_key.clone());

        Ok(Self {
            id: id.into(),
            version: policy.version.clone(),
            circuit_breaker: policy.circuit_breaker,
            providers,
            rules,
            lints,
            session_key,
        })
    }

    /// Likely mistakes, each with its field; the policy serves all the same.
    pub fn lints(&self) -> &[String] {
        &self.lints
    }

    /// How much of its limits the policy uses. Whose it is, is not known here.
    pub fn complexity(&self) -> Complexity {
        Complexity {
            policy_tenant: String::new(),
            policy_id: self.id.clone(),
            policy_version: self.version.clone(),
            providers: self.providers.len() as u64,
            rules: self.rules.len() as u64,
            rules_max: RULES_MAX as u64,
            condition_steps: self.rules.iter().map(|rule| rule.condition.size()).sum(),
            condition_steps_max: STEPS_MAX,
            extensions: 0,
        }
    }

    pub fn providers(&self) -> impl Iterator<Item = &str> {
        self.providers.iter().map(|provider| provider.name.as_str())
    }

    /// Decides which provider handles the request: the first matching rule, else the session's provider, else a
    /// weighted draw. The draw hashes the request id, so every router makes the same decision, also after a restart, as
    /// long as the policy and the providers' health stay the same.
    pub fn decide(&self, request: &DecideRequest, world: &dyn World) -> Result<Decision, Undecided> {
        let mut explanation = Vec::new();
        let constraints = request.constraints.unwrap_or_default();
        let is_eligible = |c: &Candidate| world.is_available(&c.name) && meets(c, &constraints, world);

        if let Some((n, rule)) = self.matching_rule(request, world) {
            // Only the providers that the rule names are eligible: others may not understand its tasks.
            let mut reason = Reason::BestScore;
            for named in rule.to.iter().map(|place| &self.providers[*place]) {
                explanation.push(format!("rule {n} names {}", named.name));
                if is_eligible(named) {
                    return Ok(self.decision(named, reason, None, explanation, world));
                }
                explanation.push(format!("{} cannot take it now", named.name));
                reason = Reason::CircuitBreakerFallback;
            }
            return Err(why_none(rule.to.iter().map(|place| &self.providers[*place]), world));
        }

        let session = self.session_key.as_ref().and_then(|key| {
            let value = request.metadata.as_ref()?.get(key)?;
            Some(value.as_str().map_or_else(|| value.to_string(), String::from))
        });
        if let Some(session) = session {
            let pinned = self.draw(&request.tenant_id, &session, is_eligible, world)?;
            explanation.push("the session's provider".into());
            return Ok(self.decision(pinned, Reason::Sticky, Some(session), explanation, world));
        }

        let drawn = self.draw(&request.tenant_id, &request.request_id, is_eligible, world)?;
        explanation.push("drawn by weight".into());
        Ok(self.decision(drawn, Reason::Weighted, None, explanation, world))
    }

    /// The first rule whose condition holds.
    fn matching_rule(&self, request: &DecideRequest, world: &dyn World) -> Option<(usize, &Rule)> {
        let payload = Payload::default();
        let scope = Scope::new(request, &payload);
        let share = share(self.rules.len());
        self.rules.iter().enumerate().find(|(n, rule)| {
            let holds = rule.condition.holds(&scope, share);
            if let Err(why) = &holds {
                world.rule_failed(*n, why);
            }
            holds == Ok(true)
        })
    }

    /// Draws an eligible provider by weight; the same key draws the same provider.
    fn draw(
        &self,
        tenant: &str,
        key: &str,
        is_eligible: impl Fn(&Candidate) -> bool,
        world: &dyn World,
    ) -> Result<&Candidate, Undecided> {
        let eligible = self.providers.iter().filter(|c| c.weight > 0.0 && is_eligible(c));
        let drawn = rendezvous::highest(eligible, |c| (&c.name, c.weight), &[tenant, key]);
        // Providers of weight 0 are never drawn, so their state is not the reason.
        drawn.ok_or_else(|| why_none(self.providers.iter().filter(|c| c.weight > 0.0), world))
    }

    fn decision(
        &self,
        provider: &Candidate,
        reason: Reason,
        sticky_key: Option<String>,
        explanation: Vec<String>,
        world: &dyn World,
    ) -> Decision {
        Decision {
            provider_id: provider.name.clone(),
            priority: provider.priority,
            expected_latency_ms: expected_latency(provider, world) as u64,
            expected_cost: provider.cost,
            reason,
            policy_id: self.id.clone(),
            policy_version: self.version.clone(),
            fallback_used: (reason == Reason::CircuitBreakerFallback).then_some(true),
            sticky_key,
            explanation,
            metadata: None,
            price: provider.price,
        }
    }
}

/// The steps that each rule may take if the policy has so many rules.
fn share(rules: usize) -> u64 {
    STEPS_MAX / rules.max(1) as u64
}

/// The compiled rules, and likely mistakes in them.
fn rules(policy: &Policy, providers: &[Candidate]) -> Result<(Vec<Rule>, Vec<String>), Invalid> {
    let invalid = |field: String, what: String| Invalid { field, what };
    if policy.rules.len() > RULES_MAX {
        let what = format!("has {} rules; a policy may have {RULES_MAX}", policy.rules.len());
        return Err(invalid("rules".into(), what));
    }

    let share = share(policy.rules.len());
    let (mut rules, mut lints) = (Vec::new(), Vec::new());
    for (n, rule) in policy.rules.iter().enumerate() {
        let condition = Condition::compile(&rule.when).map_err(|e| invalid(format!("rules[{n}].when"), e))?;
        if condition.size() > share {
            let what = format!("has {} parts; with so many rules, each may have {share}", condition.size());
            return Err(invalid(format!("rules[{n}].when"), what));
        }
        lints.extend(
            condition
                .lints()
                .into_iter()
                .map(|lint| format!("rules[{n}].when: {lint}")),
        );

        let place = |name: &String| {
            let place = providers.iter().position(|known| known.name == *name);
            let what = || format!("{name:?} is not among the providers; list it with weight 0");
            place.ok_or_else(|| invalid(format!("rules[{n}].to"), what()))
        };
        let to = rule.to.iter().map(place).collect::<Result<Vec<usize>, Invalid>>()?;
        if to.is_empty() {
            return Err(invalid(format!("rules[{n}].to"), "names no provider".into()));
        }
        rules.push(Rule { condition, to });
    }
    Ok((rules, lints))
}

/// Why none of these providers is eligible.
fn why_none<'a>(asked: impl Iterator<Item = &'a Candidate>, world: &dyn World) -> Undecided {
    let (up, out): (Vec<_>, Vec<_>) = asked.partition(|c| world.is_available(&c.name));
    match (up.is_empty(), out.is_empty()) {
        (true, true) => Undecided::NoWeight,
        (true, false) => Undecided::AllOpen(out.into_iter().map(|c| c.name.clone()).collect()),
        (false, _) => Undecided::Constrained,
    }
}

/// Refuses values with which a breaker would never close, never open, or remember calls without bound.
fn check(breaker: &CircuitBreaker) -> Result<(), Invalid> {
    let counts = [
        ("failure_threshold", breaker.failure_threshold),
        ("min_calls", breaker.min_calls),
        ("half_open_max_calls", breaker.half_open_max_calls),
        ("success_threshold", breaker.success_threshold),
    ];
    let invalid = |field: &str, what: &str| Invalid { field: format!("circuit_breaker.{field}"), what: what.into() };

    if let Some((field, _)) = counts.into_iter().find(|(_, count)| !(1..=10_000).contains(count)) {
        return Err(invalid(field, "must be from 1 to 10000"));
    }
    if !(breaker.error_rate_threshold > 0.0 && breaker.error_rate_threshold <= 1.0) {
        return Err(invalid("error_rate_threshold", "must be above 0, at most 1"));
    }
    if !(1..=BREAKER_TIMEOUT_MAX_MS).contains(&breaker.timeout_ms) {
        return Err(invalid("timeout_ms", "must be from 1 to 86400000, a day"));
    }
    Ok(())
}

fn expected_latency(provider: &Candidate, world: &dyn World) -> f64 {
    // The policy's number is the minimum: a provider that was quick so far may still get a long task.
    let observed = world
        .latency_ms(&provider.name)
        .into_iter()
        .chain(provider.latency_ms)
        .reduce(f64::max);
    observed.unwrap_or(LATENCY_UNKNOWN_MS)
}

fn meets(provider: &Candidate, constraints: &Constraints, world: &dyn World) -> bool {
    // A provider of unknown latency may be fast, so the constraint does not exclude it.
    let known = world.latency_ms(&provider.name).or(provider.latency_ms);
    let fast = constraints
        .max_latency_ms
        .is_none_or(|max| known.is_none_or(|latency| latency <= max));
    fast && constraints.max_cost.is_none_or(|max| provider.cost <= max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::cell::RefCell;
    use std::collections::HashSet;

    #[derive(Default)]
    struct Known {
        open: HashSet<&'static str>,
        slow: HashSet<&'static str>,
        failed: RefCell<Vec<(usize, Stop)>>,
    }

    impl World for Known {
        fn is_available(&self, provider: &str) -> bool {
            !self.open.contains(provider)
        }
        fn latency_ms(&self, provider: &str) -> Option<f64> {
            Some(if self.slow.contains(provider) { 5000.0 } else { 10.0 })
        }
        fn rule_failed(&self, rule: usize, why: &Stop) {
            self.failed.borrow_mut().push((rule, why.clone()));
        }
    }

    fn compiled(policy: serde_json::Value) -> Compiled {
        Compiled::new("default", &serde_json::from_value(policy).unwrap()).unwrap_or_else(|e| panic!("{e}"))
    }

    fn request(id: usize, extra: serde_json::Value) -> DecideRequest {
        let mut request = json!({"version": "1", "request_id": format!("r{id}"), "tenant_id": "t",
            "task": {"type": "code_completion", "payload": {}}});
        request
            .as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        serde_json::from_value(request).unwrap()
    }

    fn two() -> serde_json::Value {
        json!({"providers": [{"name": "fast", "weight": 80, "cost": 0.002}, {"name": "big", "weight": 20, "cost": 0.02}]})
    }

    #[test]
    fn weights_share_the_requests() {
        let policy = compiled(two());
        let fast = (0..10_000)
            .filter(|n| {
                policy
                    .decide(&request(*n, json!({})), &Known::default())
                    .unwrap()
                    .provider_id
                    == "fast"
            })
            .count();
        assert!((7_800..8_200).contains(&fast), "{fast}");
    }

    #[test]
    fn session_keeps_its_provider_while_it_is_available() {
        let mut document = two();
        document["sticky"] = json!({"session_key": "user_id"});
        let policy = compiled(document);
        for user in 0..200 {
            let extra = json!({"metadata": {"user_id": format!("u{user}")}});
            let first = policy.decide(&request(1, extra.clone()), &Known::default()).unwrap();
            assert_eq!(first.reason, Reason::Sticky);
            let other = if first.provider_id == "fast" { "big" } else { "fast" };
            let out = Known {
                open: HashSet::from([if other == "big" { "fast" } else { "big" }]),
                ..Known::default()
            };
            assert_eq!(policy.decide(&request(2, extra.clone()), &out).unwrap().provider_id, other);
            assert_eq!(
                policy
                    .decide(&request(3, extra), &Known::default())
                    .unwrap()
                    .provider_id,
                first.provider_id
            );
        }
    }

    #[test]
    fn rules_constraints_and_breakers_decide() {
        let mut document = two();
        document["rules"] = json!([
            {"when": "task.type == 'code_completion' && metadata.lang == 'rust'", "to": "big"},
            {"when": {"lang": ["go", "zig"]}, "to": "big"},
            {"when": {"==": [{"var": "context.lang"}, "c"]}, "to": "big"},
        ]);
        let policy = compiled(document);
        for (lang, expected) in [("rust", Some("big")), ("zig", Some("big")), ("c", Some("big")), ("perl", None)] {
            let decision = policy
                .decide(&request(1, json!({"metadata": {"lang": lang}})), &Known::default())
                .unwrap();
            match expected {
                Some(provider) => assert_eq!(decision.provider_id, provider, "{lang}"),
                None => assert_eq!(decision.reason, Reason::Weighted, "{lang}"),
            }
        }
        let cheap = json!({"constraints": {"max_cost": 0.01}});
        for n in 0..100 {
            assert_eq!(
                policy
                    .decide(&request(n, cheap.clone()), &Known::default())
                    .unwrap()
                    .provider_id,
                "fast"
            );
        }
        let all_open = Known { open: HashSet::from(["fast", "big"]), ..Known::default() };
        assert_eq!(
            policy.decide(&request(1, json!({})), &all_open),
            Err(Undecided::AllOpen(vec!["fast".into(), "big".into()]))
        );
        let too_cheap = json!({"constraints": {"max_cost": 0.001}});
        assert_eq!(policy.decide(&request(1, too_cheap), &Known::default()), Err(Undecided::Constrained));
        let rust = json!({"metadata": {"lang": "rust"}});
        let big_open = Known { open: HashSet::from(["big"]), ..Known::default() };
        let out = policy.decide(&request(1, rust.clone()), &big_open);
        assert_eq!(
            out,
            Err(Undecided::AllOpen(vec!["big".into()])),
            "only the providers that the rule names are eligible"
        );
        let mut document = two();
        document["rules"] = json!([{"when": "metadata.lang == 'rust'", "to": ["big", "fast"]}]);
        let moved = compiled(document).decide(&request(1, rust), &big_open).unwrap();
        assert_eq!((moved.provider_id.as_str(), moved.reason), ("fast", Reason::CircuitBreakerFallback));
        let quick = json!({"constraints": {"max_latency_ms": 100.0}});
        let slow = Known { slow: HashSet::from(["fast"]), ..Known::default() };
        assert_eq!(policy.decide(&request(1, quick), &slow).unwrap().provider_id, "big");
    }

    #[test]
    fn decision_names_the_price_of_its_provider() {
        let policy =
            compiled(json!({"providers": [{"name": "a", "weight": 1, "price": {"input": 2.5, "output": 10}}]}));
        let decision = policy.decide(&request(1, json!({})), &Known::default()).unwrap();
        assert_eq!(decision.price, Some(Price { input: 2.5, output: 10.0, cached_input: None }));
    }

    #[test]
    fn provider_of_weight_0_is_never_drawn() {
        let policy = compiled(json!({"providers": [{"name": "a", "weight": 1}, {"name": "spare"}]}));
        let open = Known { open: HashSet::from(["a"]), ..Known::default() };
        assert_eq!(policy.decide(&request(1, json!({})), &open), Err(Undecided::AllOpen(vec!["a".into()])));
        let none = compiled(json!({"providers": [{"name": "spare"}]}));
        assert_eq!(none.decide(&request(1, json!({})), &Known::default()), Err(Undecided::NoWeight));
    }

    #[test]
    fn failed_rule_is_reported_and_costs_later_rules_no_steps() {
        let mut document = two();
        document["rules"] = json!([
            {"when": "metadata.lang / 2 == 1", "to": "fast"},
            {"when": "metadata.list.all(x, metadata.list.exists(y, x == y))", "to": "fast"},
            {"when": "metadata.absent == 1", "to": "fast"},
            {"when": "task.type == 'code_completion'", "to": "big"},
        ]);
        let list: Vec<u32> = (0..10_000).collect();
        let metadata = json!({"metadata": {"lang": "rust", "list": list}});
        let world = Known::default();
        let decision = compiled(document).decide(&request(1, metadata), &world).unwrap();
        assert_eq!((decision.provider_id.as_str(), decision.reason), ("big", Reason::BestScore));
        let failed = world.failed.take();
        assert_eq!(failed, [(0, Stop::Failed("cannot div a string and a int".into())), (1, Stop::Spent)]);
    }

    #[test]
    fn rule_without_loops_always_has_enough_steps() {
        let rules = |count: usize, when: &str| {
            let rules: Vec<_> = (0..count).map(|_| json!({"when": when, "to": "a"})).collect();
            let policy = json!({"providers": [{"name": "a", "weight": 1}], "rules": rules});
            Compiled::new("p", &serde_json::from_value(policy).unwrap())
                .err()
                .map(|e| e.to_string())
        };
        let long = "metadata.a == 1".to_string() + &" || metadata.a == 1".repeat(60);
        assert_eq!(rules(500, "task.type == 'chat' && metadata.lang == 'rust'"), None);
        assert_eq!(rules(100, &long), None);
        assert!(rules(500, &long).unwrap().starts_with("rules[0].when: has "));
        assert_eq!(rules(501, "true").unwrap(), "rules: has 501 rules; a policy may have 500");
    }

    #[test]
    fn bad_policy_is_refused_with_its_field() {
        let breaker = |rules| json!({"providers": [{"name": "a"}], "circuit_breaker": rules});
        for (document, field) in [
            (json!({}), "providers"),
            (json!({"providers": [{"name": "a", "weight": 101}]}), "providers[0].weight"),
            (json!({"providers": [{"name": "a"}, {"name": "a"}]}), "providers[1].name"),
            (json!({"weights": {"a": 1.5}}), "weights.a"),
            (json!({"providers": [{"name": "a", "cost": -1}]}), "providers[0].cost"),
            (json!({"providers": [{"name": "a", "latency_ms": -1}]}), "providers[0].latency_ms"),
            (
                json!({"providers": [{"name": "a", "price": {"input": 1, "output": -1}}]}),
                "providers[0].price.output",
            ),
            (breaker(json!({"failure_threshold": 0})), "circuit_breaker.failure_threshold"),
            (breaker(json!({"min_calls": 4_000_000_000_u32})), "circuit_breaker.min_calls"),
            (breaker(json!({"error_rate_threshold": 0})), "circuit_breaker.error_rate_threshold"),
            (breaker(json!({"timeout_ms": u64::MAX})), "circuit_breaker.timeout_ms"),
            (
                json!({"providers": [{"name": "a"}], "rules": [{"when": "task.type ==", "to": "a"}]}),
                "rules[0].when",
            ),
            (json!({"providers": [{"name": "a"}], "rules": [{"when": "true", "to": "b"}]}), "rules[0].to"),
            (json!({"providers": [{"name": "a"}], "rules": [{"when": "true", "to": []}]}), "rules[0].to"),
            (
                json!({"providers": [{"name": "a"}], "rules": [{"when": {"almost": [1, 2]}, "to": "a"}]}),
                "rules[0].when",
            ),
        ] {
            let error = Compiled::new("p", &serde_json::from_value(document.clone()).unwrap()).err();
            assert_eq!(error.map(|e| e.field).as_deref(), Some(field), "{document}");
        }
    }
}
