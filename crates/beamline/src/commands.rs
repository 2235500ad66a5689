//! The subcommands beside `up`.

pub mod keys;
pub mod policy;
pub mod soak;
pub mod submit;
pub mod user;
