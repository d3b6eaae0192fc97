//! What a pass reads of its segments, as one array of words: a single copy to the device per pass.

use super::work::Address;
use crate::Segment;
use crate::sampling::Draw;

/// Words of a [`Draw`] on the device (`DRAW_WORDS` in sample.cuh).
const DRAW_WORDS: usize = 6;

/// The words, and where each part of them begins.
#[derive(Debug, Default)]
pub(crate) struct Inputs {
    pub words: Vec<u32>,
    /// New tokens of all segments.
    pub rows: usize,
    pub segments: usize,
    /// Rows that attend alone.
    pub singles: usize,
    /// Tiles of rows that attend together.
    pub tiles: usize,
    /// Words of a segment's block table.
    pub table_stride: usize,
    /// Most keys that a single row attends to.
    pub longest_single: usize,
    offsets: [usize; PARTS],
}

/// The parts, in their order.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    /// Of every row: its token.
    Tokens,
    /// Of every row: its position in its sequence.
    Positions,
    /// Of every row: where the cache holds it.
    Slots,
    /// Of every row: its segment.
    Sequence,
    /// Of every row: the factor of the adapter's term, f32, 0 without the adapter.
    Scales,
    /// Rows that attend alone.
    Singles,
    /// Of every tile: its first row.
    TileRows,
    /// Of every tile: its rows.
    TileCounts,
    /// Of every segment: its last row.
    LastRows,
    /// Of every segment: the factor of the adapter's term.
    LastScales,
    /// Of every segment: its cache blocks.
    Tables,
    /// Of every segment: how its next token is drawn.
    Draws,
}

const PARTS: usize = Part::Draws as usize + 1;

impl Inputs {
    /// Lays the segments out.
    ///
    /// - `scale`: the adapter's, where there is one
    /// - `tile`: how many rows of one segment may attend together, if any may
    /// - `draws`: of every segment, or none where no token is drawn
    pub fn fill(&mut self, segments: &[Segment], scale: Option<f32>, tile: Option<usize>, draws: &[Option<Draw>]) {
        let rows: usize = segments.iter().map(|s| s.tokens.len()).sum();
        self.words.clear();
        self.rows = rows;
        self.segments = segments.len();
        // A power of two: few lengths of the tables mean few recordings of a pass.
        self.table_stride = segments
            .iter()
            .map(|s| s.table.blocks().len())
            .max()
            .unwrap_or(0)
            .next_power_of_two();
        let alone = |s: &&Segment| tile.is_none() || s.tokens.len() == 1;
        self.longest_single = segments
            .iter()
            .filter(alone)
            .map(|s| s.start + s.tokens.len())
            .max()
            .unwrap_or(0);

        self.begin(Part::Tokens);
        segments.iter().for_each(|s| self.words.extend_from_slice(s.tokens));
        self.begin(Part::Positions);
        for segment in segments {
            self.words.extend(positions(segment).map(|p| p as u32));
        }
        self.begin(Part::Slots);
        for segment in segments {
            self.words.extend(positions(segment).map(|p| segment.table.slot(p)));
        }
        self.begin(Part::Sequence);
        for (i, segment) in segments.iter().enumerate() {
            self.words.extend(segment.tokens.iter().map(|_| i as u32));
        }
        let scale = |segment: &Segment, token| scale.filter(|_| token >= segment.adapted_from).unwrap_or(0.0).to_bits();
        self.begin(Part::Scales);
        for segment in segments {
            self.words
                .extend((0..segment.tokens.len()).map(|token| scale(segment, token)));
        }
        self.begin(Part::LastScales);
        self.words.extend(segments.iter().map(|s| scale(s, s.tokens.len() - 1)));
        self.lay_attention(segments, tile);
        self.begin(Part::LastRows);
        for (first, segment) in first_rows(segments) {
            self.words.push((first + segment.tokens.len() - 1) as u32);
        }
        self.begin(Part::Tables);
        for segment in segments {
            let blocks = segment.table.blocks();
            self.words.extend_from_slice(blocks);
            self.words.extend((blocks.len()..self.table_stride).map(|_| 0));
        }
        self.begin(Part::Draws);
        draws
            .iter()
            .for_each(|draw| self.words.extend_from_slice(&draw_words(*draw)));
    }

