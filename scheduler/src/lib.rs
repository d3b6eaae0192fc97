//! In which order and in which batches requests are decoded: pure logic without a clock, a file or a random source.

mod admission;
mod config;
mod cost;
mod driver;
mod plan;
mod planner;
mod residuals;
mod simulate;
mod stats;
mod timeline;

pub use admission::{AdmissionError, AdmissionOrder, AdmissionQueue, Waiting};
pub use config::{Planning, ScheduleConfig, Strategy};
pub use cost::{CostModel, CostPoint, Rise};
pub use driver::{BatchExecutor, BatchRun, DriverError, Outcome, run_groups};
pub use plan::{Job, PlannedBatch, plan_group};
pub use simulate::{Machine, PROMPT_TOKENS, Simulated, SimulatedRequest, simulate};
pub use stats::{StrategyReport, StrategyRow, StrategyStats};
pub use timeline::{Spans, Timeline};
