//! All policies by tenant and name, and which of them serves a request.

use super::files::Name;
use super::source::Version;
use crate::policy::{Compiled, Stop};
use metrics::counter;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use wire::status::{PolicyStatus, RuleErrors};

/// The tenant whose policies serve tenants that have none of that name.
pub const DEFAULT: &str = "default";

/// A status must fit into one message of the bus (1 MiB on NATS) and leave room for the breakers, however many problems
/// there are.
const STATUS_ROWS_MAX: usize = 200;
const STATUS_BYTES_MAX: usize = 512 * 1024;
/// Warnings of one policy, and failed rules of one policy.
const STATUS_NOTES_MAX: usize = 10;
const STATUS_TEXT_MAX: usize = 256;

/// The active version of a policy, and the errors of its rules since activation.
pub struct Served {
    pub name: Name,
    pub version: Arc<Version>,
    /// Tenant and policy in metrics; `other` if too many policies have their own labels.
    labels: (String, String),
    /// Count and last reason, by rule.
    failures: Mutex<BTreeMap<usize, (u64, String)>>,
}

impl Served {
    pub fn new(name: Name, version: Arc<Version>, has_labels: bool) -> Self {
        let other = || "other".to_string();
        let labels = if has_labels {
            (name.tenant.clone(), name.policy.clone())
        } else {
            (other(), other())
        };
        Self { name, version, labels, failures: Mutex::default() }
    }

    /// Counts a condition that could not be evaluated; the first failure of each rule is logged.
    pub fn rule_failed(&self, rule: usize, why: &Stop) {
        let why = match why {
            Stop::Undefined => return,
            Stop::Failed(why) => why.as_str(),
            Stop::Spent => "takes more steps than a rule may",
        };
        let (tenant, policy) = self.labels.clone();
        let number = rule.to_string();
        counter!("beamline_router_rule_errors_total", "tenant" => tenant, "policy" => policy, "rule" => number)
            .increment(1);

        let mut failures = self.failures.lock();
        let (count, last) = failures.entry(rule).or_default();
        *count += 1;
        if last != why {
            why.clone_into(last);
        }
        if *count == 1 {
            let Name { tenant, policy } = &self.name;
            tracing::warn!(tenant, policy, rule, "evaluating a condition failed, so it counts as false: {why}");
        }
    }

    fn rule_errors(&self) -> Vec<RuleErrors> {
        let failures = self.failures.lock();
        failures
            .iter()
            .map(|(rule, (count, last))| RuleErrors { rule: *rule, count: *count, last: last.clone() })
            .collect()
    }
}

pub enum Entry {
    Serves {
        served: Arc<Served>,
        /// What is wrong with the policy's file.
        problem: Option<String>,
        /// Why the version could not be stored for the next start.
        unstored: Option<String>,
    },
    Refuses(String),
}

impl Entry {
    fn found(&self, owner: &str, policy: &str) -> Lookup<'_> {
        match self {
            Self::Serves { served, .. } => Lookup::Serves(served),
            Self::Refuses(why) => Lookup::Refuses(format!("policy \"{owner}/{policy}\" cannot be used: {why}")),
        }
    }
}

/// The policy that serves a request.
pub enum Lookup<'a> {
    Serves(&'a Arc<Served>),
    /// The policy exists and cannot be used. The text goes to the client.
    Refuses(String),
    Unknown,
}

#[derive(Default)]
pub struct Set {
    by_tenant: BTreeMap<String, BTreeMap<String, Entry>>,
    /// Why the directory could never be read, in which case the set of policies is unknown.
    unread: Option<String>,
    /// The same for the directories of some tenants.
    unread_tenants: BTreeMap<String, String>,
}

impl Set {
    pub fn new(unread: Option<String>, unread_tenants: BTreeMap<String, String>) -> Self {
        Self { unread, unread_tenants, ..Self::default() }
    }

    pub fn insert(&mut self, name: &Name, entry: Entry) {
        self.by_tenant
            .entry(name.tenant.clone())
            .or_default()
            .insert(name.policy.clone(), entry);
    }

