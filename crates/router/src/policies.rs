//! The policies that serve. They are read from their directory, watched, and shared with the other routers; a bad file
//! never replaces a good version.
//!
//! [`resolve`] decides what serves; this module does the reading, storing and publishing around it.

pub mod files;
pub mod lint;
mod resolve;
mod set;
mod shared;
mod source;

use arc_swap::ArcSwap;
use bus::Bus;
use bus::clock::unix_ms;
use files::{File, Look, Name, Stamp, Unread};
use resolve::{Disk, Good, Serving, Step};
use set::Entry;
pub use set::{Lookup, Served, Set};
use shared::Shared;
use source::Version;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;
use wire::policy::{Format, Index, Stored, Tombstone};
use wire::status::PolicyStatus;

/// How often the directory is polled. Polling sees every editor's way of saving, mounted volumes and swapped links
/// alike.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Every so many polls, the router also reads what other routers have stored and deleted.
const LOOKS_PER_INDEX: u64 = 4;
/// Policies with their own labels in metrics; all others share the label `other`.
const LABELLED_MAX: usize = 50;

/// The policy of tenant `default` while there has never been a policy directory.
const BUILT_IN: &str = r#"{
    "version": "built-in",
    "providers": [{"name": "echo", "weight": 100}, {"name": "ops", "weight": 0}],
    "rules": [{"when": "task.type == 'chat' || task.type == 'ops'", "to": "ops"}]
}"#;

/// The policies that serve now.
pub struct Policies {
    current: ArcSwap<Set>,
}

impl Policies {
    pub fn current(&self) -> arc_swap::Guard<Arc<Set>> {
        self.current.load()
    }

    /// The policies that fit into a status, and how many there are in all.
    pub fn status(&self) -> (Vec<PolicyStatus>, u64) {
        self.current.load().status()
    }
}

/// Keeps [`Policies`] up to date; the only writer.
pub struct Watcher {
    dir: PathBuf,
    shared: Shared,
    policies: Arc<Policies>,
    known: BTreeMap<Name, Known>,
    /// What all routers know; `None` if there has never been a policy directory.
    index: Option<Index>,
    directory: Directory,
    built_in: Arc<Served>,
    labelled: BTreeSet<Name>,
    /// The bus problem that was logged last, so that each is logged once.
    bus_problem: Option<String>,
}

/// What all polls of the directory have shown.
#[derive(Default)]
struct Directory {
    has_existed: bool,
    has_been_read: bool,
    read_tenants: BTreeSet<String>,
    /// Why the directory cannot be read now.
    unreadable: Option<String>,
    unreadable_tenants: BTreeMap<String, String>,
}

impl Directory {
    fn note(&mut self, look: &Look) {
        self.has_existed |= look.exists;
        self.has_been_read |= look.exists && look.unreadable.is_none();
        self.read_tenants.extend(look.tenants.iter().cloned());
        self.unreadable.clone_from(&look.unreadable);
        self.unreadable_tenants.clone_from(&look.unreadable_tenants);
    }

    /// Tenants whose directory could never be read, and why.
    fn unread_tenants(&self) -> BTreeMap<String, String> {
        let mut unread = self.unreadable_tenants.clone();
        unread.retain(|tenant, _| !self.read_tenants.contains(tenant));
        unread
    }
}

/// A policy that exists or existed.
struct Known {
    disk: Disk,
    /// The file that `disk` was read from, and when.
    read: Option<(PathBuf, Stamp, u64)>,
    /// The version on disk is not known to be stored yet.
    fresh: bool,
    last_good: Option<Good>,
    tombstone: Option<Tombstone>,
    /// Why the stored version cannot be used.
    unusable: Option<String>,
    /// Why the version that serves could not be stored.
    unstored: Option<String>,
    served: Option<Arc<Served>>,
    /// The problem that was logged last.
    problem: Option<String>,
}

impl Default for Known {
    fn default() -> Self {
        Self {
            disk: Disk::Absent("its file is gone".into()),
            read: None,
            fresh: false,
            last_good: None,
            tombstone: None,
            unusable: None,
            unstored: None,
            served: None,
            problem: None,
        }
    }
}

/// Reads the directory and what is stored on the bus. A bad file does not keep the other policies from serving.
///
/// Fails if the bus does not answer or reading the directory panicked, because the set of policies is unknown then.
pub async fn load(dir: &Path, bus: Bus) -> Result<(Arc<Policies>, Watcher), crate::Error> {
    let policies = Arc::new(Policies { current: ArcSwap::default() });
    let mut watcher = Watcher {
        dir: dir.into(),
        shared: Shared::new(bus),
        policies: policies.clone(),
        known: BTreeMap::new(),
        index: None,
        directory: Directory::default(),
        built_in: Arc::new(built_in()),
        labelled: BTreeSet::new(),
        bus_problem: None,
    };

    watcher.learn().await?;
    watcher.look().await?;
    watcher.share().await?;
    watcher.publish();
    if watcher.serves_built_in() {
        tracing::info!(
            "the policy directory {} does not exist; the built-in policy serves until it does",
            dir.display()
        );
    }
    Ok((policies, watcher))
}

