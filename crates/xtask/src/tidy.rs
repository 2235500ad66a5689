//! Rules that the compiler does not check. Each finding names the location, the problem and the remedy.

mod absences;
mod dependencies;
mod documents;
mod licences;
pub mod protocol;

use crate::tree::Tree;
use anyhow::Result;
use std::fmt;

#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    pub path: String,
    /// Line number from 1; 0 means the whole file.
    pub line: usize,
    pub message: String,
}

impl Finding {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.into(), line, message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.message),
            line => write!(f, "{}:{line}: {}", self.path, self.message),
        }
    }
}

pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let mut findings = dependencies::check(tree)?;
    findings.extend(absences::check(tree));
    findings.extend(documents::check(tree));
    findings.extend(protocol::check(tree));
    findings.extend(licences::check(tree)?);
    Ok(findings)
}

/// A tree of these files (path, text), for the tests of the rules.
#[cfg(test)]
fn tree_of(files: &[(&str, &str)]) -> Tree {
    let file = |(path, text): &(&str, &str)| crate::tree::File { path: (*path).into(), text: (*text).into() };
    Tree { files: files.iter().map(file).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree;

    #[test]
    fn the_repository_is_tidy() {
        let findings = check(&Tree::read(&tree::root()).unwrap()).unwrap();
        let lines: Vec<_> = findings.iter().map(ToString::to_string).collect();
        assert!(lines.is_empty(), "\n{}", lines.join("\n"));
    }
}
