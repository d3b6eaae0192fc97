//! What a forward pass costs on one device.

use serde::{Deserialize, Serialize};

/// Seconds of a forward pass, as a sum of what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CostModel {
    /// A decode step, whatever is in it.
    pub step: f64,
    /// Each sequence in a decode step.
    pub row: f64,
    /// Each token that a sequence of a decode step has in the cache.
    pub cached_token: f64,
    /// Each prompt token.
    pub prompt_token: f64,
}

/// A measurement: a batch whose sequences have the same context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostPoint {
    /// Sequences.
    pub batch_size: f64,
    /// Tokens of each.
    pub context: f64,
    /// Seconds to run all prompts.
    pub prefill: f64,
    /// Seconds of one decode step.
    pub step: f64,
}

impl CostModel {
    /// One decode step of `rows` sequences with `context` tokens each, in seconds.
    pub fn decode_step(&self, rows: f64, context: f64) -> f64 {
        self.step + rows * (self.row + self.cached_token * context)
    }

    /// The model that fits measurements best: least squares of relative errors, no term below zero. `None` where there
    /// are fewer than three points that take time.
    pub fn fit(points: &[CostPoint]) -> Option<Self> {
        let points: Vec<&CostPoint> = points.iter().filter(|p| p.step > 0.0 && p.prefill >= 0.0).collect();
        if points.len() < 3 {
            return None;
        }
        let mut used = [true; 3];
        let terms = loop {
            let solved = least_squares(&points, used)?;
            // A term below zero is left out, the most negative first.
            let worst = (0..3).filter(|&i| used[i] && solved[i] < 0.0);
            match worst.min_by(|&a, &b| solved[a].total_cmp(&solved[b])) {
                Some(term) => used[term] = false,
                None => break solved,
            }
        };
        let tokens: f64 = points.iter().map(|p| p.batch_size * p.context).sum();
        Some(Self {
            step: terms[0],
            row: terms[1],
            cached_token: terms[2],
            prompt_token: points.iter().map(|p| p.prefill).sum::<f64>() / tokens.max(1.0),
        })
    }
}

/// Solves for the terms that are used; the others are 0. `None` where the points do not tell them apart.
fn least_squares(points: &[&CostPoint], used: [bool; 3]) -> Option<[f64; 3]> {
    let mut normal = [[0f64; 4]; 3];
    for p in points {
        let terms = [1.0, p.batch_size, p.batch_size * p.context].map(|t| t / p.step);
        for (i, row) in normal.iter_mut().enumerate() {
            for j in 0..3 {
                row[j] += terms[i] * terms[j];
            }
            row[3] += terms[i];
        }
    }
    for i in (0..3).filter(|&i| !used[i]) {
        normal.iter_mut().for_each(|row| row[i] = 0.0);
        normal[i] = [0.0; 4];
        normal[i][i] = 1.0;
    }
    eliminate(normal)
}

/// Gauss-Jordan with pivots.
fn eliminate(mut m: [[f64; 4]; 3]) -> Option<[f64; 3]> {
    for column in 0..3 {
        let pivot = (column..3).max_by(|&a, &b| m[a][column].abs().total_cmp(&m[b][column].abs()))?;
        m.swap(column, pivot);
        let scale = m[column][column];
        if scale.abs() < 1e-12 {
            return None;
        }
        m[column] = m[column].map(|v| v / scale);
        for row in (0..3).filter(|&r| r != column) {
            let factor = m[row][column];
            let pivot = m[column];
            m[row].iter_mut().zip(pivot).for_each(|(v, p)| *v -= factor * p);
        }
    }
    Some([m[0][3], m[1][3], m[2][3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(model: &CostModel) -> Vec<CostPoint> {
        let at = |(batch_size, context): (f64, f64)| CostPoint {
            batch_size,
            context,
            prefill: batch_size * context * model.prompt_token,
            step: model.decode_step(batch_size, context),
        };
        [(1.0, 32.0), (16.0, 32.0), (64.0, 128.0), (4.0, 512.0), (64.0, 512.0)]
            .map(at)
            .to_vec()
    }

    #[test]
    fn what_made_the_points_is_found_again() {
        let model = CostModel {
            step: 1e-4,
            row: 4e-5,
            cached_token: 1e-7,
            prompt_token: 2e-5,
        };
        let got = CostModel::fit(&points(&model)).expect("enough points");
        for (got, want) in [
            (got.step, model.step),
            (got.row, model.row),
            (got.cached_token, model.cached_token),
            (got.prompt_token, model.prompt_token),
        ] {
            assert!((got / want - 1.0).abs() < 1e-6, "{got}, want {want}");
        }
    }

    #[test]
    fn no_term_is_negative_and_too_few_points_are_none() {
        let mut model = CostModel {
            step: -1e-5,
            row: 4e-5,
            cached_token: 1e-7,
            prompt_token: 2e-5,
        };
        let got = CostModel::fit(&points(&model)).expect("enough points");
        assert!(got.step == 0.0 && got.row > 0.0, "{got:?}");
        model.step = 0.0;
        assert_eq!(CostModel::fit(&points(&model)[..2]), None);
        let same = [points(&model)[0]; 4];
        assert_eq!(CostModel::fit(&same), None, "one point four times tells nothing apart");
    }
}