impl Watcher {
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        for looks in 1.. {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = ticks.tick() => {}
            }

            // A turn may be dropped at any point: what it has not stored is fresh again at the next start.
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.turn(looks) => {}
            }
        }
    }

    async fn turn(&mut self, looks: u64) {
        if let Err(error) = self.look().await {
            tracing::error!(%error, "reading the policy directory failed; trying again");
        }

        let has_news = self
            .known
            .values()
            .any(|known| known.fresh || known.tombstone.is_some());
        if has_news || looks.is_multiple_of(LOOKS_PER_INDEX) {
            let shared = match self.learn().await {
                Ok(()) => self.share().await,
                error => error,
            };
            let problem = shared.err().map(|error| error.to_string());
            if let Some(problem) = problem.as_ref().filter(|_| problem != self.bus_problem) {
                tracing::error!("policies cannot be stored on the bus and would not survive a restart: {problem}");
            }
            self.bus_problem = problem;
        }

        self.publish();
    }

    /// Updates `known` from the directory. Fails if reading it panicked.
    async fn look(&mut self) -> Result<(), JoinError> {
        let dir = self.dir.clone();
        let look = tokio::task::spawn_blocking(move || files::look(&dir)).await?;
        self.directory.note(&look);

        let read_ms = unix_ms();
        let mut stale = Vec::new();
        for (name, files) in &look.files {
            if self
                .known
                .entry(name.clone())
                .or_insert_with(Known::unread)
                .is_stale(files)
            {
                stale.push((name.clone(), files.clone()));
            }
        }
        let read = |(name, files): (Name, Vec<File>)| (files::read(&name, &files), name, files);
        let read = tokio::task::spawn_blocking(move || stale.into_iter().map(read).collect::<Vec<_>>()).await?;
        for (outcome, name, files) in read {
            self.known.entry(name).or_default().note_read(&files, outcome, read_ms);
        }

        let mut tombstones = Vec::new();
        for (name, known) in self.known.iter_mut().filter(|(name, _)| !look.files.contains_key(name)) {
            known.note_absent(look.why_absent(&name.tenant));
            tombstones.extend(look.tombstones.get(name).map(|path| (name.clone(), path.clone())));
        }
        let read = |(name, path): (Name, PathBuf)| (name, files::read_tombstone(&path));
        let read = tokio::task::spawn_blocking(move || tombstones.into_iter().map(read).collect::<Vec<_>>()).await?;
        for (name, tombstone) in read {
            self.known.entry(name).or_default().note_tombstone(tombstone);
        }
        Ok(())
    }

    /// Learns which policies all routers know.
    async fn learn(&mut self) -> bus::Result<()> {
        self.index = self.shared.index().await?;
        for (name, entry) in self.index.iter().flat_map(|index| &index.policies) {
            let Some(name) = Name::parse(name) else { continue };
            if !entry.deleted {
                self.known.entry(name).or_default().note_stored();
            } else if let Some(known) = self.known.get_mut(&name) {
                known.note_erased();
            }
        }
        Ok(())
    }

    /// Stores versions that were read newly, and adopts what other routers have stored or deleted.
    async fn share(&mut self) -> bus::Result<()> {
        if self.index.is_none() && !self.directory.has_existed {
            return Ok(());
        }

        let index = self.index.clone().unwrap_or_default();
        let (mut changes, mut done) = (BTreeMap::new(), Ok(()));
        for (name, known) in &mut self.known {
            let entry = index.policies.get(&name.to_string());
            match known.share(name, entry, &self.shared).await {
                Ok(change) => changes.extend(change.map(|entry| (name.clone(), entry))),
                Err(error) => done = Err(error),
            }
        }

        if self.index.is_none() || !changes.is_empty() {
            self.index = Some(self.shared.publish(&changes).await?);
            for name in changes.keys() {
                self.known.entry(name.clone()).or_default().fresh = false;
            }
        }
        done
    }

    fn serves_built_in(&self) -> bool {
        self.index.is_none() && !self.directory.has_existed
    }

    /// Publishes the current policies to request handling.
    fn publish(&mut self) {
        let knows_none = self.index.as_ref().is_none_or(|index| index.policies.is_empty());
        let unread = self
            .directory
            .unreadable
            .clone()
            .filter(|_| !self.directory.has_been_read && knows_none);

        let mut set = Set::new(unread, self.directory.unread_tenants());
        if self.serves_built_in() {
            set.insert(
                &self.built_in.name,
                Entry::Serves { served: self.built_in.clone(), problem: None, unstored: None },
            );
        }

        let labelled = &mut self.labelled;
        self.known.retain(|name, known| {
            let entry = known.entry(name, labelled);
            let serves = entry.is_some();
            if let Some(entry) = entry {
                set.insert(name, entry);
            }
            serves
        });

        metrics::gauge!("beamline_router_policies_broken").set(set.broken() as f64);
        self.policies.current.store(Arc::new(set));
    }
}

