//! `beamline token`, `api-key` and `operator-token`: credentials from the secrets of the data directory.

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
    let ttl = lifetime(&args.ttl)?;
    wire::id::check(&args.user).map_err(|error| anyhow::anyhow!("--user {error}"))?;
    let secret = existing(args.data_dir, secrets::TOKEN_SECRET)?;

    let iat = now_s()?;
    let claims = Claims { sub: &args.user, iat, exp: iat + ttl.as_secs() };
    println!("{}", sign(&secret, &claims)?);
    Ok(())
}

pub fn operator_token(args: cli::OperatorToken) -> Result<()> {
    let ttl = lifetime(&args.ttl)?;
    wire::id::check(&args.name).map_err(|error| anyhow::anyhow!("--name {error}"))?;
    let secret = existing(args.data_dir, secrets::OPERATOR_SECRET)?;

    let iat = now_s()?;
    let claims = router::OperatorClaims {
        sub: args.name,
        aud: router::OPERATOR_AUDIENCE.into(),
        role: match args.role {
            cli::OperatorRole::Viewer => router::Role::Viewer,
            cli::OperatorRole::Operator => router::Role::Operator,
            cli::OperatorRole::Admin => router::Role::Admin,
        },
        iat,
        exp: iat + ttl.as_secs(),
    };
    println!("{}", sign(&secret, &claims)?);
    Ok(())
}

fn lifetime(text: &str) -> Result<Duration> {
    let ttl = crate::config::parse_duration(text).map_err(|what| anyhow::anyhow!("--ttl {what}"))?;
    if ttl < Duration::from_secs(1) || ttl > TTL_MAX {
        bail!("--ttl must be from 1s to {}d", TTL_MAX.as_secs() / 86_400);
    }
    Ok(ttl)
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

fn now_s() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

fn sign(secret: &str, claims: &impl Serialize) -> Result<String> {
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    Ok(jsonwebtoken::encode(&jsonwebtoken::Header::default(), claims, &key)?)
}
