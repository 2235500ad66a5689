//! The policy files: loaded, watched, and never replaced by a bad one.

use crate::Router;
use crate::policy::{Compiled, Set};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio_util::sync::CancellationToken;
use wire::policy::Policy;
use wire::status::PolicyStatus;

/// Files are looked at this often. Polling sees every editor's way of saving, mounted volumes and swapped links alike.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A policy file is not larger.
const FILE_MAX: u64 = 1024 * 1024;

/// Serves tenant `default` until a file `default/default.*` does.
const BUILT_IN: &str = r#"{
    "version": "built-in",
    "providers": [{"name": "echo", "weight": 100}, {"name": "ops", "weight": 0}],
    "rules": [{"when": "task.type == 'chat' || task.type == 'ops'", "to": "ops"}]
}"#;

pub struct Policies {
    dir: PathBuf,
    current: ArcSwap<Set>,
    files: Mutex<BTreeMap<PathBuf, File>>,
}

struct File {
    tenant: String,
    policy: String,
    stamp: Stamp,
    /// The newest good content.
    compiled: Option<Arc<Compiled>>,
    error: Option<String>,
}

type Stamp = (SystemTime, u64);
/// Tenant, policy and stamp of each file.
type Found = BTreeMap<PathBuf, (String, String, Stamp)>;

impl Policies {
    /// Reads what is there now. A bad file is logged and left out; it does not keep the others from serving.
    pub fn load(dir: &Path) -> Self {
        if !dir.is_dir() {
            tracing::info!("there is no directory {}: the built-in policy serves until there is", dir.display());
        }
        let policies = Self { dir: dir.into(), current: ArcSwap::default(), files: Mutex::default() };
        policies.reload();
        policies
    }

    pub fn current(&self) -> arc_swap::Guard<Arc<Set>> {
        self.current.load()
    }

    pub fn status(&self) -> Vec<PolicyStatus> {
        let files = self.files.lock();
        let broken = files.values().filter(|file| file.error.is_some()).map(|file| PolicyStatus {
            tenant: file.tenant.clone(),
            policy: file.policy.clone(),
            version: file.compiled.as_ref().map(|c| c.version.clone()).unwrap_or_default(),
            error: file.error.clone(),
        });
        let mut all: Vec<_> = broken.collect();
        for (tenant, compiled) in self.current.load().iter() {
            if !all.iter().any(|known| known.tenant == tenant && known.policy == compiled.id) {
                let (tenant, policy, version) = (tenant.into(), compiled.id.clone(), compiled.version.clone());
                all.push(PolicyStatus { tenant, policy, version, error: None });
            }
        }
        all.sort_by(|a, b| (&a.tenant, &a.policy).cmp(&(&b.tenant, &b.policy)));
        all
    }

    /// Looks at every file; true if anything changed.
    fn reload(&self) -> bool {
        let mut files = self.files.lock();
        let found = policy_files(&self.dir, &files);
        let mut changed = false;
        files.retain(|path, file| {
            let stays = found.contains_key(path);
            if !stays {
                changed = true;
                tracing::info!(tenant = file.tenant, policy = file.policy, "policy removed");
            }
            stays
        });
        for (path, (tenant, policy, stamp)) in found {
            if files.get(&path).is_some_and(|known| known.stamp == stamp) {
                continue;
            }
            changed = true;
            let before = files.get(&path).and_then(|known| known.compiled.clone());
            let (compiled, error) = match read(&path, &policy, stamp) {
                Ok(compiled) => {
                    tracing::info!(tenant, policy, version = compiled.version, "policy loaded");
                    (Some(Arc::new(compiled)), None)
                }
                Err(error) => {
                    let kept = if before.is_some() { "the version before it serves on" } else { "it does not serve" };
                    tracing::error!("policy file refused, {kept}: {error}");
                    (before, Some(error))
                }
            };
            files.insert(path, File { tenant, policy, stamp, compiled, error });
        }
        if changed || self.current.load().iter().next().is_none() {
            let mut set = Set::default();
            set.insert("default", Arc::new(built_in()));
            for file in files.values() {
                if let Some(compiled) = &file.compiled {
                    set.insert(&file.tenant, compiled.clone());
                }
            }
            self.current.store(Arc::new(set));
        }
        changed
    }
}

fn built_in() -> Compiled {
    let policy: Policy = serde_json::from_str(BUILT_IN).expect("the built-in policy is JSON");
    Compiled::new("default", &policy).expect("the built-in policy is valid")
}

/// What is not there is gone. What cannot be looked at now (too many open files, no permission) is as it was.
fn policy_files(dir: &Path, known: &BTreeMap<PathBuf, File>) -> Found {
    let mut found = Found::new();
    let as_before = |path: &Path, error: std::io::Error| {
        if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) {
            return Found::new();
        }
        tracing::error!(%error, path = %path.display(), "cannot look at policy files; what was read of them serves on");
        let under = known.iter().filter(|(file, _)| file.starts_with(path));
        under.map(|(file, known)| (file.clone(), (known.tenant.clone(), known.policy.clone(), known.stamp))).collect()
    };
    let tenants = entries(dir).unwrap_or_else(|error| {
        found.extend(as_before(dir, error));
        Vec::new()
    });
    for tenant in tenants {
        let files = entries(&tenant).unwrap_or_else(|error| {
            found.extend(as_before(&tenant, error));
            Vec::new()
        });
        for path in files {
            let format = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_string();
            if !matches!(format, "json" | "yaml" | "yml" | "toml") || name.starts_with('.') {
                continue;
            }
            match std::fs::metadata(&path) {
                Ok(data) => {
                    let stamp = (data.modified().unwrap_or(SystemTime::UNIX_EPOCH), data.len());
                    let tenant = tenant.file_name().unwrap_or_default().to_string_lossy().to_string();
                    found.insert(path, (tenant, name, stamp));
                }
                Err(error) => found.extend(as_before(&path, error)),
            }
        }
    }
    found
}

