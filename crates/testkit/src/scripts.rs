//! Scripts of clients that we did not write, in a folder of `tests/` with what they need.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

const DEADLINE: Duration = Duration::from_secs(120);

pub struct Scripts {
    folder: PathBuf,
}

impl Scripts {
    /// Those in the folder `tests/<name>` of the repository.
    pub fn of(name: &str) -> Self {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests");
        Self { folder: tests.join(name) }
    }

    /// Runs the command, if the folder lacks what it installs.
    pub async fn install(&self, installed: &str, command: &mut Command) {
        if !self.folder.join(installed).is_dir() {
            self.run(command).await;
        }
    }

    /// Installs the packages that `package-lock.json` names.
    pub async fn npm_ci(&self) {
        let arguments = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"];
        self.install("node_modules", Command::new("npm").args(arguments)).await;
    }

    /// Runs the command in the folder. Panics with its output if it fails.
    pub async fn run(&self, command: &mut Command) {
        let child = command
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(DEADLINE, child)
            .await
            .expect("the command ends in time");
        let output = output.unwrap_or_else(|error| panic!("cannot start {command:?}: {error}; install it"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{command:?}\n{}\n{}", text(&output.stdout), text(&output.stderr));
    }
}
