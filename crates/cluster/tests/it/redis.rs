//! Two nodes on one Redis.
