//! Live web apps: what the server says to a page (publications on the session's channel) and what the page says back
//! (the data of RPC `app.event`). The messages of `proto/app.proto`.

use prost::{Message, Oneof};

/// Of both envelopes.
pub const VERSION: u32 = 1;
/// The RPC that carries [`Back`].
pub const EVENT_METHOD: &str = "app.event";

/// Server to page.
#[derive(Clone, PartialEq, Message)]
pub struct Forward {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Grows by one with each run of the session.
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
    /// Among the children that are there without it.
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

/// The whole tree, in place of what the page holds.
#[derive(Clone, PartialEq, Message)]
pub struct Reset {
    #[prost(message, repeated, tag = "1")]
    pub children: Vec<Node>,
    #[prost(string, tag = "2")]
    pub title: String,
}

/// The root has id 0 and is not sent.
#[derive(Clone, PartialEq, Message)]
pub struct Node {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    #[prost(string, tag = "2")]
    pub kind: String,
    /// Widgets: what [`Event::key`] names.
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
    /// Lists and records.
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

/// Page to server.
#[derive(Clone, PartialEq, Message)]
pub struct Back {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The page's own random id.
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
    /// JSON.
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Rerun {
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(string, tag = "2")]
    pub query: String,
    /// The page holds no tree: send it whole.
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
