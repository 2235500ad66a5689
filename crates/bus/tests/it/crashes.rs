//! The embedded bus in crashes: its process is killed, or the power fails. Afterwards everything acknowledged is there,
//! once and in order, and no batch is half done.

use crate::{message, stream, text};
use bus::local::{Durability, Local};
use bus::streams::Sizes;
use bus::{Bus, Consumer, ConsumerConfig, Retention, Write};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use testkit::crash::{Files, Random, Victim, order, report};

const VICTIM: &str = "crashes::victim";
const WRITERS: u64 = 4;
/// Numbers that one order may use.
const NUMBERS: u64 = 1000;

async fn open(dir: &Path, durability: Durability) -> (Bus, Consumer) {
    let bus = Local::open_with(dir, durability, Sizes::default()).await.unwrap();
    bus.declare_stream(stream(Retention::WorkQueue)).await.unwrap();
    bus.declare_kv("B", None).await.unwrap();
    let consumer = ConsumerConfig {
        stream: "S",
        name: "c".into(),
        filter: None,
        ack_wait: Duration::from_secs(60),
        max_ack_pending: 100_000,
        max_in_hand: 100_000,
        from_start: true,
    };
    let consumer = bus.consume(consumer).await.unwrap();
    (bus, consumer)
}

/// Writes what the parent process orders: `durability seed first-number writes`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child process of the other tests"]
async fn victim() {
    let Some(mut next) = order() else { return };
    let power = next.starts_with("power");
    let durability = if power { Durability::Power } else { Durability::Process };
    let (bus, mut consumer) = open(Path::new("."), durability).await;
    loop {
        let numbers: Vec<u64> = next.split(' ').skip(1).map(|word| word.parse().unwrap()).collect();
        let [seed, first, writes] = numbers[..] else {
            panic!("order {next:?}")
        };
        carry_out(&bus, &mut consumer, seed, first, writes).await;
        report("done");
        match tokio::task::spawn_blocking(order).await.unwrap() {
            Some(order) => next = order,
            None => return,
        }
    }
}

async fn carry_out(bus: &Bus, consumer: &mut Consumer, seed: u64, first: u64, writes: u64) {
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let bus = bus.clone();
        let mut random = Random::new(seed.wrapping_mul(31).wrapping_add(writer * 7919));
        writers.spawn(async move {
            for n in (first + writer..).step_by(WRITERS as usize).take(writes as usize) {
                append(&bus, n, &mut random).await;
            }
        });
    }

    let mut random = Random::new(seed);
    loop {
        tokio::select! {
            biased;
            Some(written) = writers.join_next() => written.unwrap(),
            Some(delivery) = consumer.next(), if !writers.is_empty() => settle(bus, delivery, &mut random).await,
            else => return,
        }
        if writers.is_empty() {
            return;
        }
    }
}

/// Appends `n`, alone or together with a record of it.
async fn append(bus: &Bus, n: u64, random: &mut Random) {
    let id = format!("id-{n}");
    let filling = "x".repeat(random.below(3000) as usize);
    let message = message("s.a", &format!("{n} {filling}"));
    if random.below(2) == 0 {
        report(&format!("append {n}"));
        let appended = bus.append(message, Some(&id)).await.unwrap();
        report(&format!("appended {n} {}", appended.sequence));
        return;
    }

    report(&format!("batch {n}"));
    let put = Write::Put {
        bucket: "B",
        key: format!("appended-{n}"),
        value: n.to_string().into(),
        expected: None,
        done: false,
    };
    let append = Write::Append { message, msg_id: Some(&id) };
    let written = bus.write(vec![put, append]).await.unwrap();
    let bus::Written::Appended(appended) = written[1] else {
        panic!("{written:?}")
    };
    report(&format!("appended {n} {}", appended.sequence));
}

/// Acknowledges the delivery, alone or together with a record of it, or keeps it outstanding.
async fn settle(bus: &Bus, delivery: bus::Delivery, random: &mut Random) {
    let n = number(&delivery);
    match random.below(3) {
        0 => {
            report(&format!("settle {n}"));
            delivery.ack().await.unwrap();
            report(&format!("settled {n}"));
        }
        1 => {
            report(&format!("finish {n}"));
            let put = Write::Put {
                bucket: "B",
                key: format!("settled-{n}"),
                value: "".into(),
                expected: None,
                done: false,
            };
            bus.write(vec![put, Write::Ack(&delivery)]).await.unwrap();
            report(&format!("settled {n}"));
        }
        _ => {}
    }
}

fn number(delivery: &bus::Delivery) -> u64 {
    text(&delivery.message).split(' ').next().unwrap().parse().unwrap()
}

/// What the child process was about to do, and what was acknowledged to it.
#[derive(Default, Clone)]
struct Reports {
    begun: BTreeSet<u64>,
    batches: BTreeSet<u64>,
    /// Sequences by number.
    appended: BTreeMap<u64, u64>,
    settling: BTreeSet<u64>,
    /// Numbers that are settled without a record, and together with one. A crash can lead to both.
    alone: BTreeSet<u64>,
    finishing: BTreeSet<u64>,
    settled: BTreeSet<u64>,
}

