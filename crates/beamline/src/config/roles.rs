//! The parts that a process runs, and which of them need each other.
//!
//! On NATS, any part can run alone. The embedded bus connects only the parts of one process, so some parts are useless
//! there without others.

use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Gateway,
    Router,
    Worker,
    Cluster,
    Webapp,
}

use Role::{Cluster, Gateway, Router, Webapp, Worker};

impl Role {
    /// All roles, in the order in which a message passes through them.
    const ALL: [Self; 5] = [Gateway, Router, Worker, Cluster, Webapp];

    /// Parses an item of the setting `roles`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let role = Self::ALL.into_iter().find(|role| role.name() == text);
        role.ok_or_else(|| format!("{text:?} is not a role; the roles are {}", Self::names()))
    }

    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    fn name(self) -> &'static str {
        match self {
            Gateway => "gateway",
            Router => "router",
            Worker => "worker",
            Cluster => "cluster",
            Webapp => "webapp",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Roles that do not work without one of the listed roles, and the consequence.
const NEEDS: &[(Role, &[Role], &str)] = &[
    (Gateway, &[Router], "finds no router to ask"),
    (Router, &[Gateway, Webapp], "receives no requests"),
    (Worker, &[Router], "gets no task"),
    (Webapp, &[Cluster], "has no node for its pages to connect to"),
];
/// Roles that have reduced function without the other, and the consequence.
const WANTS: &[(Role, Role, &str)] = &[
    (Router, Worker, "assignments wait in the stream until a worker runs on this data directory"),
    (Webapp, Router, "questions to the assistant in rooms get no answer"),
];

/// Returns a problem for each of these roles that cannot work in this process on the embedded bus.
pub fn problems(roles: &[Role]) -> Vec<String> {
    let unmet = NEEDS
        .iter()
        .filter(|(role, needs, _)| roles.contains(role) && !needs.iter().any(|need| roles.contains(need)));
    unmet
        .map(|(role, needs, lack)| {
            let needs = needs.iter().map(|need| need.name()).collect::<Vec<_>>().join(" or ");
            format!(
                "the {role} {lack}: the embedded bus reaches only the parts of this process; add {needs} to roles, or \
                 set nats.url"
            )
        })
        .collect()
}

/// Returns a warning for each of these roles that works with reduced function on the embedded bus.
pub fn warnings(roles: &[Role]) -> Vec<String> {
    let reduced = WANTS
        .iter()
        .filter(|(role, want, _)| roles.contains(role) && !roles.contains(want));
    reduced
        .map(|(role, want, lack)| {
            format!("roles has {role} without {want}, and the embedded bus reaches no other process: {lack}")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::config::{Layers, load};

    #[test]
    fn roles_need_each_other_only_without_nats() {
        let check = |roles: &str, nats: bool, expected: Result<usize, &[&str]>| {
            let mut layers = Layers { flags: vec![("roles", roles.into())], ..Layers::default() };
            layers
                .flags
                .extend(nats.then(|| ("nats.url", "nats://127.0.0.1:4222".into())));
            match (load(&layers), expected) {
                (Ok(settings), Ok(warnings)) => assert_eq!(settings.warnings.len(), warnings, "{roles}"),
                (Err(problems), Err(parts)) => {
                    let reported: Vec<_> = problems.0.iter().map(|problem| problem.what.as_str()).collect();
                    assert_eq!(reported.len(), parts.len(), "{roles}: {reported:?}");
                    let fits =
                        |(reported, part): (&&str, &&str)| reported.contains(part) && reported.contains("nats.url");
                    assert!(reported.iter().zip(parts).all(fits), "{roles}: {reported:?}");
                }
                (loaded, _) => panic!("{roles}: {:?}", loaded.map(|settings| settings.warnings)),
            }
        };
        check("gateway,router,worker,cluster,webapp", false, Ok(0));
        check("cluster", false, Ok(0));
        check("gateway,router,worker", false, Ok(0));
        check("gateway,router,worker,cluster", false, Ok(0));
        check("router,worker,cluster,webapp", false, Ok(0));

        check("gateway,router", false, Ok(1));
        check("cluster,webapp", false, Ok(1));
        check("router,cluster,webapp", false, Ok(1));

        check("gateway", false, Err(&["the gateway finds no router"]));
        check("router", false, Err(&["the router receives no requests"]));
        check("worker", false, Err(&["the worker gets no task"]));
        check("router,worker", false, Err(&["add gateway or webapp to roles"]));
        check("gateway,worker", false, Err(&["the gateway finds no router", "the worker gets no task"]));
        check("webapp", false, Err(&["the webapp has no node"]));

        for role in super::Role::ALL {
            check(role.name(), true, Ok(0));
        }
    }
}
