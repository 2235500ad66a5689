//! Checks licences and sources of the dependencies against deny.toml, the file that `cargo deny` reads.

use super::Finding;
use crate::tree::{Tree, root};
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::process::Command;

const POLICY: &str = "deny.toml";

pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let policy = tree.file(POLICY).with_context(|| format!("{POLICY} is missing"))?;
    Ok(Policy::read(&policy.text)?.check(&packages()?))
}

/// A crate that is built. The lock file is not used, because it also lists crates behind disabled features.
#[derive(Debug, PartialEq, Eq)]
struct Package {
    name: String,
    licence: Option<String>,
    from_git: bool,
}

fn packages() -> Result<Vec<Package>> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["tree", "--workspace", "--locked", "--prefix=none", "--format={p}|{l}|"]);

    let output = command
        .current_dir(root())
        .output()
        .context("cannot start cargo tree")?;
    if !output.status.success() {
        bail!("cargo tree failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(parse(&String::from_utf8(output.stdout)?))
}

/// Parses lines like `name v1.2.3 (source or kind)|licence|`. Repeated lines end with ` (*)`.
fn parse(tree: &str) -> Vec<Package> {
    let lines: BTreeSet<&str> = tree.lines().map(|line| line.trim_end_matches(" (*)")).collect();
    let package = |line: &str| {
        let mut fields = line.split('|');
        let package = fields.next()?;
        let licence = fields.next().filter(|licence| !licence.is_empty()).map(str::to_string);
        let name = package.split(' ').next()?.to_string();
        Some(Package { name, licence, from_git: package.contains("://") })
    };
    lines
        .into_iter()
        .filter(|line| !line.is_empty())
        .filter_map(package)
        .collect()
}

struct Policy {
    allowed: Vec<String>,
    banned: Vec<String>,
}

impl Policy {
    fn read(text: &str) -> Result<Self> {
        let table: toml::Table = text.parse().with_context(|| format!("{POLICY} is not TOML"))?;
        let list = |table: &toml::Table, section: &str, key: &str| -> Vec<toml::Value> {
            table
                .get(section)
                .and_then(|section| section.get(key)?.as_array().cloned())
                .unwrap_or_default()
        };
        let text = |value: toml::Value| value.as_str().map(str::to_string);
        let name = |value: toml::Value| value.get("crate")?.as_str().map(str::to_string);
        Ok(Self {
            allowed: list(&table, "licenses", "allow").into_iter().filter_map(text).collect(),
            banned: list(&table, "bans", "deny").into_iter().filter_map(name).collect(),
        })
    }

    fn check(&self, packages: &[Package]) -> Vec<Finding> {
        let mut findings = Vec::new();
        for Package { name, licence, from_git } in packages {
            let mut report = |message: String| findings.push(Finding::new(POLICY, 0, message));
            match licence {
                None => report(format!("{name} declares no licence: replace it")),
                Some(licence) if !self.allows(licence) => {
                    report(format!("{name} is under {licence}, which is not allowed: allow it here or replace it"));
                }
                Some(_) => {}
            }
            if self.banned.contains(name) {
                report(format!("{name} is banned: `cargo tree -i {name}` shows which crate depends on it"));
            }
            if *from_git {
                report(format!("{name} comes from git: depend on a release in the registry"));
            }
        }
        findings
    }

    /// Whether the allowed licences satisfy an SPDX expression. `/` is an old notation for OR.
    fn allows(&self, expression: &str) -> bool {
        let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
        let words: Vec<&str> = spaced.split_whitespace().collect();
        let mut at = 0;
        let met = self.either(&words, &mut at);
        met && at == words.len()
    }

    fn either(&self, words: &[&str], at: &mut usize) -> bool {
        // Evaluate every alternative, even after one is met, because each consumes its words.
        let mut met = self.all(words, at);
        while words.get(*at) == Some(&"OR") {
            *at += 1;
            met |= self.all(words, at);
        }
        met
    }

    fn all(&self, words: &[&str], at: &mut usize) -> bool {
        let mut met = self.one(words, at);
        while words.get(*at) == Some(&"AND") {
            *at += 1;
            met &= self.one(words, at);
        }
        met
    }

    fn one(&self, words: &[&str], at: &mut usize) -> bool {
        let Some(word) = words.get(*at) else { return false };
        *at += 1;

        if *word == "(" {
            let met = self.either(words, at);
            // Skip the closing parenthesis.
            *at += 1;
            return met;
        }

        let mut licence = (*word).to_string();
        if words.get(*at) == Some(&"WITH") {
            licence = [licence.as_str(), "WITH", words.get(*at + 1).copied().unwrap_or_default()].join(" ");
            *at += 2;
        }
        self.allowed.contains(&licence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        let text = "[licenses]\nallow = [\"MIT\", \"Apache-2.0\", \"ISC\", \"Apache-2.0 WITH LLVM-exception\"]\n\
                    [bans]\ndeny = [{ crate = \"ring\", reason = \"x\" }]";
        Policy::read(text).unwrap()
    }

    #[test]
    fn evaluates_licence_expressions() {
        for (expression, allowed) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("MIT OR GPL-3.0", true),
            ("MIT/GPL-3.0", true),
            ("MIT AND GPL-3.0", false),
            ("(MIT OR GPL-3.0) AND ISC", true),
            ("(MIT OR Apache-2.0) AND GPL-3.0", false),
            ("Apache-2.0 WITH LLVM-exception OR GPL-3.0", true),
            ("GPL-3.0 WITH LLVM-exception", false),
            ("", false),
        ] {
            assert_eq!(policy().allows(expression), allowed, "{expression}");
        }
    }

    #[test]
    fn banned_unlicensed_and_git_packages_are_found() {
        let tree = "ours v0.1.0 (/somewhere)|Apache-2.0|\ngood v1.0.0 (proc-macro)|MIT|\n\nring v0.17.0|ISC|\n\
                    bare v1.0.0||\nfork v1.0.0 (https://example.org/fork#abc)|MIT|\n\
                    good v1.0.0 (proc-macro)|MIT| (*)\n";

        let packages = parse(tree);
        assert_eq!(packages.len(), 5);

        let findings = policy().check(&packages);
        let count = |name: &str| {
            findings
                .iter()
                .filter(|finding| finding.message.starts_with(name))
                .count()
        };
        assert_eq!(["good", "ring", "bare", "fork", "ours"].map(count), [0, 1, 1, 1, 0]);
    }
}
