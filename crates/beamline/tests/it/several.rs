//! Several routers and several unequal workers on one bus, which die, stall and come back at random moments: every
//! accepted task ends once.

use crate::clients;
use crate::ledger::Ledger;
use crate::process::Process;
use crate::random::Random;
use bus::Bus;
use bus::local::Local;
use bus::nats::{Nats, NatsConfig};
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testkit::NatsServer;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// The types of the tasks; each goes to the provider of its name. The first worker has `left` and `both`, the second
/// `right` and `both`.
const KINDS: [&str; 3] = ["left", "right", "both"];
const PROVIDERS: [[&str; 2]; 2] = [["left", "both"], ["right", "both"]];
const SLOTS: [usize; 2] = [2, 8];

/// Faults of one test.
const FAULTS: usize = 10;

fn policy(dir: &Path) {
    let rules = KINDS.map(|kind| format!("  - {{when: \"task.type == '{kind}'\", to: {kind}}}\n"));
    let providers = KINDS.map(|kind| format!("  - {{name: {kind}, weight: 1}}\n"));
    let text = format!("version: \"1\"\nproviders:\n{}rules:\n{}", providers.concat(), rules.concat());
    std::fs::create_dir_all(dir.join("default")).unwrap();
    std::fs::write(dir.join("default/default.yaml"), text).unwrap();
}

/// Runs clients of every sort beside `faults`, and checks the ledger afterwards.
/// Returns the number of tasks that ran.
async fn through(faults: impl Future<Output = ()>, bus: &Bus, sockets: Vec<PathBuf>, seed: u64) -> usize {
    let (ledger, cancel) = (Ledger::default(), CancellationToken::new());
    let decide = |name: &str| clients::decide(bus.clone(), name.into(), &KINDS, &ledger, cancel.clone());
    let submit = |name: &str| clients::submit(sockets.clone(), name.into(), &KINDS, &ledger, cancel.clone());
    let faults = async {
        faults.await;
        cancel.cancel();
    };
    tokio::join!(faults, decide("d0"), decide("d1"), decide("d2"), submit("s0"), submit("s1"), submit("s2"));
    let failed = ledger.check(bus, seed).await;
    println!("{} tasks ended, {failed} of them for lack of a provider", ledger.len());
    ledger.len() - failed
}

/// A part that runs in this process, on a runtime of its own: dropping that is as sudden as a crash.
struct Part {
    role: Role,
    runtime: Option<Runtime>,
    cancel: CancellationToken,
}

#[derive(Clone, Copy)]
enum Role {
    Router,
    Worker(usize),
}

impl Part {
    fn start(role: Role, bus: &Bus, policies: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let cancel = CancellationToken::new();
        let (bus, ended) = (bus.clone(), cancel.clone());
        let policies = policies.to_path_buf();
        runtime.spawn(async move {
            match role {
                Role::Router => {
                    let config = router::Config { policies, ..router::Config::default() };
                    router::bind(config, bus).await.unwrap().run(ended).await.unwrap();
                }
                Role::Worker(n) => {
                    let provider = |name: &str| worker::ProviderConfig {
                        name: name.into(),
                        kind: worker::Kind::Echo,
                        timeout: Duration::from_secs(60),
                    };
                    let providers = PROVIDERS[n].map(provider).into();
                    let config = worker::Config { providers, slots: SLOTS[n], ..worker::Config::default() };
                    worker::bind(config, bus).await.unwrap().run(ended).await.unwrap();
                }
            }
        });
        Self { role, runtime: Some(runtime), cancel }
    }

    /// Ends the part at once, or asks it to end, and starts another one.
    async fn replace(&mut self, crash: bool, pause: Duration, bus: &Bus, policies: &Path) {
        if !crash {
            self.cancel.cancel();
        }
        tokio::time::sleep(pause).await;
        self.end();
        *self = Self::start(self.role, bus, policies);
    }

