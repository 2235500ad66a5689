//! How we connect: who we are, what we trust, and what to say when the server and we do not agree.
//!
//! Credentials and certificates are read from their files at every connect, so a file that was replaced counts from the
//! next one on.

use super::NatsConfig;
use super::credentials;
use crate::{Error, Result};
use async_nats::rustls::{self, AlertDescription, CertificateError};
use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// What waits in the client for one of our subscriptions; our pumps empty it at once, so it fills only when the
/// process has no time. Then the server's messages are dropped and counted.
const CLIENT_QUEUE: usize = 128 * 1024;
/// A silent connection is found out after two of these.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const API_DEADLINE: Duration = Duration::from_secs(5);
const RECONNECT_DELAY_BASE: Duration = Duration::from_millis(50);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(5);

/// The servers of `nats.url`, and us.
pub struct Access {
    config: NatsConfig,
    servers: Vec<ServerAddr>,
}

impl Access {
    pub fn new(mut config: NatsConfig) -> Result<Self> {
        let servers = servers(&config.url)?;
        if config.tls_certificate.is_some() != config.tls_key.is_some() {
            return Err(Error::Disconnected("nats.tls_certificate and nats.tls_key need each other: set both".into()));
        }
        credentials::from_url(&mut config, &servers);
        Ok(Self { config, servers })
    }

    /// Connects now or fails; from then on a lost connection is sought again without end.
    pub async fn connect(self: &Arc<Self>, observe: impl Fn(Event) + Send + Sync + 'static) -> Result<Client> {
        credentials::check(&self.config).await.map_err(Error::Disconnected)?;
        let config = &self.config;
        let who = self.clone();
        let mut options = ConnectOptions::with_auth_callback(move |nonce| {
            let who = who.clone();
            async move { credentials::sign_in(&who.config, &nonce).await.map_err(async_nats::AuthError::new) }
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
        // Also for servers that others name to us, whose addresses come without a scheme.
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
        options.connect(&self.servers).await.map_err(|error| self.explain(&error))
    }

    /// Hosts and ports only: a url may hold a password.
    pub fn describe(&self) -> String {
        let show = |server: &ServerAddr| format!("{}:{}", server.host(), server.port());
        self.servers.iter().map(show).collect::<Vec<_>>().join(", ")
    }

    fn wants_tls(&self) -> bool {
        let config = &self.config;
        let set = config.tls_ca.is_some() || config.tls_certificate.is_some() || config.tls_first;
        set || self.servers.iter().any(ServerAddr::tls_required)
    }

    /// Which setting it is about, where that can be told.
    fn explain(&self, error: &ConnectError) -> Error {
        let at = self.describe();
        let config = &self.config;
        let ours = config.tls_certificate.as_deref().map(Path::display);
        let text = match (tls_error(error), error.kind()) {
            (Some(rustls::Error::InvalidCertificate(problem)), _) => format!(
                "the certificate of NATS at {at} is not valid for us: {}",
                match (problem, &config.tls_ca) {
                    (CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }, _) =>
                        "it is for another name than the host in nats.url".into(),
                    (CertificateError::UnknownIssuer | CertificateError::BadSignature, Some(ca)) =>
                        format!("no authority in nats.tls_ca {} has signed it", ca.display()),
                    (CertificateError::UnknownIssuer, None) =>
                        "no authority that this system trusts has signed it; set nats.tls_ca".into(),
                    (problem, _) => format!("{problem:?}"),
                }
            ),
            (Some(rustls::Error::AlertReceived(alert)), _) => match (ours, alert) {
                (None, AlertDescription::CertificateRequired | AlertDescription::BadCertificate) => {
                    format!("NATS at {at} asks for a client certificate: set nats.tls_certificate and nats.tls_key")
                }
                (None, alert) => format!("NATS at {at} refuses TLS with us: {alert:?}"),
                (Some(ours), alert) => {
                    format!("NATS at {at} does not take our certificate nats.tls_certificate {ours}: {alert:?}")
                }
            },
            (Some(problem), _) => format!("TLS with NATS at {at} failed: {problem}; does it speak TLS"),
            (None, ConnectErrorKind::AuthorizationViolation) => {
                format!("NATS at {at} does not let us in: {}", credentials::describe(config))
            }
            (None, ConnectErrorKind::Tls) => {
                format!("cannot use the files of nats.tls_ca, nats.tls_certificate and nats.tls_key: {error}")
            }
            (None, _) => format!(
                "cannot reach NATS at {at}: {error}; is it running, and {}",
                match (self.wants_tls() && !refused(error), ours) {
                    (true, None) => "does it ask for a client certificate (nats.tls_certificate)",
                    (true, Some(_)) => "does it trust the authority of nats.tls_certificate",
                    (false, _) => "is nats.url right",
                }
            ),
        };
        Error::Disconnected(text)
    }
}

/// Nobody listens there: no word of TLS was said.
fn refused(error: &ConnectError) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    source.is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// What TLS says, deep in the client's error.
fn tls_error(error: &ConnectError) -> Option<&rustls::Error> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = next {
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let found = error.downcast_ref().or_else(|| inner.and_then(|inner| inner.downcast_ref()));
        if found.is_some() {
            return found;
        }
        next = error.source();
    }
    None
}

fn servers(urls: &str) -> Result<Vec<ServerAddr>> {
    let invalid = |error: &dyn std::fmt::Display| Error::Disconnected(format!("nats.url is not valid: {error}"));
    let parse = |url: &str| match url.trim().parse::<ServerAddr>() {
        Ok(server) if server.host().is_empty() => Err(invalid(&"it names no host; write nats://host:port")),
        Ok(server) => Ok(server),
        Err(error) => Err(invalid(&error)),
    };
    urls.split(',').map(parse).collect()
}

/// Full jitter: many clients of a server that comes back do not all come at once.
fn reconnect_delay(attempts: usize) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(10);
    let ceiling = (RECONNECT_DELAY_BASE * 2_u32.pow(doublings)).min(RECONNECT_DELAY_MAX);
    ceiling.mul_f64(rand::random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reconnects_are_spread_and_bounded_at_any_attempt() {
        for attempts in [0, 1, 5, 9, 100, 1_000_000, usize::MAX] {
            let delays: Vec<Duration> = (0..1000).map(|_| reconnect_delay(attempts)).collect();
            let ceiling = RECONNECT_DELAY_MAX.min(RECONNECT_DELAY_BASE * 2_u32.pow(attempts.min(10) as u32));
            assert!(delays.iter().all(|delay| *delay <= ceiling), "{attempts}");
            // Full jitter: all of the range is used.
            assert!(delays.iter().any(|delay| *delay < ceiling / 4), "{attempts}");
            assert!(delays.iter().any(|delay| *delay > ceiling * 3 / 4), "{attempts}");
        }
    }

    #[test]
    fn a_password_in_the_url_is_used_and_not_shown() {
        let config = NatsConfig { url: "nats://me:s%40cret@one:4222, tls://two:4443".into(), ..NatsConfig::default() };
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
