//! What the code must not contain, and the few places where it may, each with its reason.

use super::Finding;
use crate::tree::{File, Tree, is_test};

struct Absence {
    /// Any of these in a line of code is a finding …
    tokens: &'static [&'static str],
    /// … that has this too.
    beside: &'static str,
    /// Where it is looked for: beginnings of paths.
    within: &'static [&'static str],
    /// Beginnings of paths where it may stand, and why.
    except: &'static [(&'static str, &'static str)],
    message: &'static str,
}

const ABSENCES: &[Absence] = &[
    Absence {
        tokens: &[
            "Instant",
            "SystemTime",
            "tokio",
            "async fn",
            "async move",
            "std::net",
            "std::fs",
            "std::env",
            "rand::",
        ],
        beside: "",
        within: &["crates/wire/src/", "crates/router/src/policy.rs", "crates/router/src/policy/"],
        except: &[],
        message: "knows no clock, socket, file, chance or async: take bytes, time and numbers as arguments",
    },
    Absence {
        tokens: &["Serialize", "Deserialize"],
        beside: "derive(",
        within: &["crates/"],
        except: &[
            ("crates/wire/", "messages live here"),
            ("crates/beamline/src/config", "the settings file"),
            ("crates/cluster/src/token.rs", "claims of a token: signed here and read here"),
            ("crates/gateway/src/waiters.rs", "looks into a result for its envelope"),
            ("crates/webapp/src/auth.rs", "bodies of signing in, an HTTP face only this crate has"),
            ("crates/webapp/src/app/", "props of elements and snapshots of sessions, written and read here"),
            ("crates/webapp/src/live.rs", "said among web apps only"),
            ("crates/checks/", "evidence files, which only this crate writes and reads"),
        ],
        message: "messages that cross a process boundary belong to `wire`: move the type there",
    },
    Absence {
        tokens: &["\"beamline.", "\"caf."],
        beside: ".v",
        within: &["crates/"],
        except: &[
            ("crates/wire/", "subjects live here"),
            ("crates/cluster/src/bus_api.rs", "said among nodes only"),
            ("crates/webapp/src/app/sessions.rs", "said among web apps only"),
            ("crates/webapp/src/chat/rooms.rs", "said among web apps only"),
            ("crates/webapp/src/live.rs", "said among web apps only"),
        ],
        message: "a subject of the bus: name it in wire::subjects, where both ends find it",
    },
    Absence {
        tokens: &["env::var", "env::var_os", "env::vars", "env::vars_os", "env::set_var", "env::remove_var"],
        beside: "",
        within: &["crates/"],
        except: &[("crates/beamline/src/config", "the one place that reads the environment")],
        message: "the environment is read in beamline::config only: take the value as a setting",
    },
    Absence {
        tokens: &["unbounded_channel", "unbounded(", "UnboundedSender", "UnboundedReceiver"],
        beside: "",
        within: &["crates/"],
        except: &[],
        message: "no queue without a bound: choose how much may wait, and what happens then",
    },
    Absence {
        tokens: &["tokio::spawn(", "task::spawn(", "thread::spawn("],
        beside: "",
        within: &["crates/"],
        except: &[
            ("crates/client/src/lib.rs", "the connection's one task; ends with the last handle"),
            ("crates/cluster/src/engine/redis.rs", "the subscription's one task; ends with the engine"),
        ],
        message: "no detached task: spawn on a TaskTracker or JoinSet that someone waits for",
    },
    Absence {
        tokens: &[".abort()", "abort_all()", "process::abort"],
        beside: "",
        within: &["crates/"],
        except: &[],
        message: "tasks end, they are not aborted: give it a CancellationToken",
    },
    Absence {
        tokens: &["process::exit"],
        beside: "",
        within: &["crates/"],
        except: &[("crates/beamline/src/main.rs", "the exit code is decided here")],
        message: "nothing but main ends the process: return an error",
    },
];

/// Lines that one of our files may have: over it, it holds more than one concept.
const LINES_MAX: usize = 700;

pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings: Vec<Finding> = tree.under("crates/", "rs").flat_map(in_code).collect();
    findings.extend(tree.files.iter().flat_map(machine_paths));
    findings.extend(tree.files.iter().filter_map(too_long));
    findings
}

fn in_code(file: &File) -> Vec<Finding> {
    let here = |paths: &[&str]| paths.iter().any(|path| file.path.starts_with(path));
    let excepted = |rule: &Absence| rule.except.iter().any(|(path, _)| file.path.starts_with(path));
    let rules: Vec<_> = ABSENCES.iter().filter(|rule| here(rule.within) && !excepted(rule)).collect();
    let mut findings = Vec::new();
    for (number, line) in file.code() {
        for rule in &rules {
            if let Some(token) = rule.tokens.iter().find(|token| line.contains(rule.beside) && has_word(line, token)) {
                findings.push(Finding::new(&file.path, number, format!("`{token}`: {}", rule.message)));
            }
        }
    }
    findings
}

