//! Error messages of the commands.

use crate::process::{Process, run_in};

#[tokio::test]
async fn token_and_api_key_need_an_existing_data_directory() {
    let dir = tempfile::tempdir().unwrap();
    for command in [&["token", "--user", "ann"][..], &["api-key"], &["operator-token", "--name", "ann"]] {
        let output = run_in(dir.path(), command).await;
        assert_eq!(output.code, Some(1));
        assert!(
            output
                .stderr
                .contains("no beamline has run with the data directory data"),
            "{}",
            output.stderr
        );
    }
    assert!(!dir.path().join("data").exists(), "the commands created the data directory");
}

#[tokio::test]
async fn missing_gateway_is_reported_once() {
    let dir = tempfile::tempdir().unwrap();
    let output = run_in(dir.path(), &["ping", "--socket", "nowhere"]).await;
    assert_eq!(output.code, Some(1));
    assert_eq!(output.stderr.matches("os error").count(), 1, "{}", output.stderr);
    assert!(
        output.stderr.contains("nowhere") && output.stderr.contains("is the gateway running?"),
        "{}",
        output.stderr
    );
}

#[tokio::test]
async fn timeout_of_submit_is_the_deadline_of_the_task() {
    let settings =
        "[[worker.providers]]\nname = \"echo\"\nkind = \"command\"\nprogram = \"/bin/sleep\"\nargs = [\"60\"]\n";
    let process = Process::start_with_settings(settings).await;
    let output = process
        .run(&["submit", "--type", "echo", "--wait", "result", "--timeout", "1s", "{}"])
        .await;
    assert_eq!(output.code, Some(1));
    // The gateway and the worker both enforce the deadline, and either may report it first.
    let names_deadline = output.stderr.contains("deadline") || output.stderr.contains("timeout");
    assert!(names_deadline && !output.stderr.contains("--timeout"), "{}", output.stderr);
}

/// Deadlines that are too short do not count against the provider, whose breaker opens after five failures.
#[tokio::test]
async fn five_short_deadlines_do_not_open_the_breaker() {
    let settings = "[[worker.providers]]\nname = \"echo\"\nkind = \"command\"\nprogram = \"/bin/sh\"\n\
                    args = [\"-c\", \"while [ ! -e go ]; do sleep 0.02; done; echo done\"]\n";
    let process = Process::start_with_settings(settings).await;
    let metric = |body: &str| {
        let line = body
            .lines()
            .find(|line| line.starts_with("beamline_router_results_total{status=\"timeout\"}"));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
    };
    let url = format!("http://{}/metrics", process.ops());
    // Repeat until the router has five such results: on a busy machine a request may time out before it gets there.
    testkit::eventually(std::time::Duration::from_secs(60), || async {
        let output = process
            .run(&["submit", "--type", "echo", "--wait", "result", "--timeout", "50ms", "{}"])
            .await;
        assert_eq!(output.code, Some(1), "{}", output.stdout);
        metric(&crate::journey::get(&url).await.1) >= Some(5.0)
    })
    .await;

    std::fs::write(process.dir.path().join("go"), "").unwrap();
    let patient = process
        .run(&["submit", "--type", "echo", "--wait", "result", "{}"])
        .await
        .success();
    assert!(patient.contains("success"), "{patient}");
}

#[tokio::test]
async fn policy_lint_names_file_and_line_and_fails_on_errors() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join("policies").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let rule =
        |when: &str| format!("providers:\n  - {{name: a, weight: 1}}\nrules:\n  - {{when: \"{when}\", to: a}}\n");
    write("acme/default.yaml", &rule("taks.type == 'chat'"));
    write("default/default.yaml", &rule("task.type == 'chat'"));
    let output = run_in(dir.path(), &["policy", "lint"]).await.success();
    let warning = "warning: policies/acme/default.yaml:4: rules[0].when: unknown variable \"taks\"";
    assert!(output.starts_with(warning) && output.contains("policies: 2 policies can be used"), "{output}");

    write("acme/other.json", "{\n\"providers\": 7}");
    write("acme/default.json", "{}");
    let output = run_in(dir.path(), &["policy", "lint", "policies"]).await;
    assert_eq!(output.code, Some(1));
    let both =
        "error: policies: policy acme/default has several files (acme/default.json, acme/default.yaml); keep one";
    assert!(
        output.stdout.contains(both) && output.stdout.contains("policies/acme/other.json:2: "),
        "{}",
        output.stdout
    );
}

#[tokio::test]
async fn deleted_policy_stays_deleted_and_vanished_policy_stays_in_force() {
    let mut process = Process::start().await;
    let policies = process.dir.path().join("policies");
    let write = |name: &str| {
        let text = format!("version: {name}\nproviders:\n  - {{name: echo, weight: 1}}\n");
        std::fs::create_dir_all(policies.join(name).parent().unwrap()).unwrap();
        std::fs::write(policies.join(format!("{name}.yaml")), text).unwrap();
    };
    write("acme/default");
    write("default/default");
    let version = async |process: &Process, version: &str| {
        let decides = async || {
            let output = process.run(&["submit", "--type", "t", "--tenant", "acme", "{}"]).await;
            output.stdout.contains(&format!("\"policy_version\": \"{version}\""))
        };
        testkit::eventually(std::time::Duration::from_secs(30), decides).await;
    };
    version(&process, "acme/default").await;
    std::fs::rename(&policies, process.dir.path().join("aside")).unwrap();
    process.kill_and_restart().await;
    version(&process, "acme/default").await;

    std::fs::rename(process.dir.path().join("aside"), &policies).unwrap();
    let output = process.run(&["policy", "delete", "acme/default"]).await.success();
    assert!(output.starts_with("removed policies/acme/default.yaml"), "{output}");
    version(&process, "default/default").await;
    process.kill_and_restart().await;
    version(&process, "default/default").await;

    let output = process.run(&["policy", "delete", "acmee/default"]).await;
    assert_eq!(output.code, Some(1), "{}", output.stderr);
    assert!(
        output
            .stderr
            .contains("there is no policy acmee/default in policies; tenant"),
        "{}",
        output.stderr
    );
    assert!(!policies.join("acmee").exists(), "the command created a directory for a mistyped name");
    process
        .run(&["policy", "delete", "--vanished", "acme/lost"])
        .await
        .success();
    assert!(policies.join("acme/lost.deleted").exists());

    let output = process.run(&["policy", "delete", "../default"]).await;
    assert!(output.stderr.contains("is not the name of a policy"), "{}", output.stderr);
}