    /// The tenant's own policy serves or refuses. That of tenant `default` serves only if the tenant has none of that
    /// name, which must be certain.
    pub fn find(&self, tenant: &str, policy: &str) -> Lookup<'_> {
        let of = |tenant: &str| self.by_tenant.get(tenant).and_then(|policies| policies.get(policy));
        let unread = |tenant: &str| {
            let why = self.unread_tenants.get(tenant)?;
            Some(format!("the policies of tenant {tenant:?} cannot be read: {why}"))
        };

        if let Some(own) = of(tenant) {
            return own.found(tenant, policy);
        }
        let unread = unread(tenant).or_else(|| {
            let all = self.unread.as_ref()?;
            Some(format!("the policies cannot be read: {all}"))
        });

        match (unread, of(DEFAULT)) {
            (Some(why), _) => Lookup::Refuses(why),
            (None, Some(entry)) => entry.found(DEFAULT, policy),
            (None, None) => match self.unread_tenants.get(DEFAULT) {
                Some(why) => Lookup::Refuses(format!("the policies of tenant {DEFAULT:?} cannot be read: {why}")),
                None => Lookup::Unknown,
            },
        }
    }

    /// The tenant's own policy of this name, if it serves.
    pub fn own(&self, tenant: &str, policy: &str) -> Option<&Compiled> {
        match self.by_tenant.get(tenant)?.get(policy)? {
            Entry::Serves { served, .. } => Some(&served.version.compiled),
            Entry::Refuses(_) => None,
        }
    }

    /// All policies that serve.
    pub fn iter(&self) -> impl Iterator<Item = &Compiled> {
        let entries = self.by_tenant.values().flat_map(BTreeMap::values);
        entries.filter_map(|entry| match entry {
            Entry::Serves { served, .. } => Some(&served.version.compiled),
            Entry::Refuses(_) => None,
        })
    }

    /// The policies that fit into a status, those with problems first, and how many there are in all.
    pub fn status(&self) -> (Vec<PolicyStatus>, u64) {
        let all = self.by_tenant.iter().flat_map(|(tenant, policies)| {
            policies.iter().map(move |(policy, entry)| {
                let named = PolicyStatus {
                    tenant: tenant.clone(),
                    policy: policy.clone(),
                    ..PolicyStatus::default()
                };
                match entry {
                    Entry::Refuses(why) => PolicyStatus { error: Some(why.clone()), ..named },
                    Entry::Serves { served, problem, unstored } => PolicyStatus {
                        version: served.version.compiled.version.clone(),
                        error: problem.clone(),
                        warnings: served.version.warnings.iter().chain(unstored).cloned().collect(),
                        rule_errors: served.rule_errors(),
                        ..named
                    },
                }
            })
        });

        let mut rows: Vec<_> = all.collect();
        let total = rows.len() as u64;
        rows.sort_by_key(|row| match row {
            PolicyStatus { error: Some(_), .. } => 0,
            row => 1 + u8::from(row.rule_errors.is_empty()) + u8::from(row.warnings.is_empty()),
        });
        rows.truncate(STATUS_ROWS_MAX);
        rows.iter_mut().for_each(shorten);

        let mut left = STATUS_BYTES_MAX;
        rows.retain(|row| {
            let len = serde_json::to_vec(row).map_or(usize::MAX, |row| row.len());
            left = left.saturating_sub(len);
            left > 0
        });
        (rows, total)
    }

    /// The number of policies and directories with a problem.
    pub fn broken(&self) -> usize {
        let entries = self.by_tenant.values().flat_map(BTreeMap::values);
        let is_broken = |entry: &&Entry| !matches!(entry, Entry::Serves { problem: None, .. });
        entries.filter(is_broken).count() + self.unread_tenants.len() + usize::from(self.unread.is_some())
    }
}

