//! The cost model that fits measurements.

use super::{CostModel, CostPoint, Rise};

/// What is solved for: the step, rows, cached tokens, and what both cost more beyond a number of them.
const TERMS: usize = 5;
/// A price that rises must leave less than this share of the squared error: two more numbers always fit a little better.
const CLEARLY: f64 = 0.4;
/// Relative errors up to here are the measurement's own.
const NOISE: f64 = 0.03;
/// Numbers at which a price may rise, from each measured one to the next.
const BETWEEN: usize = 4;
/// Points that must lie to each side of where a price rises.
const EACH_SIDE: usize = 2;

/// A fit: the terms, where prices rise, and the sum of squared relative errors.
struct Fit {
    terms: [f64; TERMS],
    rows: Option<f64>,
    cached_tokens: Option<f64>,
    error: f64,
}

impl CostModel {
    /// The model that fits measurements best: least squares of relative errors, no term below zero, and a price that rises
    /// only where the points clearly say so. `None` where there are fewer than three points that take time.
    pub fn fit(points: &[CostPoint]) -> Option<Self> {
        let points: Vec<&CostPoint> = points.iter().filter(|p| p.step > 0.0 && p.prefill >= 0.0).collect();
        if points.len() < 3 {
            return None;
        }
        let rows = rises(points.iter().map(|p| p.batch_size));
        let cached_tokens = rises(points.iter().map(|p| p.batch_size * p.context));
        let noise = NOISE * NOISE * points.len() as f64;
        let mut best: Option<(f64, Fit)> = None;
        for &rows in &rows {
            for &cached_tokens in &cached_tokens {
                let risen = usize::from(rows.is_some()) + usize::from(cached_tokens.is_some());
                // As many points as numbers fit whatever was measured.
                if risen > 0 && points.len() < 3 + 2 * risen + 1 {
                    continue;
                }
                let Some(fit) = solve(&points, rows, cached_tokens) else {
                    continue;
                };
                // Of those that are as good as what was measured, the simplest; of those as simple, the best.
                let score = fit.error.max(noise) / CLEARLY.powi(risen as i32);
                if best
                    .as_ref()
                    .is_none_or(|(least, best)| score < *least || score == *least && fit.error < best.error)
                {
                    best = Some((score, fit));
                }
            }
        }
        let Fit {
            terms,
            rows,
            cached_tokens,
            ..
        } = best?.1;
        let rise = |beyond: Option<f64>, more: f64| beyond.filter(|_| more > 0.0).map(|beyond| Rise { beyond, more });
        let tokens: f64 = points.iter().map(|p| p.batch_size * p.context).sum();
        Some(Self {
            step: terms[0],
            row: terms[1],
            cached_token: terms[2],
            prompt_token: points.iter().map(|p| p.prefill).sum::<f64>() / tokens.max(1.0),
            many_rows: rise(rows, terms[3]),
            many_cached_tokens: rise(cached_tokens, terms[4]),
        })
    }
}

/// Where a price may rise, nowhere first: at measured numbers and between them, with points to each side.
fn rises(measured: impl Iterator<Item = f64>) -> Vec<Option<f64>> {
    let mut all: Vec<f64> = measured.collect();
    all.sort_by(f64::total_cmp);
    let mut found = vec![None];
    let enough = |at: f64| {
        let below = all.iter().filter(|x| **x <= at).count();
        below >= EACH_SIDE && all.len() - below >= EACH_SIDE
    };
    for pair in all.windows(2).filter(|pair| pair[0] > 0.0 && pair[0] < pair[1]) {
        let step = (pair[1] / pair[0]).powf(1.0 / BETWEEN as f64);
        let between = (0..BETWEEN).map(|i| pair[0] * step.powi(i as i32));
        found.extend(between.filter(|at| enough(*at)).map(Some));
    }
    found
}

/// The best terms, given where prices rise; `None` where the points do not tell the terms apart.
fn solve(points: &[&CostPoint], rows: Option<f64>, cached_tokens: Option<f64>) -> Option<Fit> {
    let beyond = |at: Option<f64>, count: f64| at.map_or(0.0, |at| (count - at).max(0.0));
    let of_point = |p: &&CostPoint| {
        let cached = p.batch_size * p.context;
        let terms = [
            1.0,
            p.batch_size,
            cached,
            beyond(rows, p.batch_size),
            beyond(cached_tokens, cached),
        ];
        terms.map(|term| term / p.step)
    };
    let equations: Vec<[f64; TERMS]> = points.iter().map(of_point).collect();
    let mut used = [true, true, true, rows.is_some(), cached_tokens.is_some()];
    let terms = loop {
        let solved = least_squares(&equations, used)?;
        // A term below zero is left out, the most negative first.
        let worst = (0..TERMS).filter(|&i| used[i] && solved[i] < 0.0);
        match worst.min_by(|&a, &b| solved[a].total_cmp(&solved[b])) {
            Some(term) => used[term] = false,
            None => break solved,
        }
    };
    let miss = |equation: &[f64; TERMS]| equation.iter().zip(&terms).map(|(e, t)| e * t).sum::<f64>() - 1.0;
    Some(Fit {
        terms,
        rows,
        cached_tokens,
        error: equations.iter().map(|e| miss(e).powi(2)).sum(),
    })
}

/// Solves `equation · terms = 1` for the terms that are used; the others are 0.
fn least_squares(equations: &[[f64; TERMS]], used: [bool; TERMS]) -> Option<[f64; TERMS]> {
    let mut normal = [[0f64; TERMS + 1]; TERMS];
    // Rows and seconds differ by orders of magnitude: each term is measured by its own size.
    let size: [f64; TERMS] = std::array::from_fn(|i| equations.iter().map(|e| e[i] * e[i]).sum::<f64>().sqrt());
    for (i, row) in normal.iter_mut().enumerate() {
        for j in 0..TERMS {
            row[j] = match used[i] && used[j] {
                true => equations.iter().map(|e| e[i] * e[j]).sum::<f64>() / (size[i] * size[j]),
                false => f64::from(u8::from(i == j)),
            };
        }
        if used[i] {
            row[TERMS] = equations.iter().map(|e| e[i]).sum::<f64>() / size[i];
        }
    }
    let solved = eliminate(normal)?;
    Some(std::array::from_fn(|i| if used[i] { solved[i] / size[i] } else { 0.0 }))
}

/// Gauss-Jordan with pivots.
fn eliminate(mut m: [[f64; TERMS + 1]; TERMS]) -> Option<[f64; TERMS]> {
    for column in 0..TERMS {
        let pivot = (column..TERMS).max_by(|&a, &b| m[a][column].abs().total_cmp(&m[b][column].abs()))?;
        m.swap(column, pivot);
        let scale = m[column][column];
        if scale.is_nan() || scale.abs() < 1e-12 {
            return None;
        }
        m[column] = m[column].map(|v| v / scale);
        for row in (0..TERMS).filter(|&r| r != column) {
            let factor = m[row][column];
            let pivot = m[column];
            m[row].iter_mut().zip(pivot).for_each(|(v, p)| *v -= factor * p);
        }
    }
    Some(m.map(|row| row[TERMS]))
}

#[cfg(test)]
mod tests;
