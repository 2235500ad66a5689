//! What the repository demands of itself: `cargo run -p xtask -- tidy` (part of the tests), `-- protocol`.

mod tidy;
mod tree;

use anyhow::{Result, bail};
use std::path::Path;
use tree::Tree;

const USAGE: &str = "usage: cargo run -p xtask -- COMMAND

  tidy       check what compilers don't: dependency directions, absences, documents
  protocol   note in docs/protocol.md that it was read again after a change of the wire";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let root = tree::root();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tidy"] => report(&tidy::check(&Tree::read(&root)?)?),
        ["protocol"] => protocol(&root),
        _ => bail!("{USAGE}"),
    }
}

fn report(findings: &[tidy::Finding]) -> Result<()> {
    for finding in findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} to tidy", findings.len());
    }
    println!("tidy");
    Ok(())
}

fn protocol(root: &Path) -> Result<()> {
    let stamped = tidy::protocol::stamp(&Tree::read(root)?)?;
    std::fs::write(root.join(tidy::protocol::DOCUMENT), stamped)?;
    println!("{} is stamped with the wire as it is now", tidy::protocol::DOCUMENT);
    Ok(())
}
