//! Optimisers whose whole state can be written and read back, so that a resumed run is the run it resumes.

mod adamw;
mod gradients;
mod muon;
mod schedule;

pub use adamw::{AdamW, AdamWConfig};
pub use gradients::Gradients;
pub use muon::{Muon, MuonConfig};
pub use schedule::{LearningRate, Schedule};
