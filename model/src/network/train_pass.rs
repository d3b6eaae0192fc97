//! Differentiable passes over whole sequences, and gradient checkpointing.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::Llama;
use super::block::Block;
use super::layer::{Read, Training};
use super::pass::{Attention, Pass};
use crate::ModelError;
use crate::cpu::Sequences;
use crate::lora::{AdaptedRows, Adapter, Dropout, RowMask};

/// Takes gradients as they become known.
pub type GradientSink<'a> = dyn FnMut(&GradStore) -> Result<(), ModelError> + 'a;

/// One differentiable pass of a frozen network with an adapter.
///
/// With checkpointing the forward pass keeps each layer's input alone, `[tokens, hidden]`, and the backward pass runs
/// one layer after the other again: memory for one layer's activations instead of all, for a third more arithmetic.
pub struct TrainPass<'a> {
    llama: &'a Llama,
    adapter: Option<&'a Adapter>,
    dropout: Option<&'a Dropout>,
    checkpoints: Option<RefCell<Vec<Checkpoint>>>,
}

/// What the backward pass needs of a forward pass that kept no graph.
struct Checkpoint {
    positions: Arc<[u32]>,
    lengths: Arc<[usize]>,
    adapted: Option<RowMask>,
    /// Packed positions that are read, of the last layer's output.
    wanted: Tensor,
    /// Each layer's input and the state of the dropout before it.
    layers: Vec<(Tensor, Option<Dropout>)>,
    /// The last layer's output, from which the loss is computed.
    top: Var,
}

/// The tokens of a pass one behind the other.
struct PackedTokens<'a> {
    tokens: &'a [u32],
    positions: Arc<[u32]>,
    /// Tokens of each sequence.
    lengths: Arc<[usize]>,
    adapted: Option<AdaptedRows>,
    /// Rows that are read, ascending.
    read: &'a [u32],
}

impl<'a> TrainPass<'a> {
    /// A pass that keeps every activation, or with `checkpointing` those between layers alone.
    pub fn new(
        llama: &'a Llama,
        adapter: Option<&'a Adapter>,
        dropout: Option<&'a Dropout>,
        checkpointing: bool,
    ) -> Self {
        Self {
            llama,
            adapter,
            dropout,
            checkpoints: checkpointing.then(RefCell::default),
        }
    }

    /// As [`Llama::forward_train`]: logits at packed positions, `[wanted, vocab]` in f32.
    ///
    /// # Errors
    /// A sequence longer than the model's context, or the device failed.
    pub fn logits(&self, sequences: &[&[u32]], wanted: &[u32]) -> Result<Tensor, ModelError> {
        self.llama.logits(&self.hidden(sequences, wanted)?)
    }

    /// As [`Llama::last_hidden`]: each sequence's last hidden state, `[sequences, hidden]` in f32.
    ///
    /// # Errors
    /// A sequence longer than the model's context, or the device failed.
    pub fn last_hidden(&self, sequences: &[&[u32]]) -> Result<Tensor, ModelError> {
        let hidden = self.hidden(sequences, &super::last_positions(sequences))?;
        Ok(self.llama.normed(&hidden)?.to_dtype(DType::F32)?)
    }

    /// Hands over the gradients of everything that `loss`, computed from this pass, depends on: all at once, or one layer
    /// after the other with checkpointing. What is kept of them should be detached: a gradient's own graph holds its
    /// layer's activations.
    ///
    /// # Errors
    /// The device failed, or the sink's own.
    pub fn backward(&self, loss: &Tensor, sink: &mut GradientSink) -> Result<(), ModelError> {
        let store = loss.backward()?;
        sink(&store)?;
        let checkpoints = self.checkpoints.as_ref().map(RefCell::take).unwrap_or_default();
        for checkpoint in checkpoints {
            if let Some(grad) = store.get(checkpoint.top.as_tensor()) {
                self.backward_layers(&checkpoint, grad.detach(), sink)?;
            }
        }
        Ok(())
    }

