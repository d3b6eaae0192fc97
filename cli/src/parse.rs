//! Numbers of flags: what is out of range is wrong usage, said before anything is done.

use std::num::NonZeroUsize;
use std::str::FromStr;

use lengthwise_core::SamplingParams;

/// A number from 0 to 1.
pub fn fraction<T: FromStr + Copy + Into<f64>>(text: &str) -> Result<T, String> {
    number(text, |n| (0.0..=1.0).contains(&n), "a number from 0 to 1")
}

/// A number from 0 to below 1: a share that leaves something over.
pub fn fraction_below_one(text: &str) -> Result<f64, String> {
    number(text, |n| (0.0..1.0).contains(&n), "a number from 0 to below 1")
}

/// A share of the probability that some token has.
pub fn top_p(text: &str) -> Result<f32, String> {
    let expected = format!("a number {}", SamplingParams::TOP_P_RANGE);
    number(text, |n| SamplingParams::allows_top_p(n as f32), &expected)
}

/// A number above 0.
pub fn positive<T: FromStr + Copy + Into<f64>>(text: &str) -> Result<T, String> {
    number(text, |n| n > 0.0, "a number above 0")
}

/// A number that is 0 or more.
pub fn not_negative<T: FromStr + Copy + Into<f64>>(text: &str) -> Result<T, String> {
    number(text, |n| n >= 0.0, "a number, 0 or more")
}

/// A whole number from 1 to `most`: beyond it no machine has the memory, or the time.
pub fn up_to(most: usize) -> impl Fn(&str) -> Result<NonZeroUsize, String> + Clone {
    move |text| {
        let number = text.parse::<NonZeroUsize>().ok().filter(|n| n.get() <= most);
        number.ok_or_else(|| format!("expected a whole number from 1 to {most}"))
    }
}

/// A finite number that `is_allowed`; what rounds to infinity in `T` is not finite.
fn number<T: FromStr + Copy + Into<f64>>(
    text: &str,
    is_allowed: impl Fn(f64) -> bool,
    expected: &str,
) -> Result<T, String> {
    let number = text.parse::<T>().ok();
    let number = number.filter(|&n| n.into().is_finite() && is_allowed(n.into()));
    number.ok_or_else(|| format!("expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_within_their_range() {
        assert_eq!(fraction("1"), Ok(1f32));
        assert_eq!(fraction_below_one("0.99"), Ok(0.99));
        assert_eq!(top_p("1"), Ok(1.0));
        assert_eq!(positive::<f64>("2e-5"), Ok(2e-5));
        assert_eq!(not_negative::<f32>("0"), Ok(0.0));
        for text in ["nan", "inf", "-inf", "-1", "1e999", "", "x"] {
            fraction::<f64>(text).expect_err(text);
            fraction_below_one(text).expect_err(text);
            top_p(text).expect_err(text);
            positive::<f64>(text).expect_err(text);
            not_negative::<f64>(text).expect_err(text);
        }
        fraction::<f64>("1.1").expect_err("above 1");
        fraction_below_one("1").expect_err("1");
        positive::<f64>("0").expect_err("0");
        top_p("0").expect_err("0");
        assert_eq!(up_to(8)("8").map(NonZeroUsize::get), Ok(8));
        for text in ["0", "9", "-1", "1.5", "18446744073709551616"] {
            up_to(8)(text).expect_err(text);
        }
        // Finite, and not so in 32 bits.
        not_negative::<f32>("1e39").expect_err("too large");
    }
}
