//! The embedded bus on a disk that is full, read-only or broken for a while: it refuses and says why, keeps what it
//! acknowledged, and goes on when the disk is mended.

use crate::{SOON, message, stream, text};
use bus::local::{Durability, Local};
use bus::streams::Sizes;
use bus::{Bus, ConsumerConfig, Retention};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use testkit::crash::{Files, Victim, order, report};
use testkit::{DiskFault, SmallDisk};

const VICTIM: &str = "disks::victim";
/// Longer than the journal waits before it tries to reopen its log.
const REOPENED: Duration = Duration::from_millis(2500);
/// The atomic unit of a disk in bytes.
const SECTOR: usize = 512;
/// Times that a value repeats its number.
const VALUES: usize = 1000;

async fn open(dir: &Path, durability: Durability) -> bus::Result<Bus> {
    let bus = Local::open_with(dir, durability, Sizes::default()).await?;
    bus.declare_stream(stream(Retention::WorkQueue)).await?;
    Ok(bus)
}

/// Carries out the orders of the parent process: `append n`, `health`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child process of the other tests"]
async fn victim() {
    let Some(mut next) = order() else { return };
    let bus = match open(Path::new("."), Durability::Power).await {
        Ok(bus) => bus,
        Err(error) => return report(&format!("refused {error}")),
    };
    loop {
        let done = match next.strip_prefix("append ") {
            Some(n) => {
                // No two values have a sector in common.
                let value = format!("{n} ").repeat(VALUES);
                bus.append(message("s.a", &value), Some(n))
                    .await
                    .map(|appended| appended.sequence)
            }
            None => bus.health().await.map(|()| 0),
        };
        match done {
            Ok(sequence) => report(&format!("done {sequence}")),
            Err(error) => report(&format!("refused {error}")),
        }
        match tokio::task::spawn_blocking(order).await.unwrap() {
            Some(order) => next = order,
            None => return,
        }
    }
}

/// A child process with a bus, and what the bus acknowledged to it.
struct Patient {
    victim: Victim,
    asked: u64,
    /// Sequences by number.
    acknowledged: BTreeMap<u64, u64>,
}

impl Patient {
    fn new(victim: Victim) -> Self {
        Self { victim, asked: 0, acknowledged: BTreeMap::new() }
    }

    /// What the child says to an order: the sequence, or why it is refused.
    fn ask(&mut self, order: &str) -> Result<u64, String> {
        self.victim.order(order);
        let said = self.victim.report().expect("the child process ended by itself");
        match said.split_once(' ').unwrap() {
            ("done", sequence) => Ok(sequence.parse().unwrap()),
            (_, why) => Err(why.into()),
        }
    }

    fn append(&mut self) -> Result<(), String> {
        self.asked += 1;
        let n = self.asked;
        let sequence = self.ask(&format!("append {n}"))?;
        self.acknowledged.insert(n, sequence);
        Ok(())
    }

    /// Appends until it is refused; returns why.
    fn append_until_refused(&mut self) -> String {
        for _ in 0..10_000 {
            if let Err(why) = self.append() {
                return why;
            }
        }
        panic!("no append was refused");
    }

    /// Checks that the bus refuses everything although it tries to reopen its log meanwhile, and then says why.
    fn stays_refused(&mut self, named: &str) {
        let end = Instant::now() + REOPENED;
        let mut why = String::new();
        while Instant::now() < end {
            self.ask("health").expect_err("the disk is not mended");
            why = self.append().expect_err("the disk is not mended");
        }
        assert!(why.contains("cannot write to") && why.contains("bus.") && why.contains(named), "{why}");
    }

    async fn recovers(&mut self) {
        let patient = parking_lot::Mutex::new(&mut *self);
        testkit::eventually(SOON, async || patient.lock().ask("health").is_ok()).await;
        for _ in 0..5 {
            self.append().expect("a bus that is healthy takes writes");
        }
    }

