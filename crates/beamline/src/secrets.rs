//! The secrets of a deployment: created at the first start, stored in the data directory, readable by its owner only.

use anyhow::{Context, Result, bail};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// The key that signs connection tokens (HS256).
pub const TOKEN_SECRET: &str = "token-secret";
/// The key of the server API and of decisions over HTTP.
pub const API_KEY: &str = "api-key";
/// The key that signs operators' tokens (HS256).
pub const OPERATOR_SECRET: &str = "operator-secret";
/// The password of the first account, until the file is removed.
pub const ADMIN_PASSWORD: &str = "admin-password";

/// Creates the data directory, private to its owner, if it is missing.
pub fn data_dir(dir: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot create the data directory {}", dir.display()))
}

/// Reads a secret and checks that it has at least 32 characters; creates it if it does not exist.
pub fn load_or_create(dir: &Path, name: &str) -> Result<String> {
    let random = || {
        rand::random::<[u8; 32]>()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let secret = load_or_make(dir, name, random)?;
    if secret.len() < 32 {
        bail!(
            "{} is too short for a secret; remove it, and the next start creates a new one",
            dir.join(name).display()
        );
    }
    Ok(secret)
}

/// Reads a secret; stores the one that `make` returns if it does not exist.
pub fn load_or_make(dir: &Path, name: &str, make: impl FnOnce() -> String) -> Result<String> {
    data_dir(dir)?;
    let fresh = make();
    match write_new(dir, name, &fresh) {
        Ok(()) => Ok(fresh),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => read(dir, name),
        Err(e) => Err(e).with_context(|| format!("cannot write {}", dir.join(name).display())),
    }
}

pub fn remove(dir: &Path, name: &str) -> Result<()> {
    let path = dir.join(name);
    std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
}

pub fn read(dir: &Path, name: &str) -> Result<String> {
    let path = dir.join(name);
    let mut text = String::new();
    OpenOptions::new()
        .read(true)
        .open(&path)
        .and_then(|mut file| file.read_to_string(&mut text))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.trim().to_string())
}

/// Writes the secret to a temporary file and links it into place, so that a reader sees the whole secret or no file.
fn write_new(dir: &Path, name: &str, secret: &str) -> std::io::Result<()> {
    let partial = dir.join(format!(".{name}.{}", std::process::id()));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)?;

    file.write_all(secret.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()?;

    let linked = std::fs::hard_link(&partial, dir.join(name));
    std::fs::remove_file(&partial)?;
    linked?;

    // Syncs the directory, so that the file name survives a power failure too.
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn secret_is_created_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let first = load_or_create(&data, TOKEN_SECRET).unwrap();
        assert_eq!(load_or_create(&data, TOKEN_SECRET).unwrap(), first);
        assert_ne!(load_or_create(&data, API_KEY).unwrap(), first);
        assert_eq!(first.len(), 64);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&data.join(TOKEN_SECRET)), 0o600);
        assert_eq!(mode(&data), 0o700);
    }

    #[test]
    fn emptied_secret_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(API_KEY), "\n").unwrap();
        assert!(
            load_or_create(dir.path(), API_KEY)
                .unwrap_err()
                .to_string()
                .contains("too short")
        );
    }
}
