//! Nodes on free ports, driven over real sockets: by a client of these tests that says exactly what it is told to, and by
//! the unmodified npm client.

mod api;
mod bad_input;
mod channels;
mod client;
mod epochs;
mod faults;
mod json;
mod node;
mod official;
mod oracle;
mod recovery;
mod redis;
mod rpc;
mod rules;
mod sessions;
