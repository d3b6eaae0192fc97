//! Results as tables of aligned text.

use lengthwise_scheduler::StrategyRow;
use lengthwise_train::PredictorRow;

/// A table: one header, and rows of as many cells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// What the columns hold.
    pub header: Vec<&'static str>,
    /// The cells.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// The results of strategies. Columns that no row has a value for are left out.
    pub fn strategies(rows: &[StrategyRow]) -> Self {
        let columns: [Column<StrategyRow>; 10] = [
            ("strategy", |r| Some(strategy_name(r))),
            ("slots", |r| Some(r.batch_size.to_string())),
            ("steps", |r| Some(grouped(r.steps))),
            ("samples/s", |r| r.samples_per_s.map(|rate| format!("{rate:.2}"))),
            ("tokens/s", |r| r.tokens_per_s.map(|rate| grouped(rate.round() as u64))),
            ("modelled s", |r| r.modelled_seconds.map(|s| format!("{s:.1}"))),
            ("avg. length", |r| Some(format!("{:.2}", r.average_length))),
            ("effective", |r| Some(percent(r.effective_token_ratio))),
            ("failures", |r| Some(percent(r.failure_ratio))),
            ("wasted tokens", |r| Some(grouped(r.wasted_tokens))),
        ];
        let mut table = Self::of(&columns, rows);
        if !rows.is_empty() {
            table.header.push("speed-up");
            for (cells, row) in table.rows.iter_mut().zip(rows) {
                cells.push(format!("{:.2}x", speed_up(rows, row)));
            }
        }
        table
    }

    /// The results of predictors. Columns that no row has a value for are left out.
    pub fn predictors(rows: &[PredictorRow]) -> Self {
        let columns: [Column<PredictorRow>; 9] = [
            ("predictor", |r| Some(r.predictor.clone())),
            ("n", |r| Some(grouped(r.n as u64))),
            ("error", |r| Some(format!("{:.1}", r.error))),
            ("acc-50", |r| Some(percent(r.acc_50))),
            ("acc-100", |r| Some(percent(r.acc_100))),
            ("too low", |r| Some(percent(r.underestimate_rate))),
            ("Kendall tau", |r| r.kendall_tau.map(|tau| format!("{tau:.3}"))),
            ("90 % cover", |r| r.coverage_90.map(percent)),
            ("ms each", |r| r.ms_per_prediction.map(|ms| format!("{ms:.2}"))),
        ];
        Self::of(&columns, rows)
    }

    fn of<R>(columns: &[Column<R>], rows: &[R]) -> Self {
        let used: Vec<&Column<R>> = columns
            .iter()
            .filter(|(_, cell)| rows.iter().any(|r| cell(r).is_some()))
            .collect();
        let row = |row: &R| {
            used.iter()
                .map(|(_, cell)| cell(row).unwrap_or_else(|| "–".to_owned()))
                .collect()
        };
        Self {
            header: used.iter().map(|(name, _)| *name).collect(),
            rows: rows.iter().map(row).collect(),
        }
    }

    /// The table as text: the first column to the left, numbers to the right, a rule below the header.
    pub fn text(&self) -> String {
        let widths: Vec<usize> = (0..self.header.len()).map(|column| self.width(column)).collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let pad = |(column, cell): (usize, &str)| match column {
                0 => format!("{cell:<0$}", widths[0]),
                _ => format!("{cell:>0$}", widths[column]),
            };
            cells.enumerate().map(pad).collect::<Vec<_>>().join("  ")
        };
        let rule = "-".repeat(widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1));
        let mut lines = vec![line(&mut self.header.iter().copied()), rule];
        lines.extend(self.rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
        lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
    }

    fn width(&self, column: usize) -> usize {
        let cells = self.rows.iter().map(|row| row[column].chars().count());
        cells.chain([self.header[column].chars().count()]).max().unwrap_or(0)
    }
}

