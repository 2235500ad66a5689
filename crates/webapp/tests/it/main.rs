//! Drives a web app on the embedded bus, in the roles of nodes, routers and browsers.

mod accounts;
mod chat;
mod killed;
mod pages;
mod rig;
