//! Every message that crosses a process boundary, with its limits and error codes.
//!
//! This crate defines, encodes and decodes. It has no IO, async or clock: bytes and time are arguments.

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
