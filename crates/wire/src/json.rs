//! JSON that is carried from one process to another without being interpreted: it keeps its text, and nothing builds a
//! tree of it on the way.

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::fmt;

/// Levels of arrays and objects that a value may have. Messages that contain the value still fit the 128 levels that
/// JSON parsers commonly accept.
const DEPTH_MAX: usize = 120;

/// Any JSON value, as text. The text is valid in every respect ([`Json::value`] cannot fail) and has no line breaks.
#[derive(Clone, Serialize)]
#[serde(transparent)]
pub struct Json(Box<RawValue>);

/// A JSON object, as text.
#[derive(Clone, Serialize)]
#[serde(transparent)]
pub struct JsonObject(Json);

impl Json {
    /// Serializes `value`, which must not contain maps whose keys are no strings.
    pub fn of(value: &impl Serialize) -> Self {
        Self(serde_json::value::to_raw_value(value).expect("the value serializes to JSON"))
    }

    pub fn text(&self) -> &str {
        self.0.get()
    }

    pub fn value(&self) -> Value {
        serde_json::from_str(self.text()).expect("the text was checked")
    }

    /// The items, if the value is an array.
    pub fn list(&self) -> Option<Vec<Json>> {
        serde_json::from_str(self.text()).ok()
    }

    /// The string, if the value is one.
    pub fn string(&self) -> Option<String> {
        serde_json::from_str(self.text()).ok()
    }
}

impl JsonObject {
    /// Serializes `value`, which must be a map or a struct with named fields.
    pub fn of(value: &impl Serialize) -> Self {
        let object = Self::try_from(Json::of(value));
        object.expect("the value serializes to an object")
    }

    pub fn text(&self) -> &str {
        self.0.text()
    }

    pub fn map(&self) -> Map<String, Value> {
        serde_json::from_str(self.text()).expect("the text was checked")
    }

    /// The field of this name; if there are several, the last one, as other parsers have it.
    pub fn get(&self, name: &str) -> Option<Json> {
        let mut parser = serde_json::Deserializer::from_str(self.text());
        let found = parser.deserialize_map(Field(name)).expect("the text was checked");
        found.map(|raw| Json(raw.to_owned()))
    }
}

impl From<JsonObject> for Json {
    fn from(object: JsonObject) -> Self {
        object.0
    }
}

impl TryFrom<Json> for JsonObject {
    type Error = Json;

    fn try_from(json: Json) -> Result<Self, Json> {
        if json.text().starts_with('{') {
            Ok(Self(json))
        } else {
            Err(json)
        }
    }
}

/// The same value, however it is written.
impl PartialEq for Json {
    fn eq(&self, other: &Self) -> bool {
        self.text() == other.text() || self.value() == other.value()
    }
}

impl PartialEq<Value> for Json {
    fn eq(&self, other: &Value) -> bool {
        self.value() == *other
    }
}

impl fmt::Debug for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl fmt::Debug for JsonObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        // Raw text is checked for its syntax only; numbers, escapes and depth are not.
        let mut parser = serde_json::Deserializer::from_str(raw.get());
        Checked { depth: DEPTH_MAX }
            .deserialize(&mut parser)
            .map_err(de::Error::custom)?;

        // Programs read one task a line.
        Ok(Self(one_line(&raw).unwrap_or(raw)))
    }
}

/// The same JSON without line breaks; `None` if it has none.
pub(crate) fn one_line(raw: &RawValue) -> Option<Box<RawValue>> {
    // Two searches for a single byte are several times faster than one search for either of two.
    if !raw.get().contains('\n') && !raw.get().contains('\r') {
        return None;
    }
    // In valid JSON, line breaks stand between tokens only (strings escape them), so a space means the same.
    let text = raw.get().replace(['\n', '\r'], " ");
    Some(RawValue::from_string(text).expect("spaces may stand where line breaks did"))
}

