//! Connecting to NATS: credentials, TLS, reconnect policy, and error messages that name the setting to fix.
//!
//! Credentials and certificates are read from their files at every connect, so a replaced file takes effect with the
//! next connection.

use super::NatsConfig;
use super::credentials;
use crate::{Error, Result};
use async_nats::rustls::{self, AlertDescription, CertificateError};
use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Messages that the client queues for one subscription. The pumps empty this queue at once, so it fills only when the
/// process is starved of CPU. The client then drops messages, and each drop is counted.
const CLIENT_QUEUE: usize = 128 * 1024;
/// The client drops a connection that leaves two pings unanswered.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const API_DEADLINE: Duration = Duration::from_secs(5);
const RECONNECT_DELAY_BASE: Duration = Duration::from_millis(50);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(5);

/// The servers in `nats.url` and the settings for connecting to them.
pub struct Access {
    config: NatsConfig,
    servers: Vec<ServerAddr>,
}

impl Access {
    pub fn new(mut config: NatsConfig) -> Result<Self> {
        let servers = servers(&config.url)?;
        if config.tls_certificate.is_some() != config.tls_key.is_some() {
            return Err(Error::Disconnected("nats.tls_certificate and nats.tls_key must be set together".into()));
        }
        credentials::from_url(&mut config, &servers);
        Ok(Self { config, servers })
    }

    /// Connects once or fails. After that the client reconnects without limit whenever the connection is lost;
    /// `observe` receives its events.
    pub async fn connect(self: &Arc<Self>, observe: impl Fn(Event) + Send + Sync + 'static) -> Result<Client> {
        credentials::check(&self.config).await.map_err(Error::Disconnected)?;
        let config = &self.config;
        let access = self.clone();
        let mut options = ConnectOptions::with_auth_callback(move |nonce| {
            let access = access.clone();
            async move {
                credentials::sign_in(&access.config, &nonce)
                    .await
                    .map_err(async_nats::AuthError::new)
            }
        })
        .name(&config.name)
        .subscription_capacity(CLIENT_QUEUE)
        .ping_interval(PING_INTERVAL)
        .request_timeout(Some(API_DEADLINE))
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .event_callback(move |event| {
            observe(event);
            std::future::ready(())
        })
        // Servers announced by the cluster have addresses without a scheme; they need TLS just the same.
        .require_tls(self.wants_tls());

        if let Some(path) = &config.tls_ca {
            options = options.add_root_certificates(path.clone());
        }
        if let (Some(certificate), Some(key)) = (&config.tls_certificate, &config.tls_key) {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        if config.tls_first {
            options = options.tls_first();
        }

        options
            .connect(&self.servers)
            .await
            .map_err(|error| self.explain(&error))
    }

    /// Hosts and ports only, because a URL may hold a password.
    pub fn describe(&self) -> String {
        let show = |server: &ServerAddr| format!("{}:{}", server.host(), server.port());
        self.servers.iter().map(show).collect::<Vec<_>>().join(", ")
    }

    fn wants_tls(&self) -> bool {
        let config = &self.config;
        let set = config.tls_ca.is_some() || config.tls_certificate.is_some() || config.tls_first;
        set || self.servers.iter().any(ServerAddr::tls_required)
    }

    /// Turns the client's error into one that names the server and, if it can be told, the setting to fix.
    fn explain(&self, error: &ConnectError) -> Error {
        let at = self.describe();
        let config = &self.config;
        let client_certificate = config.tls_certificate.as_deref().map(Path::display);

        let text = match (tls_error(error), error.kind()) {
            (Some(rustls::Error::InvalidCertificate(problem)), _) => format!(
                "the server certificate of NATS at {at} was rejected: {}",
                match (problem, &config.tls_ca) {
                    (CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }, _) =>
                        "it was issued for another name than the host in nats.url".into(),
                    (CertificateError::UnknownIssuer | CertificateError::BadSignature, Some(ca)) =>
                        format!("it is not signed by an authority in nats.tls_ca {}", ca.display()),
                    (CertificateError::UnknownIssuer, None) =>
                        "it is not signed by an authority that this system trusts; set nats.tls_ca".into(),
                    (problem, _) => format!("{problem:?}"),
                }
            ),
            (Some(rustls::Error::AlertReceived(alert)), _) => match (client_certificate, alert) {
                (None, AlertDescription::CertificateRequired | AlertDescription::BadCertificate) => {
                    format!("NATS at {at} requires a client certificate: set nats.tls_certificate and nats.tls_key")
                }
                (None, alert) => format!("NATS at {at} refused the TLS handshake: {alert:?}"),
                (Some(certificate), alert) => {
                    format!(
                        "NATS at {at} rejected the client certificate nats.tls_certificate {certificate}: {alert:?}"
                    )
                }
            },
            (Some(problem), _) => {
                format!("the TLS handshake with NATS at {at} failed: {problem}; is TLS enabled on the server?")
            }
            (None, ConnectErrorKind::AuthorizationViolation) => {
                format!("NATS at {at} refused to authorize this client: {}", credentials::describe(config))
            }
            (None, ConnectErrorKind::Tls) => {
                format!("cannot use the files in nats.tls_ca, nats.tls_certificate and nats.tls_key: {error}")
            }
            (None, _) => format!(
                "cannot connect to NATS at {at}: {error}; is it running, and {}",
                match (self.wants_tls() && !refused(error), client_certificate) {
                    (true, None) => "does it require a client certificate (nats.tls_certificate)?",
                    (true, Some(_)) => "does it trust the authority that signed nats.tls_certificate?",
                    (false, _) => "is nats.url correct?",
                }
            ),
        };
        Error::Disconnected(text)
    }
}

