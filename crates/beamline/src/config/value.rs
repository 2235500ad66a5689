//! The kinds of settings: how each is parsed, checked and printed.

use super::problems::did_you_mean;
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Checks a URL. The error completes a sentence that begins with the setting's name, and never repeats a password.
pub type Rule = fn(&str) -> Result<(), String>;

/// Longer durations are almost certainly mistakes.
const DURATION_MAX: Duration = Duration::from_secs(3650 * 86_400);
/// The length of `sun_path` in `sockaddr_un` (unix(7)) without its final zero byte.
const SOCKET_PATH_MAX: usize = 107;
/// A shorter key of a tenant could be guessed.
const API_KEY_MIN: usize = 32;
const LOG_LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Text,
    /// Text that is never printed.
    Secret,
    Path,
    /// Path of a Unix socket, which the kernel limits in length.
    SocketPath,
    Address,
    /// A URL that the [`Rule`] accepts.
    Url(Rule),
    /// A URL that is never printed.
    SecretUrl(Rule),
    /// A list of URLs.
    Urls(Rule),
    /// "250ms", "5s", "15m", "2h", "1d"; not 0.
    Duration,
    /// A duration that may be 0.
    Pause,
    /// "512", "64KiB", "4MiB", "1GiB"; in bytes, not 0.
    Size,
    /// A whole number within bounds, both included.
    Count(u64, u64),
    /// A number above 0, at most 1.
    Share,
    Bool,
    Choice(&'static [&'static str]),
    /// A log level, or the directives of an `EnvFilter`.
    LogFilter,
    /// An array of strings, or one string with commas.
    List,
    /// A list of keys of tenants, as `tenant=key`, which are never printed.
    ApiKeys,
    /// A list of environment variables: `NAME`, or `NAME=value`. A value may be a secret and is never printed.
    Variables,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Text(String),
    Path(PathBuf),
    Address(SocketAddr),
    Duration(Duration),
    Number(u64),
    Share(f64),
    Bool(bool),
    List(Vec<String>),
}

/// Parses a value. The error completes a sentence that begins with the setting's name.
pub fn parse(kind: Kind, text: &str) -> Result<Value, String> {
    let text = text.trim();
    match kind {
        Kind::Text | Kind::Secret | Kind::Url(_) | Kind::SecretUrl(_) | Kind::LogFilter if text.is_empty() => {
            Err("is empty".into())
        }
        Kind::Text | Kind::Secret => Ok(Value::Text(text.into())),
        Kind::Url(rule) | Kind::SecretUrl(rule) => rule(text).map(|()| Value::Text(text.into())),
        Kind::LogFilter => log_filter(text).map(|()| Value::Text(text.into())),

        Kind::Path | Kind::SocketPath if text.is_empty() => Err("is an empty path".into()),
        Kind::SocketPath if text.len() > SOCKET_PATH_MAX => {
            let length = text.len();
            Err(format!(
                "has {length} bytes, but the path of a Unix socket has at most {SOCKET_PATH_MAX}; shorten it"
            ))
        }
        Kind::Path | Kind::SocketPath => Ok(Value::Path(text.into())),
        Kind::Address => text
            .parse()
            .or_else(|_| text.replacen("localhost", "127.0.0.1", 1).parse())
            .map(Value::Address)
            .map_err(|_| format!("is {text:?}, not an address such as \"127.0.0.1:8000\"")),
        Kind::Duration => duration(text, Duration::from_millis(1)).map(Value::Duration),
        Kind::Pause => duration(text, Duration::ZERO).map(Value::Duration),
        Kind::Size => size(text)
            .filter(|bytes| *bytes > 0)
            .map(Value::Number)
            .ok_or_else(|| format!("is {text:?}, not a size above 0 such as \"512\", \"64KiB\" or \"4MiB\"")),
        Kind::Count(min, max) => match text.parse::<u64>() {
            Ok(n) if (min..=max).contains(&n) => Ok(Value::Number(n)),
            _ => Err(format!("is {text:?}, not a whole number from {min} to {max}")),
        },
        Kind::Share => match text.parse::<f64>() {
            Ok(share) if share > 0.0 && share <= 1.0 => Ok(Value::Share(share)),
            _ => Err(format!("is {text:?}, not a number above 0, at most 1")),
        },

        Kind::Bool => match text {
            "true" | "1" | "yes" | "on" => Ok(Value::Bool(true)),
            "false" | "0" | "no" | "off" => Ok(Value::Bool(false)),
            _ => Err(format!("is {text:?}, not true or false")),
        },
        Kind::Choice(choices) if choices.contains(&text) => Ok(Value::Text(text.into())),
        Kind::Choice(choices) => Err(format!("is {text:?}, not one of {}", choices.join(", "))),

        Kind::List | Kind::ApiKeys | Kind::Variables | Kind::Urls(_) => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            list(kind, items.map(String::from).collect())
        }
    }
}