impl<'de> Deserialize<'de> for JsonObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let refuse = |json: Json| {
            let found = match json.text().as_bytes() {
                [b'[', ..] => Unexpected::Seq,
                [b'"', ..] => Unexpected::Other("string"),
                [b'n', ..] => Unexpected::Unit,
                [b't' | b'f', ..] => Unexpected::Other("boolean"),
                _ => Unexpected::Other("number"),
            };
            de::Error::invalid_type(found, &"a map")
        };
        Json::deserialize(deserializer)?.try_into().map_err(refuse)
    }
}

/// Reads a value and keeps nothing of it.
struct Checked {
    /// Levels that may still follow.
    depth: usize,
}

impl Checked {
    fn inner<E: de::Error>(&self) -> Result<Self, E> {
        let depth = self.depth.checked_sub(1);
        let depth = depth.ok_or_else(|| E::custom(format_args!("the value has more than {DEPTH_MAX} levels")))?;
        Ok(Self { depth })
    }
}

impl<'de> DeserializeSeed<'de> for Checked {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Checked {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(self.inner()?)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(self.inner()?)?.is_some() {
            map.next_value_seed(self.inner()?)?;
        }
        Ok(())
    }
}

/// Finds the field of this name in an object.
struct Field<'a>(&'a str);

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(is_it) = map.next_key_seed(Is(self.0))? {
            if is_it {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Whether a string is this one.
struct Is<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Is<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Is<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<bool, E> {
        Ok(text == self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_is_kept_as_it_arrived() {
        for text in ["1.50", "1e2", r#"{"b": 1,  "a":"\u00e9", "b":2}"#, "[]", "null", r#""x""#] {
            let json: Json = serde_json::from_str(text).unwrap();
            assert_eq!(json.text(), text);
            assert_eq!(serde_json::to_string(&[&json]).unwrap(), format!("[{text}]"));
        }
    }

    #[test]
    fn line_breaks_between_tokens_become_spaces() {
        let json: Json = serde_json::from_str("{\n\"a\":\r\n\"x\\ny\"}").unwrap();
        assert_eq!(json.text(), r#"{ "a":  "x\ny"}"#);
    }

    #[test]
    fn text_that_other_parsers_refuse_is_refused() {
        let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(serde_json::from_str::<Json>(&deep(DEPTH_MAX)).is_ok());
        for bad in [&deep(DEPTH_MAX + 1), "1e999", r#""\ud800""#, r#"{"\ud800":1}"#, "[1,]", "nul"] {
            assert!(serde_json::from_str::<Json>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn object_is_nothing_else() {
        assert!(serde_json::from_str::<JsonObject>("{}").is_ok());
        for bad in ["[]", "1", "true", "null", "\"{}\""] {
            let error = serde_json::from_str::<JsonObject>(bad).unwrap_err();
            assert!(error.to_string().contains("expected a map"), "{bad}: {error}");
        }
    }

    #[test]
    fn field_is_found_at_the_top_level_only() {
        let object: JsonObject = serde_json::from_str(r#"{"in":{"a":1},"a":[2],"\u0062":3,"a":{"x":4}}"#).unwrap();
        let text = |name| object.get(name).map(|json| json.text().to_string());
        assert_eq!(text("a").as_deref(), Some(r#"{"x":4}"#));
        assert_eq!(text("b").as_deref(), Some("3"));
        assert_eq!(text("x"), None);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<i32>().prop_map(|n| Value::from(f64::from(n) / 8.0)),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                proptest::collection::btree_map(".*", inner, 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_accepted_can_be_interpreted(value in any_json()) {
            let text = value.to_string();
            let json: Json = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(json.value(), serde_json::from_str::<Value>(&text).unwrap());
            prop_assert_eq!(Json::of(&json.value()).value(), json.value());
        }

        #[test]
        fn arbitrary_text_is_accepted_only_if_it_is_a_value(text in "[\\[\\]{}\",:0-9a-ue\\\\ .-]{0,40}") {
            let accepted = serde_json::from_str::<Json>(&text);
            let value = serde_json::from_str::<Value>(&text);
            prop_assert_eq!(accepted.is_ok(), value.is_ok(), "{}", text);
        }
    }
}
