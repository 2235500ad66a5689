//! Drives the product from outside and leaves evidence: soaks, and (as `make bench`) its figures beside its peers'.

pub mod machine;
pub mod process;
pub mod slope;
pub mod soak;