/// Checks the items of an array.
pub fn list(kind: Kind, items: Vec<String>) -> Result<Value, String> {
    match kind {
        Kind::Urls(rule) => items.iter().try_for_each(|item| rule(item))?,
        Kind::Variables => variables(&items)?,
        Kind::ApiKeys => items.iter().try_for_each(|item| api_key(item).map(drop))?,
        _ => {}
    }
    Ok(Value::List(items))
}

fn variables(items: &[String]) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for item in items {
        let (name, value) = variable(item);
        if name.is_empty() || name.contains('\0') || value.is_some_and(|value| value.contains('\0')) {
            return Err(format!("lists {name:?}, which is not a variable; write NAME or NAME=value"));
        }
        if !seen.insert(name) {
            return Err(format!("lists {name} twice"));
        }
    }
    Ok(())
}

/// Checks a log filter. `EnvFilter` takes a bare word that is not a level as a target and logs nothing else; so that a
/// mistyped level cannot silence the log, a bare word must be a level.
fn log_filter(text: &str) -> Result<(), String> {
    for word in text.split(',').filter(|word| !word.is_empty()) {
        let is_bare = !word.contains(['=', '[', ']', '{', '}']);
        if is_bare && word.parse::<LevelFilter>().is_err() {
            let (levels, hint) = (LOG_LEVELS.join(", "), did_you_mean(LOG_LEVELS.into_iter(), word));
            return Err(format!("has {word:?}, which is neither a level ({levels}) nor TARGET=LEVEL{hint}"));
        }
    }
    EnvFilter::try_new(text).map_err(|e| format!("is not a log filter: {e}"))?;
    Ok(())
}

/// Splits an item of [`Kind::Variables`] into its name and the value that it sets.
pub fn variable(item: &str) -> (&str, Option<&str>) {
    match item.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (item, None),
    }
}

/// Splits an item of [`Kind::ApiKeys`] into tenant and key. The error does not repeat the key.
pub fn api_key(item: &str) -> Result<(&str, &str), String> {
    let (tenant, key) = item
        .split_once('=')
        .map(|(tenant, key)| (tenant.trim(), key.trim()))
        .ok_or("holds an entry without =; a key is written as tenant=KEY")?;
    if !wire::id::is_tenant(tenant) {
        return Err("holds a key whose tenant is not a name; a key is written as tenant=KEY".into());
    }
    if key.len() < API_KEY_MIN || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!(
            "holds a key of {tenant} that is not at least {API_KEY_MIN} letters, digits and signs; make one with \
             openssl rand -hex 32"
        ));
    }
    Ok((tenant, key))
}

fn duration(text: &str, min: Duration) -> Result<Duration, String> {
    let duration = duration_of(text)
        .ok_or_else(|| format!("is {text:?}, not a duration such as \"250ms\", \"5s\", \"15m\" or \"2h\""))?;
    if !(min..=DURATION_MAX).contains(&duration) {
        let days = DURATION_MAX.as_secs() / 86_400;
        return Err(format!("is {text:?}, and must be from {min:?} to {days} days"));
    }
    Ok(duration)
}

fn duration_of(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let (digits, unit) = text.split_at(split);
    let number: u64 = digits.parse().ok()?;
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(unit_ms).map(Duration::from_millis)
}

fn size(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number: u64 = digits.parse().ok()?;
    let unit: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(unit)
}

/// Renders a value as the settings file would write it, without secrets.
pub fn render(kind: Kind, value: &Value) -> String {
    match (kind, value) {
        (Kind::Secret | Kind::SecretUrl(_), _) => "\"[REDACTED]\"".into(),
        (Kind::Size, Value::Number(n)) => match n {
            n if *n > 0 && n % (1 << 30) == 0 => format!("\"{}GiB\"", n >> 30),
            n if *n > 0 && n % (1 << 20) == 0 => format!("\"{}MiB\"", n >> 20),
            n if *n > 0 && n % (1 << 10) == 0 => format!("\"{}KiB\"", n >> 10),
            n => format!("\"{n}\""),
        },
        (_, Value::Duration(d)) => match d.as_millis() {
            0 => "\"0s\"".into(),
            ms if ms % 3_600_000 == 0 => format!("\"{}h\"", ms / 3_600_000),
            ms if ms % 60_000 == 0 => format!("\"{}m\"", ms / 60_000),
            ms if ms % 1_000 == 0 => format!("\"{}s\"", ms / 1_000),
            ms => format!("\"{ms}ms\""),
        },

        (_, Value::Text(s)) => format!("{:?}", without_password(s)),
        (_, Value::Path(p)) => format!("{:?}", p.display().to_string()),
        (_, Value::Address(a)) => format!("\"{a}\""),
        (_, Value::Number(n)) => n.to_string(),
        (_, Value::Share(share)) => format!("{share:?}"),
        (_, Value::Bool(b)) => b.to_string(),

        (Kind::Variables | Kind::ApiKeys, Value::List(items)) => {
            let shown = items.iter().map(|item| match variable(item) {
                (name, Some(_)) => format!("{name}=[REDACTED]"),
                (name, None) => name.into(),
            });
            format!("{:?}", shown.collect::<Vec<_>>())
        }
        (_, Value::List(items)) => {
            format!("{:?}", items.iter().map(|item| without_password(item)).collect::<Vec<_>>())
        }
    }
}

