//! Decides which version of a policy serves, and what to do about the version that routers share. Pure.
//!
//! Policies fail closed: once a tenant has had a policy, its last good version serves or its requests are refused,
//! until an operator deletes it. An accident (a typo, a vanished file, an unreadable directory) never makes another
//! policy serve.

use super::files::Name;
use super::source::Version;
use std::sync::Arc;
use wire::policy::{Entry, Tombstone};

/// The state of a policy in the directory.
#[derive(Clone)]
pub enum Disk {
    Good(Arc<Version>),
    /// The file exists and cannot be used, for this reason.
    Broken(String),
    /// No file can be seen, for this reason.
    Absent(String),
}

/// A usable version, and when it was read.
#[derive(Clone)]
pub struct Good {
    pub version: Arc<Version>,
    pub at_ms: u64,
}

/// The next step about the version that routers share.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Store this router's version: it was read newly.
    Store,
    /// Fetch the stored version: it is newer than the one known here.
    Fetch,
    /// The policy was deleted here: publish the deletion and forget the policy.
    Delete,
    /// The policy was deleted elsewhere: forget it.
    Forget,
    /// The policy exists but never had a usable version: publish that it exists, so that no other policy serves for it.
    Note,
}

/// The next step. `fresh` means that the version on disk was read newly and is not known to be stored; `entry` is the
/// policy's entry in the index that all routers share.
pub fn next(
    disk: &Disk,
    fresh: bool,
    last_good: Option<&Good>,
    entry: Option<&Entry>,
    tombstone: Option<&Tombstone>,
) -> Option<Step> {
    if let Disk::Good(version) = disk {
        let is_stored = entry.is_some_and(|entry| !entry.deleted && entry.hash == version.hash);
        return (fresh && !is_stored).then_some(Step::Store);
    }

    let stored = entry.filter(|entry| !entry.deleted);
    let known_ms = stored.map(|entry| entry.at_ms).max(last_good.map(|good| good.at_ms));
    // An older tombstone belongs to an earlier policy of this name.
    let is_deleted = |known_ms: u64| tombstone.is_some_and(|tombstone| tombstone.deleted_ms >= known_ms);
    if matches!(disk, Disk::Absent(_)) && known_ms.is_some_and(is_deleted) {
        return Some(Step::Delete);
    }

    match (entry, last_good) {
        (None, None) if matches!(disk, Disk::Broken(_)) => Some(Step::Note),
        (Some(entry), Some(good)) if entry.deleted => (entry.at_ms >= good.at_ms).then_some(Step::Forget),
        (Some(entry), None) if !entry.deleted => Some(Step::Fetch),
        (Some(entry), Some(good)) => {
            let is_newer = entry.at_ms > good.at_ms && entry.hash != good.version.hash;
            is_newer.then_some(Step::Fetch)
        }
        _ => None,
    }
}

/// How requests for a policy are served.
pub enum Serving {
    /// This version serves; the text says what is wrong with the policy's file.
    Version(Arc<Version>, Option<String>),
    /// Requests are refused for this reason.
    Refusal(String),
    /// The policy does not exist.
    Nothing,
}

