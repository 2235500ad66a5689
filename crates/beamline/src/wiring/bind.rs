//! Binds each part: takes its typed settings, and adds what only this process knows.

use crate::config::{self, Settings};
use crate::hosts::Hosts;
use crate::http::Front;
use crate::secrets;
use anyhow::{Context, Result};
use bus::Bus;
use bus::local::Local;
use bus::nats::Nats;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;

pub async fn bus(settings: &Settings) -> Result<Bus> {
    match &settings.bus {
        config::Bus::Embedded(durability) => Ok(Local::open_with(&settings.data_dir, *durability).await?),
        config::Bus::Nats(nats) => Ok(Nats::connect(nats.as_ref().clone()).await?),
    }
}

pub fn http_front(settings: &Settings) -> Front {
    Front {
        hosts: settings.http.hosts.clone(),
        proxies: settings.http.trusted_proxies.clone(),
    }
}

/// On loopback the operations port can be reached by the browsers of this machine, and so by pages whose name resolves
/// to it: it checks hosts like the HTTP port. Elsewhere its clients are monitors, which use names that only they know.
pub fn ops_front(settings: &Settings, listen: SocketAddr) -> Front {
    let front = http_front(settings);
    if listen.ip().is_loopback() {
        front
    } else {
        Front { hosts: Hosts::any(), ..front }
    }
}

/// `http` is the bound address of the HTTP listener, by which the node appears in the console.
pub async fn cluster(settings: &Settings, http: SocketAddr, bus: Bus) -> Result<cluster::Bound> {
    let mut config = cluster::Config {
        address: http.to_string(),
        token_secret: secrets::load_or_create(&settings.data_dir, secrets::TOKEN_SECRET)?.into_bytes(),
        api_key: secrets::load_or_create(&settings.data_dir, secrets::API_KEY)?,
        ..settings.cluster.clone()
    };

    if let cluster::EngineConfig::Memory { boot_id, .. } = &mut config.engine {
        *boot_id = this_boot_id();
    }

    cluster::bind(config, bus)
        .await
        .context("the cluster node cannot start")
}

/// Identifies the current boot of this machine; empty where the kernel does not tell.
fn this_boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .into()
}

pub async fn worker(settings: &Settings, bus: Bus) -> Result<worker::Bound> {
    worker::bind(settings.worker.clone(), bus)
        .await
        .context("the worker cannot start")
}

pub async fn router(settings: &Settings, bus: Bus) -> Result<router::Bound> {
    router::bind(settings.router.clone(), bus)
        .await
        .context("the router cannot start")
}

pub async fn webapp(settings: &Settings, bus: Bus) -> Result<webapp::Bound> {
    webapp::bind(webapp_config(settings)?, bus)
        .await
        .context("the web app cannot start")
}

/// Also the configuration that `beamline user` works with.
pub fn webapp_config(settings: &Settings) -> Result<webapp::Config> {
    Ok(webapp::Config {
        token_secret: secrets::load_or_create(&settings.data_dir, secrets::TOKEN_SECRET)?.into_bytes(),
        ..settings.webapp.clone()
    })
}

/// Binds the gateway to the socket that the service manager has `given`, otherwise to one of its own.
pub async fn gateway(settings: &Settings, given: Option<UnixListener>, bus: Bus) -> Result<gateway::Bound> {
    let config = gateway_config(settings)?;
    let bound = match given {
        Some(given) => gateway::adopt(config, given, bus).await,
        None => gateway::bind(config, bus).await,
    };
    bound.context("the gateway cannot start")
}

/// Reads the API key anew at each call, so that a reload takes over a changed key.
pub fn gateway_config(settings: &Settings) -> Result<gateway::Config> {
    Ok(gateway::Config {
        api_key: secrets::load_or_create(&settings.data_dir, secrets::API_KEY)?,
        ..settings.gateway.clone()
    })
}
