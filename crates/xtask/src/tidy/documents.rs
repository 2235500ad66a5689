//! Checks the documents: their links resolve, and they explain every setting.

use super::Finding;
use crate::tree::{File, Tree, root};

const SETTINGS: &str = "crates/beamline/src/config/keys.rs";
const EXPLAINED: &str = "docs/operations.md";

pub fn check(tree: &Tree) -> Vec<Finding> {
    let documents = tree.files.iter().filter(|file| file.path.ends_with(".md"));
    let mut findings: Vec<Finding> = documents.flat_map(|file| dead_links(tree, file)).collect();
    findings.extend(unexplained_settings(tree));
    findings
}

/// Finds relative links whose target does not exist.
fn dead_links(tree: &Tree, file: &File) -> Vec<Finding> {
    let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for target in links(line) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") || path.starts_with("mailto:") {
                continue;
            }

            let path = resolve(folder, path);
            if !exists(tree, &path) {
                findings.push(Finding::new(
                    &file.path,
                    index + 1,
                    format!("the link to {path} is dead: correct the path or remove the link"),
                ));
            }
        }
    }
    findings
}

fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', ' ']).next())
}

fn resolve(folder: &str, target: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/') {
        match part {
            "." | "" => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn exists(tree: &Tree, path: &str) -> bool {
    let below = format!("{path}/");
    // The tree holds text files only; pictures are looked up on disk.
    tree.files
        .iter()
        .any(|file| file.path == path || file.path.starts_with(&below))
        || root().join(path).exists()
}

fn unexplained_settings(tree: &Tree) -> Vec<Finding> {
    let (Some(settings), Some(explained)) = (tree.file(SETTINGS), tree.file(EXPLAINED)) else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for (number, line) in settings.code() {
        // The constructors of the table of keys.
        for opening in ["key(\"", "unset(\""] {
            let Some((_, rest)) = line.split_once(opening) else {
                continue;
            };
            let name = rest.split('"').next().unwrap_or_default();
            if !explained.text.contains(&format!("`{name}`")) {
                let message = format!("setting {name} is missing from {EXPLAINED}: add it to the table of settings");
                findings.push(Finding::new(SETTINGS, number, message));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::tree_of;
    use super::*;

    #[test]
    fn dead_links_are_found() {
        let text = "[a](a.md) [b](../b.md#part) [c](https://x.org) [d](#here)\n![e](img/none.png)\n[f](sub)";
        let files = [("docs/x.md", text), ("docs/a.md", ""), ("b.md", ""), ("docs/sub/g.md", "")];
        let findings = check(&tree_of(&files));
        assert_eq!(
            findings,
            [Finding::new(
                "docs/x.md",
                2,
                "the link to docs/img/none.png is dead: correct the path or remove the link"
            )]
        );
    }

    #[test]
    fn unexplained_settings_are_found() {
        let keys = "    key(\"a.b\", Text),\n    unset(\"a.c\", Text),\nconst fn key(name: &str) {}";
        let findings = check(&tree_of(&[(SETTINGS, keys), (EXPLAINED, "| `a.b` | x |")]));
        assert_eq!(findings.len(), 1);
        assert_eq!((findings[0].line, findings[0].message.contains("a.c")), (2, true));
    }
}
