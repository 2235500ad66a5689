//! Short runs of the soak that operators use: it accounts for every request, and it can fail.

use crate::process::Process;
use nix::sys::signal::Signal;
use serde_json::Value;
use testkit::NatsServer;

#[tokio::test]
async fn soak_through_nats_accounts_for_every_request() {
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
async fn paced_soak_keeps_its_rate_and_watches_the_metrics() {
    let process = Process::start().await;
    let metrics = format!("http://{}/metrics", process.ops());
    let args = ["soak", "gateway", "--for", "3s", "--rate", "100", "--metrics", &metrics, "--evidence", "seen.json"];
    // The soak never exceeds its rate. On a busy machine it may fall short of it, and then it must fail.
    process.run(&args).await;
    let seen: Value = serde_json::from_slice(&std::fs::read(process.dir.path().join("seen.json")).unwrap()).unwrap();
    assert!((1..=302).contains(&seen["sent"].as_u64().unwrap()), "{}", seen["sent"]);
    assert_eq!(seen["after"]["in_flight"], 0);
    assert!(seen["samples"][0]["tasks"].as_u64().unwrap() > 0 && seen["machine"]["cores"].as_u64().unwrap() > 0);

    let args = ["soak", "gateway", "--for", "2s", "--rate", "10000000", "--clients", "1", "--in-flight", "1"];
    let output = process.run(&args).await;
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("requests a second instead of"), "{}", output.stderr);
}

/// A short form of the documented million: each request is answered too late, is counted, and leaves nothing behind.
#[tokio::test]
async fn twenty_thousand_late_replies_leave_nothing_behind() {
    let nats = NatsServer::start().await;
    let url = nats.url();
    let settings = format!("roles = \"gateway\"\n[nats]\nurl = \"{url}\"\n[log]\nlevel = \"warn\"\n");
    let process = Process::start_with_settings(&settings).await;
    let metrics = format!("http://{}/metrics", process.ops());
    let late = ["soak", "gateway", "--deadline", "50ms", "--late-router", &url, "--metrics", &metrics];
    let many = ["--requests", "20000", "--clients", "4", "--in-flight", "200", "--evidence", "seen.json"];
    let output = process.run(&[&late[..], &many[..]].concat()).await.success();
    let seen: Value = serde_json::from_slice(&std::fs::read(process.dir.path().join("seen.json")).unwrap()).unwrap();
    assert_eq!(seen["errors"], serde_json::json!({"5": 20_000}), "{output}");
    // A request whose deadline passes before the gateway can send it does not reach the late router.
    let (given, counted) = (seen["late_router"].as_u64().unwrap(), seen["late_replies"].as_u64().unwrap());
    assert!(given > 0 && counted >= given, "{given} {output}");
    assert_eq!(seen["after"]["in_flight"], 0);

    // The soak refuses to take requests from a router that is running.
    let _router = Process::start_with(&["--roles", "router", "--nats-url", &url]).await;
    let output = process.run(&late).await;
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains("a router answers on this NATS"), "{}", output.stderr);
}

#[tokio::test]
async fn soak_fails_when_the_gateway_dies() {
    let process = Process::start().await;
    let args = ["soak", "gateway", "--for", "4s", "--clients", "2", "--deadline", "1s"];
    let soak = process.run(&args);
    let kill = async {
        let requests = || async {
            let (_, metrics) = crate::journey::get(&format!("http://{}/metrics", process.ops())).await;
            let line = metrics
                .lines()
                .find(|line| line.starts_with("beamline_gateway_requests_total"))
                .unwrap_or("0");
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() > 0.0
        };
        testkit::eventually(std::time::Duration::from_secs(10), requests).await;
        process.signal(Signal::SIGKILL);
    };
    let (output, ()) = tokio::join!(soak, kill);
    assert_eq!(output.code, Some(1), "{}", output.stdout);
    assert!(output.stderr.contains("got neither an answer nor an error"), "{}", output.stderr);
}
