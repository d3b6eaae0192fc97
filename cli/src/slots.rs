//! What every slot did, as text for people.

use lengthwise_scheduler::{Spans, StrategyRow, Timeline};

use crate::table::{grouped, strategy_name};

/// Letters in a line, and lines of a strategy at most.
const COLUMNS: usize = 96;
const LINES: usize = 16;
/// What a letter stands for: mostly tokens of answers, mostly waiting, mostly thrown away, no such slot then.
const LETTERS: [char; 3] = ['#', '.', 'x'];

/// Every strategy's timeline, each with a line of its own above; empty where there is none.
pub fn timelines(rows: &[StrategyRow]) -> String {
    let drawn = rows.iter().filter_map(|row| Some((row, row.timeline.as_ref()?)));
    let drawn: Vec<(&StrategyRow, &Timeline)> = drawn.collect();
    // One scale for all, so that a strategy of fewer steps is shorter.
    let Some(steps) = drawn.iter().map(|(_, timeline)| timeline.size().1).max() else {
        return String::new();
    };
    let mut text = String::new();
    for (row, timeline) in drawn {
        let (name, slots) = (strategy_name(row), row.batch_size);
        text += &format!("\n{name}, {slots} slots, {} steps\n", grouped(row.steps));
        for line in lines(timeline, steps.max(1)) {
            text += &format!("{}\n", line.trim_end());
        }
    }
    let [useful, padding, thrown] = LETTERS;
    text + &format!("\n{useful} tokens of answers   {padding} padding or idle   {thrown} thrown away\n")
}

/// Slots from above, steps from the left; a letter is what most of its slots × steps were.
fn lines(timeline: &Timeline, steps: u64) -> Vec<String> {
    let slots = timeline.size().0 as usize;
    let count = slots.min(LINES);
    let mut cells = vec![[[0f64; 3]; COLUMNS]; count];
    let mut add = |spans: &Spans, kind: usize| {
        for &[slot, begin, end] in spans {
            let line = &mut cells[slot as usize * count / slots];
            let place = |step: u64| step as f64 * COLUMNS as f64 / steps as f64;
            let (from, to) = (place(begin), place(end));
            for (column, cell) in line.iter_mut().enumerate() {
                let overlap = to.min(column as f64 + 1.0) - from.max(column as f64);
                cell[kind] += overlap.max(0.0);
            }
        }
    };
    add(&timeline.useful, 0);
    add(&timeline.padding, 1);
    add(&timeline.thrown_away, 2);
    let letter = |cell: &[f64; 3]| {
        let most = (0..3).max_by(|&a, &b| cell[a].total_cmp(&cell[b])).unwrap_or(0);
        if cell[most] > 1e-6 { LETTERS[most] } else { ' ' }
    };
    cells.iter().map(|line| line.iter().map(letter).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_is_what_most_of_its_steps_were() {
        let timeline = Timeline {
            useful: vec![[0, 0, 48], [1, 0, 96]],
            padding: vec![[0, 48, 72]],
            thrown_away: vec![[0, 72, 96]],
        };
        let want = ["#".repeat(48) + &".".repeat(24) + &"x".repeat(24), "#".repeat(96)];
        assert_eq!(lines(&timeline, 96), want);
        // On a scale of twice as many steps it takes half as much room.
        assert_eq!(lines(&timeline, 192)[1].trim_end(), "#".repeat(48));
    }

    #[test]
    fn many_slots_share_lines_and_rows_without_a_timeline_have_none() {
        let useful = (0..64).map(|slot| [slot, 0, 10]).collect();
        let timeline = Timeline {
            useful,
            ..Timeline::default()
        };
        assert_eq!(lines(&timeline, 10).len(), LINES);
        let mut rows = crate::table::tests::rows(None);
        assert_eq!(timelines(&rows), "");
        rows[1].timeline = Some(timeline);
        let text = timelines(&rows);
        assert!(
            text.starts_with("\noracle + vbs + fcr, 16 slots, 286 steps\n###") && !text.contains("vanilla"),
            "{text}"
        );
    }
}
