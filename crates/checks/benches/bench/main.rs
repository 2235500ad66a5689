//! Runs the benchmarks of `make bench`: Beamline's figures beside a peer's, from the same run on the same machine.
//!
//! Arguments select benchmarks by name (`gateway`, `decide`, `fanout`, `histories`, `reopen`, `memory`, `console`,
//! `tasks`). `--write FILE` also writes the table to a file.

mod beamline;
mod console;
mod decide;
mod fanout;
mod gateway;
mod histories;
mod memory;
mod reopen;
mod report;
mod sockets;
mod tasks;

use report::Report;

type Result<T = (), E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// The same allocator as in the binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result {
    let mut names = Vec::new();
    let mut file = None;
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--write" => file = Some(args.next().ok_or("--write needs a file name")?),
            _ => names.push(arg),
        }
    }

    let chosen = |name: &str| names.is_empty() || names.iter().any(|known| known == name);
    // An error means that a provider is already installed, which serves as well.
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;

    let mut report = Report::new();
    if chosen("decide") {
        decide::run(&mut report)?;
    }
    if chosen("gateway") {
        runtime.block_on(gateway::run(&mut report))?;
    }
    if chosen("tasks") {
        runtime.block_on(tasks::run(&mut report))?;
    }
    if chosen("fanout") {
        runtime.block_on(fanout::run(&mut report))?;
    }
    if chosen("histories") {
        runtime.block_on(histories::run(&mut report))?;
    }
    if chosen("reopen") {
        runtime.block_on(reopen::run(&mut report))?;
    }
    if chosen("memory") {
        runtime.block_on(memory::run(&mut report))?;
    }
    if chosen("console") {
        runtime.block_on(console::run(&mut report))?;
    }

    if let Some(file) = file {
        // Keep the sections that people wrote below the table.
        let before = std::fs::read_to_string(&file).unwrap_or_default();
        let kept = before.find("\n## ").map_or("", |place| &before[place..]);
        std::fs::write(file, report.markdown() + kept)?;
    }
    Ok(())
}