    /// Reads everything from the bus in this directory: what was acknowledged is there, and everything is there once.
    async fn check(&self, dir: &Path) {
        let bus = open(dir, Durability::Process).await.unwrap();
        let count = bus.stream_info("S").await.unwrap().messages;
        let config = ConsumerConfig { max_in_hand: 100_000, max_ack_pending: 100_000, ..crate::consumer("c") };
        let mut consumer = bus.consume(config).await.unwrap();
        let mut stored = BTreeMap::new();
        for _ in 0..count {
            let delivery = crate::soon(consumer.next()).await.unwrap();
            let n: u64 = text(&delivery.message).split(' ').next().unwrap().parse().unwrap();
            assert_eq!(stored.insert(n, delivery.sequence), None, "{n} is there twice");
        }
        for (n, sequence) in &self.acknowledged {
            assert_eq!(stored.get(n), Some(sequence), "{n} was acknowledged");
        }
    }
}

#[tokio::test]
async fn broken_disk_refuses_until_it_is_mended() {
    for fault in [DiskFault::writes, DiskFault::syncs] {
        let dir = tempfile::tempdir().unwrap();
        let mut patient = Patient::new(Victim::start(VICTIM, dir.path()));
        for _ in 0..5 {
            patient.append().unwrap();
        }

        let files = ["bus.db", "bus.db-wal"].map(|name| dir.path().join(name));
        let fault = fault(patient.victim.pid(), &files.each_ref().map(|file| &**file));
        let why = patient.append().unwrap_err();
        assert!(why.contains("cannot write to") && why.contains("I/O error"), "{why}");
        patient.stays_refused("I/O error");

        drop(fault);
        patient.recovers().await;
        patient.victim.kill();
        patient.check(dir.path()).await;
    }
}

/// The kernel forgets that it still has to write what it failed to sync. Here the syncs of the write-ahead log fail once,
/// so what was written to it until then never reaches the disk; everything that is acknowledged later must.
#[tokio::test]
async fn power_failure_after_a_failed_sync_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut patient = Patient::new(Victim::start(VICTIM, dir.path()));
    for _ in 0..5 {
        patient.append().unwrap();
    }

    let database = dir.path().join("bus.db");
    let synced = Files::read(&database);
    let fault = DiskFault::syncs(patient.victim.pid(), &[&dir.path().join("bus.db-wal")]);
    patient.append().unwrap_err();
    let failed = Files::read(&database);
    assert!(failed.wal.len() > synced.wal.len(), "the append was written, and its sync failed");
    drop(fault);
    patient.recovers().await;

    // A sector that is as it was when its sync failed was not written again.
    let mut image = Files::read(&database);
    let sectors = image.wal.chunks_mut(SECTOR).zip(failed.wal.chunks(SECTOR));
    for (sector, failed) in sectors.skip(synced.wal.len().div_ceil(SECTOR)) {
        if sector == failed {
            sector.fill(0);
        }
    }
    patient.victim.kill();
    let after = tempfile::tempdir().unwrap();
    image.write(&after.path().join("bus.db"));
    patient.check(after.path()).await;
}

#[tokio::test]
async fn full_or_read_only_disk_is_unhealthy_until_it_has_room() {
    let disk = SmallDisk::new(4096);
    let mut patient = Patient::new(Victim::start_on(VICTIM, &disk));
    for _ in 0..5 {
        patient.append().unwrap();
    }

    disk.fill(0);
    let why = patient.append_until_refused();
    assert!(why.contains("cannot write to") && why.contains("full"), "{why}");
    patient.stays_refused("cannot write to");
    // Room for a few writes would make it healthy for a moment.
    disk.fill(512);
    patient.stays_refused("full");

    // The bus has closed its files, so the disk can become read-only.
    testkit::eventually(SOON, async || disk.remount(true)).await;
    patient.stays_refused("ead-only");
    assert!(disk.remount(false));
    patient.stays_refused("cannot write to");

    disk.free();
    patient.recovers().await;
    patient.victim.kill();
    let copy = tempfile::tempdir().unwrap();
    let copied = disk.command("cp").arg("-r").arg(".").arg(copy.path()).status();
    assert!(copied.unwrap().success());
    patient.check(copy.path()).await;
}

#[tokio::test]
async fn read_only_directory_refuses_the_start_and_is_named() {
    let disk = SmallDisk::new(4096);
    assert!(disk.remount(true));
    let mut patient = Patient::new(Victim::start_on(VICTIM, &disk));
    let why = patient.append().unwrap_err();
    assert!(why.contains("cannot open") && why.contains("bus.lock") && why.contains("Read-only"), "{why}");
}