    /// Which rows attend alone, and which together.
    fn lay_attention(&mut self, segments: &[Segment], tile: Option<usize>) {
        let alone = |segment: &Segment| tile.is_none() || segment.tokens.len() == 1;
        let tile = tile.unwrap_or(1);
        self.begin(Part::Singles);
        for (first, segment) in first_rows(segments).filter(|(_, s)| alone(s)) {
            self.words
                .extend((first..first + segment.tokens.len()).map(|r| r as u32));
        }
        self.singles = self.words.len() - self.offsets[Part::Singles as usize];
        let tiles = || {
            let tiles_of = |(first, segment): (usize, &Segment)| {
                let end = first + segment.tokens.len();
                (first..end).step_by(tile).map(move |row| (row, (end - row).min(tile)))
            };
            first_rows(segments).filter(|(_, s)| !alone(s)).flat_map(tiles_of)
        };
        self.begin(Part::TileRows);
        self.words.extend(tiles().map(|(row, _)| row as u32));
        self.begin(Part::TileCounts);
        self.words.extend(tiles().map(|(_, count)| count as u32));
        self.tiles = self.words.len() - self.offsets[Part::TileCounts as usize];
    }

    fn begin(&mut self, part: Part) {
        self.offsets[part as usize] = self.words.len();
    }

    /// Where a part lies once the words are at `base`.
    pub fn address(&self, base: Address, part: Part) -> Address {
        base + 4 * self.offsets[part as usize] as Address
    }
}

fn positions(segment: &Segment) -> std::ops::Range<usize> {
    segment.start..segment.start + segment.tokens.len()
}

/// Every segment with the number of its first row.
fn first_rows<'a, 's>(segments: &'a [Segment<'s>]) -> impl Iterator<Item = (usize, &'a Segment<'s>)> + Clone {
    let mut next = 0;
    segments.iter().map(move |segment| {
        let first = next;
        next += segment.tokens.len();
        (first, segment)
    })
}

pub(super) fn draw_words(draw: Option<Draw>) -> [u32; DRAW_WORDS] {
    let Some(Draw { params, random }) = draw else {
        return [0; DRAW_WORDS];
    };
    let random = random.to_bits();
    [
        params.temperature.to_bits(),
        // The kernel keeps all where top-p is no number below 1.
        if params.top_p.is_nan() { 1.0 } else { params.top_p }.to_bits(),
        params.top_k,
        1,
        random as u32,
        (random >> 32) as u32,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockTable, KvCache};

    #[test]
    fn rows_lie_segment_by_segment_and_prompts_in_tiles() -> anyhow::Result<()> {
        let llama = crate::testing::network(&crate::testing::config())?;
        let mut cache = KvCache::new(&llama, 256)?;
        let mut tables = [BlockTable::default(), BlockTable::default()];
        assert!(cache.reserve(&mut tables[0], 18) && cache.reserve(&mut tables[1], 40));
        let prompt: Vec<u32> = (10..50).collect();
        let segments = [
            Segment {
                tokens: &[7],
                start: 17,
                table: &tables[0],
                adapted_from: usize::MAX,
            },
            Segment {
                tokens: &prompt,
                start: 0,
                table: &tables[1],
                adapted_from: 0,
            },
        ];
        let mut inputs = Inputs::default();
        inputs.fill(&segments, Some(2.0), Some(32), &[None, None]);
        let part = |part: Part, n: usize| &inputs.words[inputs.address(0, part) as usize / 4..][..n];
        assert_eq!(
            (inputs.rows, inputs.segments, inputs.singles, inputs.tiles),
            (41, 2, 1, 2)
        );
        assert_eq!((inputs.table_stride, inputs.longest_single), (4, 18));
        assert_eq!(part(Part::Tokens, 3), [7, 10, 11]);
        assert_eq!(part(Part::Positions, 3), [17, 0, 1]);
        assert_eq!(part(Part::Slots, 2), [tables[0].slot(17), tables[1].slot(0)]);
        assert_eq!(part(Part::Sequence, 3), [0, 1, 1]);
        assert_eq!(part(Part::Scales, 2), [0, 2f32.to_bits()]);
        assert_eq!(part(Part::Singles, 1), [0]);
        assert_eq!(
            (part(Part::TileRows, 2), part(Part::TileCounts, 2)),
            (&[1, 33][..], &[32, 8][..])
        );
        assert_eq!(part(Part::LastRows, 2), [0, 40]);
        assert_eq!(part(Part::LastScales, 2), [0, 2f32.to_bits()]);
        assert_eq!(part(Part::Tables, 2), tables[0].blocks());
        inputs.fill(&segments, None, None, &[]);
        assert_eq!((inputs.singles, inputs.tiles, inputs.longest_single), (41, 0, 40));
        Ok(())
    }
}
