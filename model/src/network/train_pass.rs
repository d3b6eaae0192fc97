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
use crate::lora::{Adapter, Dropout};

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
    /// Packed positions that are read, of the last layer's output.
    wanted: Tensor,
    /// Each layer's input and the state of the dropout before it.
    layers: Vec<(Tensor, Option<Dropout>)>,
    /// The last layer's output, from which the loss is computed.
    top: Var,
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
            let pass = self.pass(&checkpoint.positions, &checkpoint.lengths, dropout.as_ref());
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
        let (tokens, positions) = self.llama.pack(sequences.iter().map(|s| (*s, 0)))?;
        let lengths: Arc<[usize]> = sequences.iter().map(|s| s.len()).collect();
        if let Some(x) = self.hidden_of_layers(&tokens, &positions, &lengths, wanted)? {
            return Ok(x);
        }
        let pass = self.pass(&positions, &lengths, self.dropout);
        let Some(checkpoints) = &self.checkpoints else {
            return self.llama.hidden(&tokens, &pass, wanted);
        };
        let wanted = Tensor::new(wanted, self.llama.device())?;
        let mut x = self.llama.embed(&tokens)?.detach();
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
            positions,
            lengths,
            wanted,
            layers,
            top,
        });
        Ok(hidden)
    }

    /// As [`TrainPass::hidden`], by layers that compute their own gradients, where there are any for this network. With
    /// checkpointing the layers themselves run again.
    fn hidden_of_layers(
        &self,
        tokens: &[u32],
        positions: &Arc<[u32]>,
        lengths: &[usize],
        wanted: &[u32],
    ) -> Result<Option<Tensor>, ModelError> {
        let mut rows = wanted.to_vec();
        rows.sort_unstable();
        rows.dedup();
        let x = match self.run_on_gpu(tokens, positions, lengths, &rows)? {
            Some(x) => x,
            None if self.llama.blocks.iter().all(Block::runs_on_host) => {
                self.run_on_host(tokens, positions, lengths, &rows)?
            }
            None => return Ok(None),
        };
        if rows == wanted {
            return Ok(Some(x));
        }
        let place = |row| rows.partition_point(|r| r < row) as u32;
        let order: Vec<u32> = wanted.iter().map(place).collect();
        Ok(Some(x.index_select(&Tensor::new(order, self.llama.device())?, 0)?))
    }

    /// The last layer's output at packed `rows`, ascending; `None` where the GPU path does not train this network.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    fn run_on_gpu(
        &self,
        tokens: &[u32],
        positions: &[u32],
        lengths: &[usize],
        rows: &[u32],
    ) -> Result<Option<Tensor>, ModelError> {
        let llama = self.llama;
        let frozen = llama.blocks.iter().all(Block::is_frozen);
        let Some(device) = frozen.then(|| llama.gpu_training.device(llama)).transpose()?.flatten() else {
            return Ok(None);
        };
        let training = crate::gpu::GpuTraining {
            device,
            lengths,
            positions,
            read: rows,
            adapter: self.adapter,
            dropout: self.dropout,
            checkpointing: self.checkpoints.is_some(),
        };
        Ok(Some(training.run(&llama.embed(tokens)?)?))
    }

    #[cfg(not(any(feature = "cuda", feature = "kernel-emulation")))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)]
    fn run_on_gpu(&self, _: &[u32], _: &[u32], _: &[usize], _: &[u32]) -> Result<Option<Tensor>, ModelError> {
        Ok(None)
    }

    /// The last layer's output at packed `rows`, ascending, on the CPU path.
    fn run_on_host(
        &self,
        tokens: &[u32],
        positions: &Arc<[u32]>,
        lengths: &[usize],
        rows: &[u32],
    ) -> Result<Tensor, ModelError> {
        let all = Read {
            sequences: Arc::new(Sequences::new(lengths)),
            rows: None,
        };
        let last = match rows.len() == tokens.len() {
            true => all.clone(),
            false => Read {
                sequences: Arc::new(Sequences::asked(lengths, rows)),
                rows: Some(rows.into()),
            },
        };
        let training = Training {
            positions: positions.clone(),
            rope: &self.llama.rope,
            adapter: self.adapter,
            dropout: self.dropout,
            checkpointing: self.checkpoints.is_some(),
            scratch: &self.llama.scratch,
        };
        Ok(training.run(&self.llama.blocks, 0, &self.llama.embed(tokens)?, [&all, &last])?)
    }

    fn pass<'p>(&'p self, positions: &Arc<[u32]>, lengths: &Arc<[usize]>, dropout: Option<&'p Dropout>) -> Pass<'p> {
        Pass {
            positions: positions.clone(),
            rope: &self.llama.rope,
            adapter: self.adapter,
            unadapted: None,
            dropout,
            attention: Attention::Packed(lengths.clone()),
        }
    }
}
