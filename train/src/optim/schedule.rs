//! The learning rate over the steps of a run.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine down to 0.
    Cosine,
    /// A straight line down to 0.
    Linear,
    /// Not at all.
    Constant,
}

/// A learning rate with warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LearningRate {
    /// The highest rate.
    pub peak: f64,
    /// Steps of linear rise from 0.
    pub warmup_steps: usize,
    /// Steps of the whole run.
    pub total_steps: usize,
    /// The fall.
    pub schedule: Schedule,
}

impl LearningRate {
    /// The rate of step `step`, counted from 0: transformers' `get_cosine_schedule_with_warmup` and its siblings.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let left = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / left as f64).min(1.0);
        match self.schedule {
            Schedule::Cosine => self.peak * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Schedule::Linear => self.peak * (1.0 - progress),
            Schedule::Constant => self.peak,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_and_falls() {
        let rate = |schedule| LearningRate {
            peak: 1.0,
            warmup_steps: 2,
            total_steps: 12,
            schedule,
        };
        let cosine = rate(Schedule::Cosine);
        assert_eq!((cosine.at(0), cosine.at(1), cosine.at(2)), (0.0, 0.5, 1.0));
        assert!((cosine.at(7) - 0.5).abs() < 1e-12 && cosine.at(12) < 1e-12);
        assert_eq!(rate(Schedule::Linear).at(7), 0.5);
        assert_eq!(rate(Schedule::Constant).at(99), 1.0);
    }
}
