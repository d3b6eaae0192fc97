//! Flags that are numbers: what is out of range is refused before anything runs.

/// A finite number of at least 0.
pub fn not_negative(text: &str) -> Result<f32, String> {
    let number = text.parse::<f32>().ok().filter(|x| x.is_finite() && *x >= 0.0);
    number.ok_or_else(|| "expected a number of at least 0".to_owned())
}

/// A number from 0 to 1.
pub fn share(text: &str) -> Result<f32, String> {
    let number = text.parse::<f32>().ok().filter(|x| (0.0..=1.0).contains(x));
    number.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_range_alone_are_taken() {
        assert_eq!(not_negative("0"), Ok(0.0));
        assert_eq!(not_negative("1.5"), Ok(1.5));
        assert_eq!(share("1"), Ok(1.0));
        for wrong in ["", "x", "nan", "inf", "-0.1"] {
            assert!(not_negative(wrong).is_err() && share(wrong).is_err(), "{wrong}");
        }
        assert!(share("1.1").is_err());
    }
}
