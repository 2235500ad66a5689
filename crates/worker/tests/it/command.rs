//! Command providers: input, environment, output, errors, limits and termination of the programs that they run.

use crate::{Place, SOON, assignment, chunk, is_gone, provider, variables, within};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use wire::json::Json;
use wire::router::{ExecResult, ResultStatus};
use wire::subjects;
use worker::{Config, Kind};

/// Runs the script once as the provider `sh` and returns its result.
async fn run(script: &str, payload: Value) -> ExecResult {
    let place = Place::local().await;
    let mut results = place.results().await;
    let _worker = place.shell(script, |_| {}).await;
    place.assign("r", "sh", payload).await;
    results.next().await
}

/// The text of the output; leaked, so that tests can compare and split it in place.
fn text(result: &ExecResult) -> &'static str {
    let output = result.output.as_ref().map(Json::value);
    let text = output.and_then(|output| output["text"].as_str().map(String::from));
    text.unwrap_or_default().leak()
}

#[tokio::test]
async fn program_gets_task_on_stdin_and_ids_in_its_environment() {
    let result = run("cat; echo \"|$BEAMLINE_REQUEST_ID|$BEAMLINE_TENANT_ID\"", json!({"prompt": "é\n"})).await;
    let (task, ids) = text(&result).split_once('|').unwrap();
    assert_eq!(serde_json::from_str::<Value>(task).unwrap(), json!({"type": "t", "payload": {"prompt": "é\n"}}));
    assert_eq!(ids, "r|acme\n");
    assert_eq!((result.status, result.provider_id.as_str(), result.cost), (ResultStatus::Success, "sh", 0.25));
    assert_eq!((result.trace_id.as_deref(), result.tenant_id.as_deref()), (Some("t1"), Some("acme")));
    assert!(result.chunks.is_some_and(|chunks| chunks >= 1));
}

#[tokio::test]
async fn program_inherits_nothing_of_the_workers_environment() {
    let place = Place::local().await;
    let mut results = place.results().await;

    // The program name has no slash: it is looked up in the PATH that is given, else in the system's default PATH.
    let given = [&[][..], &[("PATH", "/usr/bin"), ("LANG", "C.UTF-8"), ("BEAMLINE_TENANT_ID", "other")]];
    let of = |env: &[(&str, &str)]| Kind::Command {
        program: "env".into(),
        args: vec![],
        env: variables(env),
        output_max: 1024,
    };
    let providers = vec![provider("none", of(given[0])), provider("some", of(given[1]))];
    let _worker = place.worker(Config { providers, ..Config::default() }).await;

    for (name, expected) in [("none", &[][..]), ("some", &["LANG=C.UTF-8", "PATH=/usr/bin"])] {
        place.assign(name, name, json!({})).await;
        let result = results.next().await;
        let mut seen: Vec<&str> = text(&result).lines().collect();
        seen.sort_unstable();
        let run_id = seen.iter().position(|line| line.starts_with("BEAMLINE_RUN_ID="));
        seen.remove(run_id.expect("the run has an id"));
        let ids = [format!("BEAMLINE_REQUEST_ID={name}"), "BEAMLINE_TENANT_ID=acme".into()];
        let expected: Vec<&str> = ids.iter().map(String::as_str).chain(expected.iter().copied()).collect();
        assert_eq!(seen, expected);
    }
}

/// A script finds the standard programs although PATH is not given.
#[tokio::test]
async fn script_runs_in_an_empty_environment() {
    let result =
        run("cat >/dev/null; printf 'b\na\n' | sort | tr '\n' ' '; ls / >/dev/null && echo ok", json!({})).await;
    assert_eq!((result.status, text(&result)), (ResultStatus::Success, "a b ok\n"), "{result:?}");
}

