//! End-to-end tests of the binary, and of the rules between the crates.

mod architecture;
mod bundled_model;
mod cli;
mod hub;
mod length_head;
mod loading;
mod outputs;
mod pipeline;
mod report;
mod serving;
mod signals;
mod support;
