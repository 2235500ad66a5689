//! Starts the process: binds the ports and the parts, and runs them in their stages.

use super::announce::{self, Addresses, Ready};
use super::bind;
use super::stages::Stages;
use crate::activation::Given;
use crate::config::{Role, Settings};
use crate::health::{self, Health};
use crate::log::Log;
use crate::self_check::Endpoint;
use crate::{grpc, http, listen, metrics, secrets};
use anyhow::{Context, Result, ensure};
use axum::Router;
use bus::Bus;
use metrics_exporter_prometheus::PrometheusHandle;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Limit of open connections to the operations port, whose clients are monitors and scrapers.
const OPS_CONNECTIONS_MAX: usize = 64;
/// Interval between upkeeps of metrics and log. Histograms keep every sample until the next upkeep.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Handles on the running process, for signals and the watchdog.
pub struct Running {
    pub bus: Bus,
    pub gateway: Option<gateway::Control>,
    /// Where the watchdog's self-check connects.
    pub endpoint: Endpoint,
    /// One line for the service manager.
    pub status: String,
}

/// Starts the whole process. If it fails, the parts already running are in `stages`, for the caller to drain.
pub async fn start(
    settings: &Settings,
    given: Given,
    log: &Log,
    stages: &mut Stages,
    draining: CancellationToken,
) -> Result<Running> {
    ensure!(
        given.gateway.is_none() || settings.has_role(Role::Gateway),
        "the service manager has a socket for the gateway, but this process does not run it: add gateway to roles, or \
         disable the socket unit"
    );
    secrets::data_dir(&settings.data_dir)?;

    let ports = Ports::bind(settings, given.http, given.ops, given.grpc)?;
    let addresses = ports.addresses();
    let metrics = metrics::install()?;
    let bus = bind::bus(settings).await?;
    tracing::info!(bus = bus.describe(), "bus is up");

    // Consumers start first and producers last, so that the first request finds every part it needs.
    let mut parts = Parts::new(settings, bus, stages);
    parts.start_cluster(addresses.http).await?;
    parts.start_worker().await?;
    parts.start_router().await?;
    parts.start_webapp().await?;
    parts.start_gateway(given.gateway).await?;
    let Parts { bus, routes, checks, notices, gateway, admin_password, .. } = parts;

    let metrics_public = settings.metrics_public;
    let health = Arc::new(Health { checks, notices, metrics, metrics_public, draining });
    ports.serve(settings, log, stages, routes, health);

    let (socket, gateway) = gateway.unzip();
    announce::ready(&Ready::new(&addresses, socket.clone()))?;
    announce::greet(settings, log, addresses.http, socket.as_deref(), admin_password.as_deref());
    Ok(Running {
        bus,
        gateway,
        endpoint: socket.map_or(Endpoint::Operations(addresses.ops), Endpoint::Gateway),
        status: announce::status(settings, addresses.http),
    })
}

/// The bound TCP listeners, which do not accept yet.
struct Ports {
    http: (TcpListener, SocketAddr),
    ops: (TcpListener, SocketAddr),
    grpc: (TcpListener, SocketAddr),
}

impl Ports {
    /// Adopts the listeners inherited from the service manager, and binds the others.
    fn bind(
        settings: &Settings,
        http: Option<std::net::TcpListener>,
        ops: Option<std::net::TcpListener>,
        grpc: Option<std::net::TcpListener>,
    ) -> Result<Self> {
        Ok(Self {
            http: listen::bind("http.listen", settings.http.listen, http)?,
            ops: listen::bind("ops.listen", settings.ops_listen, ops)?,
            grpc: listen::bind("grpc.listen", settings.grpc_listen, grpc)?,
        })
    }

    fn addresses(&self) -> Addresses {
        Addresses { http: self.http.1, ops: self.ops.1, grpc: self.grpc.1 }
    }

    /// Begins to accept connections. The HTTP port stops accepting when the node begins to disconnect its clients;
    /// metrics and health are served to the end.
    fn serve(self, settings: &Settings, log: &Log, stages: &mut Stages, routes: Router, health: Arc<Health>) {
        let drain = settings.drain_timeout();
        let (metrics, draining) = (health.metrics.clone(), health.draining.clone());

        let (listener, _) = self.http;
        let (front, max) = (bind::http_front(settings), settings.http.max_connections);
        let routes = routes.merge(health::http_routes(health.clone()));
        stages.nodes.run("HTTP listener", |cancel| async move {
            http::serve(listener, routes, front, max, drain, cancel).await;
            Ok(())
        });

        let (listener, address) = self.ops;
        let front = bind::ops_front(settings, address);
        let routes = health::ops_routes(health);
        stages.operations.run("operations listener", |cancel| async move {
            http::serve(listener, routes, front, OPS_CONNECTIONS_MAX, drain, cancel).await;
            Ok(())
        });

        let (listener, _) = self.grpc;
        stages
            .operations
            .run("gRPC listener", |cancel| grpc::serve(listener, draining, cancel));
        let log = log.clone();
        stages.operations.run("upkeep", |cancel| upkeep(metrics, log, cancel));
    }
}

