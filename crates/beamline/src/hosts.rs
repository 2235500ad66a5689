//! The host names that this server answers to.
//!
//! Another site can make its own name resolve to this server's address (DNS rebinding). The browser then treats the
//! server as that site's origin, and only the `Host` header reveals it, so a request must name one of this server's
//! hosts. An IP address cannot be rebound, so the local address of a connection is always accepted.

use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use std::net::IpAddr;

/// Paths that are answered for any host, because load balancers use addresses or names of their own. They reveal
/// nothing secret.
const OPEN_TO_ALL: [&str; 4] = ["/health", "/ready", "/healthz", "/readyz"];

/// The hosts that requests may name.
#[derive(Debug, Clone, Default)]
pub struct Hosts {
    /// In lower case, without ports.
    names: Vec<String>,
    any: bool,
}

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request names no host or several, or the name cannot be parsed.
    Unreadable,
    /// The request names a host that is not one of this server's.
    Foreign(String),
}

impl Hosts {
    /// Combines the settings `http.hosts` and `http.origins`. The hosts of origins are accepted too: they are the
    /// public names of a proxy.
    pub fn new(listed: &[String], origins: &[String]) -> Self {
        let of_origins = origins
            .iter()
            .filter_map(|origin| origin.split_once("://"))
            .map(|(_, host)| host);
        let names = listed
            .iter()
            .map(String::as_str)
            .chain(of_origins)
            .filter_map(name_of)
            .collect();
        Self { names, any: listed.iter().any(|host| host == "*") }
    }

    /// Allows every host, for a port whose clients are not browsers.
    pub fn any() -> Self {
        Self { names: Vec::new(), any: true }
    }

    /// Whether requests may name a host other than localhost and this machine's addresses.
    pub fn has_names(&self) -> bool {
        self.any || !self.names.is_empty()
    }

    /// Checks a request that came in on the address `local`.
    pub fn check(&self, request: &Parts, local: IpAddr) -> Result<(), Refusal> {
        if self.any || OPEN_TO_ALL.contains(&request.uri.path()) {
            return Ok(());
        }

        // A request in absolute form, as sent to a proxy, also names a host in its target. Both must be accepted.
        for named in [Some(host_header(&request.headers)?), authority(&request.uri)]
            .into_iter()
            .flatten()
        {
            let host = name_of(named).ok_or(Refusal::Unreadable)?;
            if !self.is_ours(&host, local) {
                return Err(Refusal::Foreign(host));
            }
        }
        Ok(())
    }

    fn is_ours(&self, host: &str, local: IpAddr) -> bool {
        if host == "localhost" || self.names.iter().any(|name| name == host) {
            return true;
        }
        address(host).is_some_and(|ip| ip.is_loopback() || ip == local.to_canonical())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Unreadable => {
                (StatusCode::BAD_REQUEST, "the request must have one Host header with one host\n").into_response()
            }
            Self::Foreign(host) => {
                let text = format!(
                    "this server does not answer to the host {host:?}; if it should, add the name to http.hosts\n"
                );
                (StatusCode::MISDIRECTED_REQUEST, text).into_response()
            }
        }
    }
}

/// Whether a text is valid in `http.hosts`: a name or address without scheme, port or path, or `*`.
pub fn is_host(text: &str) -> bool {
    text == "*" || (!has_port(text) && name_of(text).is_some())
}

fn has_port(text: &str) -> bool {
    text.parse::<Authority>()
        .is_ok_and(|authority| authority.port().is_some())
}

fn host_header(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().map_err(|_| Refusal::Unreadable),
        _ => Err(Refusal::Unreadable),
    }
}

fn authority(uri: &Uri) -> Option<&str> {
    uri.authority().map(Authority::as_str)
}

/// Normalizes a host for comparison: lower case, without port and without the final dot of a full name. `None` if the
/// text is not a host.
fn name_of(text: &str) -> Option<String> {
    let authority: Authority = text.parse().ok()?;
    let host = authority.host();
    let host = host.strip_suffix('.').unwrap_or(host);
    let is_host = !host.is_empty() && !text.contains('@');
    is_host.then(|| host.to_ascii_lowercase())
}

