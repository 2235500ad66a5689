//! The `beamline` binary: parses the command line and runs the command.

mod activation;
mod cli;
mod commands;
mod config;
mod grpc;
mod health;
mod hosts;
mod http;
mod listen;
mod log;
mod metrics;
mod notify;
mod proxies;
mod secrets;
mod self_check;
mod wiring;

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// The exit code for bad settings: `EX_USAGE` of sysexits(3), after which the systemd unit does not restart the
/// process.
const EXIT_SETTINGS: u8 = 64;

/// With many small messages, the system's allocator took half of the time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long blocking tasks may delay the exit of the process after the drain.
const RUNTIME_SHUTDOWN_MAX: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    // Fails only if a provider is installed already.
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    run(cli.command)
}

fn run(command: cli::Command) -> ExitCode {
    let done = match command {
        cli::Command::Up(setting) => return up(setting),
        cli::Command::Submit(args) => in_runtime(commands::submit::submit(args)),
        cli::Command::Ping(args) => in_runtime(commands::submit::ping(args)),
        cli::Command::Token(args) => commands::credentials::token(args),
        cli::Command::ApiKey(args) => commands::credentials::api_key(args),
        cli::Command::OperatorToken(args) => commands::credentials::operator_token(args),
        cli::Command::User(cli::User::Add { name, data_dir }) => in_runtime(commands::user::add(name, data_dir)),
        cli::Command::Policy(cli::Policy::Lint { dir }) => commands::policy::lint(dir),
        cli::Command::Policy(cli::Policy::Delete { name, policies, vanished }) => {
            commands::policy::delete(&name, policies, vanished)
        }
        cli::Command::Soak(cli::Soak::Gateway(args)) => in_runtime(commands::soak::gateway(args)),
        cli::Command::Config(cli::Config::Show(setting)) => show(setting),
        cli::Command::Config(cli::Config::Check(setting)) => check(setting),
    };
    exit_code(done, &mut std::io::stderr())
}

/// Reports an error to `to`, and returns the exit code.
fn exit_code(done: anyhow::Result<()>, to: &mut impl Write) -> ExitCode {
    let (text, code) = match done {
        Ok(()) => return ExitCode::SUCCESS,
        Err(error) if error.is::<config::Problems>() => (format!("beamline: {error}"), EXIT_SETTINGS.into()),
        // The reader closed the pipe early, as `head` does, which is not a failure.
        Err(error) if is_broken_pipe(&error) => return ExitCode::SUCCESS,
        Err(error) => (format!("beamline: {error:#}\n"), ExitCode::FAILURE),
    };
    // If stderr cannot be written, the exit code is all that is left.
    let _ = to.write_all(text.as_bytes());
    code
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn up(setting: cli::Setting) -> ExitCode {
    let (start, writer) = match prepare(setting) {
        Ok(prepared) => prepared,
        Err(error) => return exit_code(Err(error), &mut std::io::stderr()),
    };
    let log = start.log.clone();
    let done = serve(start);

    log.report_missing();
    // Through the log's queue, because a stderr that takes nothing must not hold up the exit.
    exit_code(done, &mut writer.queue().clone())
}

/// Everything that comes before the first thread of the runtime.
fn prepare(setting: cli::Setting) -> anyhow::Result<(wiring::Start, log::Writer)> {
    let layers = setting.into_layers();
    let settings = config::load(&layers)?;

    // Removes variables from the environment, which is safe only before any thread is started.
    let given = activation::Given::take(layers.environment.get("LISTEN_FDNAMES").map(String::as_str))?;
    let (log, writer) = log::init(&settings)?;
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    Ok((wiring::Start { layers, settings, given, log }, writer))
}

fn serve(start: wiring::Start) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let done = runtime.block_on(wiring::up(start));
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN_MAX);
    done
}

fn show(setting: cli::Setting) -> anyhow::Result<()> {
    print!("{}", config::load(&setting.into_layers())?.show());
    Ok(())
}

fn check(setting: cli::Setting) -> anyhow::Result<()> {
    let settings = config::load(&setting.into_layers())?;
    for warning in &settings.warnings {
        eprintln!("beamline: {warning}");
    }

    match &settings.file {
        Some(file) => println!("{}: ok", file.display()),
        None => println!("no settings file; the defaults and the environment are ok"),
    }
    Ok(())
}

fn in_runtime(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(command)
}
