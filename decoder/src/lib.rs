//! decoder.
