//! Which version of a policy serves, and what to tell the other routers of it. Pure.
//!
//! Policies fail closed: what has once been a tenant's policy is served by its own last good version or refused, until somebody
//! deletes it. An accident (a typo, a vanished file, an unreadable directory) never makes another policy serve.

use super::files::Name;
use super::source::Version;
use std::sync::Arc;
use wire::policy::{Entry, Tombstone};

/// What the directory says of a policy.
#[derive(Clone)]
pub enum Disk {
    Good(Arc<Version>),
    /// There is a file, which cannot be used.
    Broken(String),
    /// There is no file, or none that can be seen: why.
    Absent(String),
}

/// A version that could be used, and when it was read.
#[derive(Clone)]
pub struct Good {
    pub version: Arc<Version>,
    pub at_ms: u64,
}

/// What is to be done about the version that routers share.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Store ours: it is newly read.
    Store,
    /// Fetch theirs: it is newer than what is known here.
    Fetch,
    /// The policy was deleted here: tell the others, and forget it.
    Delete,
    /// The policy was deleted elsewhere.
    Forget,
    /// There is a policy, of which no version could be used yet: the others must know, so that nothing else serves for it.
    Note,
}

/// `fresh`: what is on disk was read just now, and is not yet known to be stored. `entry` is what all routers know.
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
    // A tombstone that is older belongs to a policy of that name which came back since.
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

/// What requests for a policy get.
pub enum Serving {
    /// This version; and what is wrong with its file.
    Version(Arc<Version>, Option<String>),
    /// A refusal that says why.
    Refusal(String),
    /// There is no such policy.
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

    fn stored(name: &str, at_ms: u64) -> Option<Entry> {
        Some(Entry { hash: version(name).hash.clone(), at_ms, deleted: false })
    }

    #[test]
    fn what_is_shared_follows_files_and_deletions() {
        let on_disk = || Disk::Good(version("a"));
        let broken = || Disk::Broken("acme/p.yaml:1: bad".into());
        let absent = || Disk::Absent("its file is gone".into());
        let deleted = |at_ms| Some(Entry { hash: String::new(), at_ms, deleted: true });
        let noted = |at_ms| Some(Entry { hash: String::new(), at_ms, deleted: false });
        let tombstone = |deleted_ms| Some(Tombstone { deleted_ms, by: String::new() });
        let cases = [
            ("a new file is stored", on_disk(), true, None, None, None, Some(Step::Store)),
            ("a stored file is not stored again", on_disk(), true, None, stored("a", 5), None, None),
            ("a changed file is stored", on_disk(), true, None, stored("b", 5), None, Some(Step::Store)),
            ("routers of different files leave each other's", on_disk(), false, None, stored("b", 5), None, None),
            ("a file that came back is stored", on_disk(), true, None, deleted(5), None, Some(Step::Store)),
            ("a file wins over a tombstone", on_disk(), false, None, stored("a", 5), tombstone(9), None),
            (
                "broken at the start: the stored one",
                broken(),
                false,
                None,
                stored("a", 5),
                None,
                Some(Step::Fetch),
            ),
            ("gone at the start: the stored one", absent(), false, None, stored("a", 5), None, Some(Step::Fetch)),
            (
                "another router mended it",
                broken(),
                false,
                Some(good("a", 5)),
                stored("b", 9),
                None,
                Some(Step::Fetch),
            ),
            ("ours is newer", broken(), false, Some(good("b", 9)), stored("a", 5), None, None),
            ("both are the same", broken(), false, Some(good("a", 5)), stored("a", 9), None, None),
            ("nothing was ever good", broken(), false, None, None, None, Some(Step::Note)),
            ("nothing was ever good, and is gone", absent(), false, None, noted(5), None, Some(Step::Fetch)),
            (
                "nothing was ever good, and is deleted",
                absent(),
                false,
                None,
                noted(5),
                tombstone(9),
                Some(Step::Delete),
            ),
            ("good at last", on_disk(), true, None, noted(5), None, Some(Step::Store)),
            ("deleted", absent(), false, Some(good("a", 5)), stored("a", 5), tombstone(9), Some(Step::Delete)),
            (
                "deleted while no router ran",
                absent(),
                false,
                None,
                stored("a", 5),
                tombstone(9),
                Some(Step::Delete),
            ),
            (
                "deleted, and never stored",
                absent(),
                false,
                Some(good("a", 5)),
                None,
                tombstone(9),
                Some(Step::Delete),
            ),
            (
                "the tombstone of an older one",
                absent(),
                false,
                Some(good("a", 9)),
                stored("a", 9),
                tombstone(5),
                None,
            ),
            (
                "a broken file is no deleted one",
                broken(),
                false,
                Some(good("a", 5)),
                stored("a", 5),
                tombstone(9),
                None,
            ),
            ("deleted already", absent(), false, None, deleted(9), tombstone(9), None),
            ("deleted elsewhere", absent(), false, Some(good("a", 5)), deleted(9), None, Some(Step::Forget)),
            ("deleted before it came back", broken(), false, Some(good("a", 9)), deleted(5), None, None),
        ];
        for (case, disk, fresh, last_good, entry, tombstone, expected) in cases {
            let step = next(&disk, fresh, last_good.as_ref(), entry.as_ref(), tombstone.as_ref());
            assert_eq!(step, expected, "{case}");
        }
    }

    #[test]
    fn a_policy_is_served_by_its_own_last_good_version_or_refused() {
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
