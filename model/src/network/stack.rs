//! The layers of a training pass one behind the other, whatever runs them: what of the forward pass is kept for the
//! backward pass, and how far down a gradient is wanted.

use std::borrow::Borrow;
use std::sync::{Mutex, PoisonError};

use candle_core::{Result, Tensor, bail};

use crate::lora::AdaptedRows;

/// A decoder layer that computes its own gradients.
///
/// The factors are those of all layers, one behind the other; a layer knows the place of its own.
pub(crate) trait Layer {
    /// Rows in memory that goes from layer to layer.
    type Rows: Borrow<Self::View>;
    /// Rows, or all factors, wherever they lie.
    type View: ?Sized;
    /// What the backward pass reads of the forward pass.
    type Kept;

    /// Whether the adapter has a term in it.
    fn has_factors(&self) -> bool;

    /// Runs the layer; with `wants_output` the rows are its output, `[read, hidden]`, else anything.
    ///
    /// - `x`: `[tokens, hidden]`
    fn forward(&self, x: &Self::View, factors: &Self::View, wants_output: bool) -> Result<(Self::Rows, Self::Kept)>;

    /// The gradient of the layer's input, where `deep` asks for it; those of its factors are written into `dfactors`.
    ///
    /// - `x`: the layer's input; `grad`: of its output, `[read, hidden]`
    fn backward(
        &self,
        x: &Self::View,
        kept: Self::Kept,
        grad: &Self::View,
        deep: bool,
        dfactors: &mut Self::View,
    ) -> Result<Option<Self::Rows>>;

    /// Takes memory back.
    fn give(&self, rows: Self::Rows);

    /// Takes the memory of a forward pass that no backward pass will read back.
    fn give_kept(&self, kept: Self::Kept);
}

/// What of a forward pass stays for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Keeps {
    /// None will follow.
    Nothing,
    /// The layers' inputs alone: each layer runs again.
    Inputs,
    /// What each layer keeps.
    Layers,
}

impl Keeps {
    /// For an operation on `x` and `factors`; with `checkpointing` the inputs alone.
    pub fn of(x: &Tensor, factors: &Tensor, checkpointing: bool) -> Self {
        match (x.track_op() || factors.track_op(), checkpointing) {
            (false, _) => Self::Nothing,
            (true, true) => Self::Inputs,
            (true, false) => Self::Layers,
        }
    }
}

/// The packed rows that a backward pass stays within, where those are not all: the ones that the adapter changes, if nothing
/// but its factors wants a gradient and not all rows are read of the last layer.
pub(crate) fn rows_within(
    adapted: Option<&AdaptedRows>,
    x: &Tensor,
    factors: &Tensor,
    reads_all: bool,
) -> Option<Vec<u32>> {
    let narrows = factors.track_op() && !x.track_op() && !reads_all;
    let rows = adapted.filter(|_| narrows)?.changed();
    (!rows.is_empty()).then_some(rows)
}

/// Layers with what a forward pass left for the backward pass.
pub(crate) struct Stack<L: Layer> {
    layers: Vec<L>,
    keeps: Keeps,
    kept: Mutex<Vec<Run<L>>>,
}

/// A layer's forward pass.
struct Run<L: Layer> {
    /// Its input; `None` for the first, whose input the caller has.
    input: Option<L::Rows>,
    kept: Option<L::Kept>,
}

impl<L: Layer> Stack<L> {
    pub fn new(layers: Vec<L>, keeps: Keeps) -> Self {
        Self {
            layers,
            keeps,
            kept: Mutex::default(),
        }
    }

    /// Runs all layers and notes what the backward pass needs.
    ///
    /// # Errors
    /// There is no layer, or one failed.
    pub fn forward(&self, x: &L::View, factors: &L::View) -> Result<L::Rows> {
        let (mut input, mut runs) = (None::<L::Rows>, Vec::with_capacity(self.layers.len()));
        for layer in &self.layers {
            let (output, kept) = layer.forward(input.as_ref().map_or(x, Borrow::borrow), factors, true)?;
            let kept = match self.keeps {
                Keeps::Layers => Some(kept),
                _ => {
                    layer.give_kept(kept);
                    None
                }
            };
            let input = input.replace(output);
            match self.keeps {
                Keeps::Nothing => input.into_iter().for_each(|rows| layer.give(rows)),
                _ => runs.push(Run { input, kept }),
            }
        }
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = runs;
        match input {
            Some(output) => Ok(output),
            None => bail!("there are no layers to run"),
        }
    }

    /// What a forward pass noted. It goes with the first backward pass, so that its memory serves the layers below.
    fn take(&self) -> Vec<Run<L>> {
        std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The gradient of `x`, where `deep` asks for it; those of the factors are written into `dfactors`.
    ///
    /// # Errors
    /// A layer failed.
    pub fn backward(
        &self,
        x: &L::View,
        factors: &L::View,
        grad: &L::View,
        deep: bool,
        dfactors: &mut L::View,
    ) -> Result<Option<L::Rows>> {
        let mut runs = self.take();
        if runs.is_empty() {
            // A second backward pass.
            let output = self.forward(x, factors)?;
            if let Some(layer) = self.layers.first() {
                layer.give(output);
            }
            runs = self.take();
        }
        let lowest = self.layers.iter().position(L::has_factors);
        let mut above = None;
        for (i, (run, layer)) in runs.into_iter().zip(&self.layers).enumerate().rev() {
            let deep = deep || lowest.is_some_and(|lowest| lowest < i);
            let input = run.input.as_ref().map_or(x, Borrow::borrow);
            let kept = match run.kept {
                Some(kept) => kept,
                None => {
                    let (output, kept) = layer.forward(input, factors, false)?;
                    layer.give(output);
                    kept
                }
            };
            let of_output = above.as_ref().map_or(grad, Borrow::borrow);
            let below = layer.backward(input, kept, of_output, deep, dfactors)?;
            run.input.into_iter().chain(above).for_each(|rows| layer.give(rows));
            above = below;
            // Below the lowest factors nothing wants a gradient.
            if above.is_none() {
                break;
            }
        }
        Ok(above.filter(|_| deep))
    }
}