/// Redacts the user and password of a URL.
fn without_password(text: &str) -> Cow<'_, str> {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.into();
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    match rest[..end].rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://[REDACTED]@{host}{}", &rest[end..]).into(),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rendered_values_are_read_back() {
        for (kind, text) in [
            (Kind::Duration, "250ms"),
            (Kind::Duration, "90s"),
            (Kind::Duration, "15m"),
            (Kind::Pause, "0s"),
            (Kind::Size, "64MiB"),
            (Kind::Size, "1000"),
            (Kind::Address, "127.0.0.1:0"),
            (Kind::Text, "a\"b"),
        ] {
            let value = parse(kind, text).unwrap();
            let rendered = render(kind, &value);
            let back: toml::Value = toml::from_str::<toml::Table>(&format!("x = {rendered}")).unwrap()["x"].clone();
            assert_eq!(parse(kind, back.as_str().unwrap()).unwrap(), value, "{text}");
        }
    }

    #[test]
    fn urls_are_rendered_without_their_password() {
        let list = Value::List(vec!["redis://:geheim@a:6379/1".into(), "redis://b".into()]);
        assert_eq!(render(Kind::List, &list), r#"["redis://[REDACTED]@a:6379/1", "redis://b"]"#);
        let url = Value::Text("nats://me:ge@heim@host".into());
        assert_eq!(render(Kind::Text, &url), r#""nats://[REDACTED]@host""#);
        assert_eq!(render(Kind::Text, &Value::Text("a@b".into())), r#""a@b""#);
    }

    #[test]
    fn variables_are_rendered_without_their_values() {
        let value = parse(Kind::Variables, "PATH, TOKEN=geheim=,EMPTY=").unwrap();
        assert_eq!(render(Kind::Variables, &value), r#"["PATH", "TOKEN=[REDACTED]", "EMPTY=[REDACTED]"]"#);
        for (text, problem) in [("A,A=1", "lists A twice"), ("=1", "lists \"\""), ("A=x\0geheim", "lists \"A\"")] {
            let error = parse(Kind::Variables, text).unwrap_err();
            assert!(error.contains(problem) && !error.contains("geheim"), "{error}");
        }
    }

    #[test]
    fn errors_repeat_the_bad_value() {
        for (kind, text) in [
            (Kind::Duration, "5"),
            (Kind::Duration, "5 sec"),
            (Kind::Duration, "99999999999999999999s"),
            (Kind::Duration, "0s"),
            (Kind::Duration, "4000d"),
            (Kind::Pause, "4000d"),
            (Kind::Size, "0"),
            (Kind::Size, "0KiB"),
            (Kind::Size, "4MB"),
            (Kind::Size, "-1"),
            (Kind::Count(1, 10), "0"),
            (Kind::Count(1, 10), "11"),
            (Kind::Share, "0"),
            (Kind::Share, "1.01"),
            (Kind::Share, "NaN"),
            (Kind::Bool, "maybe"),
            (Kind::Address, "8000"),
            (Kind::Choice(&["human", "json"]), "xml"),
        ] {
            let problem = parse(kind, text).unwrap_err();
            assert!(problem.contains(text), "{problem}");
        }
    }

    #[test]
    fn mistyped_log_level_is_refused() {
        for good in ["info", "WARN", "off", "info,cluster=debug", "info,[span{field=1}]=trace"] {
            assert!(parse(Kind::LogFilter, good).is_ok(), "{good}");
        }
        for (bad, expected) in [
            ("wran", "did you mean warn?"),
            ("info,cluster", "\"cluster\", which is neither a level"),
            ("info,cluster=loud", "is not a log filter"),
            (" ", "is empty"),
        ] {
            let problem = parse(Kind::LogFilter, bad).unwrap_err();
            assert!(problem.contains(expected), "{bad}: {problem}");
        }
    }

    #[test]
    fn socket_path_has_at_most_107_bytes() {
        let path = |length: usize| format!("/{}", "s".repeat(length - 1));
        assert!(parse(Kind::SocketPath, &path(107)).is_ok());
        let problem = parse(Kind::SocketPath, &path(108)).unwrap_err();
        assert!(problem.contains("has 108 bytes") && problem.contains("107"), "{problem}");
    }
}
