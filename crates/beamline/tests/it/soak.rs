//! The soak that operators run, short: it accounts for every request and is able to fail.

use crate::process::Process;
use nix::sys::signal::Signal;
use serde_json::Value;
use testkit::NatsServer;

#[tokio::test]
async fn a_short_soak_through_nats_accounts_for_every_request() {
    let nats = NatsServer::start().await;
    let process = Process::start_with(&["--nats-url", &nats.url()]).await;
    let seen = process.dir.path().join("seen.json");
    let args = ["soak", "gateway", "--for", "4s", "--clients", "4", "--in-flight", "4", "--evidence", "seen.json"];
    let output = process.run(&args).await.success();
    assert!(output.trim_end().ends_with("passed"), "{output}");
    let seen: Value = serde_json::from_slice(&std::fs::read(seen).unwrap()).unwrap();
    assert!(seen["sent"].as_u64().unwrap() > 100, "{output}");
    assert_eq!(seen["sent"], seen["answered"], "{output}");
    assert_eq!(seen["pid"], process.ready["pid"]);
}

#[tokio::test]
async fn a_gateway_that_dies_fails_the_soak() {
    let process = Process::start().await;
    let args = ["soak", "gateway", "--for", "4s", "--clients", "2", "--deadline", "1s"];
    let soak = process.run(&args);
    let kill = async {
        let requests = || async {
            let (_, metrics) = crate::journey::get(&format!("http://{}/metrics", process.ops())).await;
            let line = metrics.lines().find(|line| line.starts_with("beamline_gateway_requests_total")).unwrap_or("0");
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() > 0.0
        };
        testkit::eventually(std::time::Duration::from_secs(10), requests).await;
        process.signal(Signal::SIGKILL);
    };
    let (output, ()) = tokio::join!(soak, kill);
    assert_eq!(output.code, Some(1), "{}", output.stdout);
    assert!(output.stderr.contains("got neither an answer nor an error"), "{}", output.stderr);
}