/// A column's name and how a row's cell is made; `None` where the row has no such value.
type Column<R> = (&'static str, fn(&R) -> Option<String>);

/// How many times faster than the first row, by time; where there is none, by steps, and then than the first row of the
/// same batch size, since a step of another is other work.
fn speed_up(rows: &[StrategyRow], row: &StrategyRow) -> f64 {
    let first = rows.first().unwrap_or(row);
    match (first.samples_per_s, row.samples_per_s) {
        (Some(base), Some(rate)) => rate / base,
        _ if first.modelled_seconds.is_some() => {
            let seconds = |row: &StrategyRow| row.modelled_seconds.unwrap_or(f64::NAN);
            seconds(first) / seconds(row)
        }
        _ => {
            let first = rows.iter().find(|r| r.batch_size == row.batch_size).unwrap_or(row);
            first.steps as f64 / row.steps.max(1) as f64
        }
    }
}

/// `oracle + vbs + fcr`.
pub fn strategy_name(row: &StrategyRow) -> String {
    let extra = |on, name| if on { name } else { "" };
    format!(
        "{}{}{}{}",
        row.strategy,
        extra(row.vbs, " + vbs"),
        extra(row.fcr, " + fcr"),
        extra(row.cost_model, " + cost")
    )
}

/// `33.9 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use lengthwise_scheduler::{ScheduleConfig, Strategy, StrategyStats};

    /// Two strategies on four requests of 572 tokens together; the second takes half of `seconds`.
    pub fn rows(seconds: Option<f64>) -> Vec<StrategyRow> {
        let stats = |slot_steps, failures| StrategyStats {
            requests: 4,
            steps: slot_steps / 4,
            slot_steps,
            useful_tokens: 572,
            failures,
            probe_tokens: 0,
        };
        let oracle = ScheduleConfig::new(Strategy::Oracle).with(true, true);
        vec![
            stats(2572, 0).row(&ScheduleConfig::new(Strategy::Vanilla), seconds),
            stats(1144, 1).row(&oracle, seconds.map(|s| s / 2.0)),
        ]
    }

    #[test]
    fn numbers_are_aligned_and_ratios_are_percent() {
        let want = "\
strategy            slots  steps  samples/s  tokens/s  avg. length  effective  failures  wasted tokens  speed-up
----------------------------------------------------------------------------------------------------------------
vanilla                16    643       2.00       286       643.00     22.2 %     0.0 %          2,000     1.00x
oracle + vbs + fcr     16    286       4.00       572       286.00     50.0 %    25.0 %            572     2.00x
";
        assert_eq!(Table::strategies(&rows(Some(2.0))).text(), want);
    }

    #[test]
    fn columns_without_a_value_are_left_out() {
        let simulated = Table::strategies(&rows(None));
        assert!(!simulated.header.contains(&"samples/s"), "{:?}", simulated.header);
        // Nothing was timed: 643 / 286 steps.
        assert_eq!(simulated.rows[1].last().map(String::as_str), Some("2.25x"));
        // Steps of other batch sizes are not compared, times are.
        let mut sizes = rows(None);
        sizes[1].batch_size = 4;
        let last = |rows: &[StrategyRow]| Table::strategies(rows).rows[1].last().cloned();
        assert_eq!(last(&sizes).as_deref(), Some("1.00x"));
        let mut timed = rows(Some(2.0));
        timed[1].batch_size = 4;
        assert_eq!(last(&timed).as_deref(), Some("2.00x"));
        let predictor = lengthwise_train::evaluate("constant", &[(100, 10), (100, 151)]);
        let table = Table::predictors(&[predictor]);
        assert_eq!(
            table.header,
            ["predictor", "n", "error", "acc-50", "acc-100", "too low"]
        );
        assert_eq!(table.rows[0], ["constant", "2", "70.5", "0.0 %", "100.0 %", "50.0 %"]);
    }

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!([0, 999, 1000, 1234567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
