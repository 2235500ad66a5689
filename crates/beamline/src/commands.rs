//! The subcommands beside `up`.

pub mod keys;
pub mod soak;
pub mod submit;
pub mod user;
