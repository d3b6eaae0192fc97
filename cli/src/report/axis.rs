//! Axes with round ticks.

use super::chart::Axis;

/// Ticks of a linear axis, at most.
const MOST_TICKS: f64 = 7.0;

impl Axis {
    /// From 0 to a tick at `most` or above it.
    pub fn from_zero(label: impl Into<String>, most: f64) -> Self {
        let most = if most > 0.0 { most } else { 1.0 };
        let step = round_up(most / MOST_TICKS);
        let count = (most / step * (1.0 - 1e-9)).ceil().max(1.0) as u32;
        let tick = |i: u32| (f64::from(i) * step, number(f64::from(i) * step));
        Self {
            label: label.into(),
            range: [0.0, f64::from(count) * step],
            ticks: (0..=count).map(tick).collect(),
        }
    }

    /// From 0 to `end` exactly, with ticks as far as they fit.
    pub fn up_to(label: impl Into<String>, end: f64) -> Self {
        let mut axis = Self::from_zero(label, end);
        axis.range[1] = end;
        axis.ticks.retain(|(at, _)| *at <= end * (1.0 + 1e-9));
        axis
    }

    /// From 0 to 100 %; values are fractions.
    pub fn share(label: impl Into<String>) -> Self {
        let tick = |i: u32| (f64::from(i) / 5.0, format!("{} %", 20 * i));
        Self {
            label: label.into(),
            range: [0.0, 1.0],
            ticks: (0..=5).map(tick).collect(),
        }
    }

    /// Sizes in powers of two: a value's place is its logarithm to the base 2, and every size that occurs has its tick
    /// unless it would touch its neighbour.
    pub fn sizes(label: impl Into<String>, sizes: impl Iterator<Item = u32>) -> Self {
        let mut sizes: Vec<u32> = sizes.map(|size| size.max(1)).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let place = |size: u32| f64::from(size).log2();
        let (least, most) = match (sizes.first(), sizes.last()) {
            (Some(&least), Some(&most)) => (place(least), place(most)),
            _ => (0.0, 0.0),
        };
        let air = ((most - least) * 0.04).max(0.25);
        let range = [least - air, most + air];
        let mut ticks: Vec<(f64, String)> = Vec::new();
        for size in sizes {
            let near = (range[1] - range[0]) * 0.05;
            if ticks.last().is_none_or(|(before, _)| place(size) - before >= near) {
                ticks.push((place(size), number(f64::from(size))));
            }
        }
        let label = label.into();
        Self { label, range, ticks }
    }

    /// A logarithmic axis around positive values: a value's place is its logarithm to the base 10; ticks at 1, 2 and 5
    /// times the powers of ten, at powers alone where there are many.
    pub fn log(label: impl Into<String>, values: impl Iterator<Item = f64>) -> Self {
        let (least, most) = values
            .filter(|value| *value > 0.0)
            .fold((f64::MAX, 0f64), |(least, most), value| {
                (least.min(value), most.max(value))
            });
        let (least, most) = if most > 0.0 { (least, most) } else { (1.0, 1.0) };
        let powers = least.log10().floor() as i32..=most.log10().ceil() as i32;
        let steps: &[f64] = if powers.clone().count() > 5 {
            &[1.0]
        } else {
            &[1.0, 2.0, 5.0]
        };
        let all: Vec<f64> = powers
            .flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)))
            .collect();
        let from = all.iter().copied().rfind(|v| *v <= least * (1.0 + 1e-9));
        let to = all.iter().copied().find(|v| *v >= most * (1.0 - 1e-9));
        let (from, mut to) = (from.unwrap_or(least), to.unwrap_or(most));
        if to <= from {
            to = from * 10.0;
        }
        let within = all.into_iter().filter(|v| (from..=to).contains(v));
        Self {
            label: label.into(),
            range: [from.log10(), to.log10()],
            ticks: within.map(|v| (v.log10(), number(v))).collect(),
        }
    }
}

/// The next round number from `value` up: 1, 2, 2.5 or 5 times a power of ten.
pub fn round_up(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0];
    let step = steps.iter().find(|&step| step * power >= value * (1.0 - 1e-9));
    step.unwrap_or(&10.0) * power
}

/// An axis's number: whole ones with thousands set apart, others with up to three digits behind the point.
pub fn number(value: f64) -> String {
    // Ticks are multiples of steps, so 0.3 may come as 0.30000000000000004.
    let rounded = (value * 1000.0).round() / 1000.0;
    if rounded.fract() == 0.0 && rounded >= 0.0 {
        crate::table::grouped(rounded as u64)
    } else {
        rounded.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, text)| text.as_str()).collect()
    }

    #[test]
    fn linear_axes_end_at_round_numbers() {
        let axis = Axis::from_zero("", 2_500.0);
        assert_eq!(texts(&axis), ["0", "500", "1,000", "1,500", "2,000", "2,500"]);
        assert_eq!(axis.range, [0.0, 2_500.0]);
        assert_eq!(
            texts(&Axis::from_zero("", 0.61)),
            ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]
        );
        assert_eq!(
            Axis::from_zero("", 0.0).range,
            [0.0, 1.0],
            "nothing to show is still an axis"
        );
        let exact = Axis::up_to("", 1_130.0);
        assert_eq!((exact.range[1], texts(&exact).last()), (1_130.0, Some(&"1,000")));
    }

    #[test]
    fn sizes_have_their_own_ticks_at_their_logarithms() {
        let axis = Axis::sizes("", [64, 4, 16, 4].into_iter());
        assert_eq!(
            axis.ticks,
            [(2.0, "4".to_owned()), (4.0, "16".to_owned()), (6.0, "64".to_owned())]
        );
        // 100 and 101 would stand on top of each other.
        assert_eq!(texts(&Axis::sizes("", [1, 100, 101].into_iter())), ["1", "100"]);
        assert!(
            Axis::sizes("", [8].into_iter()).range[0] < 3.0,
            "one size still spans something"
        );
    }

    #[test]
    fn logarithmic_axes_hold_their_values_between_round_ticks() {
        let axis = Axis::log("", [0.31, 7.9].into_iter());
        assert_eq!(texts(&axis), ["0.2", "0.5", "1", "2", "5", "10"]);
        assert!(axis.range[0] < 0.31f64.log10() && axis.range[1] > 7.9f64.log10());
        assert_eq!(texts(&Axis::log("", [1.0].into_iter())).first(), Some(&"1"));
    }

    #[test]
    fn numbers_are_short_and_thousands_set_apart() {
        assert_eq!([0.1 + 0.2, 1500.0, 0.0].map(number), ["0.3", "1,500", "0"]);
        assert_eq!(
            [0.0, 1.0, 1.1, 2.2, 430.0, 7000.0].map(round_up),
            [1.0, 1.0, 2.0, 2.5, 500.0, 10000.0]
        );
    }
}
