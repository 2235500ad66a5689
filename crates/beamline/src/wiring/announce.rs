//! Announces that the process is ready, and its addresses: to the parent process, the service manager and the terminal.

use crate::config::{LogFormat, Role, Settings};
use crate::log::Log;
use crate::secrets;
use anyhow::Result;
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The bound addresses of the listeners; the settings may say port 0.
pub struct Addresses {
    pub http: SocketAddr,
    pub ops: SocketAddr,
    pub grpc: SocketAddr,
}

/// The line `ready {…}` on stdout, for the parent process.
#[derive(Debug, Serialize)]
pub struct Ready {
    grpc: SocketAddr,
    http: SocketAddr,
    ops: SocketAddr,
    pid: u32,
    /// Path of the gateway's socket; null without a gateway.
    socket: Option<PathBuf>,
}

impl Ready {
    pub fn new(addresses: &Addresses, socket: Option<PathBuf>) -> Self {
        Self {
            grpc: addresses.grpc,
            http: addresses.http,
            ops: addresses.ops,
            pid: std::process::id(),
            socket,
        }
    }
}

pub fn ready(ready: &Ready) -> Result<()> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "ready {}", serde_json::to_string(ready)?)?;
    Ok(stdout.flush()?)
}

/// One line for the service manager.
pub fn status(settings: &Settings, http: SocketAddr) -> String {
    let roles: Vec<String> = settings.roles.iter().map(Role::to_string).collect();
    format!("{} on http://{http}", roles.join(", "))
}

/// Greets the person who started the process, on stderr.
pub fn greet(settings: &Settings, log: &Log, http: SocketAddr, socket: Option<&Path>, admin_password: Option<&str>) {
    if settings.log_format == LogFormat::Json {
        return;
    }

    let mut lines = vec![format!("beamline {} is up", env!("CARGO_PKG_VERSION"))];
    if settings.has_role(Role::Webapp) {
        lines.extend(pages(settings, http, admin_password));
    } else if settings.has_role(Role::Cluster) {
        lines.push(format!("  WebSocket   ws://{http}/connection/websocket"));
        lines.push(format!("  server API  http://{http}/api/publish"));
    }
    if let Some(socket) = socket {
        lines.extend(commands_to_try(settings, socket));
    }
    log.say(&format!("\n{}\n\n", lines.join("\n")));
}

fn pages(settings: &Settings, http: SocketAddr, admin_password: Option<&str>) -> Vec<String> {
    let mut lines = vec![format!("  chat      http://{http}/"), format!("  console   http://{http}/console")];
    lines.push(match admin_password {
        // A stderr that is not a terminal usually goes to a log, which others may read.
        Some(_) if !std::io::stderr().is_terminal() => {
            let file = settings.data_dir.join(secrets::ADMIN_PASSWORD);
            format!("  sign in   name admin, password in {}", file.display())
        }
        Some(password) => format!("  sign in   name admin, password {password}"),
        None => "  sign in   with your account".into(),
    });
    if settings.webapp.signup {
        lines.push("            or create an account on the page".into());
    }
    lines
}

fn commands_to_try(settings: &Settings, socket: &Path) -> Vec<String> {
    // The program's name as it was typed, so that the lines can be copied.
    let program = std::env::args().next().unwrap_or_else(|| "beamline".into());
    let socket = if settings.is_default("gateway.socket") {
        String::new()
    } else {
        format!(" --socket {}", socket.display())
    };
    let submit = format!("    {program} submit{socket}");
    vec![
        "  try".into(),
        format!("{submit} --type echo --wait stream '{{\"prompt\":\"hello from a program\"}}'"),
        format!("{submit} --type ops --wait result '{{\"prompt\":\"status\"}}'"),
    ]
}
