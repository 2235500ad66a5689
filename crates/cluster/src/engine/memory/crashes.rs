//! Channel histories in crashes: the process is killed, or the power fails. Afterwards every acknowledged publication is
//! there, once and at its offset.

use super::*;
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use testkit::crash::{Files, Random, Victim, order, report};

const VICTIM: &str = "engine::memory::crashes::victim";
const PUBLISHERS: u64 = 8;
const CHANNELS: u64 = 5;
/// Numbers that one order may use.
const NUMBERS: u64 = 10_000;

fn rules() -> Rules {
    Rules {
        history_size: 1_000_000,
        history_ttl: Duration::from_secs(3600),
        ..Rules::default()
    }
}

async fn open(dir: &Path, durability: Durability) -> Arc<Memory> {
    Memory::open(dir, "a boot", durability, Arc::default(), |_| Some(rules()))
        .await
        .unwrap()
}

/// Publishes what the parent process orders: `durability seed first-number publications`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child process of the other tests"]
async fn victim() {
    let Some(mut next) = order() else { return };
    let power = next.starts_with("power");
    let durability = if power { Durability::Power } else { Durability::Process };
    let memory = open(Path::new("."), durability).await;
    loop {
        let numbers: Vec<u64> = next.split(' ').skip(1).map(|word| word.parse().unwrap()).collect();
        let [seed, first, count] = numbers[..] else {
            panic!("order {next:?}")
        };
        let mut publishers = tokio::task::JoinSet::new();
        for publisher in 0..PUBLISHERS {
            let (memory, mut random) = (memory.clone(), Random::new(seed.wrapping_add(publisher * 7919)));
            publishers.spawn(async move {
                for n in (first + publisher..).step_by(PUBLISHERS as usize).take(count as usize) {
                    publish(&memory, n, &mut random).await;
                }
            });
        }
        while let Some(published) = publishers.join_next().await {
            published.unwrap();
        }
        report("done");
        match tokio::task::spawn_blocking(order).await.unwrap() {
            Some(order) => next = order,
            None => return,
        }
    }
}

async fn publish(memory: &Memory, n: u64, random: &mut Random) {
    let channel = random.below(CHANNELS);
    let text = format!("{n} {}", "x".repeat(random.below(2000) as usize));
    let publication = Publication { data: text.into(), ..Publication::default() };
    report(&format!("publish {n} {channel}"));
    let key = Some(format!("key-{n}"));
    let position = memory.publish(&channel.to_string(), publication, &rules(), key).await;
    let Position { offset, epoch } = position.unwrap();
    report(&format!("published {n} {channel} {offset} {epoch}"));
}

/// What the child process was about to publish, and what was acknowledged to it.
#[derive(Default, Clone)]
struct Reports {
    begun: BTreeSet<(String, u64)>,
    published: BTreeMap<(String, u64), Position>,
}

impl Reports {
    fn take(&mut self, line: &str) {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["publish", n, channel] => _ = self.begun.insert((channel.into(), n.parse().unwrap())),
            ["published", n, channel, offset, epoch] => {
                let position = Position { offset: offset.parse().unwrap(), epoch: epoch.into() };
                self.published.insert((channel.into(), n.parse().unwrap()), position);
            }
            _ => panic!("unknown report {line:?}"),
        }
    }

    /// Reads every history and compares. The files may be a copy, which begins new epochs. `case` names the case in
    /// failures.
    async fn check(&self, dir: &Path, is_copy: bool, case: &str) {
        let memory = open(dir, Durability::Process).await;
        for channel in (0..CHANNELS).map(|n| n.to_string()) {
            let page = memory.history(&channel, &rules(), None).await.unwrap();
            let offsets: Vec<u64> = page.publications.iter().map(|one| one.offset).collect();
            let newest = page.position.offset;
            assert_eq!(offsets, (1..=newest).collect::<Vec<_>>(), "{case}: the history of {channel} has a hole");

            let number = |one: &Publication| {
                let text = String::from_utf8(one.data.to_vec()).unwrap();
                text.split(' ').next().unwrap().parse::<u64>().unwrap()
            };
            let stored: Vec<u64> = page.publications.iter().map(number).collect();
            let once: BTreeSet<&u64> = stored.iter().collect();
            assert_eq!(once.len(), stored.len(), "{case}: a publication to {channel} is there twice");
            let begun = |n: &u64| self.begun.contains(&(channel.clone(), *n));
            assert!(stored.iter().all(begun), "{case}: {channel} has a publication from nowhere");

            let acknowledged = self.published.iter().filter(|((on, _), _)| *on == channel);
            for ((_, n), position) in acknowledged {
                let index = usize::try_from(position.offset - 1).unwrap();
                assert_eq!(stored.get(index), Some(n), "{case}: {n} was acknowledged and is lost");
                assert!(is_copy || position.epoch == page.position.epoch, "{case}: {channel} began a new epoch");
            }
        }

        // What is repeated after the crash has no effect.
        if let Some(((channel, n), position)) = self.published.iter().next_back() {
            let again = memory
                .publish(channel, Publication::default(), &rules(), Some(format!("key-{n}")))
                .await;
            assert_eq!(again.unwrap().offset, position.offset, "{case}: {n} was published again");
        }
        drop(memory);
        released(dir).await;
    }
}