/// Starts the parts of the roles, and collects their routes, checks and handles.
struct Parts<'a> {
    settings: &'a Settings,
    bus: Bus,
    stages: &'a mut Stages,
    routes: Router,
    checks: Vec<(&'static str, health::Check)>,
    notices: Vec<(&'static str, health::Notice)>,
    /// The socket that the gateway listens on, and its handle.
    gateway: Option<(std::path::PathBuf, gateway::Control)>,
    admin_password: Option<String>,
}

impl<'a> Parts<'a> {
    fn new(settings: &'a Settings, bus: Bus, stages: &'a mut Stages) -> Self {
        let mut parts = Self {
            settings,
            bus: bus.clone(),
            stages,
            routes: Router::new(),
            checks: Vec::new(),
            notices: Vec::new(),
            gateway: None,
            admin_password: None,
        };
        parts.check("bus", move || {
            let bus = bus.clone();
            async move { bus.health().await.map_err(|e| e.to_string()) }
        });
        parts
    }

    /// Adds a condition of readiness.
    fn check<F>(&mut self, name: &'static str, check: impl Fn() -> F + Send + Sync + 'static)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.checks.push((name, Box::new(move || Box::pin(check()))));
    }

    async fn start_cluster(&mut self, http: SocketAddr) -> Result<()> {
        if !self.settings.has_role(Role::Cluster) {
            return Ok(());
        }
        let node = bind::cluster(self.settings, http, self.bus.clone()).await?;
        self.routes = std::mem::take(&mut self.routes).merge(node.routes());

        let ready = node.ready();
        self.check("channels", move || {
            let ready = ready.clone();
            async move { ready.check().await }
        });

        self.stages
            .nodes
            .run("cluster node", |cancel| async move { Ok(node.run(cancel).await?) });
        Ok(())
    }

    async fn start_worker(&mut self) -> Result<()> {
        if !self.settings.has_role(Role::Worker) {
            return Ok(());
        }
        let worker = bind::worker(self.settings, self.bus.clone()).await?;
        self.stages
            .work
            .run("worker", |cancel| async move { Ok(worker.run(cancel).await?) });
        Ok(())
    }

    async fn start_router(&mut self) -> Result<()> {
        if !self.settings.has_role(Role::Router) {
            return Ok(());
        }
        let router = bind::router(self.settings, self.bus.clone()).await?;
        let stores = router.stores();
        self.notices.push(("stores", Box::new(move || stores.report())));
        self.stages
            .work
            .run("router", |cancel| async move { Ok(router.run(cancel).await?) });
        Ok(())
    }

    async fn start_webapp(&mut self) -> Result<()> {
        if !self.settings.has_role(Role::Webapp) {
            return Ok(());
        }
        let webapp = bind::webapp(self.settings, self.bus.clone()).await?;
        self.admin_password = admin_password(self.settings, &webapp).await?;

        self.routes = std::mem::take(&mut self.routes).merge(webapp.routes());

        let ready = webapp.ready();
        self.check("database", move || {
            let ready = ready.clone();
            async move { ready.check().await }
        });

        self.stages
            .pages
            .run("web app", |cancel| async move { Ok(webapp.run(cancel).await?) });
        Ok(())
    }

    async fn start_gateway(&mut self, given: Option<std::os::unix::net::UnixListener>) -> Result<()> {
        if !self.settings.has_role(Role::Gateway) {
            return Ok(());
        }
        let gateway = bind::gateway(self.settings, given, self.bus.clone()).await?;
        self.routes = std::mem::take(&mut self.routes).merge(gateway.routes());
        self.gateway = Some((gateway.socket().to_path_buf(), gateway.control()));
        self.stages
            .intake
            .run("gateway", |cancel| async move { Ok(gateway.run(cancel).await?) });
        Ok(())
    }
}

/// Creates the first account of a new database. Returns its password for as long as the file with it exists.
async fn admin_password(settings: &Settings, webapp: &webapp::Bound) -> Result<Option<String>> {
    let data_dir = &settings.data_dir;
    if webapp.is_new().await? {
        // The password is stored before the account exists: a crash between the two must not leave an account that
        // nobody can open.
        let password = secrets::load_or_make(data_dir, secrets::ADMIN_PASSWORD, webapp::generate_password)?;
        let created = webapp
            .create_admin(&password)
            .await
            .context("cannot create the first account")?;
        if !created {
            secrets::remove(data_dir, secrets::ADMIN_PASSWORD)?;
        }
    }
    Ok(secrets::read(data_dir, secrets::ADMIN_PASSWORD).ok())
}

async fn upkeep(metrics: PrometheusHandle, log: Log, cancel: CancellationToken) -> Result<()> {
    let mut ticks = tokio::time::interval(UPKEEP_EVERY);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            _ = ticks.tick() => {}
        }
        metrics.run_upkeep();
        log.report_missing();
    }
}
