//! Measures the product from outside and records the evidence: soaks here, benchmarks against peers in `benches/`.

pub mod machine;
pub mod process;
pub mod slope;
pub mod soak;
