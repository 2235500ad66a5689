//! What the commands say when something is not as it should be.

use crate::process::{Process, run_in};

#[tokio::test]
async fn a_token_is_not_made_where_nothing_has_run() {
    let dir = tempfile::tempdir().unwrap();
    for command in [&["token", "--user", "ann"][..], &["api-key"]] {
        let output = run_in(dir.path(), command).await;
        assert_eq!(output.code, Some(1));
        assert!(output.stderr.contains("no beamline has run with the data directory data"), "{}", output.stderr);
    }
    assert!(!dir.path().join("data").exists(), "and nothing was made");
}

#[tokio::test]
async fn a_gateway_that_is_not_there_is_named_once() {
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
async fn a_deadline_of_the_command_is_the_tasks() {
    let settings =
        "[[worker.providers]]\nname = \"echo\"\nkind = \"command\"\nprogram = \"/bin/sleep\"\nargs = [\"60\"]\n";
    let process = Process::start_with_settings(settings).await;
    let output = process.run(&["submit", "--type", "echo", "--wait", "result", "--timeout", "1s", "{}"]).await;
    assert_eq!(output.code, Some(1));
    // Either the wait ends by the gateway's word, or the run by the worker's: both know the deadline.
    let told = output.stderr.contains("deadline") || output.stderr.contains("timeout");
    assert!(told && !output.stderr.contains("--timeout"), "{}", output.stderr);
}
