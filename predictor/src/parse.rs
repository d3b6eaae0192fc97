//! The number in a model's answer.

/// The length that an answer states, in tokens: the number in its first line that has one; the mean where that line has
/// exactly two (a range), as published; the first where it has more. `None` where there is no number. Later lines do not
/// count: after a zero-shot question the response itself begins there. Numbers beyond `u32` become its largest value.
pub fn parse_length(answer: &str) -> Option<u32> {
    let numbers = answer.lines().map(numbers).find(|numbers| !numbers.is_empty())?;
    Some(match numbers[..] {
        [low, high] => low.midpoint(high),
        _ => numbers[0],
    })
}

/// The whole numbers of a line: `1,200` is one, and of `12.5` the fraction is dropped.
fn numbers(line: &str) -> Vec<u32> {
    let bytes = line.as_bytes();
    let digits = |from: usize| {
        bytes[from.min(bytes.len())..]
            .iter()
            .take_while(|b| b.is_ascii_digit())
            .count()
    };
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let mut end = at + digits(at);
        if end == at {
            at += 1;
            continue;
        }
        // A comma is a thousands separator only before exactly three digits, after at most three.
        while end - at <= 3 || line[at..end].contains(',') {
            if bytes.get(end) != Some(&b',') || digits(end + 1) != 3 {
                break;
            }
            end += 4;
        }
        let number = line[at..end].replace(',', "");
        // Only digits are left, so the one way to fail is to be too large.
        found.push(number.parse().unwrap_or(u32::MAX));
        at = match bytes.get(end) {
            Some(b'.') => end + 1 + digits(end + 1),
            _ => end,
        };
    }
    found
}

#[cfg(test)]
mod tests {
    use super::parse_length;

    #[test]
    fn a_number_is_found_in_whatever_stands_around_it() {
        assert_eq!(parse_length(" 150"), Some(150));
        assert_eq!(parse_length("150."), Some(150));
        assert_eq!(parse_length("About 120 tokens."), Some(120));
        assert_eq!(parse_length("-5"), Some(5));
        assert_eq!(parse_length("ungefähr 80 Wörter"), Some(80));
    }

    #[test]
    fn two_numbers_are_a_range_and_give_their_mean() {
        assert_eq!(parse_length("between 100 and 200"), Some(150));
        assert_eq!(parse_length("100-200 tokens"), Some(150));
        assert_eq!(parse_length("4294967295 4294967295"), Some(u32::MAX));
    }

    #[test]
    fn of_more_numbers_the_first_counts() {
        assert_eq!(parse_length("90, or 3 lines of 30"), Some(90));
    }

    #[test]
    fn only_the_first_line_with_a_number_counts() {
        // Asked in advance, the model goes on with its response.
        assert_eq!(parse_length("\nEstimate:\n50\n\n1. Wash 2 apples"), Some(50));
    }

    #[test]
    fn separators_and_fractions_do_not_make_two_numbers() {
        assert_eq!(parse_length("1,200 tokens"), Some(1200));
        assert_eq!(parse_length("1,234,567"), Some(1_234_567));
        assert_eq!(parse_length("12.5"), Some(12));
        assert_eq!(parse_length("100,200"), Some(100_200));
        assert_eq!(parse_length("100,20"), Some(60));
    }

    #[test]
    fn a_number_too_large_is_the_largest_and_no_number_is_none() {
        assert_eq!(parse_length("99999999999"), Some(u32::MAX));
        assert_eq!(parse_length("I cannot say"), None);
        assert_eq!(parse_length("..,,."), None);
        assert_eq!(parse_length(""), None);
    }
}
