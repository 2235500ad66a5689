//! The web app on the embedded bus, spoken to as nodes, routers and browsers speak to it.

mod accounts;
mod chat;
mod pages;
mod rig;
