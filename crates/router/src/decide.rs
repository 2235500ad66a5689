//! Decides which provider handles a request: the tenant's policy chooses, breakers and latencies limit the choice.

use crate::Router;
use crate::breakers::{Place, Scope, Standing};
use crate::policies::{Lookup, Served, Set};
use crate::policy::{Stop, Undecided, World};
use bus::clock::unix_ms;
use std::sync::Arc;
use wire::router::{Choice, DecideRequest, Decision, ErrorBody, RouterCode};

/// A decision, with permission to call its provider: one place in its breakers, which may be half open.
pub struct Chosen<'a> {
    pub decision: Decision,
    pub choice: Choice,
    pub place: Place<'a>,
}

impl Router {
    /// Decides who handles the request. If a breaker of the chosen provider is half open, `holder` takes one of its
    /// places.
    pub fn decide(&self, request: &DecideRequest, holder: &str) -> Result<Chosen<'_>, ErrorBody> {
        let policies = self.policies.current();
        let served = find(&policies, request)?;
        let mut seen = Seen::by(self, served, request, false);
        let Scope { tenant: owner, policy: name, .. } = seen.scope;
        let now_ms = seen.now_ms;
        loop {
            let decision = seen.decide(request)?;
            let Some(place) = self
                .breakers
                .reserve(&decision.provider_id, &seen.scope, holder, now_ms)
            else {
                // Another request took the provider's last place in the meantime: decide again without it.
                seen.taken.push(decision.provider_id);
                continue;
            };

            let options = request.options.as_ref();
            let choice = Choice {
                generation: place.generation,
                policy_tenant: owner.into(),
                policy_id: name.into(),
                policy_generation: place.policy_generation,
                client_deadline: options.is_some_and(|options| options.deadline_ms.is_some()),
            };
            return Ok(Chosen { decision, choice, place });
        }
    }

    /// What [`Self::decide`] would decide now. Takes no place, and counts nothing.
    pub fn dry_run(&self, request: &DecideRequest) -> Result<Decision, ErrorBody> {
        let policies = self.policies.current();
        let served = find(&policies, request)?;
        Seen::by(self, served, request, true).decide(request)
    }
}

/// The policy that serves the request, unless the request came too late.
fn find<'a>(policies: &'a Set, request: &DecideRequest) -> Result<&'a Arc<Served>, ErrorBody> {
    if request.deadline.is_some_and(|deadline| deadline < unix_ms()) {
        let text = "the request's deadline passed before it was decided";
        return Err(ErrorBody::new(RouterCode::DeadlineExceeded, text));
    }

    match policies.find(&request.tenant_id, name(request)) {
        Lookup::Serves(served) => Ok(served),
        // Not `unavailable`: gateways would count that against the router, for all tenants.
        Lookup::Refuses(why) => Err(ErrorBody::new(RouterCode::DecisionFailed, why)),
        Lookup::Unknown => Err(unknown_policy(&request.tenant_id, name(request))),
    }
}

fn name(request: &DecideRequest) -> &str {
    request.policy_id.as_deref().unwrap_or("default")
}

pub fn unknown_policy(tenant: &str, name: &str) -> ErrorBody {
    let text = format!("tenant {tenant:?} has no policy {name:?}, and neither has tenant \"default\"");
    ErrorBody::new(RouterCode::PolicyNotFound, text)
}

/// What a policy sees of this router while it decides one request.
struct Seen<'a> {
    router: &'a Router,
    served: &'a Served,
    scope: Scope<'a>,
    now_ms: u64,
    /// Providers whose last place was taken by other requests.
    taken: Vec<String>,
    /// Conditions that fail are not counted.
    is_dry: bool,
}

impl<'a> Seen<'a> {
    fn by(router: &'a Router, served: &'a Served, request: &'a DecideRequest, is_dry: bool) -> Self {
        let scope = Scope {
            tenant: served.name.tenant.as_str(),
            policy: name(request),
            rules: router.rules_of(&served.version.compiled),
        };
        Self {
            router,
            served,
            scope,
            now_ms: router.uptime_ms(),
            taken: Vec::new(),
            is_dry,
        }
    }

    fn decide(&self, request: &DecideRequest) -> Result<Decision, ErrorBody> {
        let decided = self.served.version.compiled.decide(request, self);
        decided.map_err(|undecided| self.refusal(&undecided))
    }

    fn standing(&self, provider: &str) -> Standing {
        self.router.breakers.standing(provider, &self.scope, self.now_ms)
    }

    fn refusal(&self, undecided: &Undecided) -> ErrorBody {
        let out = match undecided {
            Undecided::NoWeight => return ErrorBody::new(RouterCode::DecisionFailed, undecided.to_string()),
            Undecided::Constrained => return ErrorBody::new(RouterCode::NoProviderAvailable, undecided.to_string()),
            Undecided::AllOpen(out) => out,
        };

        let cooling = out.iter().filter_map(|provider| match self.standing(provider) {
            Standing::CoolingDown { ms } => Some(ms),
            Standing::Eligible | Standing::Out => None,
        });
        // One provider suffices, so the first cool-down that ends counts.
        let Some(ms) = cooling.min() else {
            return ErrorBody::new(RouterCode::NoProviderAvailable, undecided.to_string());
        };

        let seconds = ms.div_ceil(1000).max(1);
        let text = format!("out of service for now: {}; try again in {seconds} s", out.join(", "));
        ErrorBody::new(RouterCode::RateLimited, text).retry_after(seconds)
    }
}

impl World for Seen<'_> {
    fn is_available(&self, provider: &str) -> bool {
        !self.taken.iter().any(|taken| taken == provider) && self.standing(provider) == Standing::Eligible
    }

    fn latency_ms(&self, provider: &str) -> Option<f64> {
        self.router.stats.latency_ms(provider)
    }

    fn rule_failed(&self, rule: usize, why: &Stop) {
        if !self.is_dry {
            self.served.rule_failed(rule, why);
        }
    }
}