fn address(host: &str) -> Option<IpAddr> {
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    bare.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;

    fn check_with(hosts: &Hosts, local: &str, target: &str, named: &[&str]) -> Result<(), Refusal> {
        let mut request = Request::get(target);
        for host in named {
            request = request.header(header::HOST, *host);
        }
        hosts.check(&request.body(()).unwrap().into_parts().0, local.parse().unwrap())
    }

    fn foreign(host: &str) -> Result<(), Refusal> {
        Err(Refusal::Foreign(host.into()))
    }

    #[test]
    fn only_loopback_is_ours_by_default() {
        let check = |host: &str| check_with(&Hosts::default(), "127.0.0.1", "/", &[host]);
        for host in [
            "localhost",
            "LocalHost.:8000",
            "127.0.0.1",
            "127.9.9.9:1",
            "[::1]",
            "[::1]:8000",
            "[::ffff:127.0.0.1]:80",
        ] {
            assert_eq!(check(host), Ok(()), "{host}");
        }

        for (host, named) in [
            ("evil.example", "evil.example"),
            ("EVIL.example.:8000", "evil.example"),
            ("localhost.evil.example", "localhost.evil.example"),
            ("127.0.0.1.evil.example:8000", "127.0.0.1.evil.example"),
            ("0.0.0.0:8000", "0.0.0.0"),
            ("192.168.1.7", "192.168.1.7"),
            ("[2001:db8::1]", "[2001:db8::1]"),
        ] {
            assert_eq!(check(host), foreign(named), "{host}");
        }

        for host in ["", " ", "a b", "localhost@evil.example", "evil@localhost", "http://localhost", "[::1", "::1", "/"]
        {
            assert_eq!(check(host), Err(Refusal::Unreadable), "{host:?}");
        }
    }

    #[test]
    fn request_in_any_form_must_name_one_of_our_hosts() {
        let check = |target: &str, named: &[&str]| check_with(&Hosts::default(), "127.0.0.1", target, named);
        assert_eq!(check("/", &[]), Err(Refusal::Unreadable));
        assert_eq!(check("/", &["localhost", "evil.example"]), Err(Refusal::Unreadable));
        assert_eq!(check("/", &["localhost", "localhost"]), Err(Refusal::Unreadable));
        assert_eq!(check("http://localhost/auth/login", &["localhost"]), Ok(()));
        assert_eq!(check("http://evil.example/auth/login", &["localhost"]), foreign("evil.example"));
        assert_eq!(check("http://localhost/auth/login", &["evil.example"]), foreign("evil.example"));

        for path in OPEN_TO_ALL {
            assert_eq!(check(path, &["10.0.0.7:8000"]), Ok(()), "{path}");
            assert_eq!(check(path, &[]), Ok(()), "{path}");
        }
        assert_eq!(check("/health/", &["evil.example"]), foreign("evil.example"));
    }

    #[test]
    fn listed_names_origins_and_the_local_address_are_ours() {
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let hosts = Hosts::new(&texts(&["Chat.Example", "10.1.2.3"]), &texts(&["https://app.example:8443", "*"]));
        let check = |host: &str| check_with(&hosts, "::ffff:192.168.1.7", "/", &[host]);
        for host in ["chat.example:8000", "app.example", "10.1.2.3", "192.168.1.7:8000", "localhost"] {
            assert_eq!(check(host), Ok(()), "{host}");
        }
        assert_eq!(check("evil.example"), foreign("evil.example"), "`*` among the origins does not allow any host");
        assert_eq!(check("192.168.1.8"), foreign("192.168.1.8"));

        let any = Hosts::new(&texts(&["*"]), &[]);
        assert_eq!(check_with(&any, "127.0.0.1", "/", &["evil.example"]), Ok(()));
    }

    #[test]
    fn setting_accepts_names_and_addresses_only() {
        for (text, fits) in [
            ("chat.example", true),
            ("10.0.0.1", true),
            ("[::1]", true),
            ("*", true),
            ("chat.example:8000", false),
            ("https://chat.example", false),
            ("chat.example/", false),
            ("a b", false),
            ("", false),
            ("me@host", false),
        ] {
            assert_eq!(is_host(text), fits, "{text}");
        }
    }
}
