//! The subcommands besides `up` and `config`.

pub mod credentials;
pub mod policy;
pub mod soak;
pub mod submit;
pub mod user;
