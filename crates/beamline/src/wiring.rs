//! Starts the parts on one bus, waits, and drains them in the order the data flows.

use crate::activation::Given;
use crate::alive::Door;
use crate::config::{Layers, Settings};
use crate::health::{self, Health};
use crate::{grpc, http, listen, log, notify, secrets};
use anyhow::{Context, Result, anyhow, ensure};
use bus::Bus;
use std::future::Future;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub mod parts;
mod reload;

/// What the process starts from.
pub struct Start {
    pub layers: Layers,
    pub settings: Settings,
    pub given: Given,
    pub filter: log::Filter,
}

/// Parts that stop together; the stages stop one after the other.
struct Stage {
    name: &'static str,
    cancel: CancellationToken,
    parts: JoinSet<(&'static str, Result<()>)>,
}

impl Stage {
    fn new(name: &'static str) -> Self {
        Self { name, cancel: CancellationToken::new(), parts: JoinSet::new() }
    }

    fn run<F, R>(&mut self, part: &'static str, run: R)
    where
        R: FnOnce(CancellationToken) -> F,
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let run = run(self.cancel.clone());
        self.parts.spawn(async move { (part, run.await) });
    }

    /// The first part that ends; never, when the stage runs none.
    async fn first_end(&mut self) -> Result<()> {
        match self.parts.join_next().await {
            None => std::future::pending().await,
            Some(Ok((part, Ok(())))) => Err(anyhow!("the {part} ended before it was told to")),
            Some(Ok((part, Err(error)))) => Err(error.context(format!("the {part} failed"))),
            Some(Err(panic)) => Err(anyhow!(panic).context(format!("a part of stage {} panicked", self.name))),
        }
    }

    async fn drain(mut self, deadline: Duration) -> bool {
        self.cancel.cancel();
        let drained = tokio::time::timeout(deadline, async {
            while let Some(ended) = self.parts.join_next().await {
                match ended {
                    Ok((part, Ok(()))) => tracing::debug!(part, "drained"),
                    Ok((part, Err(error))) => tracing::error!(part, "failed while draining: {error:#}"),
                    Err(panic) => tracing::error!(stage = self.name, %panic, "panicked while draining"),
                }
            }
        });
        let clean = drained.await.is_ok();
        if !clean {
            tracing::error!(stage = self.name, "not drained within {deadline:?}; ending it");
        }
        clean
    }
}

/// In the order in which the data flows, and so they end.
struct Stages {
    intake: Stage,
    work: Stage,
    pages: Stage,
    nodes: Stage,
    operations: Stage,
}

impl Stages {
    fn new() -> Self {
        Self {
            intake: Stage::new("intake"),
            work: Stage::new("work"),
            pages: Stage::new("pages"),
            nodes: Stage::new("nodes"),
            operations: Stage::new("operations"),
        }
    }

    async fn first_end(&mut self) -> Result<()> {
        tokio::select! {
            ended = self.intake.first_end() => ended,
            ended = self.work.first_end() => ended,
            ended = self.pages.first_end() => ended,
            ended = self.nodes.first_end() => ended,
            ended = self.operations.first_end() => ended,
        }
    }

