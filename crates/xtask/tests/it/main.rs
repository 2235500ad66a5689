//! Tests of the scripts and of the files in deploy/, as their users run and read them.

mod advisories;
mod tools;
mod units;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("xtask is a folder of crates/")
        .into()
}

/// A temporary home directory with a PATH that holds only the given programs.
struct Machine {
    dir: tempfile::TempDir,
}

struct Output {
    code: Option<i32>,
    text: String,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        Self { dir }
    }

    /// Adds a program to PATH that runs this line of shell.
    fn with(self, name: &str, script: &str) -> Self {
        self.put(&format!("bin/{name}"), script);
        self
    }

    /// Adds such a program at a path in the home directory.
    fn put(&self, path: &str, script: &str) {
        let path = self.dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Adds the real programs of this machine to PATH.
    fn with_real(self, names: &[&str]) -> Self {
        for name in names {
            let found = ["/usr/bin", "/bin", "/usr/local/bin"]
                .iter()
                .map(|dir| Path::new(dir).join(name));
            let program = found
                .into_iter()
                .find(|path| path.exists())
                .unwrap_or_else(|| panic!("{name} is not installed"));
            symlink(program, self.dir.path().join("bin").join(name)).unwrap();
        }
        self
    }

    fn run(&self, program: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(root()).env_clear();
        command
            .env("PATH", self.dir.path().join("bin"))
            .env("HOME", self.dir.path())
            .envs(variables.iter().copied());
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        Output { code: output.status.code(), text: String::from_utf8(text).unwrap() }
    }

    fn exists(&self, path: &str) -> bool {
        self.dir.path().join(path).exists()
    }
}
