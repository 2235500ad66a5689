//! Messages of live web apps, as in `proto/app.proto`: from the server to a page (publications on the session's
//! channel) and from the page to the server (the data of the RPC `app.event`).

use prost::{Message, Oneof};

/// The version of both envelopes, [`Forward`] and [`Back`].
pub const VERSION: u32 = 1;
/// The RPC that carries [`Back`].
pub const EVENT_METHOD: &str = "app.event";

/// A message from the server to a page.
#[derive(Clone, PartialEq, Message)]
pub struct Forward {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The number of the session's run, counted from 1.
    #[prost(uint64, tag = "2")]
    pub run: u64,
    #[prost(oneof = "Body", tags = "3, 4, 5, 6, 7")]
    pub body: Option<Body>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Body {
    #[prost(message, tag = "3")]
    Deltas(Deltas),
    #[prost(message, tag = "4")]
    RunFinished(RunFinished),
    #[prost(message, tag = "5")]
    Error(Failure),
    #[prost(message, tag = "6")]
    Navigate(Navigate),
    #[prost(message, tag = "7")]
    Toast(Toast),
}

#[derive(Clone, PartialEq, Message)]
pub struct Deltas {
    #[prost(message, repeated, tag = "1")]
    pub delta: Vec<Delta>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Delta {
    #[prost(oneof = "Op", tags = "1, 2, 3, 4, 5, 6")]
    pub op: Option<Op>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Op {
    #[prost(message, tag = "1")]
    Insert(Insert),
    #[prost(message, tag = "2")]
    Update(Update),
    #[prost(message, tag = "3")]
    Remove(Remove),
    #[prost(message, tag = "4")]
    Move(Move),
    #[prost(message, tag = "5")]
    AppendText(AppendText),
    #[prost(message, tag = "6")]
    Reset(Reset),
}

#[derive(Clone, PartialEq, Message)]
pub struct Insert {
    #[prost(uint64, tag = "1")]
    pub parent: u64,
    #[prost(uint32, tag = "2")]
    pub index: u32,
    #[prost(message, optional, tag = "3")]
    pub node: Option<Node>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Update {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(message, repeated, tag = "2")]
    pub set: Vec<Prop>,
    #[prost(string, repeated, tag = "3")]
    pub unset: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Remove {
    #[prost(uint64, tag = "1")]
    pub id: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Move {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(uint64, tag = "2")]
    pub parent: u64,
    /// Position among the parent's children, not counting the moved node.
    #[prost(uint32, tag = "3")]
    pub index: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct AppendText {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(string, tag = "2")]
    pub prop: String,
    #[prost(string, tag = "3")]
    pub text: String,
}

/// The whole tree, which replaces the one that the page holds.
#[derive(Clone, PartialEq, Message)]
pub struct Reset {
    #[prost(message, repeated, tag = "1")]
    pub children: Vec<Node>,
    #[prost(string, tag = "2")]
    pub title: String,
}

/// A node of the element tree. The root has id 0 and is never sent.
#[derive(Clone, PartialEq, Message)]
pub struct Node {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(string, tag = "2")]
    pub kind: String,
    /// The key of a widget, which [`Event::key`] refers to; empty for other elements.
    #[prost(string, tag = "3")]
    pub key: String,
    #[prost(message, repeated, tag = "4")]
    pub props: Vec<Prop>,
    #[prost(message, repeated, tag = "5")]
    pub children: Vec<Node>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Prop {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(oneof = "Value", tags = "2, 3, 4, 5")]
    pub value: Option<Value>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Value {
    #[prost(string, tag = "2")]
    Text(String),
    #[prost(double, tag = "3")]
    Number(f64),
    #[prost(bool, tag = "4")]
    Flag(bool),
    /// Lists and records, as JSON.
    #[prost(string, tag = "5")]
    Json(String),
}

#[derive(Clone, PartialEq, Message)]
pub struct RunFinished {
    #[prost(uint32, tag = "1")]
    pub duration_us: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Failure {
    #[prost(string, tag = "1")]
    pub message: String,
    #[prost(string, tag = "2")]
    pub trace_id: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Navigate {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(string, tag = "2")]
    pub query: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Toast {
    #[prost(string, tag = "1")]
    pub tone: String,
    #[prost(string, tag = "2")]
    pub text: String,
}

/// A message from a page to the server.
#[derive(Clone, PartialEq, Message)]
pub struct Back {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The random id that the page chose for its session.
    #[prost(string, tag = "2")]
    pub session: String,
    #[prost(oneof = "Said", tags = "3, 4, 5, 6")]
    pub body: Option<Said>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Said {
    #[prost(message, tag = "3")]
    Event(Event),
    #[prost(message, tag = "4")]
    Rerun(Rerun),
    #[prost(message, tag = "5")]
    Submit(Submit),
    #[prost(message, tag = "6")]
    Stop(Stop),
}

#[derive(Clone, PartialEq, Message)]
pub struct Event {
    #[prost(string, tag = "1")]
    pub key: String,
    /// The widget's value as JSON.
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Rerun {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(string, tag = "2")]
    pub query: String,
    /// Whether the page holds no tree yet and needs the whole one.
    #[prost(bool, tag = "3")]
    pub reset: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct Submit {
    #[prost(string, tag = "1")]
    pub form: String,
    #[prost(message, repeated, tag = "2")]
    pub values: Vec<Event>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Stop {}

impl Forward {
    pub fn new(run: u64, body: Body) -> Self {
        Self { version: VERSION, run, body: Some(body) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value as Json;

    /// Another protobuf implementation wrote the vectors. The front end's codec is tested with the same file.
    #[test]
    fn golden_messages_encode_and_decode() {
        let fixtures: Json = serde_json::from_str(include_str!("../../../fixtures/wire/app.json")).unwrap();
        check(&fixtures["forward"], forward);
        check(&fixtures["back"], back);
    }

    fn check<M: Message + Default + PartialEq + std::fmt::Debug>(cases: &Json, read: fn(&Json) -> M) {
        for case in cases.as_array().unwrap() {
            let bytes = hex::decode(text(case, "protobuf")).unwrap();
            let message = read(&case["json"]);
            assert_eq!(hex::encode(message.encode_to_vec()), text(case, "protobuf"), "{}", case["name"]);
            assert_eq!(M::decode(bytes.as_slice()).unwrap(), message, "{}", case["name"]);
            for end in 0..bytes.len() {
                let _ = M::decode(&bytes[..end]);
            }
        }
    }

    fn forward(v: &Json) -> Forward {
        let body = one(v, "deltas", |v| Body::Deltas(Deltas { delta: list(v, "delta", delta) }))
            .or(one(v, "runFinished", |v| Body::RunFinished(RunFinished { duration_us: small(v, "durationUs") })))
            .or(one(v, "error", |v| {
                Body::Error(Failure { message: text(v, "message"), trace_id: text(v, "traceId") })
            }))
            .or(one(v, "navigate", |v| Body::Navigate(Navigate { path: text(v, "path"), query: text(v, "query") })))
            .or(one(v, "toast", |v| Body::Toast(Toast { tone: text(v, "tone"), text: text(v, "text") })));
        Forward { version: small(v, "version"), run: number(v, "run"), body }
    }

    fn delta(v: &Json) -> Delta {
        let op = one(v, "insert", |v| {
            Op::Insert(Insert {
                parent: number(v, "parent"),
                index: small(v, "index"),
                node: one(v, "node", node),
            })
        })
        .or(one(v, "update", |v| {
            let unset = list(v, "unset", |name| name.as_str().unwrap().to_string());
            Op::Update(Update { id: number(v, "id"), set: list(v, "set", prop), unset })
        }))
        .or(one(v, "remove", |v| Op::Remove(Remove { id: number(v, "id") })))
        .or(one(v, "move", |v| {
            Op::Move(Move {
                id: number(v, "id"),
                parent: number(v, "parent"),
                index: small(v, "index"),
            })
        }))
        .or(one(v, "appendText", |v| {
            Op::AppendText(AppendText { id: number(v, "id"), prop: text(v, "prop"), text: text(v, "text") })
        }))
        .or(one(v, "reset", |v| {
            Op::Reset(Reset { children: list(v, "children", node), title: text(v, "title") })
        }));
        Delta { op }
    }

    fn node(v: &Json) -> Node {
        Node {
            id: number(v, "id"),
            kind: text(v, "kind"),
            key: text(v, "key"),
            props: list(v, "props", prop),
            children: list(v, "children", node),
        }
    }

    fn prop(v: &Json) -> Prop {
        let value = one(v, "text", |v| Value::Text(v.as_str().unwrap().to_string()))
            .or(one(v, "number", |v| Value::Number(v.as_f64().unwrap())))
            .or(one(v, "flag", |v| Value::Flag(v.as_bool().unwrap())))
            .or(one(v, "json", |v| Value::Json(v.as_str().unwrap().to_string())));
        Prop { name: text(v, "name"), value }
    }

    fn back(v: &Json) -> Back {
        let body = one(v, "event", |v| Said::Event(event(v)))
            .or(one(v, "rerun", |v| {
                let reset = v["reset"].as_bool().unwrap_or_default();
                Said::Rerun(Rerun { path: text(v, "path"), query: text(v, "query"), reset })
            }))
            .or(one(v, "submit", |v| {
                Said::Submit(Submit { form: text(v, "form"), values: list(v, "values", event) })
            }))
            .or(one(v, "stop", |_| Said::Stop(Stop {})));
        Back { version: small(v, "version"), session: text(v, "session"), body }
    }

    fn event(v: &Json) -> Event {
        Event { key: text(v, "key"), value: text(v, "value") }
    }

    fn text(v: &Json, name: &str) -> String {
        v[name].as_str().unwrap_or_default().to_string()
    }

    fn number(v: &Json, name: &str) -> u64 {
        v[name].as_u64().unwrap_or_default()
    }

    fn small(v: &Json, name: &str) -> u32 {
        number(v, name).try_into().unwrap()
    }

    fn one<T>(v: &Json, name: &str, read: impl Fn(&Json) -> T) -> Option<T> {
        v.get(name).map(read)
    }

    fn list<T>(v: &Json, name: &str, read: impl Fn(&Json) -> T) -> Vec<T> {
        v[name].as_array().into_iter().flatten().map(read).collect()
    }
}
