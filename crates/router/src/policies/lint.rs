//! `beamline policy lint`: the errors and warnings that a router would report about a policy directory.

use super::files;
use std::path::Path;

pub struct Findings {
    /// Policies that can serve.
    pub policies: usize,
    /// Why other policies cannot serve, with file and line.
    pub errors: Vec<String>,
    /// Likely mistakes in policies that serve, with file and line.
    pub warnings: Vec<String>,
}

pub fn lint(dir: &Path) -> Findings {
    let look = files::look(dir);
    let mut findings = Findings { policies: 0, errors: Vec::new(), warnings: Vec::new() };
    let at = dir.display();

    if !look.exists {
        findings.errors.push(format!("{at}: there is no such directory"));
    }
    findings
        .errors
        .extend(look.unreadable.map(|why| format!("{at}: cannot be read: {why}")));
    let tenants = look.unreadable_tenants.into_iter();
    findings
        .errors
        .extend(tenants.map(|(tenant, why)| format!("{at}/{tenant}: cannot be read: {why}")));

    for (name, files) in &look.files {
        match files::read(name, files) {
            Ok(version) => {
                findings.policies += 1;
                findings
                    .warnings
                    .extend(version.warnings.iter().map(|warning| format!("{at}/{warning}")));
            }
            Err(error) if files.len() > 1 => findings.errors.push(format!("{at}: {error}")),
            Err(error) => findings.errors.push(format!("{at}/{error}")),
        }
    }
    findings
}
