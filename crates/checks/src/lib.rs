//! The figures of the product beside its peers': `make bench`.
