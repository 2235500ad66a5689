//! Reads the text files of the repository for the rules.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Directories that hold dependencies, build output or generated data.
const SKIPPED: &[&str] = &["target", "node_modules", "site-packages", "dist", "data", "corpus", "artifacts"];
/// Extensions of the files that rules read. Pictures, lock files and the like are skipped.
const TEXT: &[&str] = &[
    "rs", "ts", "tsx", "css", "html", "mjs", "js", "json", "toml", "md", "sh", "proto", "yaml", "yml", "sql", "service",
];

pub struct Tree {
    /// Sorted by path.
    pub files: Vec<File>,
}

pub struct File {
    /// Relative to the root, with `/`.
    pub path: String,
    pub text: String,
}

/// The root of the repository that the command runs in. It may differ from the one that built this binary, because
/// checkouts share target directories.
pub fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest)
        .ancestors()
        .nth(2)
        .expect("xtask is a folder of crates/")
        .into()
}

impl Tree {
    pub fn read(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        read(root, root, &mut files)?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Self { files })
    }

    pub fn file(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Files below `folder` (which ends with `/`) that have this extension.
    pub fn under<'a>(&'a self, folder: &'a str, extension: &'a str) -> impl Iterator<Item = &'a File> {
        self.files.iter().filter(move |file| {
            file.path.starts_with(folder)
                && file
                    .path
                    .rsplit_once('.')
                    .is_some_and(|(_, of_file)| of_file == extension)
        })
    }
}

fn read(root: &Path, folder: &Path, files: &mut Vec<File>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        // Do not follow symbolic links: they may point outside of the repository.
        let kind = entry.file_type()?;
        if kind.is_dir() && !SKIPPED.contains(&&*name) && (!name.starts_with('.') || name == ".ci") {
            read(root, &path, files)?;
        } else if kind.is_file() && is_text(&name) {
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let path = path.strip_prefix(root)?.to_string_lossy().replace('\\', "/");
            files.push(File { path, text });
        }
    }
    Ok(())
}

fn is_text(name: &str) -> bool {
    match name.rsplit_once('.') {
        Some((_, extension)) => TEXT.contains(&extension) && name != "package-lock.json",
        None => matches!(name, "Makefile" | "run"),
    }
}

impl File {
    /// Lines of code, numbered from 1, without comments and test code.
    pub fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let mut tests = if is_test(&self.path) {
            Tests::Whole
        } else {
            Tests::Outside
        };
        self.text.lines().enumerate().filter_map(move |(index, line)| {
            // Test code is recognized by layout: rustfmt puts `#[cfg(test)]` and the closing brace in the first column.
            tests = match tests {
                Tests::Outside if line == "#[cfg(test)]" => Tests::Announced,
                Tests::Announced if line.starts_with("#[") => Tests::Announced,
                Tests::Announced if line.ends_with('{') => Tests::Inside,
                Tests::Announced => Tests::Ended,
                Tests::Inside if line == "}" => Tests::Ended,
                Tests::Ended => Tests::Outside,
                other => other,
            };
            // A second test block may follow the first one immediately.
            if matches!(tests, Tests::Outside) && line == "#[cfg(test)]" {
                tests = Tests::Announced;
            }

            matches!(tests, Tests::Outside).then(|| (index + 1, without_comment(line)))
        })
    }
}

#[derive(Clone, Copy)]
enum Tests {
    Outside,
    Announced,
    Inside,
    /// On the line that closes the block.
    Ended,
    Whole,
}

/// Whether only tests and developers use this file.
pub fn is_test(path: &str) -> bool {
    let dev = ["crates/testkit/", "crates/xtask/", "fuzz/"];
    dev.iter().any(|folder| path.starts_with(folder))
        || path.contains("/tests/")
        || path.contains("/benches/")
        || path.ends_with("/tests.rs")
        || path.ends_with("/build.rs")
}

fn without_comment(line: &str) -> &str {
    let comment = line.match_indices("//").find(|(at, _)| {
        let before = &line[..*at];
        // Within a string literal, as in a URL, the number of quotes before is odd.
        before.bytes().filter(|byte| *byte == b'"').count() % 2 == 0
    });
    comment.map_or(line, |(at, _)| &line[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_skips_comments_and_tests() {
        let text = "//! about\nuse a; // b\nlet url = \"http://x\";\n#[cfg(test)]\nmod tests {\n    hidden\n}\nseen\n\
                    #[cfg(test)]\nmod more;\nend";
        let file = File { path: "crates/a/src/lib.rs".into(), text: text.into() };
        let code: Vec<_> = file.code().collect();
        assert_eq!(code, [(1, ""), (2, "use a; "), (3, "let url = \"http://x\";"), (8, "seen"), (11, "end")]);

        let file = File { path: "crates/a/tests/it/main.rs".into(), text: text.into() };
        assert_eq!(file.code().count(), 0);
    }

    #[test]
    fn build_output_and_hidden_files_are_skipped() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["a.rs", "target/b.rs", ".git/c.toml", "d/e.md", "d/f.png", ".ci/run"] {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }

        let tree = Tree::read(dir.path()).unwrap();
        let paths: Vec<_> = tree.files.iter().map(|file| &*file.path).collect();
        assert_eq!(paths, [".ci/run", "a.rs", "d/e.md"]);
    }
}
