//! Checks the URLs of servers without connecting. The errors never repeat a user or a password.

use std::path::Path;
use url::Url;

/// The base URL of a model endpoint, without `/chat/completions`: `http://127.0.0.1:11434/v1`.
pub fn endpoint(text: &str) -> Result<(), String> {
    const LIKE: &str = "an endpoint such as \"http://127.0.0.1:11434/v1\"";
    let url = parse(text, LIKE)?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("does not begin with http:// or https://; write {LIKE}"));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(format!("names no host; write {LIKE}"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("has a user or a password in it; set api_key, which is sent as a bearer token".into());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("has a ? or # in it, after which no path can be added".into());
    }
    if url.path().trim_end_matches('/').ends_with("/chat/completions") {
        return Err("ends with /chat/completions; remove it, Beamline appends that path".into());
    }
    Ok(())
}

/// One server, or several with commas between: `nats://host:4222`, `tls://…`, or `host:4222`.
pub fn nats(text: &str) -> Result<(), String> {
    const LIKE: &str = "a server such as \"nats://10.0.0.10:4222\"";
    for text in text.split(',').map(str::trim) {
        let url = if text.contains("://") {
            parse(text, LIKE)?
        } else {
            parse(&format!("nats://{text}"), LIKE)?
        };
        if !matches!(url.scheme(), "nats" | "tls") {
            return Err(format!("begins neither with nats:// nor with tls://; write {LIKE}"));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(format!("names no host; write {LIKE}"));
        }
    }
    Ok(())
}

/// `redis://host:6379` or `redis://host:6379/1` with the number of a database, or the path of a Unix socket.
pub fn redis(text: &str) -> Result<(), String> {
    const LIKE: &str = "a server such as \"redis://10.0.0.10:6379\"";
    let url = parse(text, LIKE)?;
    match url.scheme() {
        "redis" | "valkey" if url.host_str().is_none_or(str::is_empty) => Err(format!("names no host; write {LIKE}")),
        "redis" | "valkey" => match url.path().trim_matches('/') {
            "" => Ok(()),
            number => database_number(number),
        },
        "unix" | "redis+unix" | "valkey+unix" => {
            let number = url.query_pairs().find(|(name, _)| name == "db");
            number.map_or(Ok(()), |(_, number)| database_number(&number))
        }
        "rediss" | "valkeys" => Err("asks for TLS, which the client of Redis is built without; use redis://".into()),
        _ => Err(format!("does not begin with redis://; write {LIKE}")),
    }
}

/// Checks the number of a Redis database. The error does not repeat the text, which may be part of a password that
/// contains a slash.
fn database_number(text: &str) -> Result<(), String> {
    if text.parse::<u32>().is_ok() {
        return Ok(());
    }
    Err(
        "names a database that is not a number; write \"redis://10.0.0.10:6379/1\", or percent-encode a / in the \
         password as %2F"
            .into(),
    )
}

/// `sqlite://path`, or `postgres://…`, which may hold a password.
pub fn database(text: &str) -> Result<(), String> {
    if let Some(rest) = text.strip_prefix("sqlite:") {
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        let (path, parameters) = rest.split_once('?').unwrap_or((rest, ""));
        if path.contains(":memory:") || parameters.contains("mode=memory") {
            return Err(
                "keeps accounts and messages in memory, where they end with each connection; name a file".into()
            );
        }
        if path.ends_with('/') || Path::new(path).file_name().is_none() {
            return Err("names no file; write \"sqlite:///var/lib/beamline/webapp.db\"".into());
        }
        return Ok(());
    }
    if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
        return Err("must begin with sqlite:// or postgres://".into());
    }
    parse(text, "\"postgres://user:password@host/name\"").map(drop)
}

/// The error does not repeat the text: if it cannot be parsed, any part of it may be the password.
fn parse(text: &str, like: &str) -> Result<Url, String> {
    Url::parse(text).map_err(|error| format!("is not a URL ({error}); write {like}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(rule: fn(&str) -> Result<(), String>, good: &[&str], bad: &[(&str, &str)]) {
        for text in good {
            assert_eq!(rule(text), Ok(()), "{text}");
        }
        for (text, expected) in bad {
            let problem = rule(text).expect_err(text);
            assert!(problem.contains(expected) && !problem.contains("geheim"), "{text}: {problem}");
        }
    }

    #[test]
    fn endpoints_are_http_urls_without_query_or_completions_path() {
        let good = ["http://127.0.0.1:11434/v1", "https://api.example.com/v1/", "http://[::1]:80", "http://localhost"];
        let bad = [
            ("127.0.0.1:11434/v1", "not a URL"),
            ("localhost:11434/v1", "does not begin with http"),
            ("ftp://host/v1", "does not begin with http"),
            ("http://", "not a URL"),
            ("http://host:port/v1", "not a URL"),
            ("https://user:geheim@host/v1", "set api_key"),
            ("https://host/v1?key=geheim", "? or #"),
            ("https://host/v1#geheim", "? or #"),
            ("https://host/v1/chat/completions", "remove it"),
        ];
        check(endpoint, &good, &bad);
    }

    #[test]
    fn nats_and_redis_servers_need_their_scheme_and_a_host() {
        let good = ["nats://10.0.0.1:4222", "tls://a, nats://b:1", "host:4222", "host", "nats://u:p@h"];
        check(
            nats,
            &good,
            &[("http://h:4222", "nats://"), ("nats://", "no host"), ("nats://h:geheim", "not a URL")],
        );

        let good = [
            "redis://127.0.0.1:6379",
            "redis://:p@h:6379/1",
            "redis://h/",
            "unix:///run/redis.sock",
            "unix:///run/redis.sock?db=2",
        ];
        let bad = [
            ("127.0.0.1:6379", "not a URL"),
            ("localhost:6379", "does not begin with redis://"),
            ("rediss://:geheim@h", "TLS"),
            ("redis://", "no host"),
            ("http://u:geheim@h", "redis://"),
            ("redis://h/abc", "not a number"),
            ("redis://h/1/geheim", "not a number"),
            ("unix:///run/redis.sock?db=abc", "not a number"),
        ];
        check(redis, &good, &bad);
    }

    #[test]
    fn database_is_a_sqlite_file_or_a_postgres_server() {
        let good = [
            "sqlite://data/x.db",
            "sqlite:x.db",
            "sqlite:///var/x.db?mode=ro",
            "postgres://u:p@h/d",
            "postgresql://h",
            "postgres:///d?host=/run/postgresql",
            "postgres:///d",
        ];
        let bad = [
            ("mysql://u:geheim@h", "must begin with"),
            ("sqlite::memory:", "in memory"),
            ("sqlite://x?mode=memory", "in memory"),
            ("sqlite://", "names no file"),
            ("sqlite:///var/", "names no file"),
            ("postgres://u:geheim@h:port/d", "not a URL"),
            ("postgres://u:geheim@", "not a URL"),
        ];
        check(database, &good, &bad);
    }
}