    fn backward_layers(
        &self,
        checkpoint: &Checkpoint,
        mut grad: Tensor,
        sink: &mut GradientSink,
    ) -> Result<(), ModelError> {
        for (layer, (input, dropout)) in checkpoint.layers.iter().enumerate().rev() {
            let x = Var::from_tensor(input)?;
            let pass = Pass {
                dropout: dropout.as_ref(),
                ..self.pass(&checkpoint.positions, &checkpoint.lengths, checkpoint.adapted.clone())
            };
            let wanted = self.llama.wanted_of(layer, &checkpoint.wanted);
            let y = self.llama.blocks[layer].forward(x.as_tensor(), layer, &pass, wanted)?;
            // The gradient of Σ y grad, grad a constant, is what the chain rule asks for.
            let mut store = (y * grad)?.sum_all()?.backward()?;
            let below = store.remove(x.as_tensor());
            sink(&store)?;
            match below {
                Some(below) => grad = below.detach(),
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Hidden states at the packed positions `wanted`, before the last norm.
    fn hidden(&self, sequences: &[&[u32]], wanted: &[u32]) -> Result<Tensor, ModelError> {
        let mut rows = wanted.to_vec();
        rows.sort_unstable();
        rows.dedup();
        let x = self.hidden_of_rows(sequences, &rows)?;
        if rows == wanted {
            return Ok(x);
        }
        let place = |row| rows.partition_point(|r| r < row) as u32;
        let order: Vec<u32> = wanted.iter().map(place).collect();
        Ok(x.index_select(&Tensor::new(order, self.llama.device())?, 0)?)
    }

    /// The last layer's output at packed `rows`, ascending: by layers that compute their own gradients, where there are any
    /// for this network, and with checkpointing run again themselves; else by candle's operations.
    fn hidden_of_rows(&self, sequences: &[&[u32]], rows: &[u32]) -> Result<Tensor, ModelError> {
        let (tokens, positions) = self.llama.pack(sequences.iter().map(|s| (*s, 0)))?;
        let packed = PackedTokens {
            tokens: &tokens,
            positions,
            lengths: sequences.iter().map(|s| s.len()).collect(),
            adapted: self.adapted_rows(sequences, rows),
            read: rows,
        };
        match self.run_on_gpu(&packed)? {
            Some(x) => Ok(x),
            None if self.llama.blocks.iter().all(Block::runs_on_host) => self.run_on_host(packed),
            None => self.run_stock(packed),
        }
    }

    /// As [`TrainPass::hidden_of_rows`], in candle's operations.
    fn run_stock(&self, packed: PackedTokens) -> Result<Tensor, ModelError> {
        let adapted = packed.adapted.map(|rows| rows.on(self.llama.device())).transpose()?;
        let pass = self.pass(&packed.positions, &packed.lengths, adapted.clone());
        let Some(checkpoints) = &self.checkpoints else {
            return self.llama.hidden(packed.tokens, &pass, packed.read);
        };
        let wanted = Tensor::new(packed.read, self.llama.device())?;
        let mut x = self.llama.embed(packed.tokens)?.detach();
        let mut layers = Vec::with_capacity(self.llama.blocks.len());
        for (layer, block) in self.llama.blocks.iter().enumerate() {
            layers.push((x.clone(), self.dropout.cloned()));
            x = block
                .forward(&x, layer, &pass, self.llama.wanted_of(layer, &wanted))?
                .detach();
        }
        let top = Var::from_tensor(&x)?;
        let hidden = top.as_tensor().clone();
        checkpoints.borrow_mut().push(Checkpoint {
            positions: packed.positions,
            lengths: packed.lengths,
            adapted,
            wanted,
            layers,
            top,
        });
        Ok(hidden)
    }

    /// The last layer's output at packed `rows`, ascending; `None` where the GPU path does not train this network.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    fn run_on_gpu(&self, packed: &PackedTokens) -> Result<Option<Tensor>, ModelError> {
        let llama = self.llama;
        let frozen = llama.blocks.iter().all(Block::is_frozen);
        let Some(device) = frozen.then(|| llama.gpu_training.device(llama)).transpose()?.flatten() else {
            return Ok(None);
        };
        let training = crate::gpu::GpuTraining {
            device,
            lengths: &packed.lengths,
            positions: &packed.positions,
            read: packed.read,
            adapter: self.adapter,
            adapted: packed.adapted.as_ref(),
            dropout: self.dropout,
            checkpointing: self.checkpoints.is_some(),
        };
        Ok(Some(training.run(&llama.embed(packed.tokens)?)?))
    }

    #[cfg(not(any(feature = "cuda", feature = "kernel-emulation")))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)]
    fn run_on_gpu(&self, _: &PackedTokens) -> Result<Option<Tensor>, ModelError> {
        Ok(None)
    }

    /// The last layer's output at packed `rows`, ascending, on the CPU path.
    fn run_on_host(&self, packed: PackedTokens) -> Result<Tensor, ModelError> {
        let (lengths, rows) = (&*packed.lengths, packed.read);
        let all = Read {
            sequences: Arc::new(Sequences::new(lengths)),
            rows: None,
        };
        let last = match rows.len() == packed.tokens.len() {
            true => all.clone(),
            false => Read {
                sequences: Arc::new(Sequences::asked(lengths, rows)),
                rows: Some(rows.into()),
            },
        };
        let training = Training {
            positions: packed.positions,
            rope: &self.llama.rope,
            adapter: self.adapter,
            adapted: packed.adapted.map(Arc::new),
            dropout: self.dropout,
            checkpointing: self.checkpoints.is_some(),
            scratch: &self.llama.scratch,
        };
        Ok(training.run(&self.llama.blocks, 0, &self.llama.embed(packed.tokens)?, [&all, &last])?)
    }

    /// The rows that the adapter changes, where that is not all.
    fn adapted_rows(&self, sequences: &[&[u32]], read: &[u32]) -> Option<AdaptedRows> {
        let adapter = self.adapter?;
        let sequences = sequences.iter().map(|s| (s.len(), adapter.config().active_from(s)));
        AdaptedRows::new(sequences, read.iter().map(|&row| row as usize))
    }

    fn pass<'p>(&'p self, positions: &Arc<[u32]>, lengths: &Arc<[usize]>, adapted: Option<RowMask>) -> Pass<'p> {
        Pass {
            positions: positions.clone(),
            rope: &self.llama.rope,
            adapter: self.adapter,
            adapted,
            dropout: self.dropout,
            attention: Attention::Packed(lengths.clone()),
        }
    }
}
