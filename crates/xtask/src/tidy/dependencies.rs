//! Checks that dependencies point down only, and that parts communicate over the bus alone.

use super::Finding;
use crate::tree::Tree;
use anyhow::{Context, Result};

/// The crates of the workspace that each crate may depend on. Tests may use any crate, except that a part's tests must
/// not use another part.
const MAY_USE: &[(&str, &[&str])] = &[
    ("wire", &[]),
    ("journal", &[]),
    ("bus", &["wire", "journal"]),
    ("client", &["wire"]),
    ("gateway", &["wire", "bus"]),
    ("router", &["wire", "bus"]),
    ("worker", &["wire", "bus"]),
    ("cluster", &["wire", "bus", "journal"]),
    ("webapp", &["wire", "bus"]),
    ("checks", &["wire", "bus", "client"]),
    (
        "beamline",
        &["wire", "journal", "bus", "client", "gateway", "router", "worker", "cluster", "webapp", "checks"],
    ),
    ("testkit", &["wire", "bus", "client"]),
    ("xtask", &[]),
];
const PARTS: &[&str] = &["gateway", "router", "worker", "cluster", "webapp"];
/// Crates that provide time, sockets, threads or randomness, which messages must not depend on.
const NOT_IN_WIRE: &[&str] = &[
    "tokio",
    "tokio-util",
    "futures-util",
    "async-trait",
    "axum",
    "hyper",
    "chrono",
    "time",
    "rand",
    "uuid",
    "tracing",
    "metrics",
];

pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for file in tree
        .under("crates/", "toml")
        .filter(|file| file.path.ends_with("/Cargo.toml"))
    {
        let manifest: toml::Table = file
            .text
            .parse()
            .with_context(|| format!("{} is not TOML", file.path))?;
        let Some(name) = manifest
            .get("package")
            .and_then(|package| package.get("name")?.as_str())
        else {
            continue;
        };

        let Some((_, allowed)) = MAY_USE.iter().find(|(of, _)| *of == name) else {
            let message =
                format!("crate {name} is not in the dependency order: add it to MAY_USE in xtask's dependencies.rs");
            findings.push(Finding::new(&file.path, 0, message));
            continue;
        };

        let line = |dependency: &str| {
            let found = file
                .text
                .lines()
                .position(|line| line.split(['.', ' ', '=']).next() == Some(dependency));
            found.map_or(0, |index| index + 1)
        };

        for dependency in names(&manifest, "dependencies") {
            let ours = MAY_USE.iter().any(|(of, _)| *of == dependency);
            if ours && !allowed.contains(&dependency) {
                let message = format!(
                    "{name} must not depend on {dependency}: let them exchange messages of `wire` over the bus"
                );
                findings.push(Finding::new(&file.path, line(dependency), message));
            }
            if name == "wire" && NOT_IN_WIRE.contains(&dependency) {
                let message = format!("wire holds messages only: take what {dependency} provides as an argument");
                findings.push(Finding::new(&file.path, line(dependency), message));
            }
        }

        for dependency in names(&manifest, "dev-dependencies") {
            if PARTS.contains(&name) && PARTS.contains(&dependency) {
                let message =
                    format!("tests of {name} must not use {dependency}: test them together in beamline/tests/it");
                findings.push(Finding::new(&file.path, line(dependency), message));
            }
        }

        if manifest
            .get("lints")
            .and_then(|lints| lints.get("workspace")?.as_bool())
            != Some(true)
        {
            let message = "the workspace's lints are off: add `[lints] workspace = true`";
            findings.push(Finding::new(&file.path, 0, message));
        }
    }
    Ok(findings)
}

fn names<'a>(manifest: &'a toml::Table, table: &str) -> impl Iterator<Item = &'a str> {
    manifest
        .get(table)
        .and_then(toml::Value::as_table)
        .into_iter()
        .flat_map(|table| table.keys().map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::super::tree_of;
    use super::*;

    fn lines(name: &str, rest: &str) -> Vec<String> {
        let text = format!("[package]\nname = \"{name}\"\n{rest}");
        let tree = tree_of(&[("crates/x/Cargo.toml", &text)]);
        check(&tree).unwrap().iter().map(ToString::to_string).collect()
    }

    const LINTS: &str = "[lints]\nworkspace = true\n";

    #[test]
    fn only_dependencies_on_lower_crates_are_allowed() {
        for (name, rest, expected) in [
            ("gateway", "[dependencies]\nwire.workspace = true\nbus.workspace = true\n", None),
            (
                "gateway",
                "[dependencies]\nrouter.workspace = true\n",
                Some("crates/x/Cargo.toml:6: gateway must not"),
            ),
            (
                "bus",
                "[dependencies]\ngateway = { path = \"../gateway\" }\n",
                Some("bus must not depend on gateway"),
            ),
            ("cluster", "[dev-dependencies]\nwebapp.workspace = true\n", Some("beamline/tests/it")),
            ("gateway", "[dev-dependencies]\nclient.workspace = true\ntestkit.workspace = true\n", None),
            ("gateway", "[dependencies]\ntestkit.workspace = true\n", Some("gateway must not depend on testkit")),
            ("wire", "[dependencies]\ntokio.workspace = true\n", Some("wire holds messages only")),
            ("newcomer", "", Some("add it to MAY_USE")),
        ] {
            let found = lines(name, &format!("{LINTS}{rest}"));
            match expected {
                None => assert!(found.is_empty(), "{found:?}"),
                Some(text) => assert!(found.len() == 1 && found[0].contains(text), "{text}: {found:?}"),
            }
        }
    }

    #[test]
    fn manifest_without_the_workspace_lints_is_found() {
        assert_eq!(
            lines("wire", ""),
            ["crates/x/Cargo.toml: the workspace's lints are off: add `[lints] workspace = true`"]
        );
    }
}
