//! The subcommands besides `up` and `config`.

pub mod keys;
pub mod policy;
pub mod soak;
pub mod submit;
pub mod user;
