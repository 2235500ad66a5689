//! Meters an evaluation: every step is charged, so that a condition ends after a bounded amount of work.

use cel::Value as Cel;
use serde_json::{Map, Value as Json};

/// Bytes of text that count as one step when they are compared, searched or copied.
const TEXT_STEP: usize = 64;

/// Why an evaluation has no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The expression names something that the request does not have.
    Undefined,
    /// Wrong types, an overflow, a division by zero. The text names types and functions, never values of the request.
    Failed(String),
    /// All steps are used up.
    Spent,
}

/// The steps that an evaluation may still take.
pub struct Meter {
    pub left: u64,
}

impl Meter {
    pub fn charge(&mut self, steps: u64) -> Result<(), Stop> {
        let left = self.left.checked_sub(steps);
        self.left = left.unwrap_or(0);
        left.map(drop).ok_or(Stop::Spent)
    }

    pub fn text(&mut self, text: &str) -> Result<(), Stop> {
        self.charge(1 + (text.len() / TEXT_STEP) as u64)
    }

    /// Charges the steps of copying or comparing the whole value.
    pub fn json(&mut self, json: &Json) -> Result<(), Stop> {
        match json {
            Json::String(text) => self.text(text),
            Json::Array(items) => {
                self.charge(1)?;
                items.iter().try_for_each(|item| self.json(item))
            }
            Json::Object(fields) => self.object(fields),
            _ => self.charge(1),
        }
    }

    pub fn object(&mut self, fields: &Map<String, Json>) -> Result<(), Stop> {
        self.charge(1)?;
        fields
            .iter()
            .try_for_each(|(key, value)| self.text(key).and_then(|()| self.json(value)))
    }

    pub fn cel(&mut self, value: &Cel) -> Result<(), Stop> {
        match value {
            Cel::String(text) => self.text(text),
            Cel::Bytes(bytes) => self.charge(1 + (bytes.len() / TEXT_STEP) as u64),
            Cel::List(items) => {
                self.charge(1)?;
                items.iter().try_for_each(|item| self.cel(item))
            }
            Cel::Map(map) => {
                self.charge(1)?;
                map.map
                    .iter()
                    .try_for_each(|(_, value)| self.charge(1).and_then(|()| self.cel(value)))
            }
            _ => self.charge(1),
        }
    }
}
