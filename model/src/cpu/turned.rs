//! The inner loop with a left side that lies turned, as the gradients of factors need it.

use super::panel::{Lane, Output, Rows, tile_turned_of};
use super::registers::Base;

/// [`super::panel::tile`] with a left side that lies turned: `a` is `[panel.len(), rows]`, one row per row of the panel.
#[inline(always)]
pub(crate) fn tile_turned(a: Rows, rows: usize, panel: &[Lane], out: &Output, at: (usize, usize), accumulate: bool) {
    tile_turned_of::<Base>(a, rows, panel, out, at, accumulate);
}