/// Waits until the dropped engine has closed its files, so that another process can open them.
async fn released(dir: &Path) {
    let is_ours = |file: std::fs::DirEntry| std::fs::read_link(file.path()).is_ok_and(|path| path.starts_with(dir));
    testkit::eventually(Duration::from_secs(20), || async {
        !std::fs::read_dir("/proc/self/fd").unwrap().flatten().any(is_ours)
    })
    .await;
}

fn seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    seed
}

/// Kills the child at a random report, checks, and continues on the same files.
async fn kills(rounds: u64) {
    let seed = seed();
    let mut random = Random::new(seed);
    let mut dir = tempfile::tempdir().unwrap();
    let mut reports = Reports::default();
    for round in 0..rounds {
        // Not on the same files forever, because every check reads all of them.
        if round % 20 == 0 {
            dir = tempfile::tempdir().unwrap();
            reports = Reports::default();
        }

        let mut victim = Victim::start(VICTIM, dir.path());
        victim.order(&format!("process {} {} 500", random.below(u64::MAX), round * NUMBERS));
        for _ in 0..random.below(400) {
            let line = victim.report().expect("the child process ended by itself");
            reports.take(&line);
        }
        victim.kill();
        while let Some(line) = victim.report() {
            reports.take(&line);
        }
        reports
            .check(dir.path(), false, &format!("seed {seed}, kill {round}"))
            .await;
    }
}

/// Lets the power fail at random points of a batch of publications.
async fn power_failures(stores: u64, orders: u64, failures: u64) {
    let seed = seed();
    let mut random = Random::new(seed);
    for store in 0..stores {
        let dir = tempfile::tempdir().unwrap();
        let mut victim = Victim::start(VICTIM, dir.path());
        let mut reports = Reports::default();
        let mut before: Option<Files> = None;
        for order in 0..orders {
            let count = 1 + random.below(8);
            victim.order(&format!("power {} {} {count}", random.below(u64::MAX), order * NUMBERS));
            let mut expected = reports.clone();
            loop {
                match victim.report().expect("the child process ended by itself").as_str() {
                    "done" => break,
                    line => reports.take(line),
                }
            }
            // What was acknowledged before, and what may have happened since.
            expected.begun.clone_from(&reports.begun);

            let after = Files::read(&dir.path().join("channels.db"));
            if let Some(before) = before.replace(after.clone()) {
                for failure in 0..failures {
                    let image = tempfile::tempdir().unwrap();
                    let files = before.after_power_failure(&after, &mut random);
                    files.write(&image.path().join("channels.db"));
                    let case = format!("seed {seed}, store {store}, order {order}, failure {failure}");
                    expected.check(image.path(), true, &case).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn killed_process_loses_and_doubles_nothing() {
    kills(20).await;
}

#[tokio::test]
async fn power_failure_loses_and_doubles_nothing() {
    power_failures(2, 10, 5).await;
}

/// Takes minutes: `cargo test -p cluster --lib -- --ignored thousands`.
#[tokio::test]
#[ignore = "takes minutes"]
async fn thousands_of_crashes_lose_and_double_nothing() {
    kills(1500).await;
    power_failures(60, 20, 5).await;
}
