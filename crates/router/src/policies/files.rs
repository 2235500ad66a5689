//! The files of the policy directory, `<tenant>/<policy>.{json,yaml,yml,toml}`: finding, reading and deleting them.

use super::source::{self, Version};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use wire::id;
use wire::policy::{Stored, Tombstone};

/// The size of a policy file, in bytes.
const FILE_MAX: u64 = 1024 * 1024;
const TOMBSTONE_MAX: u64 = 4096;
/// A file that was read this soon after a change is read again: the file system's clock has coarse ticks, and a second
/// change within one tick would not show.
const UNSETTLED_NS: i128 = 2_000_000_000;

/// Tenant and name of a policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    pub tenant: String,
    pub policy: String,
}

impl Name {
    /// Parses `<tenant>/<policy>`; `None` if no directory could hold a policy of that name.
    pub fn parse(text: &str) -> Option<Self> {
        let (tenant, policy) = text.split_once('/')?;
        let valid = id::is_tenant(tenant) && id::is_valid(policy);
        // A file name has no slash, and the watcher skips hidden files.
        let file_names = !policy.contains('/') && !tenant.starts_with('.') && !policy.starts_with('.');
        (valid && file_names).then(|| Self { tenant: tenant.into(), policy: policy.into() })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.policy)
    }
}

/// The content of the directory at one time.
#[derive(Debug, Default)]
pub struct Look {
    /// The directory exists, though it may be unreadable.
    pub exists: bool,
    /// Why the directory cannot be read.
    pub unreadable: Option<String>,
    /// Tenants whose directory was read.
    pub tenants: BTreeSet<String>,
    /// Tenants whose directory cannot be read, and why.
    pub unreadable_tenants: BTreeMap<String, String>,
    pub files: BTreeMap<Name, Vec<File>>,
    pub tombstones: BTreeMap<Name, PathBuf>,
}

#[derive(Debug, Clone)]
pub struct File {
    pub path: PathBuf,
    /// `<tenant>/<file>`, the file's name in messages.
    pub label: String,
    /// The file's stamp, or why it has none.
    pub stamp: std::result::Result<Stamp, String>,
}

/// Identifies a file's content: differs whenever the content may differ, also after a swap by `rename` and after a
/// write that restores the modification time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    modified_ns: i128,
    changed_ns: i128,
    len: u64,
}

impl Stamp {
    fn of(data: &std::fs::Metadata) -> Self {
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Self {
            device: data.dev(),
            inode: data.ino(),
            modified_ns: ns(data.mtime(), data.mtime_nsec()),
            changed_ns: ns(data.ctime(), data.ctime_nsec()),
            len: data.len(),
        }
    }

    /// Whether a change after this time would change the stamp.
    pub fn is_settled(&self, read_ms: u64) -> bool {
        i128::from(read_ms) * 1_000_000 > self.changed_ns + UNSETTLED_NS
    }
}

/// Lists the directory without reading its files.
pub fn look(dir: &Path) -> Look {
    let mut look = Look::default();
    let tenants = match entries(dir) {
        Ok(tenants) => tenants,
        Err(error) => {
            look.exists = !is_gone(&error);
            look.unreadable = look.exists.then(|| error.to_string());
            return look;
        }
    };

    look.exists = true;
    for dir in tenants {
        let Some(tenant) = visible_name(&dir) else { continue };
        match entries(&dir) {
            Ok(files) => {
                files.into_iter().for_each(|path| look.note(&tenant, path));
                look.tenants.insert(tenant);
            }
            // A file beside the tenants' directories, or a directory that was removed just now.
            Err(error) if is_gone(&error) => {}
            Err(error) => _ = look.unreadable_tenants.insert(tenant, error.to_string()),
        }
    }
    look
}

impl Look {
    /// Why a policy of the tenant has no file.
    pub fn why_absent(&self, tenant: &str) -> String {
        match (&self.unreadable, self.unreadable_tenants.get(tenant)) {
            (Some(why), _) => format!("the policy directory cannot be read: {why}"),
            (None, Some(why)) => format!("its tenant's directory cannot be read: {why}"),
            (None, None) if !self.exists => "the policy directory is gone".into(),
            (None, None) => "its file is gone".into(),
        }
    }

    fn note(&mut self, tenant: &str, path: PathBuf) {
        let Some(file) = visible_name(&path) else { return };
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let name = Name { tenant: tenant.into(), policy: stem.into() };

        if path.extension().is_some_and(|extension| extension == "deleted") {
            self.tombstones.insert(name, path);
        } else if source::format_of(&path).is_some() {
            let stamp = stamp(&path).map_err(|error| error.to_string());
            self.files
                .entry(name)
                .or_default()
                .push(File { path, label: format!("{tenant}/{file}"), stamp });
        }
    }
}

