//! The table of results: Beamline's figure, the peer's, their ratio and the goal.

use std::fmt::Write;
use std::process::Command;

pub struct Report {
    rows: Vec<Row>,
    began: String,
}

struct Row {
    what: String,
    ours: String,
    peer: String,
    ratio: String,
    goal: String,
}

/// One figure with its unit.
#[derive(Clone, Copy)]
pub enum Figure {
    PerSecond(f64),
    Micros(f64),
    Bytes(f64),
}

impl Figure {
    fn value(self) -> f64 {
        match self {
            Self::PerSecond(value) | Self::Micros(value) | Self::Bytes(value) => value,
        }
    }

    fn text(self) -> String {
        match self {
            Self::PerSecond(value) => format!("{}/s", thousands(value)),
            Self::Micros(value) if value >= 100.0 => format!("{value:.0} µs"),
            Self::Micros(value) => format!("{value:.1} µs"),
            Self::Bytes(value) => format!("{} B", thousands(value)),
        }
    }
}

impl Report {
    pub fn new() -> Self {
        let began = format!("load average before: {}", load());
        println!("{began}");
        Self { rows: Vec::new(), began }
    }

    /// Prints and keeps one row. `peer` is a name and a figure; `goal` is free text.
    pub fn row(&mut self, what: &str, ours: Figure, peer: Option<(&str, Figure)>, goal: &str) {
        let row = Row {
            what: what.into(),
            ours: ours.text(),
            peer: peer.map_or("–".into(), |(name, figure)| format!("{} ({name})", figure.text())),
            ratio: peer.map_or("–".into(), |(_, figure)| format!("{:.2}", ours.value() / figure.value())),
            goal: goal.into(),
        };
        println!(
            "{:<58} {:>16}   peer {:<40} ratio {:>6}   goal {}",
            row.what, row.ours, row.peer, row.ratio, row.goal
        );
        self.rows.push(row);
    }

    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "# Benchmarks\n\nWritten by `make bench`: each figure beside a peer's from the same run. \
             A ratio above 1 is good for rates, below 1 for times and bytes.\n\n",
        );
        let _ = writeln!(text, "- commit: {}", output("git", &["describe", "--always", "--dirty"]));
        let _ = writeln!(text, "- date: {}", output("date", &["-u", "+%F %H:%M UTC"]));
        let _ = writeln!(text, "- machine: {}", machine());
        let _ = writeln!(text, "- {}, after: {}\n", self.began, load());
        text.push_str("| what | ours | peer | ratio | goal |\n|---|---|---|---|---|\n");
        for row in &self.rows {
            let _ = writeln!(text, "| {} | {} | {} | {} | {} |", row.what, row.ours, row.peer, row.ratio, row.goal);
        }
        text
    }
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("", |(_, m)| m.trim());
    format!("{cores} cores, {model}; {}", output("uname", &["-sr"]))
}

fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    output.map_or_else(|_| "unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
