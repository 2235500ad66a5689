//! Drives a web app on the embedded bus, in the roles of nodes, routers and browsers.

mod accounts;
mod chat;
mod pages;
mod rig;
