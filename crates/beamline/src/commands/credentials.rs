//! `beamline token` and `beamline api-key`: credentials from the secrets of the data directory.

use crate::cli;
use crate::config::{Layers, load};
use crate::secrets;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest lifetime of a token from the command line.
const TTL_MAX: Duration = Duration::from_secs(365 * 86_400);

/// The claims of a connection token.
#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    /// Seconds since the epoch, like `exp`.
    iat: u64,
    exp: u64,
}

pub fn token(args: cli::Token) -> Result<()> {
    let ttl = crate::config::parse_duration(&args.ttl).map_err(|what| anyhow::anyhow!("--ttl {what}"))?;
    if ttl.is_zero() || ttl > TTL_MAX {
        bail!("--ttl must be from 1s to {}d", TTL_MAX.as_secs() / 86_400);
    }

    wire::id::check(&args.user).map_err(|error| anyhow::anyhow!("--user {error}"))?;
    let secret = existing(args.data_dir, secrets::TOKEN_SECRET)?;
    println!("{}", sign(&secret, &args.user, ttl)?);
    Ok(())
}

pub fn api_key(args: cli::DataDir) -> Result<()> {
    println!("{}", existing(args, secrets::API_KEY)?);
    Ok(())
}

/// Reads a secret that `beamline up` has created. It is never created here, because a running process would not use it.
fn existing(args: cli::DataDir, name: &str) -> Result<String> {
    let dir = data_dir(args)?;
    let missing = || {
        format!(
            "no beamline has run with the data directory {} yet; run beamline up first, or set --data-dir",
            dir.display()
        )
    };
    secrets::read(&dir, name).with_context(missing)
}

fn data_dir(args: cli::DataDir) -> Result<PathBuf> {
    let mut layers = Layers::from_process();
    layers.flags.extend(args.data_dir.map(|dir| ("data_dir", dir)));
    Ok(load(&layers)?.data_dir)
}

fn sign(secret: &str, user: &str, ttl: Duration) -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let claims = Claims { sub: user, iat: now.as_secs(), exp: (now + ttl).as_secs() };
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    Ok(jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key)?)
}
