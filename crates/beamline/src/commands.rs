//! The subcommands beside `up`.

pub mod keys;
pub mod submit;
pub mod user;
