//! `beamline policy`: checks the policies, and deletes one.

use crate::config::{Layers, load};
use anyhow::{Context, Result, bail};
use router::PolicyName;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};
use wire::policy::Tombstone;

pub fn lint(dir: Option<PathBuf>) -> Result<()> {
    let dir = directory(dir)?;
    let findings = router::lint(&dir);
    let errors = findings.errors.len();
    for error in findings.errors {
        println!("error: {error}");
    }
    for warning in findings.warnings {
        println!("warning: {warning}");
    }
    match errors {
        0 => {
            println!("{}: {} policies can serve", dir.display(), findings.policies);
            Ok(())
        }
        _ => bail!("{}: {errors} of the policies cannot serve", dir.display()),
    }
}

pub fn delete(name: &str, dir: Option<PathBuf>) -> Result<()> {
    let Some(name) = PolicyName::parse(name) else {
        bail!("{name:?} does not name a policy; write it as TENANT/POLICY, for example acme/default");
    };
    let dir = directory(dir)?;
    if !dir.is_dir() {
        bail!("there is no policy directory {}; name it by --policies", dir.display());
    }
    let user = nix::unistd::getuid();
    let by = nix::unistd::User::from_uid(user).ok().flatten().map_or_else(|| user.to_string(), |user| user.name);
    let deleted_ms = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    let removed = router::delete_policy(&dir, &name, &Tombstone { deleted_ms, by })
        .with_context(|| format!("cannot delete {name} from {}", dir.display()))?;
    for path in &removed {
        println!("removed {}", path.display());
    }
    println!("the routers that watch {} stop serving {name} within seconds", dir.display());
    Ok(())
}

fn directory(given: Option<PathBuf>) -> Result<PathBuf> {
    match given {
        Some(dir) => Ok(dir),
        None => Ok(load(&Layers::from_process())?.values.path("router.policies")),
    }
}
