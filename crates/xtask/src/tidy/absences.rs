//! Tokens that the code must not contain, and the few exceptions, each with its reason.

use super::Finding;
use crate::tree::{File, Tree, is_test};

struct Absence {
    /// A line of code that contains any of these and `beside` is a finding.
    tokens: &'static [&'static str],
    /// Empty if the tokens alone are a finding.
    beside: &'static str,
    /// Prefixes of the paths that are searched.
    within: &'static [&'static str],
    /// Prefixes of the paths that are exempt, each with the reason.
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
        message: "this code has no clock, socket, file, randomness or async: take bytes, time and numbers as arguments",
    },
    Absence {
        tokens: &["Serialize", "Deserialize"],
        beside: "derive(",
        within: &["crates/"],
        except: &[
            ("crates/wire/", "messages live here"),
            ("crates/beamline/src/config", "the settings file"),
            ("crates/beamline/src/commands/credentials.rs", "claims of a token: signed here, read by the cluster"),
            ("crates/beamline/src/health.rs", "bodies of the health endpoints, which only this crate serves"),
            ("crates/beamline/src/wiring/announce.rs", "the line `ready {…}` on stdout"),
            ("crates/cluster/src/token.rs", "claims of a token: signed here and read here"),
            ("crates/gateway/src/openai/", "requests and answers of OpenAI's API, which is not ours"),
            ("crates/gateway/src/waiters.rs", "reads the envelope of a result"),
            ("crates/router/src/operators.rs", "claims of a token: signed by the command line, read here"),
            ("crates/webapp/src/auth.rs", "bodies of the sign-in endpoints and claims of the tokens made there"),
            ("crates/webapp/src/app/", "props of elements and session snapshots, written and read here"),
            ("crates/webapp/src/live.rs", "exchanged between web apps only"),
            ("crates/worker/src/provider/openai", "requests and answers of OpenAI's API, which is not ours"),
            ("crates/checks/", "evidence files, which only this crate writes and reads"),
        ],
        message: "messages that cross a process boundary belong in `wire`: move the type there",
    },
    Absence {
        tokens: &["json!"],
        beside: "",
        within: &["crates/"],
        except: &[
            ("crates/testkit/", "answers of the scripted model endpoint, for tests only"),
            (
                "crates/worker/src/provider",
                "a task's output has no fixed form; requests have that of the endpoint's API",
            ),
        ],
        message: "a message has a type: build the type and serialize it (`json!` is for tests)",
    },
    Absence {
        tokens: &["\"beamline.", "\"caf."],
        beside: ".v",
        within: &["crates/"],
        except: &[
            ("crates/wire/", "subjects live here"),
            ("crates/cluster/src/operations.rs", "exchanged between nodes only"),
            ("crates/webapp/src/app/sessions.rs", "exchanged between web apps only"),
            ("crates/webapp/src/chat/rooms.rs", "exchanged between web apps only"),
            ("crates/webapp/src/live.rs", "exchanged between web apps only"),
        ],
        message: "bus subjects belong in wire::subjects, which both ends use: define it there",
    },
    Absence {
        tokens: &["env::var", "env::var_os", "env::vars", "env::vars_os", "env::set_var", "env::remove_var"],
        beside: "",
        within: &["crates/"],
        except: &[("crates/beamline/src/config", "the only place that reads the environment")],
        message: "the environment is read in beamline::config only: take the value as a setting",
    },
    Absence {
        tokens: &["unbounded_channel", "unbounded(", "UnboundedSender", "UnboundedReceiver"],
        beside: "",
        within: &["crates/"],
        except: &[],
        message: "every queue must be bounded: choose a capacity, and what happens when the queue is full",
    },
    Absence {
        tokens: &["tokio::spawn(", "task::spawn(", "thread::spawn("],
        beside: "",
        within: &["crates/"],
        except: &[("crates/client/src/lib.rs", "the connection's only task; it ends with the last handle")],
        message: "no detached task: spawn on a TaskTracker or JoinSet that is awaited",
    },
    Absence {
        tokens: &[".abort()", "abort_all()", "process::abort"],
        beside: "",
        within: &["crates/"],
        except: &[],
        message: "tasks must not be aborted: end the task with a CancellationToken",
    },
    Absence {
        tokens: &["process::exit"],
        beside: "",
        within: &["crates/"],
        except: &[("crates/beamline/src/main.rs", "main decides the exit code")],
        message: "only main ends the process: return an error",
    },
];