impl Known {
    /// A policy with a file that has not been read yet. Its requests are refused until then.
    fn unread() -> Self {
        Self {
            disk: Disk::Broken("its file has not been read yet".into()),
            ..Self::default()
        }
    }

    /// Other routers have stored a version. Requests are refused until it is fetched, because nothing else may serve.
    fn note_stored(&mut self) {
        if self.last_good.is_none() {
            self.unusable
                .get_or_insert_with(|| "its stored version has not been fetched yet".into());
        }
    }

    /// The stored version was deleted.
    fn note_erased(&mut self) {
        if self.last_good.is_none() {
            self.unusable = None;
        }
    }

    /// Whether the file may have changed since it was read.
    fn is_stale(&self, files: &[File]) -> bool {
        match (files, &self.read) {
            ([File { path, stamp: Ok(stamp), .. }], Some((read, known, read_ms))) => {
                path != read || stamp != known || !stamp.is_settled(*read_ms)
            }
            _ => true,
        }
    }

    fn note_read(&mut self, files: &[File], outcome: Result<Version, Unread>, read_ms: u64) {
        self.read = match files {
            [File { path, stamp: Ok(stamp), .. }] => Some((path.clone(), *stamp, read_ms)),
            _ => None,
        };
        self.tombstone = None;

        match outcome {
            // The next poll reads it again.
            Err(Unread::Changed(why)) => {
                self.read = None;
                if matches!(self.disk, Disk::Absent(_)) {
                    self.disk = Disk::Broken(why);
                }
            }
            Ok(version) if matches!(&self.disk, Disk::Good(before) if before.hash == version.hash) => {}
            Ok(version) => {
                let version = Arc::new(version);
                self.last_good = Some(Good { version: version.clone(), at_ms: read_ms });
                self.disk = Disk::Good(version);
                (self.fresh, self.unusable, self.unstored) = (true, None, None);
            }
            Err(Unread::Broken(problem)) => (self.disk, self.fresh) = (Disk::Broken(problem), false),
        }
    }

    fn note_absent(&mut self, why: String) {
        (self.disk, self.read, self.fresh, self.tombstone) = (Disk::Absent(why), None, false, None);
    }

    fn note_tombstone(&mut self, tombstone: Result<Tombstone, String>) {
        match tombstone {
            Ok(tombstone) => self.tombstone = Some(tombstone),
            Err(error) => {
                self.disk = Disk::Absent(format!("its file is gone, and its tombstone is unreadable: {error}"))
            }
        }
    }

    /// Does the next step about the shared version. Returns the policy's new entry for the index, if it changes.
    async fn share(
        &mut self,
        name: &Name,
        entry: Option<&wire::policy::Entry>,
        shared: &Shared,
    ) -> bus::Result<Option<wire::policy::Entry>> {
        let step = resolve::next(&self.disk, self.fresh, self.last_good.as_ref(), entry, self.tombstone.as_ref());
        match (step, &self.last_good) {
            (Some(Step::Store), Some(good)) => match shared.store(name, &good.version).await {
                Ok(()) => {
                    let (hash, at_ms) = (good.version.hash.clone(), good.at_ms);
                    return Ok(Some(wire::policy::Entry { hash, at_ms, deleted: false }));
                }
                Err(error @ bus::Error::TooLarge { .. }) => {
                    self.fresh = false;
                    self.unstored = Some(format!("{name}: this version would not survive a restart: {error}"));
                }
                Err(error) => return Err(error),
            },
            (Some(Step::Note), _) => {
                let at_ms = self.read.as_ref().map_or(0, |(_, _, read_ms)| *read_ms);
                return Ok(Some(wire::policy::Entry { hash: String::new(), at_ms, deleted: false }));
            }
            (Some(Step::Fetch), _) if entry.is_some_and(|entry| entry.hash.is_empty()) => {
                let text = "it has never had a usable version; replace its file with a good one, or delete the policy";
                self.unusable = Some(format!("{name}: {text}"));
            }
            (Some(Step::Fetch), _) => match shared.fetch(name).await? {
                Ok(version) => {
                    let at_ms = entry.map_or(0, |entry| entry.at_ms);
                    self.last_good = Some(Good { version: Arc::new(version), at_ms });
                    self.unusable = None;
                }
                Err(problem) => self.unusable = Some(problem),
            },
            (Some(Step::Delete), _) => {
                let at_ms = self.tombstone.as_ref().map_or(0, |tombstone| tombstone.deleted_ms);
                shared.erase(name).await?;
                (self.last_good, self.unusable) = (None, None);
                return Ok(Some(wire::policy::Entry { hash: String::new(), at_ms, deleted: true }));
            }
            (Some(Step::Forget), _) => (self.last_good, self.unusable) = (None, None),
            // It is stored already, perhaps by another router.
            (Some(Step::Store), None) | (None, _) => self.fresh = false,
        }
        Ok(None)
    }

