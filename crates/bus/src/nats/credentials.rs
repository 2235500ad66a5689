//! Credentials and certificates as they lie in files: reading them, and signing in with them.

use super::NatsConfig;
use async_nats::rustls::pki_types::pem::PemObject;
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use async_nats::{Auth, ServerAddr};
use nkeys::KeyPair;
use percent_encoding::percent_decode_str;
use std::path::Path;

/// Whether all files are there and hold what they should; the error names the setting.
pub async fn check(config: &NatsConfig) -> Result<(), String> {
    for (setting, path) in [("nats.tls_ca", &config.tls_ca), ("nats.tls_certificate", &config.tls_certificate)] {
        let Some(path) = path else { continue };
        let text = read(setting, path).await?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
        if certificates.map_err(|error| format!("cannot read {setting} {}: {error}", path.display()))?.is_empty() {
            return Err(format!("{setting} {} holds no certificate; it is a PEM file", path.display()));
        }
    }
    if let Some(path) = &config.tls_key {
        let text = read("nats.tls_key", path).await?;
        PrivateKeyDer::from_pem_slice(text.as_bytes())
            .map_err(|error| format!("nats.tls_key {} holds no private key: {error}", path.display()))?;
    }
    sign_in(config, b"").await.map(drop)
}

/// Our answer to the server's `nonce`.
pub async fn sign_in(config: &NatsConfig, nonce: &[u8]) -> Result<Auth, String> {
    let mut auth = Auth::new();
    auth.username = config.user.clone();
    auth.password = config.password.clone();
    auth.token = config.token.clone();
    if let Some(path) = &config.nkey {
        let key = key("nats.nkey", path, read("nats.nkey", path).await?.trim())?;
        auth.signature = Some(sign(&key, nonce)?);
        auth.nkey = Some(key.public_key());
    }
    if let Some(path) = &config.credentials {
        let text = read("nats.credentials", path).await?;
        let missing = |what| format!("nats.credentials {} holds no {what}; it is a .creds file", path.display());
        let token = after(&text, "BEGIN NATS USER JWT").ok_or_else(|| missing("user JWT"))?;
        let seed = after(&text, "BEGIN USER NKEY SEED").ok_or_else(|| missing("seed"))?;
        auth.signature = Some(sign(&key("nats.credentials", path, seed)?, nonce)?);
        auth.jwt = Some(token.into());
    }
    Ok(auth)
}

/// The user of a url, if no setting names another: `nats://user:password@host` or `nats://token@host`.
pub fn from_url(config: &mut NatsConfig, servers: &[ServerAddr]) {
    let set = [config.user.is_some(), config.token.is_some(), config.nkey.is_some(), config.credentials.is_some()];
    let Some((server, user)) = servers.iter().find_map(|server| Some((server, server.username()?))) else { return };
    if set.contains(&true) {
        return;
    }
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    match server.password() {
        Some(password) => (config.user, config.password) = (Some(decode(user)), Some(decode(password))),
        None => config.token = Some(decode(user)),
    }
}

/// What a server that refuses us was shown.
pub fn describe(config: &NatsConfig) -> String {
    let file = |setting, path: &Path| format!("it does not know the key of {setting} {}", path.display());
    if let Some(path) = &config.credentials {
        format!("it does not take nats.credentials {}", path.display())
    } else if let Some(path) = &config.nkey {
        file("nats.nkey", path)
    } else if config.token.is_some() {
        "it does not take nats.token".into()
    } else if let Some(user) = &config.user {
        format!("it does not take nats.user {user:?} with this nats.password")
    } else if let Some(path) = &config.tls_certificate {
        file("nats.tls_certificate", path)
    } else {
        "set nats.user and nats.password, nats.token, nats.nkey or nats.credentials".into()
    }
}

async fn read(setting: &str, path: &Path) -> Result<String, String> {
    tokio::fs::read_to_string(path).await.map_err(|error| format!("cannot read {setting} {}: {error}", path.display()))
}

fn key(setting: &str, path: &Path, seed: &str) -> Result<KeyPair, String> {
    // The library's error could show some of the seed.
    KeyPair::from_seed(seed)
        .map_err(|_| format!("{setting} {} holds no valid seed; a user's begins with SU", path.display()))
}

fn sign(key: &KeyPair, nonce: &[u8]) -> Result<Vec<u8>, String> {
    key.sign(nonce).map_err(|error| format!("cannot sign in to NATS: {error}"))
}

/// The line below the one that holds `title`.
fn after<'a>(text: &'a str, title: &str) -> Option<&'a str> {
    let mut lines = text.lines().skip_while(|line| !line.contains(title)).skip(1);
    lines.next().map(str::trim).filter(|line| !line.is_empty())
}