/// Maximum number of lines of a source file; a longer one holds more than one concept.
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
    let rules: Vec<_> = ABSENCES
        .iter()
        .filter(|rule| here(rule.within) && !excepted(rule))
        .collect();

    let mut findings = Vec::new();
    for (number, line) in file.code() {
        for rule in &rules {
            if let Some(token) = rule
                .tokens
                .iter()
                .find(|token| line.contains(rule.beside) && has_word(line, token))
            {
                findings.push(Finding::new(&file.path, number, format!("`{token}`: {}", rule.message)));
            }
        }
    }
    findings
}

/// Whether `line` contains `token` other than as part of a longer name.
fn has_word(line: &str, token: &str) -> bool {
    let named = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');

    // A token that begins or ends with punctuation, such as `.abort()`, cannot be part of a longer name on that side.
    let word_begins = named(token.as_bytes().first());
    let word_ends = named(token.as_bytes().last());

    line.match_indices(token).any(|(at, _)| {
        let before = line.as_bytes()[..at].last();
        let after = line.as_bytes().get(at + token.len());
        let part_of_longer = (word_begins && named(before)) || (word_ends && named(after));
        !part_of_longer
    })
}

/// Finds paths that exist on one developer's machine only.
fn machine_paths(file: &File) -> Vec<Finding> {
    // Assembled at run time, so that this file does not contain such a path itself.
    let roots = ["work", "root", "Users"].map(|name| format!("/{name}/"));
    let found = |line: &str| roots.iter().find(|root| has_path(line, root)).cloned();

    let lines = file.text.lines().enumerate();
    lines
        .filter_map(|(index, line)| {
            let root = found(line)?;
            Some(Finding::new(
                &file.path,
                index + 1,
                format!("{root}… exists on one machine only: use a relative path"),
            ))
        })
        .collect()
}

fn has_path(line: &str, root: &str) -> bool {
    line.match_indices(root).any(|(at, _)| {
        // Skip the middle of a longer path or of a URL.
        !line.as_bytes()[..at]
            .last()
            .is_some_and(|byte| byte.is_ascii_alphanumeric() || b"._-~*$})".contains(byte))
    })
}

fn too_long(file: &File) -> Option<Finding> {
    let ours = ["rs", "ts", "tsx"]
        .iter()
        .any(|extension| file.path.ends_with(&format!(".{extension}")));
    let lines = file.text.lines().count();
    let message = || format!("{lines} lines, {LINES_MAX} at most: move its second concept to a separate file");
    (ours && lines > LINES_MAX && !is_test(&file.path)).then(|| Finding::new(&file.path, 0, message()))
}

#[cfg(test)]
mod tests {
    use super::super::tree_of;
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        check(&tree_of(&[(path, text)]))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn rules_apply_only_within_their_paths() {
        for (path, line, seen) in [
            ("crates/wire/src/a.rs", "let now = Instant::now();", true),
            ("crates/wire/src/a.rs", "let instantly = 1; // Instant", false),
            ("crates/router/src/policy/a.rs", "pub async fn decide() {", true),
            ("crates/router/src/tasks.rs", "pub async fn decide() {", false),
            ("crates/router/src/tasks.rs", "#[derive(Debug, Serialize)]", true),
            ("crates/router/src/tasks.rs", "fn send(message: &impl Serialize) {", false),
            ("crates/wire/src/a.rs", "#[derive(Debug, Serialize)]", false),
            ("crates/router/src/tasks.rs", "let body = json!({\"ok\": true});", true),
            ("crates/router/src/tasks.rs", "let body = serde_json::json!({});", true),
            ("crates/router/src/tasks.rs", "#[cfg(test)]\nmod tests {\n    let body = json!({});\n}", false),
            ("crates/router/tests/it/main.rs", "let body = json!({});", false),
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
    fn finding_names_line_and_remedy() {
        let text = "fn a() {\n    tokio::spawn(b());\n}\n";
        let expected = "crates/worker/src/a.rs:2: `tokio::spawn(`: no detached task: spawn on a TaskTracker or JoinSet \
                        that is awaited";
        assert_eq!(found("crates/worker/src/a.rs", text), [expected]);
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        let path = |root: &str| format!("see {root}/x");
        assert_eq!(found("README.md", &path(concat!("/ro", "ot"))).len(), 1);
        assert_eq!(found("docs/a.md", &path(concat!("/wo", "rk"))).len(), 1);
        assert!(found("docs/a.md", "https://example.org/work/x and $HOME/work/x").is_empty());
    }

    #[test]
    fn long_source_files_are_found() {
        assert!(found("frontend/src/a.ts", &"x\n".repeat(LINES_MAX)).is_empty());
        assert_eq!(found("frontend/src/a.ts", &"x\n".repeat(LINES_MAX + 1)).len(), 1);
        assert!(found("docs/a.md", &"x\n".repeat(LINES_MAX + 1)).is_empty());
    }
}