pub async fn output_is_published_while_the_program_runs(place: Place) {
    let script = "printf 'one \\342\\202'; while [ ! -e $DIR/go ]; do sleep 0.02; done; printf '\\254 two'";
    let mut results = place.results().await;
    let mut output = place.output("r").await;
    let _worker = place.shell(script, |_| {}).await;
    place.assign("r", "sh", json!({})).await;

    let first = chunk(&mut output).await;
    assert_eq!(
        (first.seq, first.attempt, first.assignment_id.as_str(), first.data.value()),
        (0, 1, "a-r", json!("one "))
    );

    place.file("go");
    let second = chunk(&mut output).await;
    assert_eq!((second.seq, second.data.value()), (1, json!("€ two")), "a character is not split");
    let result = results.next().await;
    assert_eq!((text(&result), result.chunks), ("one € two", Some(2)));
}

#[tokio::test]
async fn result_reports_how_the_program_ended() {
    for (script, code, message) in [
        ("exit 0", None, ""),
        (
            "echo said; echo 'out of cheese' >&2; exit 3",
            Some("exit_status"),
            "exit status: 3; standard error ended with: out of cheese",
        ),
        ("kill -9 $$", Some("exit_status"), "signal: 9 (SIGKILL)"),
        ("nosuchprogram", Some("exit_status"), "exit status: 127"),
    ] {
        let result = run(script, json!({})).await;
        assert_eq!(result.error_code.as_deref(), code, "{script}");
        assert!(result.error_message.unwrap_or_default().contains(message), "{script}");
        let expected = if code.is_none() {
            ResultStatus::Success
        } else {
            ResultStatus::Error
        };
        assert_eq!(result.status, expected, "{script}");
    }

    let result = run("echo said; exit 1", json!({})).await;
    assert_eq!(
        result.output.map(|output| output.value()),
        Some(json!({"text": "said\n"})),
        "the output of a failed program is kept"
    );
    let result = run("printf 'a\\377b'", json!({})).await;
    assert_eq!(result.output.map(|output| output.value()), Some(json!({"text": "a\u{fffd}b"})));
}

#[tokio::test]
async fn program_that_cannot_start_fails() {
    let place = Place::local().await;
    let mut results = place.results().await;
    let missing = Kind::Command {
        program: "/no/such/program".into(),
        args: vec![],
        env: variables(&[]),
        output_max: 1024,
    };
    let folder = Kind::Command {
        program: place.dir.path().into(),
        args: vec![],
        env: variables(&[]),
        output_max: 1024,
    };
    let providers = vec![provider("missing", missing), provider("folder", folder)];
    let _worker = place.worker(Config { providers, ..Config::default() }).await;

    for (name, problem) in [("missing", "No such file"), ("folder", "Permission denied")] {
        place.assign(name, name, json!({})).await;
        let result = results.next().await;
        assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Error, Some("spawn_failed")));
        assert!(result.error_message.unwrap().contains(problem), "{name}");
    }
}

#[tokio::test]
async fn unread_input_is_not_an_error() {
    let big = json!({"prompt": "x".repeat(500_000)});
    for script in ["exec <&-; echo ok", "echo ok", "head -c 10 >/dev/null; echo ok"] {
        let result = run(script, big.clone()).await;
        assert_eq!((result.status, text(&result)), (ResultStatus::Success, "ok\n"), "{script}");
    }
}

#[tokio::test]
async fn excessive_output_ends_the_program() {
    let started = Instant::now();
    let result = run("yes", json!({})).await;
    assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Error, Some("output")));
    assert!(result.error_message.unwrap().contains("more than 65536 bytes"));
    assert!((32 * 1024..=64 * 1024).contains(&result.output.unwrap().value()["text"].as_str().unwrap().len()));
    assert!(started.elapsed() < Duration::from_secs(10));

    let result = run("head -c 5000000 /dev/zero | tr '\\0' e >&2; echo end >&2; exit 1", json!({})).await;
    let message = result.error_message.unwrap();
    assert!(message.ends_with("eend") && message.len() < 5000, "{}", message.len());
}

