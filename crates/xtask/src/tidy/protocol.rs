//! Checks that docs/protocol.md was reviewed after each change of `wire`: it ends with a hash of the crate's sources.

use super::Finding;
use crate::tree::Tree;
use anyhow::{Context, Result};
use sha1::{Digest, Sha1};

pub const DOCUMENT: &str = "docs/protocol.md";
const SOURCES: &str = "crates/wire/";

pub fn check(tree: &Tree) -> Vec<Finding> {
    let Some(document) = tree.file(DOCUMENT) else {
        return vec![Finding::new(DOCUMENT, 0, "this document is missing: client authors rely on it, so write it")];
    };
    if document.text.lines().last() == Some(&mark(tree)) {
        return Vec::new();
    }
    let message = "crates/wire has changed: update this document, then run `cargo run -p xtask -- protocol`";
    vec![Finding::new(DOCUMENT, document.text.lines().count(), message)]
}

/// Returns the document with the mark of the current `wire`.
pub fn stamp(tree: &Tree) -> Result<String> {
    let document = tree.file(DOCUMENT).with_context(|| format!("{DOCUMENT} is missing"))?;
    let lines = document.text.lines().filter(|line| !line.starts_with("<!-- wire: "));
    let text = lines.collect::<Vec<_>>().join("\n");
    Ok(format!("{}\n\n{}\n", text.trim_end(), mark(tree)))
}

/// A hash of the code and of `.proto` messages. Comments, layout and tests do not count.
fn mark(tree: &Tree) -> String {
    let mut hash = Sha1::new();
    let sources = tree.under(SOURCES, "rs").chain(tree.under(SOURCES, "proto"));
    for file in sources {
        hash.update(&file.path);
        // Hash word by word, so that reformatting does not change the mark.
        let words = file.code().flat_map(|(_, line)| line.split_whitespace());
        words.for_each(|word| hash.update(word));
    }
    format!("<!-- wire: {} -->", hex::encode(hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::super::tree_of;
    use super::*;

    #[test]
    fn change_of_the_wire_requires_a_new_stamp() {
        let source = "crates/wire/src/a.rs";
        let stamped = stamp(&tree_of(&[(source, "const A: u8 = 1;"), (DOCUMENT, "# Protocol\n")])).unwrap();
        for (text, findings) in [
            ("const A: u8 = 1;", 0),
            ("const A: u8 =\n    1; // one", 0),
            ("const A: u8 = 1;\n#[cfg(test)]\nmod tests {\n    fn a() {}\n}", 0),
            ("const A: u8 = 2;", 1),
        ] {
            assert_eq!(check(&tree_of(&[(source, text), (DOCUMENT, &stamped)])).len(), findings, "{text}");
        }

        assert_eq!(check(&tree_of(&[])).len(), 1);
        let again = stamp(&tree_of(&[(source, "const A: u8 = 1;"), (DOCUMENT, &stamped)])).unwrap();
        assert_eq!(again, stamped);
    }
}