fn shorten(row: &mut PolicyStatus) {
    row.warnings.truncate(STATUS_NOTES_MAX);
    row.rule_errors.truncate(STATUS_NOTES_MAX);
    let lasts = row.rule_errors.iter_mut().map(|rule| &mut rule.last);
    for text in row
        .error
        .iter_mut()
        .chain(&mut row.warnings)
        .chain(lasts)
        .chain([&mut row.version])
    {
        text.truncate(text.floor_char_boundary(STATUS_TEXT_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::super::source;
    use super::*;
    use wire::policy::{Format, Stored};

    #[test]
    fn default_tenants_policy_serves_only_if_the_tenant_never_had_its_own() {
        let mut set = Set::default();
        let serve = |set: &mut Set, name: &str| {
            let name = Name::parse(name).unwrap();
            let text = format!("version: {name}\nproviders:\n  - {{name: a, weight: 1}}\n");
            let version = source::compile("f", &name.policy, Stored { format: Format::Yaml, text }).unwrap();
            let served = Arc::new(Served::new(name.clone(), Arc::new(version), true));
            set.insert(&name, Entry::Serves { served, problem: None, unstored: None });
        };
        serve(&mut set, "default/default");
        serve(&mut set, "acme/own");
        let refuse = |set: &mut Set, name| set.insert(&Name::parse(name).unwrap(), Entry::Refuses("bad".into()));
        refuse(&mut set, "acme/default");
        refuse(&mut set, "default/broken");
        set.unread_tenants.insert("locked".into(), "permission denied".into());

        for (tenant, policy, expected) in [
            ("other", "default", "default/default"),
            ("acme", "own", "acme/own"),
            ("acme", "default", "policy \"acme/default\" cannot be used: bad"),
            ("other", "broken", "policy \"default/broken\" cannot be used: bad"),
            ("locked", "default", "the policies of tenant \"locked\" cannot be read: permission denied"),
            ("other", "own", "unknown"),
        ] {
            let found = match set.find(tenant, policy) {
                Lookup::Serves(served) => served.version.compiled.version.clone(),
                Lookup::Refuses(why) => why,
                Lookup::Unknown => "unknown".into(),
            };
            assert_eq!(found, expected, "{tenant} {policy}");
        }
        assert_eq!(set.broken(), 3);
        set.unread = Some("permission denied".into());
        assert!(matches!(set.find("other", "default"), Lookup::Refuses(_)));
        assert!(matches!(set.find("acme", "own"), Lookup::Serves(_)));
    }

    #[test]
    fn status_is_bounded_and_shows_problems_first() {
        let mut set = Set::default();
        let rules: String = (0..20)
            .map(|n| format!("  - {{when: \"unknown{n} == '{}'\", to: a}}\n", "\u{e9}".repeat(200)))
            .collect();
        let text = format!("providers: [{{name: a}}]\nrules:\n{rules}");
        let source = Stored { format: Format::Yaml, text };
        let version = Arc::new(source::compile("f", "p", source).unwrap());
        assert!(version.warnings.len() > STATUS_NOTES_MAX);
        for n in 0..500 {
            let name = Name::parse(&format!("acme/p{n:03}")).unwrap();
            let served = Arc::new(Served::new(name.clone(), version.clone(), false));
            for rule in 0..20 {
                served.rule_failed(rule, &Stop::Failed("\u{e9}".repeat(1000)));
            }
            set.insert(&name, Entry::Serves { served, problem: None, unstored: None });
        }
        set.insert(&Name::parse("zulu/p").unwrap(), Entry::Refuses("x".repeat(100_000)));

        let (rows, total) = set.status();
        assert_eq!((total, rows[0].tenant.as_str(), rows[0].error.as_ref().unwrap().len()), (501, "zulu", 256));
        assert!(rows.len() > 50 && rows.len() <= STATUS_ROWS_MAX, "{}", rows.len());
        assert!(
            rows.iter()
                .all(|row| row.warnings.len() <= 10 && row.rule_errors.len() <= 10)
        );
        assert!(serde_json::to_vec(&rows).unwrap().len() <= STATUS_BYTES_MAX + STATUS_ROWS_MAX);
    }

    #[test]
    fn rule_failures_are_counted_by_rule() {
        let name = Name::parse("acme/p").unwrap();
        let source = Stored { format: Format::Yaml, text: "providers: [{name: a}]".into() };
        let served = Served::new(name, Arc::new(source::compile("f", "p", source).unwrap()), true);
        served.rule_failed(2, &Stop::Failed("no".into()));
        served.rule_failed(2, &Stop::Spent);
        served.rule_failed(0, &Stop::Failed("no".into()));
        let errors = |rule, count, last: &str| RuleErrors { rule, count, last: last.into() };
        assert_eq!(served.rule_errors(), [errors(0, 1, "no"), errors(2, 2, "takes more steps than a rule may")]);
    }
}