/// Whether the TCP connection was refused, so that TLS cannot be the cause.
fn refused(error: &ConnectError) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    source.is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// Finds the TLS error in the chain of the client's error.
fn tls_error(error: &ConnectError) -> Option<&rustls::Error> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = next {
        // `io::Error::source` skips the error that it wraps; `get_ref` returns that one.
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let found = error
            .downcast_ref()
            .or_else(|| inner.and_then(|inner| inner.downcast_ref()));
        if found.is_some() {
            return found;
        }

        next = error.source();
    }
    None
}

/// Parses the comma-separated URLs of `nats.url`.
fn servers(urls: &str) -> Result<Vec<ServerAddr>> {
    let invalid = |error: &dyn std::fmt::Display| Error::Disconnected(format!("nats.url is not valid: {error}"));
    let parse = |url: &str| match url.trim().parse::<ServerAddr>() {
        Ok(server) if server.host().is_empty() => Err(invalid(&"it names no host; write nats://host:port")),
        Ok(server) => Ok(server),
        Err(error) => Err(invalid(&error)),
    };
    urls.split(',').map(parse).collect()
}

/// Exponential backoff with full jitter, so that clients of a restarted server do not all reconnect at once.
fn reconnect_delay(attempts: usize) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(10);
    let ceiling = (RECONNECT_DELAY_BASE * 2_u32.pow(doublings)).min(RECONNECT_DELAY_MAX);
    ceiling.mul_f64(rand::random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reconnect_delay_is_jittered_and_capped() {
        for attempts in [0, 1, 5, 9, 100, 1_000_000, usize::MAX] {
            let delays: Vec<Duration> = (0..1000).map(|_| reconnect_delay(attempts)).collect();
            let ceiling = RECONNECT_DELAY_MAX.min(RECONNECT_DELAY_BASE * 2_u32.pow(attempts.min(10) as u32));
            assert!(delays.iter().all(|delay| *delay <= ceiling), "{attempts}");

            // Full jitter uses the whole range.
            assert!(delays.iter().any(|delay| *delay < ceiling / 4), "{attempts}");
            assert!(delays.iter().any(|delay| *delay > ceiling * 3 / 4), "{attempts}");
        }
    }

    #[test]
    fn url_credentials_are_used_but_never_shown() {
        let config = NatsConfig {
            url: "nats://me:s%40cret@one:4222, tls://two:4443".into(),
            ..NatsConfig::default()
        };
        let access = Access::new(config).unwrap();
        assert_eq!(access.describe(), "one:4222, two:4443");
        assert_eq!(access.config.user.as_deref(), Some("me"));
        assert_eq!(access.config.password.as_deref(), Some("s@cret"));
        assert!(access.wants_tls());

        for bad in ["", "nats://", "nats://a:b:c", "http://a"] {
            assert!(Access::new(NatsConfig { url: bad.into(), ..NatsConfig::default() }).is_err(), "{bad:?}");
        }
    }
}
