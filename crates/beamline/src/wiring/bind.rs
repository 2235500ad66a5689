//! Binds each part: takes its typed settings and adds the values known only at run time.

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
        config::Bus::Embedded(durability) => {
            Ok(Local::open_with(&settings.data_dir, *durability, settings.sizes.clone()).await?)
        }
        config::Bus::Nats(nats) => Ok(Nats::connect(nats.as_ref().clone()).await?),
    }
}

pub fn http_front(settings: &Settings) -> Front {
    Front {
        hosts: settings.http.hosts.clone(),
        proxies: settings.http.trusted_proxies.clone(),
    }
}

/// On loopback, browsers on this machine can reach the operations port, so it checks hosts like the HTTP port (DNS
/// rebinding). Elsewhere its clients are monitors, which may use any name.
pub fn ops_front(settings: &Settings, listen: SocketAddr) -> Front {
    let front = http_front(settings);
    if listen.ip().is_loopback() {
        front
    } else {
        Front { hosts: Hosts::any(), ..front }
    }
}

/// `http` is the bound address of the HTTP listener, which the console shows for the node.
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

/// The id of this machine's current boot; empty if the kernel does not report one.
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
    let config = router::Config {
        operator_secret: secrets::load_or_create(&settings.data_dir, secrets::OPERATOR_SECRET)?.into_bytes(),
        ..settings.router.clone()
    };
    router::bind(config, bus).await.context("the router cannot start")
}

pub async fn webapp(settings: &Settings, bus: Bus) -> Result<webapp::Bound> {
    webapp::bind(webapp_config(settings)?, bus)
        .await
        .context("the web app cannot start")
}

/// The configuration of the web app, which `beamline user` uses too.
pub fn webapp_config(settings: &Settings) -> Result<webapp::Config> {
    Ok(webapp::Config {
        token_secret: secrets::load_or_create(&settings.data_dir, secrets::TOKEN_SECRET)?.into_bytes(),
        ..settings.webapp.clone()
    })
}

/// Binds the gateway to the inherited socket `given`, or else to a socket of its own.
pub async fn gateway(settings: &Settings, given: Option<UnixListener>, bus: Bus) -> Result<gateway::Bound> {
    let config = gateway_config(settings)?;
    let bound = match given {
        Some(given) => gateway::adopt(config, given, bus).await,
        None => gateway::bind(config, bus).await,
    };
    bound.context("the gateway cannot start")
}

/// Reads the API key at each call, so that a reload applies a changed key.
pub fn gateway_config(settings: &Settings) -> Result<gateway::Config> {
    Ok(gateway::Config {
        api_key: secrets::load_or_create(&settings.data_dir, secrets::API_KEY)?,
        ..settings.gateway.clone()
    })
}