/// Runs a script that prints the ids of its processes with a deadline of 500 ms. Checks that the run exceeds the
/// deadline and that all of these processes end, and returns how long this took.
async fn timed_out(script: &str, processes: usize) -> Duration {
    let place = Place::local().await;
    let mut results = place.results().await;
    let _worker = place.shell(script, |_| {}).await;

    let started = Instant::now();
    place
        .append(subjects::ASSIGN, within(assignment("r", "sh", json!({})), 500).to_string())
        .await;
    let result = results.next().await;
    assert_eq!(
        (result.status, result.error_code.as_deref()),
        (ResultStatus::Timeout, Some("deadline_exceeded")),
        "{result:?}"
    );

    let pids: Vec<&str> = text(&result).split_whitespace().collect();
    assert_eq!(pids.len(), processes, "{pids:?}");
    testkit::eventually(SOON, || async { pids.iter().all(|pid| is_gone(pid)) }).await;
    started.elapsed()
}

/// The error code tells the provider's timeout from the assignment's deadline; if both are equal, it is the timeout.
#[tokio::test]
async fn timeout_names_the_limit_that_was_exceeded() {
    for (provider_ms, assignment_ms, code) in [(200, 60_000, "timeout"), (60_000, 200, "deadline_exceeded")] {
        let place = Place::local().await;
        let mut results = place.results().await;
        let limit = Duration::from_millis(provider_ms);
        let _worker = place
            .shell("sleep 1000", |config| config.providers[0].timeout = limit)
            .await;

        place
            .append(subjects::ASSIGN, within(assignment("r", "sh", json!({})), assignment_ms).to_string())
            .await;
        let result = results.next().await;
        assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Timeout, Some(code)), "{result:?}");
    }
}

#[tokio::test]
async fn hanging_program_is_ended_with_all_its_children() {
    let hangs = "echo $$; sleep 1000 & echo $!; sh -c 'echo $$; sleep 1000 & echo $!; wait' & wait; sleep 1000";
    let took = timed_out(hangs, 4).await;
    assert!(took < Duration::from_secs(3), "SIGTERM should be enough: {took:?}");
}

#[tokio::test]
async fn program_that_ignores_sigterm_is_killed() {
    timed_out("trap '' TERM; echo $$; (trap '' TERM; echo $(sh -c 'echo $PPID'); while :; do sleep 0.1; done) & while :; do sleep 0.1; done", 2).await;
}

#[tokio::test]
async fn processes_left_behind_do_not_delay_the_result() {
    let started = Instant::now();
    let result = run("sleep 1000 & echo $!", json!({})).await;
    assert_eq!(result.status, ResultStatus::Success);
    assert!(started.elapsed() < Duration::from_secs(10));
    testkit::eventually(SOON, || async { is_gone(text(&result)) }).await;
}

/// Starts a process in a session of its own, one that also loses its parent, and one that hides its environment. They
/// write their ids to files, so that they need not hold the output open.
const DAEMONS: &str = "setsid sh -c 'echo $$ > $DIR/session; exec sleep 1000' >/dev/null 2>&1 &
    (setsid sh -c 'echo $$ > $DIR/orphan; sleep 1000' >/dev/null 2>&1 &)
    env -i $(command -v setsid) sh -c 'echo $$ > $DIR/bare; exec sleep 1000' >/dev/null 2>&1 &
    while [ ! -s $DIR/session ] || [ ! -s $DIR/orphan ] || [ ! -s $DIR/bare ]; do sleep 0.02; done; ";

/// Runs the script after [`DAEMONS`], and returns the result and which of them are left.
async fn daemons(rest: &str, cancel: bool) -> (ExecResult, Vec<&'static str>) {
    let place = Place::local().await;
    let mut results = place.results().await;
    let _worker = place.shell(&format!("{DAEMONS} {rest}"), |_| {}).await;

    place
        .append(subjects::ASSIGN, within(assignment("r", "sh", json!({})), 1500).to_string())
        .await;
    let started = ["session", "orphan", "bare"];
    let pid = |name: &str| std::fs::read_to_string(place.dir.path().join(name)).unwrap_or_default();
    testkit::eventually(SOON, || async { started.iter().all(|name| pid(name).ends_with('\n')) }).await;
    if cancel {
        place.cancel("r").await;
    }
    let result = results.next().await;
    let left = started.into_iter().filter(|name| !is_gone(&pid(name))).collect();
    for name in started {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid(name).trim().parse().unwrap()),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
    (result, left)
}

