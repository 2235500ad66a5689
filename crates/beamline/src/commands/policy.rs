//! `beamline policy`: checks all policies, or deletes one.

use crate::config::{Layers, load};
use anyhow::{Context, Result, bail};
use router::PolicyName;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
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
            println!("{}: {} policies can be used", dir.display(), findings.policies);
            Ok(())
        }
        _ => bail!("{}: {errors} problems found; routers refuse policies with an error", dir.display()),
    }
}

/// Deletes a policy; with `vanished`, even if its file is missing from the directory.
pub fn delete(name: &str, dir: Option<PathBuf>, vanished: bool) -> Result<()> {
    let Some(name) = PolicyName::parse(name) else {
        bail!("{name:?} is not the name of a policy; write TENANT/POLICY, for example acme/default");
    };

    let dir = directory(dir)?;
    if !dir.is_dir() {
        bail!("there is no policy directory {}; name it with --policies", dir.display());
    }

    let known = router::policy_names(&dir);
    if !vanished && !known.contains(&name) {
        bail!("{}", unknown(&dir, &name, &known));
    }

    let user = nix::unistd::getuid();
    let by = nix::unistd::User::from_uid(user)
        .ok()
        .flatten()
        .map_or_else(|| user.to_string(), |user| user.name);

    let deleted_ms = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    let removed = router::delete_policy(&dir, &name, &Tombstone { deleted_ms, by })
        .with_context(|| format!("cannot delete {name} from {}", dir.display()))?;

    for path in &removed {
        println!("removed {}", path.display());
    }
    println!("the routers that watch {} stop serving {name} within seconds", dir.display());
    Ok(())
}

fn unknown(dir: &Path, name: &PolicyName, known: &BTreeSet<PolicyName>) -> String {
    let own = known.iter().filter(|other| other.tenant == name.tenant);
    let own: Vec<_> = own.map(PolicyName::to_string).collect();
    let own = match own.is_empty() {
        true => format!("tenant {:?} has no policies there", name.tenant),
        false => format!("tenant {:?} has {}", name.tenant, own.join(", ")),
    };

    let dir = dir.display();
    format!("there is no policy {name} in {dir}; {own}; if its file was lost, add --vanished to delete it")
}

fn directory(given: Option<PathBuf>) -> Result<PathBuf> {
    match given {
        Some(dir) => Ok(dir),
        None => Ok(load(&Layers::from_process())?.router.policies),
    }
}