impl Reports {
    fn take(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let n = words[1].parse().unwrap();
        match words[0] {
            "append" => _ = self.begun.insert(n),
            "batch" => _ = (self.begun.insert(n), self.batches.insert(n)),
            "appended" => _ = self.appended.insert(n, words[2].parse().unwrap()),
            "settle" => _ = (self.settling.insert(n), self.alone.insert(n)),
            "finish" => _ = (self.settling.insert(n), self.finishing.insert(n)),
            "settled" => _ = self.settled.insert(n),
            other => panic!("unknown report {other:?}"),
        }
    }

    /// Reads everything from the bus and compares. `case` names the case in failures.
    async fn check(&self, dir: &Path, case: &str) {
        let (bus, mut consumer) = open(dir, Durability::Process).await;
        let count = bus.stream_info("S").await.unwrap().messages;
        let mut stored = BTreeMap::new();
        let mut last = 0;
        for _ in 0..count {
            let delivery = crate::soon(consumer.next()).await.unwrap();
            let n = number(&delivery);
            assert!(delivery.sequence > last, "{case}: {n} is out of order");
            assert!(self.begun.contains(&n), "{case}: {n} was never appended");
            assert_eq!(stored.insert(n, delivery.sequence), None, "{case}: {n} is there twice");
            last = delivery.sequence;
        }

        for (n, sequence) in &self.appended {
            let found = stored.get(n);
            assert!(found.is_none_or(|found| found == sequence), "{case}: {n} has another sequence");
            assert!(found.is_some() || self.settling.contains(n), "{case}: {n} was acknowledged and is lost");
        }
        for n in &self.settled {
            assert!(!stored.contains_key(n), "{case}: {n} was settled and is there again");
        }

        let has = async |key: String| bus.kv_get("B", &key).await.unwrap().is_some();
        // Of a message that is not there, it is known whether it was appended if that was acknowledged, or if nobody
        // can have settled it.
        for n in &self.batches {
            let has = has(format!("appended-{n}")).await;
            let appended = stored.contains_key(n) || self.appended.contains_key(n);
            let known = appended || !self.settling.contains(n);
            assert!(!known || has == appended, "{case}: the batch of {n} is half done");
        }
        for n in &self.finishing {
            let has = has(format!("settled-{n}")).await;
            let settled = !stored.contains_key(n);
            let known = !settled || (self.appended.contains_key(n) && !self.alone.contains(n));
            assert!(!known || has == settled, "{case}: the settlement of {n} is half done");
        }

        // A message id is known as long as the message: what is repeated after the crash has no effect.
        if let Some((n, sequence)) = self.appended.iter().next_back() {
            let again = bus
                .append(message("s.a", "again"), Some(&format!("id-{n}")))
                .await
                .unwrap();
            assert_eq!((again.duplicate, again.sequence), (true, *sequence), "{case}: {n} was appended again");
        }

        drop((bus, consumer));
        released(dir).await;
    }
}

/// Waits until the dropped bus has closed its files, so that another process can open them.
async fn released(dir: &Path) {
    let is_ours = |file: std::fs::DirEntry| std::fs::read_link(file.path()).is_ok_and(|path| path.starts_with(dir));
    testkit::eventually(crate::SOON, || async { !std::fs::read_dir("/proc/self/fd").unwrap().flatten().any(is_ours) })
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
        victim.order(&format!("process {} {} 200", random.below(u64::MAX), round * NUMBERS));
        for _ in 0..random.below(150) {
            let line = victim.report().expect("the child process ended by itself");
            reports.take(&line);
        }
        victim.kill();
        while let Some(line) = victim.report() {
            reports.take(&line);
        }
        reports.check(dir.path(), &format!("seed {seed}, kill {round}")).await;
    }
}

/// Lets the power fail at random points of a batch of writes.
async fn power_failures(stores: u64, orders: u64, failures: u64) {
    let seed = seed();
    let mut random = Random::new(seed);
    for store in 0..stores {
        let dir = tempfile::tempdir().unwrap();
        let mut victim = Victim::start(VICTIM, dir.path());
        let mut reports = Reports::default();
        let mut before = None;
        for order in 0..orders {
            let writes = 1 + random.below(8);
            victim.order(&format!("power {} {} {writes}", random.below(u64::MAX), order * NUMBERS));
            let acknowledged = reports.clone();
            let mut begun = Reports::default();
            loop {
                match victim.report().expect("the child process ended by itself").as_str() {
                    "done" => break,
                    line => {
                        reports.take(line);
                        begun.take(line);
                    }
                }
            }

            let after = Files::read(&dir.path().join("bus.db"));
            if let Some(before) = before.replace(after.clone()) {
                // What was acknowledged before, and what may have happened since.
                let mut expected = acknowledged;
                expected.begun.extend(begun.begun);
                expected.batches.extend(begun.batches);
                expected.settling.extend(begun.settling);
                expected.alone.extend(begun.alone);
                expected.finishing.extend(begun.finishing);
                for failure in 0..failures {
                    let image = tempfile::tempdir().unwrap();
                    let files = before.after_power_failure(&after, &mut random);
                    files.write(&image.path().join("bus.db"));
                    let case = format!("seed {seed}, store {store}, order {order}, failure {failure}");
                    expected.check(image.path(), &case).await;
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

/// Takes minutes: `cargo test -p bus --test it -- --ignored thousands`.
#[tokio::test]
#[ignore = "takes minutes"]
async fn thousands_of_crashes_lose_and_double_nothing() {
    kills(1500).await;
    power_failures(60, 20, 5).await;
}
