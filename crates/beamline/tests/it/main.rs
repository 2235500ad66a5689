//! The real process with real servers, driven from outside.

mod clients;
mod commands;
mod contract;
mod data_dir;
mod doors;
mod drain;
mod durability;
mod gateway;
mod journey;
mod keys;
mod ledger;
mod logs;
mod memory;
mod openai;
mod process;
mod random;
mod realtime;
mod roles;
mod secrets;
mod service;
mod settings;
mod several;
mod soak;
mod spread;
mod stopping;
mod stores;
