//! The list of everything that is wrong with the settings.

use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// File and line, environment variable, flag or key.
    pub at: String,
    pub what: String,
}

#[derive(Debug, Default)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    pub fn add(&mut self, at: impl fmt::Display, what: impl Into<String>) {
        self.0.push(Problem { at: at.to_string(), what: what.into() });
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = if self.0.len() == 1 {
            "1 problem".to_string()
        } else {
            format!("{} problems", self.0.len())
        };
        writeln!(f, "the settings have {count}; nothing was started:")?;
        for problem in &self.0 {
            writeln!(f, "  {}: {}", problem.at, problem.what)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// The end of a message about an unknown name: `; did you mean …?`, or nothing if no known name resembles it.
pub fn did_you_mean<'a>(known: impl Iterator<Item = &'a str>, name: &str) -> String {
    let nearest = known
        .map(|known| (strsim::damerau_levenshtein(known, name), known))
        .filter(|(distance, known)| *distance <= known.len().max(name.len()) / 2)
        .min();
    nearest.map_or(String::new(), |(_, known)| format!("; did you mean {known}?"))
}
