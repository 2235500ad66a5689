//! The real process with real servers, driven from outside.

mod commands;
mod contract;
mod doors;
mod drain;
mod durability;
mod gateway;
mod journey;
mod logs;
mod memory;
mod process;
mod realtime;
mod roles;
mod secrets;
mod service;
mod settings;
mod soak;
mod spread;
mod stopping;
