//! The element tree of one session: what a run builds ([`Element`]) and what the page holds ([`Node`]).

use serde::Serialize;
use serde_json::Value as Json;
use wire::app;

/// An element as a page function built it, before the page has it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Element {
    pub kind: &'static str,
    /// Identifies the element among siblings of its kind when they move. If empty, the order identifies them.
    pub key: String,
    /// For a widget: the name under which the page reports its value.
    pub widget: String,
    pub props: Props,
    pub children: Vec<Element>,
}

/// An element as the page holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub id: u64,
    pub kind: &'static str,
    pub key: String,
    pub widget: String,
    pub props: Props,
    pub children: Vec<Node>,
}

/// Each name appears once.
pub type Props = Vec<(&'static str, Prop)>;

#[derive(Debug, Clone, PartialEq)]
pub enum Prop {
    Text(String),
    Number(f64),
    Flag(bool),
    /// A list or a record.
    Json(Json),
}

impl Element {
    pub fn new(kind: &'static str) -> Self {
        Self { kind, ..Self::default() }
    }

    #[must_use]
    pub fn text(self, name: &'static str, text: impl Into<String>) -> Self {
        self.prop(name, Prop::Text(text.into()))
    }

    #[must_use]
    pub fn number(self, name: &'static str, number: f64) -> Self {
        self.prop(name, Prop::Number(number))
    }

    #[must_use]
    pub fn flag(self, name: &'static str, flag: bool) -> Self {
        self.prop(name, Prop::Flag(flag))
    }

    #[must_use]
    pub fn json(self, name: &'static str, value: impl Serialize) -> Self {
        // Fails only for a map whose keys are not strings, and no property is such a map.
        self.prop(name, Prop::Json(serde_json::to_value(value).unwrap_or_default()))
    }

    #[must_use]
    fn prop(mut self, name: &'static str, value: Prop) -> Self {
        match self.props.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => self.props.push((name, value)),
        }
        self
    }
}

impl Node {
    pub fn prop(&self, name: &str) -> Option<&Prop> {
        self.props
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| value)
    }

    pub fn to_wire(&self) -> app::Node {
        app::Node {
            id: self.id,
            kind: self.kind.into(),
            key: self.widget.clone(),
            props: self.props.iter().map(|(name, value)| value.to_wire(name)).collect(),
            children: self.children.iter().map(Self::to_wire).collect(),
        }
    }
}

impl Prop {
    pub fn to_wire(&self, name: &str) -> app::Prop {
        let value = match self {
            Self::Text(text) => app::Value::Text(text.clone()),
            Self::Number(number) => app::Value::Number(*number),
            Self::Flag(flag) => app::Value::Flag(*flag),
            Self::Json(json) => app::Value::Json(json.to_string()),
        };
        app::Prop { name: name.into(), value: Some(value) }
    }
}

/// Finds a widget by its name, anywhere in the tree.
pub fn find<'a>(nodes: &'a [Node], widget: &str) -> Option<&'a Node> {
    nodes.iter().find_map(|node| {
        if node.widget == widget {
            Some(node)
        } else {
            find(&node.children, widget)
        }
    })
}