#[tokio::test]
async fn processes_in_sessions_of_their_own_end_with_a_run_that_is_stopped() {
    for (rest, cancel, status) in [
        ("sleep 1000", true, ResultStatus::Cancelled),
        ("sleep 1000", false, ResultStatus::Timeout),
        ("yes; sleep 1000", false, ResultStatus::Error),
    ] {
        let (result, left) = daemons(rest, cancel).await;
        assert_eq!((result.status, left), (status, vec![]), "{:?}", result.error_message);
    }
}

/// A process that hides its environment, its session and its parent is out of sight.
#[tokio::test]
async fn processes_in_sessions_of_their_own_end_with_a_program_that_exits() {
    for (rest, status) in [("exit 0", ResultStatus::Success), ("exit 1", ResultStatus::Error)] {
        let (result, mut left) = daemons(rest, false).await;
        left.retain(|name| *name != "bare");
        assert_eq!((result.status, left), (status, vec![]), "{:?}", result.error_message);
    }
}

#[tokio::test]
async fn daemons_of_a_hundred_runs_leave_no_zombie() {
    let place = Place::local().await;
    let mut results = place.results().await;
    // One daemon ends by itself during the run, one after it, and one is ended with it.
    let script = "(setsid sh -c 'echo $$; exec >&- 2>&-' &); (setsid sh -c 'echo $$; exec >&- 2>&-; sleep 0.01' &); \
                  (setsid sh -c 'echo $$; exec >&- 2>&-; sleep 1000' &); sleep 0.05";
    let _worker = place.shell(script, |_| {}).await;

    let mut pids = Vec::new();
    for round in 0..10 {
        for n in 0..10 {
            place.assign(&format!("r{round}-{n}"), "sh", json!({})).await;
        }
        for _ in 0..10 {
            let result = results.next().await;
            assert_eq!(result.status, ResultStatus::Success, "{result:?}");
            pids.extend(text(&result).lines().map(String::from));
        }
    }
    assert_eq!(pids.len(), 300);
    let is_left = |pid: &String| std::path::Path::new(&format!("/proc/{pid}")).exists();
    testkit::eventually(SOON, || async { !pids.iter().any(is_left) }).await;
}

pub async fn cancel_ends_a_running_program(place: Place) {
    let mut results = place.results().await;
    let mut output = place.output("r").await;
    let _worker = place.shell("echo $$; sleep 1000", |_| {}).await;
    place.assign("r", "sh", json!({})).await;
    chunk(&mut output).await;

    place.cancel("another").await;
    place.cancel("r").await;
    let result = results.next().await;
    assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Cancelled, Some("cancelled")));
    testkit::eventually(SOON, || async { is_gone(text(&result)) }).await;
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;
    assert_eq!(place.count(subjects::STREAM_RESULT).await, 1);
}

#[tokio::test]
async fn program_that_closed_its_output_can_be_cancelled() {
    let place = Place::local().await;
    let mut results = place.results().await;
    let _worker = place.shell("exec >&- 2>&-; : > $DIR/closed; sleep 1000", |_| {}).await;
    place.assign("r", "sh", json!({})).await;
    testkit::eventually(SOON, || async { place.dir.path().join("closed").exists() }).await;
    place.cancel("r").await;
    assert_eq!(results.next().await.status, ResultStatus::Cancelled);
}

#[tokio::test]
async fn result_that_is_too_large_becomes_an_error_result() {
    let place = Place::local().await;
    let mut results = place.results().await;

    // Each zero byte is escaped to six bytes in JSON.
    let args = vec!["-c".into(), "2000000".into(), "/dev/zero".into()];
    let zeros = Kind::Command { program: "head".into(), args, env: variables(&[]), output_max: 4_000_000 };
    let _worker = place
        .worker(Config { providers: vec![provider("zeros", zeros)], ..Config::default() })
        .await;

    place.assign("r", "zeros", json!({})).await;
    let result = results.next().await;
    assert_eq!((result.status, result.error_code.as_deref()), (ResultStatus::Error, Some("output")));
    assert_eq!(result.output, None);
    testkit::eventually(SOON, || async { place.count(subjects::STREAM_ASSIGN).await == 0 }).await;
}
