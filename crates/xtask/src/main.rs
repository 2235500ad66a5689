//! Repository checks: `cargo run -p xtask -- tidy`, which is also one of the tests, and `-- protocol`.

mod tidy;
mod tree;

use anyhow::{Result, bail};
use std::path::Path;
use tree::Tree;

const USAGE: &str = "usage: cargo run -p xtask -- COMMAND

  tidy       check the rules that the compiler does not: dependencies, forbidden tokens, documents, licences
  protocol   stamp docs/protocol.md after reviewing it for a change of crates/wire";

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
        bail!("tidy found {} problem(s)", findings.len());
    }
    println!("tidy: no findings");
    Ok(())
}

fn protocol(root: &Path) -> Result<()> {
    let stamped = tidy::protocol::stamp(&Tree::read(root)?)?;
    std::fs::write(root.join(tidy::protocol::DOCUMENT), stamped)?;
    println!("stamped {} with the hash of the current crates/wire", tidy::protocol::DOCUMENT);
    Ok(())
}