pub fn serving(name: &Name, disk: &Disk, last_good: Option<&Good>) -> Serving {
    let (problem, cure) = match disk {
        Disk::Good(version) => return Serving::Version(version.clone(), None),
        Disk::Broken(problem) => (problem.clone(), String::new()),
        Disk::Absent(why) => (
            format!("{name}: {why}"),
            format!("; to delete the policy for good: beamline policy delete --vanished {name}"),
        ),
    };

    match (last_good, disk) {
        (Some(good), _) => {
            let (version, at) = (&good.version.compiled.version, wire::time::rfc3339(good.at_ms / 1000));
            let text = format!("{problem}; the last good version, {version:?} of {at}, serves on{cure}");
            Serving::Version(good.version.clone(), Some(text))
        }
        (None, Disk::Broken(_)) => Serving::Refusal(problem),
        (None, _) => Serving::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::super::source;
    use super::*;
    use wire::policy::{Format, Stored};

    fn version(name: &str) -> Arc<Version> {
        let text = format!("version: {name}\nproviders:\n  - {{name: a, weight: 1}}\n");
        Arc::new(source::compile("acme/p.yaml", "p", Stored { format: Format::Yaml, text }).unwrap())
    }

    fn good(name: &str, at_ms: u64) -> Good {
        Good { version: version(name), at_ms }
    }

    /// The state of a policy before a step. By default its file is gone and nothing else is known of it.
    struct Before {
        disk: Disk,
        fresh: bool,
        last_good: Option<Good>,
        entry: Option<Entry>,
        tombstone: Option<Tombstone>,
    }

    impl Before {
        fn absent() -> Self {
            Self {
                disk: Disk::Absent("its file is gone".into()),
                fresh: false,
                last_good: None,
                entry: None,
                tombstone: None,
            }
        }

        fn broken() -> Self {
            Self { disk: Disk::Broken("acme/p.yaml:1: bad".into()), ..Self::absent() }
        }

        /// The file holds version `a`.
        fn on_disk() -> Self {
            Self { disk: Disk::Good(version("a")), ..Self::absent() }
        }

        fn fresh(self) -> Self {
            Self { fresh: true, ..self }
        }

        fn last_good(self, name: &str, at_ms: u64) -> Self {
            Self { last_good: Some(good(name, at_ms)), ..self }
        }

        fn stored(self, name: &str, at_ms: u64) -> Self {
            let hash = version(name).hash.clone();
            Self { entry: Some(Entry { hash, at_ms, deleted: false }), ..self }
        }

        /// Other routers know that the policy exists, but no usable version of it.
        fn noted(self, at_ms: u64) -> Self {
            Self {
                entry: Some(Entry { hash: String::new(), at_ms, deleted: false }),
                ..self
            }
        }

        fn deleted(self, at_ms: u64) -> Self {
            Self { entry: Some(Entry { hash: String::new(), at_ms, deleted: true }), ..self }
        }

        fn tombstone(self, deleted_ms: u64) -> Self {
            Self { tombstone: Some(Tombstone { deleted_ms, by: String::new() }), ..self }
        }

        fn next(&self) -> Option<Step> {
            next(&self.disk, self.fresh, self.last_good.as_ref(), self.entry.as_ref(), self.tombstone.as_ref())
        }
    }

    fn check(case: &str, before: Before, expected: Option<Step>) {
        assert_eq!(before.next(), expected, "{case}");
    }

    #[test]
    fn newly_read_file_is_stored_once() {
        let file = Before::on_disk;
        check("a new file", file().fresh(), Some(Step::Store));
        check("the same version is stored", file().fresh().stored("a", 5), None);
        check("another version is stored", file().fresh().stored("b", 5), Some(Step::Store));
        check("another router has another file", file().stored("b", 5), None);
        check("the file came back after a deletion", file().fresh().deleted(5), Some(Step::Store));
        check("a file beats a tombstone", file().stored("a", 5).tombstone(9), None);
        check("the first usable version", file().fresh().noted(5), Some(Step::Store));
    }

    #[test]
    fn router_without_a_usable_file_fetches_newer_versions() {
        let (broken, absent) = (Before::broken, Before::absent);
        check("broken at the start", broken().stored("a", 5), Some(Step::Fetch));
        check("gone at the start", absent().stored("a", 5), Some(Step::Fetch));
        check("another router has a newer version", broken().last_good("a", 5).stored("b", 9), Some(Step::Fetch));
        check("ours is newer", broken().last_good("b", 9).stored("a", 5), None);
        check("both are the same", broken().last_good("a", 5).stored("a", 9), None);
        check("never usable, unknown to others", broken(), Some(Step::Note));
        check("never usable, and gone", absent().noted(5), Some(Step::Fetch));
    }

    #[test]
    fn deletion_needs_a_newer_tombstone_and_no_file() {
        let (broken, absent) = (Before::broken, Before::absent);
        check("deleted", absent().last_good("a", 5).stored("a", 5).tombstone(9), Some(Step::Delete));
        check("deleted while no router ran", absent().stored("a", 5).tombstone(9), Some(Step::Delete));
        check("deleted, and never stored", absent().last_good("a", 5).tombstone(9), Some(Step::Delete));
        check("deleted, and never usable", absent().noted(5).tombstone(9), Some(Step::Delete));
        check("the tombstone is older", absent().last_good("a", 9).stored("a", 9).tombstone(5), None);
        check("a broken file is not deleted", broken().last_good("a", 5).stored("a", 5).tombstone(9), None);
        check("deleted already", absent().deleted(9).tombstone(9), None);
        check("deleted elsewhere", absent().last_good("a", 5).deleted(9), Some(Step::Forget));
        check("deleted before it came back", broken().last_good("a", 9).deleted(5), None);
    }

    #[test]
    fn policy_without_a_usable_file_serves_its_last_good_version_or_refuses() {
        let name = Name::parse("acme/p").unwrap();
        let broken = Disk::Broken("acme/p.yaml:2: unknown field".into());
        let absent = Disk::Absent("its file is gone".into());
        let last = good("a", 1_767_225_599_000);
        let at = "the last good version, \"a\" of 2025-12-31T23:59:59Z, serves on";
        let how = "to delete the policy for good: beamline policy delete --vanished acme/p";
        for (disk, last_good, expected) in [
            (Disk::Good(version("b")), Some(&last), "b serves".into()),
            (broken.clone(), Some(&last), format!("a serves: acme/p.yaml:2: unknown field; {at}")),
            (broken, None, "refused: acme/p.yaml:2: unknown field".into()),
            (absent.clone(), Some(&last), format!("a serves: acme/p: its file is gone; {at}; {how}")),
            (absent, None, "nothing".into()),
        ] {
            let shown = match serving(&name, &disk, last_good) {
                Serving::Version(version, None) => format!("{} serves", version.compiled.version),
                Serving::Version(version, Some(problem)) => format!("{} serves: {problem}", version.compiled.version),
                Serving::Refusal(why) => format!("refused: {why}"),
                Serving::Nothing => "nothing".into(),
            };
            assert_eq!(shown, expected);
        }
    }
}
