//! The subcommands beside `up`.

pub mod keys;
