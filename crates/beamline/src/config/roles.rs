//! Which parts can run without which others on the embedded bus, which reaches only the parts of one process.

use super::Settings;

/// All parts, in the order in which a message passes them.
pub const ROLES: [&str; 5] = ["gateway", "router", "worker", "cluster", "webapp"];

/// What a part does not work without: one of these.
const NEEDS: &[(&str, &[&str], &str)] = &[
    ("gateway", &["router"], "finds no router to ask"),
    ("router", &["gateway", "webapp"], "receives no requests"),
    ("worker", &["router"], "gets no task"),
    ("webapp", &["cluster"], "has no node for its pages to connect to"),
];
/// Optional companions: the role runs without them, with reduced function.
const WANTS: &[(&str, &str, &str)] = &[
    ("router", "worker", "assignments wait in the stream until a worker runs on this data directory"),
    ("webapp", "router", "in rooms nobody answers the assistant's questions"),
];

/// What is wrong with the roles.
pub fn problems(settings: &Settings) -> Vec<String> {
    let roles = settings.values.list("roles");
    if roles.is_empty() {
        return vec![format!("names no role; there are {}", ROLES.join(", "))];
    }
    let strange = roles.iter().filter(|role| !ROLES.contains(&role.as_str()));
    let mut problems: Vec<String> = strange
        .map(|role| format!("{role:?} is not a role; there are {}", ROLES.join(", ")))
        .collect();
    if !is_embedded(settings) {
        return problems;
    }
    for (role, needs, lack) in NEEDS {
        if settings.has_role(role) && !needs.iter().any(|need| settings.has_role(need)) {
            let needs = needs.join(" or ");
            problems.push(format!(
                "the {role} {lack}: the embedded bus reaches only the parts of this process; add {needs} to roles, or set \
                 nats.url"
            ));
        }
    }
    problems
}

/// What the roles leave undone.
pub fn warnings(settings: &Settings) -> Vec<String> {
    let lacks = WANTS
        .iter()
        .filter(|(role, want, _)| settings.has_role(role) && !settings.has_role(want));
    let warning = |(role, want, lack): &(&str, &str, &str)| {
        format!("roles has {role} without {want}, and the embedded bus reaches no other process: {lack}")
    };
    if is_embedded(settings) {
        lacks.map(warning).collect()
    } else {
        Vec::new()
    }
}

fn is_embedded(settings: &Settings) -> bool {
    settings.values.maybe_text("nats.url").is_none()
}

#[cfg(test)]
mod tests {
    use crate::config::{Layers, load};

    #[test]
    fn roles_that_find_each_other_start_without_nats() {
        let check = |roles: &str, nats: bool, expected: Result<usize, &[&str]>| {
            let mut layers = Layers { flags: vec![("roles", roles.into())], ..Layers::default() };
            layers
                .flags
                .extend(nats.then(|| ("nats.url", "nats://127.0.0.1:4222".into())));
            match (load(&layers), expected) {
                (Ok(settings), Ok(warnings)) => assert_eq!(settings.warnings.len(), warnings, "{roles}"),
                (Err(problems), Err(parts)) => {
                    let told: Vec<_> = problems.0.iter().map(|problem| problem.what.as_str()).collect();
                    assert_eq!(told.len(), parts.len(), "{roles}: {told:?}");
                    let fits = |(told, part): (&&str, &&str)| told.contains(part) && told.contains("nats.url");
                    assert!(told.iter().zip(parts).all(fits), "{roles}: {told:?}");
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
        for role in super::ROLES {
            check(role, true, Ok(0));
        }
    }
}