fn entries(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
}

fn read(path: &Path, name: &str, stamp: Stamp) -> Result<Compiled, String> {
    let at = path.display();
    if stamp.1 > FILE_MAX {
        return Err(format!("{at}: has {} bytes, more than a policy may ({FILE_MAX})", stamp.1));
    }
    let text = std::fs::read_to_string(path).map_err(|e| format!("{at}: cannot be read: {e}"))?;
    let policy: Policy = match path.extension().and_then(|e| e.to_str()) {
        Some("json") => serde_json::from_str(&text).map_err(|e| format!("{at}:{}: {e}", e.line()))?,
        Some("toml") => toml::from_str(&text).map_err(|e: toml::de::Error| {
            let line = e.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            format!("{at}:{line}: {}", e.message())
        })?,
        _ => serde_norway::from_str(&text).map_err(|e| {
            let line = e.location().map_or(1, |location| location.line());
            format!("{at}:{line}: {e}")
        })?,
    };
    Compiled::new(name, &policy).map_err(|e| {
        let line = line_of_field(&text, &e.field);
        format!("{at}:{line}: {e}")
    })
}

/// The line where a field of the checked document stands, by the last name in its path: good enough to find it.
fn line_of_field(text: &str, field: &str) -> usize {
    let (list, rest) = field.split_once('[').unwrap_or((field, ""));
    let nth = rest.split(']').next().and_then(|n| n.parse::<usize>().ok()).unwrap_or(0);
    let name = field.rsplit('.').next().unwrap_or(field);
    let from = text.find(list).unwrap_or(0);
    let place = text[from..].match_indices(name).nth(nth).map_or(from, |(at, _)| from + at);
    text[..place].matches('\n').count() + 1
}

pub async fn watch(router: Arc<Router>, cancel: CancellationToken) {
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let looking = router.clone();
        let looked = tokio::task::spawn_blocking(move || looking.policies.reload()).await;
        if let Err(error) = looked {
            tracing::error!(%error, "looking at the policy files failed; trying again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn three_formats_mean_the_same() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "acme/j.json", r#"{"providers":[{"name":"a","weight":1}]}"#);
        write(dir.path(), "acme/y.yaml", "providers:\n  - {name: a, weight: 1}\n");
        write(dir.path(), "acme/t.toml", "[[providers]]\nname = \"a\"\nweight = 1\n");
        let set = Policies::load(dir.path());
        for name in ["j", "y", "t"] {
            let current = set.current();
            let names: Vec<_> = current.get("acme", name).unwrap().providers().collect();
            assert_eq!(names, ["a"], "{name}");
        }
        assert!(set.current().get("acme", "default").is_some(), "the built-in policy serves tenants without their own");
    }

    #[test]
    fn a_bad_file_never_replaces_a_good_one_and_names_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let good = "providers:\n  - {name: a, weight: 1}\n";
        write(dir.path(), "default/default.yaml", good);
        let set = Policies::load(dir.path());
        for (bad, expected) in [
            ("providers:\n  - {name: a, weigt: 1}\n", "default.yaml:2: "),
            (
                "providers:\n  - {name: a, weight: 1}\nrules:\n  - when: \"task.type ==\"\n    to: a\n",
                "default.yaml:4: rules[0].when",
            ),
        ] {
            write(dir.path(), "default/default.yaml", bad);
            assert!(set.reload());
            let status = set.status();
            let error = status[0].error.as_ref().unwrap();
            assert!(error.contains(expected), "{error}");
            assert_eq!(set.current().get("t", "default").unwrap().providers().collect::<Vec<_>>(), ["a"]);
        }
        write(dir.path(), "default/default.yaml", "providers:\n  - {name: other, weight: 1}\n");
        assert!(set.reload());
        assert_eq!(set.current().get("t", "default").unwrap().providers().collect::<Vec<_>>(), ["other"]);
        std::fs::remove_file(dir.path().join("default/default.yaml")).unwrap();
        assert!(set.reload());
        assert_eq!(set.current().get("t", "default").unwrap().version, "built-in");
    }

    #[test]
    fn what_cannot_be_looked_at_serves_on() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("policies");
        write(&dir, "acme/p.json", r#"{"providers":[{"name":"a","weight":1}]}"#);
        let set = Policies::load(&dir);
        let served = || set.current().get("acme", "p").is_some();
        for path in [dir.clone(), dir.join("acme"), dir.join("acme/p.json")] {
            let aside = root.path().join("aside");
            std::fs::rename(&path, &aside).unwrap();
            // A link to itself: there, but not to be read.
            std::os::unix::fs::symlink(&path, &path).unwrap();
            assert!(!set.reload() && served(), "{}", path.display());
            std::fs::remove_file(&path).unwrap();
            assert!(set.reload() && !served(), "what is not there is gone");
            std::fs::rename(&aside, &path).unwrap();
            assert!(set.reload() && served());
        }
    }
}
