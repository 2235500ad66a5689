//! Several routers and several unequal workers on one bus, which die, stall and come back at random moments: every
//! accepted task ends once.

use crate::clients;
use crate::ledger::Ledger;
use crate::process::Process;
use crate::random::Random;
use bus::Bus;
use bus::local::Local;
use bus::nats::{Nats, NatsConfig};
use futures_util::future::join_all;
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testkit::{NatsServer, OpenAi, Reply};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// The types of the tasks; each goes to the provider of its name. The first worker has `left` and `both`, the second
/// `right` and `both`.
const KINDS: [&str; 3] = ["left", "right", "both"];
const PROVIDERS: [[&str; 2]; 2] = [["left", "both"], ["right", "both"]];
const SLOTS: [usize; 2] = [2, 8];

/// How long a task takes: at any moment some are under way.
const WORK: Duration = Duration::from_millis(100);

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
    let decide = |name: String| clients::decide(bus.clone(), name, &KINDS, &ledger, cancel.clone());
    let submit = |name: String| clients::submit(sockets.clone(), name, &KINDS, &ledger, cancel.clone());
    let faults = async {
        faults.await;
        cancel.cancel();
    };
    let decides = join_all((0..6).map(|n| decide(format!("d{n}"))));
    let submits = join_all((0..6).map(|n| submit(format!("s{n}"))));
    tokio::join!(faults, decides, submits);
    ledger.check(bus, seed).await;
    println!("{} tasks ended", ledger.len());
    ledger.len()
}

/// A part that runs in this process, on a runtime of its own: dropping that is as sudden as a crash.
struct Part {
    role: Role,
    runtime: Option<Runtime>,
    cancel: CancellationToken,
}

/// What the parts share.
struct Place {
    dir: tempfile::TempDir,
    bus: Bus,
    /// Does the work of the tasks.
    endpoint: OpenAi,
}

#[derive(Clone, Copy)]
enum Role {
    Router,
    Worker(usize),
}

impl Part {
    fn start(role: Role, place: &Place) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let cancel = CancellationToken::new();
        let (bus, ended) = (place.bus.clone(), cancel.clone());
        let (policies, base_url) = (place.dir.path().to_path_buf(), place.endpoint.url());
        runtime.spawn(async move {
            match role {
                Role::Router => {
                    let config = router::Config { policies, ..router::Config::default() };
                    router::bind(config, bus).await.unwrap().run(ended).await.unwrap();
                }
                Role::Worker(n) => {
                    let provider = |name: &str| worker::ProviderConfig {
                        name: name.into(),
                        kind: worker::Kind::OpenAi(worker::Model::new(&base_url, "m")),
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
    async fn replace(&mut self, crash: bool, pause: Duration, place: &Place) {
        if !crash {
            self.cancel.cancel();
        }
        tokio::time::sleep(pause).await;
        self.end();
        *self = Self::start(self.role, place);
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
    let endpoint = OpenAi::start().await;
    // More replies than tasks.
    for _ in 0..10_000 {
        endpoint.reply(Reply::Words { words: vec!["done".into()], delay: WORK });
    }
    let place = Place { dir, bus, endpoint };
    let mut parts = roles.map(|role| Part::start(role, &place));

    // Each part crashes and is stopped.
    let mut faults: Vec<(usize, bool)> = (0..parts.len())
        .flat_map(|part| [(part, true), (part, false)])
        .collect();
    random.shuffle(&mut faults);
    let faults = async {
        for (part, crash) in faults {
            tokio::time::sleep(random.milliseconds(100..400)).await;
            parts[part].replace(crash, random.milliseconds(1..300), &place).await;
        }
    };
    through(faults, &place.bus, vec![socket], seed).await;

    stop.cancel();
    gateway.await.unwrap().unwrap();
}

/// What a worker's programs do: note the run, work for a moment, return the task.
const SCRIPT: &str = "echo $BEAMLINE_REQUEST_ID $PPID >> {dir}/runs; sleep 0.1; cat";

/// The processes on one NATS: two routers, two workers, two gateways.
struct Fleet {
    nats: NatsServer,
    processes: Vec<Process>,
    /// The ids of processes that were killed.
    killed: Vec<u64>,
    dir: tempfile::TempDir,
}

#[derive(Clone, Copy)]
enum Fault {
    /// SIGKILL, then a start on the same files.
    BusDies,
    /// SIGSTOP, later SIGCONT.
    Stalls(usize),
    /// SIGKILL, then a new start.
    Dies(usize),
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
        Self { nats, killed: Vec::new(), processes, dir }
    }

    async fn suffer(&mut self, fault: Fault, pause: Duration) {
        match fault {
            Fault::BusDies => {
                self.nats.kill();
                tokio::time::sleep(pause).await;
                self.nats.restart().await;
            }
            Fault::Stalls(one) => {
                self.processes[one].signal(Signal::SIGSTOP);
                tokio::time::sleep(pause).await;
                self.processes[one].signal(Signal::SIGCONT);
            }
            Fault::Dies(one) => {
                self.killed.push(self.processes[one].ready["pid"].as_u64().unwrap());
                self.processes[one].kill_and_restart().await;
            }
        }
    }

    /// The workers, by process id, that ran each task.
    fn runs(&self) -> BTreeMap<String, Vec<u64>> {
        let mut runs = BTreeMap::<String, Vec<u64>>::new();
        for line in std::fs::read_to_string(self.dir.path().join("runs")).unwrap().lines() {
            let (request_id, worker) = line.split_once(' ').unwrap();
            runs.entry(request_id.into()).or_default().push(worker.parse().unwrap());
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

    // Each worker dies and stalls, one router and one gateway too.
    let [some_router, some_gateway] = [random.index(2), GATEWAYS[random.index(2)]];
    let mut faults = vec![Fault::BusDies, Fault::BusDies];
    for one in [some_router, WORKERS[0], WORKERS[1], some_gateway] {
        faults.extend([Fault::Dies(one), Fault::Stalls(one)]);
    }
    random.shuffle(&mut faults);
    let faults = async {
        for fault in faults {
            tokio::time::sleep(random.milliseconds(100..400)).await;
            fleet.suffer(fault, random.milliseconds(100..1500)).await;
        }
    };
    let ran = through(faults, &bus, sockets, seed).await;

    // Only what a killed worker had not finished runs again, on another one.
    let runs = fleet.runs();
    assert_eq!(runs.len(), ran, "seed {seed}");
    for (request_id, workers) in runs {
        let alive = workers.iter().filter(|worker| !fleet.killed.contains(worker)).count();
        let once = workers
            .iter()
            .all(|worker| workers.iter().filter(|other| *other == worker).count() == 1);
        assert!(alive <= 1 && once, "seed {seed}: {request_id} ran on {workers:?}; killed: {:?}", fleet.killed);
    }
}
