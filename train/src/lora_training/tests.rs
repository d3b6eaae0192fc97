//! Training with a head.
