//! Tests of nodes on free ports over real sockets, with a scripted test client and with the unmodified npm client.

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