/// The file name, unless it is hidden: `.git` and the `..data` of a mounted ConfigMap belong to tools.
fn visible_name(path: &Path) -> Option<String> {
    path.file_name()
        .and_then(|name| name.to_str())
        .filter(|name| !name.starts_with('.'))
        .map(String::from)
}

/// Whether the error means that the path does not exist, as opposed to being unreadable.
fn is_gone(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// The directory's entries, sorted.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(dir)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    entries.sort();
    Ok(entries)
}

/// Why a policy file was not read.
#[derive(Debug, PartialEq, Eq)]
pub enum Unread {
    /// The file changed while it was read, so it may be half written.
    Changed(String),
    Broken(String),
}

impl From<String> for Unread {
    fn from(problem: String) -> Self {
        Self::Broken(problem)
    }
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Changed(why) | Self::Broken(why)) = self;
        f.write_str(why)
    }
}

/// Reads and compiles a policy, which must have exactly one file. A panic becomes an error of this policy alone.
pub fn read(name: &Name, files: &[File]) -> std::result::Result<Version, Unread> {
    let [file] = files else {
        let labels: Vec<_> = files.iter().map(|file| file.label.as_str()).collect();
        return Err(format!("policy {name} has several files ({}); keep one", labels.join(", ")).into());
    };
    contained(&file.label, || read_one(name, file))
}

fn contained<T>(at: &str, read: impl FnOnce() -> std::result::Result<T, Unread>) -> std::result::Result<T, Unread> {
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    done.unwrap_or_else(|_| Err(format!("{at}: reading it panicked").into()))
}

fn read_one(name: &Name, file: &File) -> std::result::Result<Version, Unread> {
    let at = &file.label;
    let stamp = file
        .stamp
        .as_ref()
        .map_err(|error| format!("{at}: cannot be read: {error}"))?;
    if stamp.len > FILE_MAX {
        return Err(format!("{at}: has {} bytes; a policy may have {FILE_MAX}", stamp.len).into());
    }

    // The stamp is compared before the text is judged: a half-written text is not an error.
    let text = read_text(&file.path, FILE_MAX);
    if self::stamp(&file.path).ok().as_ref() != Some(stamp) {
        return Err(Unread::Changed(format!("{at}: changed while it was read")));
    }

    let text = text.map_err(|error| format!("{at}: cannot be read: {error}"))?;
    let format = source::format_of(&file.path).ok_or_else(|| format!("{at}: is not a policy file"))?;
    Ok(source::compile(at, &name.policy, Stored { format, text })?)
}

pub fn read_tombstone(path: &Path) -> std::result::Result<Tombstone, String> {
    let text = read_text(path, TOMBSTONE_MAX).map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| error.to_string())
}

/// The stamp of a regular file. Anything else is refused, because opening a pipe or a device can block forever.
fn stamp(path: &Path) -> Result<Stamp> {
    let data = std::fs::metadata(path)?;
    if data.is_file() {
        Ok(Stamp::of(&data))
    } else {
        Err(Error::other("it is not a regular file"))
    }
}

/// Reads a file of at most `max` bytes, also if it grew since its stamp was taken.
fn read_text(path: &Path, max: u64) -> Result<String> {
    stamp(path)?;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(Error::other(format!("it has more than {max} bytes")));
    }
    String::from_utf8(bytes).map_err(|error| Error::new(ErrorKind::InvalidData, error))
}

/// The policies that have a file or a tombstone in the directory.
pub fn names(dir: &Path) -> BTreeSet<Name> {
    let look = look(dir);
    look.files.into_keys().chain(look.tombstones.into_keys()).collect()
}

