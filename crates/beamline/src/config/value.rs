//! The kinds of settings: how each is written and read.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What is wrong with a URL, in words that follow the setting's name and repeat no password.
pub type Rule = fn(&str) -> Result<(), String>;

/// What is longer was meant otherwise.
const DURATION_MAX: Duration = Duration::from_secs(3650 * 86_400);

#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Text,
    /// Text that is never printed.
    Secret,
    Path,
    Address,
    /// What [`Rule`] accepts.
    Url(Rule),
    /// The same, never printed.
    SecretUrl(Rule),
    /// Several of them, as a list.
    Urls(Rule),
    /// "250ms", "5s", "15m", "2h", "1d"; not 0.
    Duration,
    /// The same, or 0.
    Pause,
    /// "512", "64KiB", "4MiB", "1GiB"; in bytes, not 0.
    Size,
    /// A whole number within bounds, both included.
    Count(u64, u64),
    /// A number above 0, at most 1.
    Share,
    Bool,
    Choice(&'static [&'static str]),
    /// An array of strings, or one string with commas.
    List,
    /// The same, of variables: `NAME`, or `NAME=value`, whose value may be a secret and is never printed.
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

/// What is wrong with the text, in words that follow "http.listen".
pub fn parse(kind: Kind, text: &str) -> Result<Value, String> {
    let text = text.trim();
    match kind {
        Kind::Text | Kind::Secret | Kind::Url(_) | Kind::SecretUrl(_) if text.is_empty() => Err("is empty".into()),
        Kind::Text | Kind::Secret => Ok(Value::Text(text.into())),
        Kind::Url(rule) | Kind::SecretUrl(rule) => rule(text).map(|()| Value::Text(text.into())),
        Kind::Path if text.is_empty() => Err("is an empty path".into()),
        Kind::Path => Ok(Value::Path(text.into())),
        Kind::Address => text
            .parse()
            .or_else(|_| text.replacen("localhost", "127.0.0.1", 1).parse())
            .map(Value::Address)
            .map_err(|_| format!("is {text:?}, not an address such as \"127.0.0.1:8000\"")),
        Kind::Duration | Kind::Pause => {
            let duration = duration(text)
                .ok_or_else(|| format!("is {text:?}, not a duration such as \"250ms\", \"5s\", \"15m\" or \"2h\""))?;
            let least = if matches!(kind, Kind::Pause) {
                Duration::ZERO
            } else {
                Duration::from_millis(1)
            };
            if !(least..=DURATION_MAX).contains(&duration) {
                let days = DURATION_MAX.as_secs() / 86_400;
                return Err(format!("is {text:?}, and must be from {least:?} to {days} days"));
            }
            Ok(Value::Duration(duration))
        }
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
        Kind::List | Kind::Variables | Kind::Urls(_) => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            list(kind, items.map(String::from).collect())
        }
    }
}

/// The items of an array, or what is wrong with them.
pub fn list(kind: Kind, items: Vec<String>) -> Result<Value, String> {
    if let Kind::Urls(rule) = kind {
        items.iter().try_for_each(|item| rule(item))?;
    }
    if matches!(kind, Kind::Variables) {
        let mut seen = BTreeSet::new();
        for item in &items {
            let (name, value) = variable(item);
            if name.is_empty() || name.contains('\0') || value.is_some_and(|value| value.contains('\0')) {
                return Err(format!("holds {name:?}, which is no variable; write NAME or NAME=value"));
            }
            if !seen.insert(name) {
                return Err(format!("holds {name} twice"));
            }
        }
    }
    Ok(Value::List(items))
}

/// An item of [`Kind::Variables`]: its name, and the value that it sets.
pub fn variable(item: &str) -> (&str, Option<&str>) {
    match item.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (item, None),
    }
}

fn duration(text: &str) -> Option<Duration> {
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

/// As it would be written in the file.
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
        (Kind::Variables, Value::List(items)) => {
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

/// A URL without whom it signs in as and with what.
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
    fn what_is_rendered_is_read_back() {
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
    fn a_url_is_shown_without_its_password() {
        let list = Value::List(vec!["redis://:geheim@a:6379/1".into(), "redis://b".into()]);
        assert_eq!(render(Kind::List, &list), r#"["redis://[REDACTED]@a:6379/1", "redis://b"]"#);
        let url = Value::Text("nats://me:ge@heim@host".into());
        assert_eq!(render(Kind::Text, &url), r#""nats://[REDACTED]@host""#);
        assert_eq!(render(Kind::Text, &Value::Text("a@b".into())), r#""a@b""#);
    }

    #[test]
    fn variables_are_shown_without_their_values() {
        let value = parse(Kind::Variables, "PATH, TOKEN=geheim=,EMPTY=").unwrap();
        assert_eq!(render(Kind::Variables, &value), r#"["PATH", "TOKEN=[REDACTED]", "EMPTY=[REDACTED]"]"#);
        for (text, problem) in [("A,A=1", "holds A twice"), ("=1", "holds \"\""), ("A=x\0geheim", "holds \"A\"")] {
            let told = parse(Kind::Variables, text).unwrap_err();
            assert!(told.contains(problem) && !told.contains("geheim"), "{told}");
        }
    }

    #[test]
    fn bad_values_say_what_would_be_good() {
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
}