    fn end(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.end();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_task_ends_once_while_parts_on_the_embedded_bus_crash() {
    let mut random = Random::start();
    let seed = random.seed;
    let dir = tempfile::tempdir().unwrap();
    policy(dir.path());
    let bus = Local::open(dir.path()).await.unwrap();
    let socket = dir.path().join("s");
    let config = gateway::Config { socket: socket.clone(), ..gateway::Config::default() };
    let gateway = gateway::bind(config, bus.clone()).await.unwrap();
    let stop = CancellationToken::new();
    let gateway = tokio::spawn(gateway.run(stop.clone()));

    let roles = [Role::Router, Role::Router, Role::Worker(0), Role::Worker(1)];
    let mut parts = roles.map(|role| Part::start(role, &bus, dir.path()));
    let faults = async {
        for _ in 0..FAULTS {
            tokio::time::sleep(random.milliseconds(50..300)).await;
            let (part, crash) = (random.index(parts.len()), random.index(2) == 0);
            let pause = random.milliseconds(1..300);
            parts[part].replace(crash, pause, &bus, dir.path()).await;
        }
    };
    through(faults, &bus, vec![socket], seed).await;

    stop.cancel();
    gateway.await.unwrap().unwrap();
}

/// What a worker's programs do: note the run, work for a moment, return the task.
const SCRIPT: &str = "echo $BEAMLINE_REQUEST_ID >> {dir}/runs; sleep 0.02; cat";

/// The processes on one NATS: two routers, two workers, two gateways.
struct Fleet {
    nats: NatsServer,
    processes: Vec<Process>,
    /// How often each process was killed.
    killed: Vec<usize>,
    dir: tempfile::TempDir,
}

/// Where the workers and the gateways are in [`Fleet::processes`].
const WORKERS: [usize; 2] = [2, 3];
const GATEWAYS: [usize; 2] = [4, 5];

impl Fleet {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        policy(dir.path());
        let nats = NatsServer::start().await;
        let part = |role: &str| format!("roles = [\"{role}\"]\n[nats]\nurl = \"{}\"\n", nats.url());
        let router = part("router") + &format!("[router]\npolicies = \"{}\"\n", dir.path().display());
        let worker = |n: usize| {
            let script = SCRIPT.replace("{dir}", &dir.path().display().to_string());
            let providers = PROVIDERS[n].map(|name| {
                format!(
                    "[[worker.providers]]\nname = \"{name}\"\nkind = \"command\"\nprogram = \"sh\"\n\
                     args = [\"-c\", \"{script}\"]\n"
                )
            });
            part("worker") + &format!("[worker]\nslots = {}\n", SLOTS[n]) + &providers.concat()
        };

        let mut processes = Vec::new();
        for settings in [router.clone(), router, worker(0), worker(1), part("gateway"), part("gateway")] {
            processes.push(Process::start_with_settings(&settings).await);
        }
        Self { nats, killed: vec![0; processes.len()], processes, dir }
    }

    async fn fault(&mut self, random: &mut Random) {
        let (one, pause) = (random.index(self.processes.len()), random.milliseconds(100..1500));
        let process = &mut self.processes[one];
        match random.index(8) {
            0 => {
                self.nats.kill();
                tokio::time::sleep(pause / 2).await;
                self.nats.restart().await;
            }
            1..=3 => {
                process.signal(Signal::SIGSTOP);
                tokio::time::sleep(pause).await;
                process.signal(Signal::SIGCONT);
            }
            _ => {
                self.killed[one] += 1;
                process.kill_and_restart().await;
            }
        }
    }

    /// Runs of programs, by request id.
    fn runs(&self) -> BTreeMap<String, usize> {
        let mut runs = BTreeMap::new();
        for request_id in std::fs::read_to_string(self.dir.path().join("runs")).unwrap().lines() {
            *runs.entry(request_id.to_string()).or_default() += 1;
        }
        runs
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_task_ends_once_while_processes_on_nats_die_and_stall() {
    let mut random = Random::start();
    let seed = random.seed;
    let mut fleet = Fleet::start().await;
    let bus = Nats::connect(NatsConfig { url: fleet.nats.url(), ..NatsConfig::default() })
        .await
        .unwrap();
    let sockets = GATEWAYS.map(|gateway| fleet.processes[gateway].socket()).into();

    let faults = async {
        for _ in 0..FAULTS {
            tokio::time::sleep(random.milliseconds(50..500)).await;
            fleet.fault(&mut random).await;
        }
    };
    let ran = through(faults, &bus, sockets, seed).await;

    // Only what a killed worker was doing runs again.
    let runs = fleet.runs();
    let again: usize = runs.values().map(|count| count - 1).sum();
    let interrupted: usize = (0..2).map(|n| fleet.killed[WORKERS[n]] * SLOTS[n]).sum();
    assert!(runs.len() >= ran, "seed {seed}: {} of {ran} ran", runs.len());
    assert!(
        again <= interrupted,
        "seed {seed}: {again} runs were repeated; the kills interrupted up to {interrupted}"
    );
}