/// Deletes a policy for good: leaves a tombstone for the routers, then removes the policy's files. Versions that a
/// router read before `tombstone.deleted_ms` serve no more. Returns the removed files.
pub fn delete(dir: &Path, name: &Name, tombstone: &Tombstone) -> Result<Vec<PathBuf>> {
    let tenant = dir.join(&name.tenant);
    std::fs::create_dir_all(&tenant)?;

    // The tombstone comes first: without it, a missing file would look like an accident, and the policy would still
    // serve.
    let part = tenant.join(format!(".{}.deleted", name.policy));
    std::fs::write(&part, serde_json::to_vec(tombstone).map_err(Error::other)?)?;
    std::fs::rename(&part, tenant.join(format!("{}.deleted", name.policy)))?;

    let extensions = ["json", "yaml", "yml", "toml"];
    let mut removed = Vec::new();
    for path in extensions.map(|extension| tenant.join(format!("{}.{extension}", name.policy))) {
        match std::fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    fn stamp(dir: &Path) -> Stamp {
        look(dir).files.into_values().next().unwrap()[0].stamp.clone().unwrap()
    }

    #[test]
    fn swap_with_the_same_time_and_length_changes_the_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), "acme/p.yaml", "version: a");
        let time = std::fs::metadata(&path).unwrap().modified().unwrap();
        let before = stamp(dir.path());
        let other = write(dir.path(), "other", "version: b");
        std::fs::File::options()
            .write(true)
            .open(&other)
            .unwrap()
            .set_modified(time)
            .unwrap();
        std::fs::rename(&other, &path).unwrap();
        let after = stamp(dir.path());
        assert_eq!((before.modified_ns, before.len), (after.modified_ns, after.len), "the swap keeps both");
        assert_ne!(before, after);
    }

    #[test]
    fn stamp_is_not_settled_right_after_a_change() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "acme/p.yaml", "version: a");
        let stamp = stamp(dir.path());
        let changed_ms = u64::try_from(stamp.changed_ns / 1_000_000).unwrap();
        assert!(!stamp.is_settled(changed_ms + 1) && stamp.is_settled(changed_ms + 3000));
    }

    #[test]
    fn pipe_is_refused_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "acme/other.yaml", "");
        for name in ["acme/p.yaml", "acme/p.deleted"] {
            let path = dir.path().join(name);
            assert!(
                std::process::Command::new("mkfifo")
                    .arg(path)
                    .status()
                    .unwrap()
                    .success()
            );
        }
        let (done, outcomes) = std::sync::mpsc::sync_channel(8);
        let root = dir.path().to_path_buf();
        std::thread::spawn(move || {
            let name = Name::parse("acme/p").unwrap();
            done.send(
                read(&name, &look(&root).files[&name])
                    .map(drop)
                    .unwrap_err()
                    .to_string(),
            )
            .unwrap();
            done.send(read_tombstone(&root.join("acme/p.deleted")).unwrap_err())
                .unwrap();
        });
        for _ in 0..2 {
            let error = outcomes
                .recv_timeout(std::time::Duration::from_secs(10))
                .expect("reading a pipe blocks");
            assert!(error.ends_with("it is not a regular file"), "{error}");
        }
    }

    #[test]
    fn file_that_changes_while_it_is_read_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), "acme/p.yaml", "providers: [{name: a}]");
        let name = Name::parse("acme/p").unwrap();
        let files = look(dir.path()).files.remove(&name).unwrap();
        assert!(read(&name, &files).is_ok());
        write(dir.path(), "acme/p.yaml", "providers: [{name: a}]\nrules: [{when: ");
        assert!(matches!(read(&name, &files), Err(Unread::Changed(_))));
        assert!(read_text(&path, 4).is_err_and(|error| error.to_string() == "it has more than 4 bytes"));
    }

    #[test]
    fn panic_is_an_error_of_one_policy() {
        let outcome = contained("acme/p.yaml", || -> std::result::Result<(), Unread> { panic!("a bug") });
        assert_eq!(outcome, Err(Unread::Broken("acme/p.yaml: reading it panicked".into())));
    }

    #[test]
    fn look_distinguishes_missing_from_unreadable() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("policies");
        assert!(!look(&dir).exists);
        write(&dir, "acme/p.json", "{}");
        write(&dir, "acme/p.deleted", "{}");
        write(&dir, "acme/.hidden.json", "{}");
        write(&dir, "README.md", "");
        write(&dir, "..data/acme/p.json", "{}");
        let seen = look(&dir);
        assert_eq!(seen.files.keys().map(Name::to_string).collect::<Vec<_>>(), ["acme/p"]);
        assert_eq!((seen.tenants.len(), seen.tombstones.len(), seen.unreadable), (1, 1, None));

        // A link to itself exists but cannot be read.
        std::fs::remove_dir_all(dir.join("acme")).unwrap();
        std::os::unix::fs::symlink(dir.join("acme"), dir.join("acme")).unwrap();
        assert_eq!(look(&dir).unreadable_tenants.keys().collect::<Vec<_>>(), ["acme"]);
        std::fs::rename(&dir, root.path().join("aside")).unwrap();
        std::os::unix::fs::symlink(&dir, &dir).unwrap();
        let seen = look(&dir);
        assert!(seen.exists && seen.unreadable.is_some());
    }

    #[test]
    fn name_must_be_one_that_a_directory_can_hold() {
        for (text, fits) in [
            ("acme/default", true),
            ("acme/a b", true),
            ("acme", false),
            ("/default", false),
            ("acme/", false),
            ("../default", false),
            ("acme/../x", false),
            ("acme/.hidden", false),
            ("acme/a\nb", false),
            ("a b/default", false),
        ] {
            assert_eq!(Name::parse(text).is_some(), fits, "{text}");
        }
    }
}