    /// How the policy serves now; `None` if it does not exist any more.
    fn entry(&mut self, name: &Name, labelled: &mut BTreeSet<Name>) -> Option<Entry> {
        let Name { tenant, policy } = name;
        let (entry, problem) = match resolve::serving(name, &self.disk, self.last_good.as_ref()) {
            Serving::Version(version, problem) => {
                let serves = self.served.take().filter(|served| served.version.hash == version.hash);
                let served = serves.unwrap_or_else(|| {
                    tracing::info!(tenant, policy, version = version.compiled.version, "policy loaded");
                    version.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
                    let has_labels = labelled.contains(name) || labelled.len() < LABELLED_MAX;
                    if has_labels {
                        labelled.insert(name.clone());
                    }
                    Arc::new(Served::new(name.clone(), version, has_labels))
                });
                self.served = Some(served.clone());
                let unstored = self.unstored.clone();
                (Some(Entry::Serves { served, problem: problem.clone(), unstored }), problem)
            }
            Serving::Refusal(why) => (Some(Entry::Refuses(why.clone())), Some(why)),
            Serving::Nothing => match &self.unusable {
                Some(why) => (Some(Entry::Refuses(why.clone())), Some(why.clone())),
                None => {
                    tracing::info!(tenant, policy, "policy deleted");
                    (None, None)
                }
            },
        };

        // Each problem is logged when it begins and when it ends.
        if problem != self.problem {
            match &problem {
                Some(problem) if self.last_good.is_some() => tracing::error!(tenant, policy, "{problem}"),
                Some(problem) => tracing::error!(tenant, policy, "requests are refused: {problem}"),
                None => tracing::info!(tenant, policy, "the policy's file is good again"),
            }
            self.problem = problem;
        }
        entry
    }
}

fn built_in() -> Served {
    let name = Name { tenant: set::DEFAULT.into(), policy: "default".into() };
    let source = Stored { format: Format::Json, text: BUILT_IN.into() };
    let version = source::compile("the built-in policy", &name.policy, source).expect("the built-in policy is valid");
    Served::new(name, Arc::new(version), true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::policy::Entry;

    #[tokio::test]
    async fn stored_policy_is_refused_until_it_is_fetched() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("policies");
        std::fs::create_dir_all(dir.join("default")).unwrap();
        std::fs::write(dir.join("default/p.yaml"), "version: all\nproviders: [{name: a}]").unwrap();
        let bus = bus::local::Local::open(root.path()).await.unwrap();
        bus::streams::declare(&bus).await.unwrap();

        let (policies, mut watcher) = load(&dir, bus).await.unwrap();
        let found = || match policies.current().find("acme", "p") {
            Lookup::Serves(served) => served.version.compiled.version.clone(),
            Lookup::Refuses(why) => why,
            Lookup::Unknown => "unknown".into(),
        };
        assert_eq!(found(), "all");

        for (deleted, expected) in [
            (false, "policy \"acme/p\" cannot be used: its stored version has not been fetched yet"),
            (true, "all"),
        ] {
            let entry = Entry { hash: "other".into(), at_ms: 5, deleted };
            let change = BTreeMap::from([(Name::parse("acme/p").unwrap(), entry)]);
            watcher.shared.publish(&change).await.unwrap();
            watcher.learn().await.unwrap();
            // No fetch succeeds before this.
            watcher.publish();
            assert_eq!(found(), expected);
        }
    }

    #[test]
    fn new_file_is_refused_until_it_is_read() {
        let name = Name::parse("acme/p").unwrap();
        let mut unread = Known::unread();
        assert!(matches!(unread.entry(&name, &mut BTreeSet::new()), Some(super::Entry::Refuses(_))));

        let mut changing = Known::default();
        changing.note_read(&[], Err(Unread::Changed("acme/p.yaml: changed".into())), 1);
        assert!(matches!(changing.entry(&name, &mut BTreeSet::new()), Some(super::Entry::Refuses(_))));
    }
}
