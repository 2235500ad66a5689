//! Compiles the text of a policy file. Errors and warnings name the line.

use crate::policy::Compiled;
use sha1::{Digest, Sha1};
use std::path::Path;
use wire::policy::{Format, Policy, Stored};

/// A version of a policy: its text and the compiled policy.
pub struct Version {
    pub source: Stored,
    /// SHA-1 of format and text, in hex.
    pub hash: String,
    pub compiled: Compiled,
    /// Likely mistakes, each with its file and line.
    pub warnings: Vec<String>,
}

/// The format that a file's extension names; `None` if it is not a policy file.
pub fn format_of(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "json" => Some(Format::Json),
        "yaml" | "yml" => Some(Format::Yaml),
        "toml" => Some(Format::Toml),
        _ => None,
    }
}

/// Compiles policy `name`. Its errors begin with `at`, the name of its file.
pub fn compile(at: &str, name: &str, source: Stored) -> Result<Version, String> {
    let text = source.text.as_str();
    let policy: Policy = match source.format {
        Format::Json => serde_json::from_str(text).map_err(|e| format!("{at}:{}: {e}", e.line()))?,
        Format::Toml => toml::from_str(text).map_err(|e: toml::de::Error| {
            let line = e.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            format!("{at}:{line}: {}", e.message())
        })?,
        Format::Yaml => serde_norway::from_str(text).map_err(|e| {
            let line = e.location().map_or(1, |location| location.line());
            format!("{at}:{line}: {e}")
        })?,
    };

    let compiled = Compiled::new(name, &policy).map_err(|e| {
        let line = line_of_field(text, &e.field);
        format!("{at}:{line}: {e}")
    })?;

    let warn = |lint: &String| {
        let field = lint.split(':').next().unwrap_or_default();
        format!("{at}:{}: {lint}", line_of_field(text, field))
    };
    let warnings = compiled.lints().iter().map(warn).collect();
    Ok(Version { hash: hash(&source), source, compiled, warnings })
}

pub fn hash(source: &Stored) -> String {
    let format = match source.format {
        Format::Json => "json\n",
        Format::Yaml => "yaml\n",
        Format::Toml => "toml\n",
    };
    let digest = Sha1::new().chain_update(format).chain_update(&source.text).finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The line of a field, found by the last name in its path. A guess, but close enough for a reader.
fn line_of_field(text: &str, field: &str) -> usize {
    let (list, rest) = field.split_once('[').unwrap_or((field, ""));
    let nth = rest
        .split(']')
        .next()
        .and_then(|n| n.parse::<usize>().ok())
        .unwrap_or(0);
    let name = field.rsplit('.').next().unwrap_or(field);

    let from = text.find(list).unwrap_or(0);
    let place = text[from..]
        .match_indices(name)
        .nth(nth)
        .map_or(from, |(at, _)| from + at);
    text[..place].matches('\n').count() + 1
}
