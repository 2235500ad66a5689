//! Every message that crosses a process boundary, with its limits and codes.
//!
//! Types, encode, decode. No IO, no async, no clock: bytes and time are arguments.

pub mod app;
pub mod channels;
pub mod chat;
pub mod id;
pub mod ipc;
pub mod limits;
pub mod policy;
pub mod realtime;
pub mod router;
pub mod status;
pub mod subjects;
pub mod websocket;