    /// Whether all ended in time.
    async fn drain(self, deadline: Duration) -> bool {
        let mut clean = true;
        for stage in [self.intake, self.work, self.pages, self.nodes, self.operations] {
            clean &= stage.drain(deadline).await;
        }
        clean
    }
}

pub async fn up(start: Start) -> Result<()> {
    // From here on: a start that waits for a server that is away can be ended too.
    let mut signals = Signals::new()?;
    let mut hangups = signal(SignalKind::hangup())?;
    let Start { layers, settings, given, filter } = start;
    let deadline = settings.values.duration("shutdown.deadline");
    let draining = CancellationToken::new();
    let mut stages = Stages::new();
    notify::status("starting");
    let started = tokio::select! {
        started = parts_up(&settings, given, &mut stages, draining.clone()) => started.map(Some),
        name = signals.next() => { tracing::info!(signal = name, "ended during the start"); Ok(None) }
    };
    let ended = match started {
        Ok(Some(Running { bus, gateway, door, status })) => {
            notify::ready(&status);
            let reload = reload::Reload { layers, settings, filter, bus, gateway, status };
            tokio::select! {
                name = signals.next() => { tracing::info!(signal = name, "draining"); Ok(()) }
                ended = stages.first_end() => {
                    if let Err(error) = &ended {
                        tracing::error!("{error:#}; draining the rest");
                    }
                    ended
                }
                never = reload.run(&mut hangups) => match never {},
                never = notify::watchdog(|| door.answers()) => match never {},
            }
        }
        started => started.map(|_| ()),
    };

    notify::stopping();
    draining.cancel();
    let clean = tokio::select! {
        clean = stages.drain(deadline) => clean,
        name = signals.next() => return Err(anyhow!("{name} again: ended without draining")),
    };
    ended?;
    if clean {
        tracing::info!("drained and stopped");
    }
    if clean {
        Ok(())
    } else {
        Err(anyhow!("a stage was not drained in time"))
    }
}

/// What those who look after a running process need.
struct Running {
    bus: Bus,
    gateway: Option<gateway::Control>,
    door: Door,
    status: String,
}

/// Binds and runs everything; what it has started when it fails is in `stages`.
async fn parts_up(
    settings: &Settings,
    given: Given,
    stages: &mut Stages,
    draining: CancellationToken,
) -> Result<Running> {
    let values = &settings.values;
    ensure!(
        given.gateway.is_none() || settings.has_role("gateway"),
        "the service manager has a socket for the gateway, which is none of our roles"
    );
    let data_dir = values.path("data_dir");
    secrets::data_dir(&data_dir)?;

    let (http_listener, http_address) = listen::bind("http.listen", values.address("http.listen"), given.http)?;
    let (ops_listener, ops_address) = listen::bind("ops.listen", values.address("ops.listen"), given.ops)?;
    let (grpc_listener, grpc_address) = listen::bind("grpc.listen", values.address("grpc.listen"), given.grpc)?;

    let metrics = crate::metrics::install()?;

    let bus = parts::bus(settings, &data_dir).await?;
    tracing::info!(bus = bus.describe(), "bus is up");

    let mut routes = axum::Router::new();
    let mut checks: Vec<(&'static str, health::Check)> = vec![("bus", bus_check(bus.clone()))];
    let (mut socket, mut control) = (None, None);
    let mut sign_in = None;

    // Consumers first, producers last: the first request already finds who serves it.
    if settings.has_role("cluster") {
        let node = parts::cluster(settings, &data_dir, http_address, bus.clone()).await?;
        routes = routes.merge(node.routes());
        let ready = node.ready();
        checks.push((
            "channels",
            Box::new(move || {
                let ready = ready.clone();
                Box::pin(async move { ready.check().await })
            }),
        ));
        stages
            .nodes
            .run("cluster node", |cancel| async move { Ok(node.run(cancel).await?) });
    }
    if settings.has_role("worker") {
        let worker = parts::worker(settings, bus.clone()).await?;
        stages
            .work
            .run("worker", |cancel| async move { Ok(worker.run(cancel).await?) });
    }
    if settings.has_role("router") {
        let router = parts::router(settings, bus.clone()).await?;
        stages
            .work
            .run("router", |cancel| async move { Ok(router.run(cancel).await?) });
    }
    if settings.has_role("webapp") {
        let webapp = parts::webapp(settings, &data_dir, bus.clone()).await?;
        if webapp.is_new().await? {
            // Noted before there is an account: a crash between the two must not leave one that nobody can open.
            let password = secrets::load_or_make(&data_dir, secrets::ADMIN_PASSWORD, webapp::generate_password)?;
            if !webapp
                .create_admin(&password)
                .await
                .context("the first account cannot be made")?
            {
                secrets::remove(&data_dir, secrets::ADMIN_PASSWORD)?;
            }
        }
        sign_in = secrets::read(&data_dir, secrets::ADMIN_PASSWORD).ok();
        let ready = webapp.ready();
        checks.push((
            "database",
            Box::new(move || {
                let ready = ready.clone();
                Box::pin(async move { ready.check().await })
            }),
        ));
        routes = routes.merge(webapp.routes());
        stages
            .pages
            .run("web app", |cancel| async move { Ok(webapp.run(cancel).await?) });
    }
    if settings.has_role("gateway") {
        let gateway = parts::gateway(settings, given.gateway, bus.clone()).await?;
        routes = routes.merge(gateway.routes());
        socket = Some(gateway.socket().to_path_buf());
        control = Some(gateway.control());
        stages
            .intake
            .run("gateway", |cancel| async move { Ok(gateway.run(cancel).await?) });
    }

    let health = Arc::new(Health {
        checks,
        metrics: metrics.clone(),
        metrics_public: values.flag("ops.metrics_public"),
        draining: draining.clone(),
    });
    let routes = routes.merge(health::http_routes(health.clone()));
    let (max, drain) = (values.count("http.max_connections"), parts::drain_timeout(values));
    let front = parts::http_front(values);
    stages.nodes.run("HTTP listener", |cancel| async move {
        http::serve(http_listener, routes, front, max, drain, cancel).await;
        Ok(())
    });
    let front = parts::ops_front(values, ops_address);
    stages.operations.run("operations listener", |cancel| async move {
        http::serve(ops_listener, health::ops_routes(health), front, 64, drain, cancel).await;
        Ok(())
    });
    stages
        .operations
        .run("gRPC listener", |cancel| grpc::serve(grpc_listener, draining, cancel));
    stages
        .operations
        .run("metrics upkeep", |cancel| upkeep(metrics, cancel));

    let ready = serde_json::json!({
        "http": http_address.to_string(), "ops": ops_address.to_string(), "grpc": grpc_address.to_string(),
        "socket": socket, "pid": std::process::id(),
    });
    writeln!(std::io::stdout(), "ready {ready}")?;
    std::io::stdout().flush()?;
    greet(settings, http_address, socket.as_deref(), sign_in.as_deref());
    let status = format!("{} on http://{http_address}", values.list("roles").join(", "));
    let door = socket.map_or(Door::Operations(ops_address), Door::Gateway);
    Ok(Running { bus, gateway: control, door, status })
}

/// SIGTERM and Ctrl-C.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

fn bus_check(bus: Bus) -> health::Check {
    Box::new(move || {
        let bus = bus.clone();
        Box::pin(async move { bus.health().await.map_err(|e| e.to_string()) })
    })
}

/// Histograms hold their samples until somebody drains them.
async fn upkeep(metrics: metrics_exporter_prometheus::PrometheusHandle, cancel: CancellationToken) -> Result<()> {
    let mut ticks = tokio::time::interval(Duration::from_secs(5));
    loop {
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            _ = ticks.tick() => metrics.run_upkeep(),
        }
    }
}

/// For the person who started it, on stderr; programs read the `ready` line.
fn greet(
    settings: &Settings,
    http: std::net::SocketAddr,
    socket: Option<&std::path::Path>,
    admin_password: Option<&str>,
) {
    if settings.values.text("log.format") == "json" {
        return;
    }
    let mut lines = vec![format!("beamline {} is up", env!("CARGO_PKG_VERSION"))];
    if settings.has_role("webapp") {
        lines.push(format!("  chat      http://{http}/"));
        lines.push(format!("  console   http://{http}/console"));
        match admin_password {
            // Logs are kept and read by many.
            Some(_) if !std::io::stderr().is_terminal() => {
                let file = settings.values.path("data_dir").join(secrets::ADMIN_PASSWORD);
                lines.push(format!("  sign in   name admin, password in {}", file.display()));
            }
            Some(password) => lines.push(format!("  sign in   name admin, password {password}")),
            None => lines.push("  sign in   with your account".into()),
        }
        if settings.values.flag("auth.signup") {
            lines.push("            or create an account on the page".into());
        }
    }
    if settings.has_role("cluster") && !settings.has_role("webapp") {
        lines.push(format!("  WebSocket   ws://{http}/connection/websocket"));
        lines.push(format!("  server API  http://{http}/api/publish"));
    }
    if let Some(socket) = socket {
        // As it was typed, so that the lines can be copied.
        let program = std::env::args().next().unwrap_or_else(|| "beamline".into());
        let socket = match settings.values.source("gateway.socket") {
            Some(crate::config::Source::Default) => String::new(),
            _ => format!(" --socket {}", socket.display()),
        };
        let submit = format!("    {program} submit{socket}");
        lines.push("  try".into());
        lines.push(format!("{submit} --type echo --wait stream '{{\"prompt\":\"hello from a program\"}}'"));
        lines.push(format!("{submit} --type ops --wait result '{{\"prompt\":\"status\"}}'"));
    }
    let _ = writeln!(std::io::stderr(), "\n{}\n", lines.join("\n"));
}