/// `token` stands in `line`, and not as a part of a longer name.
fn has_word(line: &str, token: &str) -> bool {
    let named = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let word_begins = named(token.as_bytes().first());
    let word_ends = named(token.as_bytes().last());
    line.match_indices(token).any(|(at, _)| {
        let before = line.as_bytes()[..at].last();
        let after = line.as_bytes().get(at + token.len());
        let part_of_longer = (word_begins && named(before)) || (word_ends && named(after));
        !part_of_longer
    })
}

/// Paths that exist on one developer's machine only. Put together here, so that this file has none.
fn machine_paths(file: &File) -> Vec<Finding> {
    let roots = ["work", "root", "Users"].map(|name| format!("/{name}/"));
    let found = |line: &str| roots.iter().find(|root| has_path(line, root)).cloned();
    let lines = file.text.lines().enumerate();
    lines
        .filter_map(|(index, line)| {
            let root = found(line)?;
            Some(Finding::new(&file.path, index + 1, format!("{root}… is a path of one machine: make it relative")))
        })
        .collect()
}

fn has_path(line: &str, root: &str) -> bool {
    line.match_indices(root).any(|(at, _)| {
        // Not the middle of a longer path or an address.
        !line.as_bytes()[..at].last().is_some_and(|byte| byte.is_ascii_alphanumeric() || b"._-~*$})".contains(byte))
    })
}

fn too_long(file: &File) -> Option<Finding> {
    let ours = ["rs", "ts", "tsx"].iter().any(|extension| file.path.ends_with(&format!(".{extension}")));
    let lines = file.text.lines().count();
    let message = || format!("{lines} lines, over {LINES_MAX}: give its second concept a file of its own");
    (ours && lines > LINES_MAX && !is_test(&file.path)).then(|| Finding::new(&file.path, 0, message()))
}

#[cfg(test)]
mod tests {
    use super::super::tree_of;
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        check(&tree_of(&[(path, text)])).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_absence_is_seen_where_it_counts() {
        for (path, line, seen) in [
            ("crates/wire/src/a.rs", "let now = Instant::now();", true),
            ("crates/wire/src/a.rs", "let instantly = 1; // Instant", false),
            ("crates/router/src/policy/a.rs", "pub async fn decide() {", true),
            ("crates/router/src/tasks.rs", "pub async fn decide() {", false),
            ("crates/router/src/tasks.rs", "#[derive(Debug, Serialize)]", true),
            ("crates/router/src/tasks.rs", "fn send(message: &impl Serialize) {", false),
            ("crates/wire/src/a.rs", "#[derive(Debug, Serialize)]", false),
            ("crates/router/src/tasks.rs", "const OWN: &str = \"beamline.own.v1\";", true),
            ("crates/gateway/src/a.rs", "std::env::var(\"HOME\")", true),
            ("crates/gateway/src/a.rs", "std::env::vars()", true),
            ("crates/beamline/src/config/load.rs", "std::env::vars_os()", false),
            ("crates/gateway/src/a.rs", "let (a, b) = mpsc::unbounded_channel();", true),
            ("crates/gateway/src/a.rs", "tokio::spawn(run());", true),
            ("crates/gateway/src/a.rs", "tracker.spawn(run());", false),
            ("crates/gateway/tests/it/main.rs", "tokio::spawn(run());", false),
            ("crates/gateway/src/a.rs", "handle.abort();", true),
            ("crates/gateway/src/a.rs", "std::process::exit(1);", true),
            ("crates/beamline/src/main.rs", "std::process::exit(1);", false),
        ] {
            assert_eq!(!found(path, line).is_empty(), seen, "{path}: {line}");
        }
    }

    #[test]
    fn a_finding_names_line_and_remedy() {
        let text = "fn a() {\n    tokio::spawn(b());\n}\n";
        let expected = "crates/worker/src/a.rs:2: `tokio::spawn(`: no detached task: spawn on a TaskTracker or JoinSet \
                        that someone waits for";
        assert_eq!(found("crates/worker/src/a.rs", text), [expected]);
    }

    #[test]
    fn paths_of_a_machine() {
        let path = |root: &str| format!("see {root}/x");
        assert_eq!(found("README.md", &path(concat!("/ro", "ot"))).len(), 1);
        assert_eq!(found("docs/a.md", &path(concat!("/wo", "rk"))).len(), 1);
        assert!(found("docs/a.md", "https://example.org/work/x and $HOME/work/x").is_empty());
    }

    #[test]
    fn long_files() {
        assert!(found("frontend/src/a.ts", &"x\n".repeat(LINES_MAX)).is_empty());
        assert_eq!(found("frontend/src/a.ts", &"x\n".repeat(LINES_MAX + 1)).len(), 1);
        assert!(found("docs/a.md", &"x\n".repeat(LINES_MAX + 1)).is_empty());
    }
}
