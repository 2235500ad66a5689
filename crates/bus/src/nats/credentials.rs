//! Credentials and certificates in files: validating them and signing in with them.

use super::NatsConfig;
use async_nats::rustls::pki_types::pem::PemObject;
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use async_nats::{Auth, ServerAddr};
use nkeys::KeyPair;
use percent_encoding::percent_decode_str;
use std::path::Path;

/// Checks that every configured file exists and parses. The error names the setting and the path.
pub async fn check(config: &NatsConfig) -> Result<(), String> {
    for (setting, path) in [("nats.tls_ca", &config.tls_ca), ("nats.tls_certificate", &config.tls_certificate)] {
        let Some(path) = path else { continue };
        let text = read(setting, path).await?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
        if certificates
            .map_err(|error| format!("cannot read {setting} {}: {error}", path.display()))?
            .is_empty()
        {
            return Err(format!("{setting} {} holds no certificate; expected a PEM file", path.display()));
        }
    }

    if let Some(path) = &config.tls_key {
        let text = read("nats.tls_key", path).await?;
        PrivateKeyDer::from_pem_slice(text.as_bytes())
            .map_err(|error| format!("nats.tls_key {} holds no private key: {error}", path.display()))?;
    }

    // A trial signature checks the nkey and credentials files.
    sign_in(config, b"").await.map(drop)
}

/// The credentials for one connect, with the server's `nonce` signed by the nkey, if any.
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
        let missing = |what| format!("nats.credentials {} holds no {what}; expected a .creds file", path.display());
        let token = after(&text, "BEGIN NATS USER JWT").ok_or_else(|| missing("user JWT"))?;
        let seed = after(&text, "BEGIN USER NKEY SEED").ok_or_else(|| missing("seed"))?;
        auth.signature = Some(sign(&key("nats.credentials", path, seed)?, nonce)?);
        auth.jwt = Some(token.into());
    }

    Ok(auth)
}

/// Takes the credentials from the first URL that has any: `nats://user:password@host` or `nats://token@host`.
/// Credentials in settings take precedence.
pub fn from_url(config: &mut NatsConfig, servers: &[ServerAddr]) {
    let set = [config.user.is_some(), config.token.is_some(), config.nkey.is_some(), config.credentials.is_some()];
    let Some((server, user)) = servers.iter().find_map(|server| Some((server, server.username()?))) else {
        return;
    };
    if set.contains(&true) {
        return;
    }

    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    match server.password() {
        Some(password) => (config.user, config.password) = (Some(decode(user)), Some(decode(password))),
        None => config.token = Some(decode(user)),
    }
}

/// Why a server refused to authorize this client: names the credentials that it was given, or the settings to add.
pub fn describe(config: &NatsConfig) -> String {
    let file = |setting, path: &Path| format!("it does not accept {setting} {}", path.display());
    if let Some(path) = &config.credentials {
        file("nats.credentials", path)
    } else if let Some(path) = &config.nkey {
        file("nats.nkey", path)
    } else if config.token.is_some() {
        "it does not accept nats.token".into()
    } else if let Some(user) = &config.user {
        format!("it does not accept nats.user {user:?} with this nats.password")
    } else if let Some(path) = &config.tls_certificate {
        file("nats.tls_certificate", path)
    } else {
        "no credentials are set; set nats.user and nats.password, nats.token, nats.nkey or nats.credentials".into()
    }
}

async fn read(setting: &str, path: &Path) -> Result<String, String> {
    tokio::fs::read_to_string(path)
        .await
        .map_err(|error| format!("cannot read {setting} {}: {error}", path.display()))
}

fn key(setting: &str, path: &Path, seed: &str) -> Result<KeyPair, String> {
    // The library's error is discarded because it could reveal part of the seed.
    KeyPair::from_seed(seed)
        .map_err(|_| format!("{setting} {} holds no valid nkey seed; a user seed begins with SU", path.display()))
}

fn sign(key: &KeyPair, nonce: &[u8]) -> Result<Vec<u8>, String> {
    key.sign(nonce)
        .map_err(|error| format!("cannot sign the nonce of the NATS server: {error}"))
}

/// The line that follows the first line containing `title`; `None` if it is missing or empty.
fn after<'a>(text: &'a str, title: &str) -> Option<&'a str> {
    let mut lines = text.lines().skip_while(|line| !line.contains(title)).skip(1);
    lines.next().map(str::trim).filter(|line| !line.is_empty())
}
