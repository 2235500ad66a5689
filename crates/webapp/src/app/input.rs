//! Checks the value that a page reports for a widget against the options that the widget offered.

use crate::tree::{Node, Prop};
use serde_json::Value as Json;

/// Longest text of a text field, in bytes.
pub const TEXT_MAX: usize = 64 * 1024;

#[derive(Debug, PartialEq)]
pub enum Input {
    Value(Json),
    /// A button was clicked. It returns true in the next run only.
    Click,
}

/// Returns the value to store, or why this widget cannot report it.
pub fn read(node: &Node, value: &Json) -> Result<Input, String> {
    let refused = |wanted: &str| Err(format!("{} {:?} must report {wanted}", node.kind, node.widget));
    match node.kind {
        "button" if node.prop("disabled") == Some(&Prop::Flag(true)) => Err("the button is disabled".into()),
        "button" | "form" => Ok(Input::Click),
        "text_input" | "text_area" => match value.as_str() {
            Some(text) if text.len() <= TEXT_MAX => Ok(Input::Value(text.into())),
            _ => refused("a text of at most 64 KiB"),
        },
        "number_input" | "slider" => match value.as_f64() {
            Some(number) => Ok(Input::Value(clamp(node, number).into())),
            None => refused("a number"),
        },
        "checkbox" | "toggle" | "dialog" => match value.as_bool() {
            Some(flag) => Ok(Input::Value(flag.into())),
            None => refused("true or false"),
        },
        "radio" | "selectbox" => {
            // An option is a text, or a record with a value.
            let offered = list(node, "options")
                .iter()
                .any(|option| option == value || &option["value"] == value);
            if offered && value.is_string() {
                Ok(Input::Value(value.clone()))
            } else {
                refused("one of its options")
            }
        }
        "tabs" => match value.as_u64() {
            Some(index) if index < list(node, "labels").len() as u64 => Ok(Input::Value(index.into())),
            _ => refused("the index of a tab"),
        },
        kind => Err(format!("an element of kind {kind} has no value to report")),
    }
}

fn clamp(node: &Node, number: f64) -> f64 {
    let bound = |name| match node.prop(name) {
        Some(Prop::Number(bound)) => Some(*bound),
        _ => None,
    };
    number
        .max(bound("min").unwrap_or(f64::MIN))
        .min(bound("max").unwrap_or(f64::MAX))
}

fn list<'a>(node: &'a Node, name: &str) -> &'a [Json] {
    match node.prop(name) {
        Some(Prop::Json(Json::Array(list))) => list,
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::{Ids, adopt};
    use crate::tree::Element;
    use serde_json::json;

    #[track_caller]
    fn check(element: Element, value: Json, expected: Option<Json>) {
        let node = adopt(vec![element], &mut Ids::default()).remove(0);
        let read = read(&node, &value);
        match expected {
            Some(expected) => assert_eq!(read, Ok(Input::Value(expected))),
            None => assert!(read.is_err(), "{read:?}"),
        }
    }

    #[test]
    fn values_that_were_not_offered_are_refused() {
        let slider = || Element::new("slider").number("min", 0.0).number("max", 10.0);
        check(slider(), json!(3.5), Some(json!(3.5)));
        check(slider(), json!(1e300), Some(json!(10.0)));
        check(slider(), json!("3"), None);

        let select = || Element::new("selectbox").json("options", json!([{"value": "a", "label": "A"}]));
        check(select(), json!("a"), Some(json!("a")));
        check(select(), json!("b"), None);
        check(select(), json!({"value": "a", "label": "A"}), None);

        let tabs = || Element::new("tabs").json("labels", json!(["one", "two"]));
        check(tabs(), json!(1), Some(json!(1)));
        check(tabs(), json!(2), None);
        check(tabs(), json!(-1), None);

        check(Element::new("text_input"), json!("x".repeat(TEXT_MAX + 1)), None);
        check(Element::new("checkbox"), json!(1), None);
        check(Element::new("heading"), json!("x"), None);
        check(Element::new("button").flag("disabled", true), json!(null), None);
    }
}
