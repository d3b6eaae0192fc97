//! Flags of `bench` and `simulate`, which run several schedules and can record what every slot does.

use std::num::NonZeroUsize;

use anyhow::bail;
use clap::Args;

use crate::error::UsageError;
use crate::inputs::ScheduleArgs;

/// Requests that a figure of the slots can show.
const MOST_DRAWN: usize = 1000;

/// The flags.
#[derive(Args, Clone)]
pub struct SweepArgs {
    /// Run every strategy at each of these batch sizes, with commas, instead of at one
    #[arg(long, value_delimiter = ',', value_name = "SIZES", conflicts_with = "batch_size")]
    pub batch_sizes: Vec<NonZeroUsize>,
    /// Record what every slot did in every step: with --json for the figure that `report` makes of it, else printed with
    /// a letter for a stretch of steps
    #[arg(long)]
    pub timeline: bool,
}

impl SweepArgs {
    /// One schedule for every batch size, the smallest first; the one of `--batch-size` where none are given.
    ///
    /// # Errors
    /// A batch size occurs twice.
    pub fn schedules(&self, schedule: &ScheduleArgs) -> anyhow::Result<Vec<ScheduleArgs>> {
        if self.batch_sizes.is_empty() {
            return Ok(vec![schedule.clone()]);
        }
        let mut sizes = self.batch_sizes.clone();
        sizes.sort_unstable();
        if let Some(two) = sizes.windows(2).find(|two| two[0] == two[1]) {
            let twice = two[0];
            bail!(UsageError(format!("--batch-sizes names {twice} twice: give each once")));
        }
        let with = |batch_size| ScheduleArgs {
            batch_size,
            ..schedule.clone()
        };
        Ok(sizes.into_iter().map(with).collect())
    }

    /// That a figure of so many requests can be read.
    ///
    /// # Errors
    /// It is asked for and there are too many.
    pub fn check(&self, requests: usize) -> anyhow::Result<()> {
        if self.timeline && requests > MOST_DRAWN {
            bail!("--timeline is for at most {MOST_DRAWN} requests, there are {requests}: give --num");
        }
        Ok(())
    }
}
