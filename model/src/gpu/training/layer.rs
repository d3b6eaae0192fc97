//! A decoder layer of a training pass on the GPU: the forward pass. See `network/layer.rs`, which is the same on the CPU.

use std::sync::Arc;

use candle_core::Result;

use super::inputs::{PassInputs, Reading};
use super::pool::Rows;
use super::terms::Low;
use super::{Device, Locked, Place};
use crate::gpu::kernels::{Heads, Packed};
use crate::gpu::weights::LayerWeights;
use crate::gpu::work::Address;
use crate::lora::LinearKind::{self, DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
use crate::lora::Terms;
use crate::network::Layer;
use crate::ops::AttentionShape;

/// The rows that are read of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Reads {
    All,
    /// Those that the adapter changes: by the backward pass alone.
    Changed,
    /// Those of the last layer.
    Last,
}

/// A layer with its part of the adapter.
#[derive(Clone)]
pub(super) struct GpuLayer {
    pub device: Arc<Device>,
    pub number: usize,
    pub inputs: Arc<PassInputs>,
    pub reads: Reads,
    pub terms: Terms,
    /// Probability and seed.
    pub dropout: Option<(f64, u64)>,
}

/// What the backward pass reads of the forward pass. `t` tokens, `n` of them read by the backward pass; T is the model's
/// dtype.
pub(super) struct Kept {
    /// The adapter's factors, which the operation holds.
    pub factors: Place,
    /// Queries, `[n, heads * head_dim]` T, as their linear layer gave them.
    pub q: Rows,
    /// Keys and values, `[t, 2 * kv_heads * head_dim]` T, likewise.
    pub kv: Rows,
    /// What attention gave, as the queries.
    pub mixed: Rows,
    /// `[n, heads]` f32.
    pub log_sums: Rows,
    /// The residual stream between the halves, `[n, hidden]` T.
    pub middle: Rows,
    /// `[n, 2 * intermediate]` T.
    pub gate_up: Rows,
    pub low: Vec<Low>,
}

impl Kept {
    /// Its memory.
    pub fn into_rows(self) -> impl Iterator<Item = Rows> {
        let Self {
            factors: _,
            q,
            kv,
            mixed,
            log_sums,
            middle,
            gate_up,
            low,
        } = self;
        let low = low.into_iter().map(|low| low.low);
        [q, kv, mixed, log_sums, middle, gate_up].into_iter().chain(low)
    }
}

impl Layer for GpuLayer {
    type Rows = Rows;
    type View = Place;
    type Kept = Kept;

    fn has_factors(&self) -> bool {
        !self.terms.is_empty()
    }

    fn forward(&self, x: &Place, factors: &Place, wants_output: bool) -> Result<(Rows, Kept)> {
        self.run(&mut self.device.lock(), x.address, *factors, wants_output)
    }

    fn backward(&self, x: &Place, kept: Kept, grad: &Place, deep: bool, dfactors: &mut Place) -> Result<Option<Rows>> {
        let mut on = self.device.lock();
        self.as_read_back()
            .run_back(&mut on, [x.address, grad.address], kept, deep, *dfactors)
    }

    fn give(&self, rows: Rows) {
        self.device.lock().give([rows]);
    }

    fn give_kept(&self, kept: Kept) {
        self.device.lock().give(kept.into_rows());
    }
}

/// Sizes of a layer's rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub tokens: usize,
    pub queries: usize,
    /// Rows whose input has a gradient in the backward pass.
    pub inputs: usize,
    pub hidden: usize,
    pub inner: usize,
    pub q_width: usize,
    pub kv_width: usize,
    /// Bytes of an element.
    pub element: usize,
}

impl GpuLayer {
    pub(super) fn weights(&self) -> &LayerWeights {
        &self.device.weights.layers[self.number]
    }

    pub(super) fn shape(&self) -> AttentionShape {
        self.device.weights.shape
    }

    pub(super) fn eps(&self) -> f32 {
        self.device.weights.eps
    }

    pub(super) fn read(&self) -> &Reading {
        match (self.reads, &self.inputs.changed) {
            (Reads::Last, _) => &self.inputs.last,
            (Reads::Changed, Some(changed)) => changed,
            _ => &self.inputs.all,
        }
    }

    pub(super) fn sizes(&self) -> Sizes {
        let config = &self.device.config;
        Sizes {
            tokens: self.inputs.tokens,
            queries: self.read().queries,
            inputs: self
                .inputs
                .changed
                .map_or(self.inputs.tokens, |changed| changed.queries),
            hidden: config.hidden_size,
            inner: config.intermediate_size,
            q_width: self.shape().q_width(),
            kv_width: self.shape().kv_width(),
            element: self.device.dtype.size_in_bytes(),
        }
    }

    fn run(&self, on: &mut Locked, x: Address, factors: Place, wants_output: bool) -> Result<(Rows, Kept)> {
        on.gpu().bind()?;
        let (sizes, w) = (self.sizes(), self.weights());
        let (n, hidden, inner) = (sizes.queries, sizes.hidden, sizes.inner);
        let mut low = Vec::new();
        let [q, kv] = self.queries_keys_values(on, x, factors, &mut low)?;
        let (mixed, log_sums) = self.attention(on, &q, &kv)?;

        let middle = on.take(n * hidden)?;
        let to = (middle.address(), hidden);
        // SAFETY: here and below, memory was taken for the sizes that a launch names, the weights have the config's, and
        // the inputs name rows of this pass.
        unsafe {
            let kernels = on.kernels();
            kernels.place_rows(middle.address(), 0, x, self.read().rows, (n, hidden))?;
            kernels.linear(middle.address(), mixed.address(), w.o, (n, hidden, sizes.q_width), true)?;
        }
        low.extend(self.add_term(on, OProj, mixed.address(), to, factors)?);

        let normed = on.take(n * hidden)?;
        let gate_up = on.take(n * 2 * inner)?;
        // SAFETY: as above.
        unsafe {
            let kernels = on.kernels();
            kernels.rms_norm(normed.address(), middle.address(), w.post_norm, n, hidden, self.eps())?;
            kernels.linear(
                gate_up.address(),
                normed.address(),
                w.gate_up,
                (n, 2 * inner, hidden),
                false,
            )?;
        }
        for (kind, to) in [(GateProj, gate_up.address()), (UpProj, self.up(&gate_up))] {
            low.extend(self.add_term(on, kind, normed.address(), (to, 2 * inner), factors)?);
        }
        on.give([normed]);
        let output = self.down(on, &middle, &gate_up, factors, wants_output, &mut low)?;
        let kept = Kept {
            factors,
            q,
            kv,
            mixed,
            log_sums,
            middle,
            gate_up,
            low,
        };
        Ok((output, self.changed_of(on, kept)?))
    }

    /// The layer's end: its output, or where that is not wanted at least what the term keeps.
    fn down(
        &self,
        on: &mut Locked,
        middle: &Rows,
        gate_up: &Rows,
        factors: Place,
        wants_output: bool,
        low: &mut Vec<Low>,
    ) -> Result<Rows> {
        let (sizes, w) = (self.sizes(), self.weights());
        let (n, hidden, inner) = (sizes.queries, sizes.hidden, sizes.inner);
        if !wants_output && !self.terms.has(DownProj) {
            return on.take(1);
        }
        let (output, active) = (on.take(n * hidden)?, on.take(n * inner)?);
        // SAFETY: see `run`.
        unsafe {
            let kernels = on.kernels();
            kernels.swiglu(active.address(), gate_up.address(), n, inner)?;
            kernels.place_rows(output.address(), 0, middle.address(), 0, (n, hidden))?;
            if wants_output {
                kernels.linear(output.address(), active.address(), w.down, (n, hidden, inner), true)?;
            }
        }
        let to = (output.address(), hidden);
        low.extend(self.add_term(on, DownProj, active.address(), to, factors)?);
        on.give([active]);
        Ok(output)
    }

    fn queries_keys_values(
        &self,
        on: &mut Locked,
        x: Address,
        factors: Place,
        low: &mut Vec<Low>,
    ) -> Result<[Rows; 2]> {
        let (sizes, w) = (self.sizes(), self.weights());
        let (t, n, hidden) = (sizes.tokens, sizes.queries, sizes.hidden);
        let (q_width, kv_width) = (sizes.q_width, sizes.kv_width);
        let normed = self.normed(on, x, t)?;
        let asking = match self.read().rows {
            0 => None,
            _ => Some(self.pick(on, self.read(), normed.address(), hidden)?),
        };
        let asks = asking.as_ref().unwrap_or(&normed).address();
        let (q, kv) = (on.take(n * q_width)?, on.take(t * 2 * kv_width)?);
        // SAFETY: see `run`.
        unsafe {
            let kernels = on.kernels();
            kernels.linear(q.address(), asks, w.qkv, (n, q_width, hidden), false)?;
            let shape = (t, 2 * kv_width, hidden);
            kernels.linear(kv.address(), normed.address(), self.kv_weight(), shape, false)?;
            if w.bias != 0 {
                let kv_bias = w.bias + (q_width * sizes.element) as Address;
                kernels.add_bias(q.address(), w.bias, (n, q_width))?;
                kernels.add_bias(kv.address(), kv_bias, (t, 2 * kv_width))?;
            }
        }
        low.extend(self.add_term(on, QProj, asks, (q.address(), q_width), factors)?);
        for (kind, to) in [(KProj, kv.address()), (VProj, self.values(kv.address()))] {
            low.extend(self.add_term(on, kind, normed.address(), (to, 2 * kv_width), factors)?);
        }
        on.give(asking.into_iter().chain([normed]));
        Ok([q, kv])
    }

    fn attention(&self, on: &mut Locked, q: &Rows, kv: &Rows) -> Result<(Rows, Rows)> {
        let sizes = self.sizes();
        let mixed = on.take(sizes.queries * sizes.q_width)?;
        let log_sums = on.take_floats(sizes.queries * self.shape().heads)?;
        let turned = self.turned(on, q, kv)?;
        let packed = self.packed(&turned, kv);
        // SAFETY: see `run`.
        unsafe {
            on.kernels()
                .packed_forward(&packed, mixed.address(), log_sums.address())?
        };
        on.give(turned);
        Ok((mixed, log_sums))
    }

    /// Queries and keys with their positions turned in, without gaps.
    pub(super) fn turned(&self, on: &mut Locked, q: &Rows, kv: &Rows) -> Result<[Rows; 2]> {
        let sizes = self.sizes();
        let turned_q = on.take(sizes.queries * sizes.q_width)?;
        let turned_k = on.take(sizes.tokens * sizes.kv_width)?;
        // SAFETY: see `run`.
        unsafe {
            let kernels = on.kernels();
            kernels.turn_heads(turned_q.address(), sizes.q_width, &self.heads(QProj, q))?;
            kernels.turn_heads(turned_k.address(), sizes.kv_width, &self.heads(KProj, kv))?;
        }
        Ok([turned_q, turned_k])
    }

    pub(super) fn packed(&self, [q, k]: &[Rows; 2], kv: &Rows) -> Packed {
        let read = self.read();
        Packed {
            q: q.address(),
            k: k.address(),
            k_stride: self.shape().kv_width(),
            v: self.values(kv.address()),
            kv_stride: 2 * self.shape().kv_width(),
            query_positions: read.positions,
            positions: self.inputs.positions,
            query_tiles: read.query_tiles,
            key_tiles: read.key_tiles,
            queries: read.queries,
            shape: self.shape(),
        }
    }

    /// Queries or keys as their linear layer gave them.
    pub(super) fn heads(&self, kind: LinearKind, raw: &Rows) -> Heads {
        let (sizes, weights, w) = (self.sizes(), &self.device.weights, self.weights());
        let is_query = kind == QProj;
        let shape = self.shape();
        Heads {
            raw: raw.address(),
            raw_stride: if is_query { sizes.q_width } else { 2 * sizes.kv_width },
            rows: if is_query { sizes.queries } else { sizes.tokens },
            heads: if is_query { shape.heads } else { shape.kv_heads },
            head_dim: shape.head_dim,
            positions: if is_query {
                self.read().positions
            } else {
                self.inputs.positions
            },
            cos: weights.cos,
            sin: weights.sin,
            norm: if is_query { w.q_norm } else { w.k_norm },
            eps: weights.eps,
        }
    }

    /// What the layer's input is after its norm.
    pub(super) fn normed(&self, on: &mut Locked, x: Address, rows: usize) -> Result<Rows> {
        let hidden = self.sizes().hidden;
        let normed = on.take(rows * hidden)?;
        let weight = self.weights().input_norm;
        // SAFETY: see `run`.
        unsafe {
            on.kernels()
                .rms_norm(normed.address(), x, weight, rows, hidden, self.eps())?
        };
        Ok(normed)
    }

    /// These rows of all.
    pub(super) fn pick(&self, on: &mut Locked, reading: &Reading, all: Address, width: usize) -> Result<Rows> {
        let picked = on.take(reading.queries * width)?;
        // SAFETY: see `run`.
        unsafe {
            on.kernels()
                .gather_rows(picked.address(), all, reading.rows, reading.queries, width)?
        };
        Ok(picked)
    }

    /// The values among keys and values, or their gradients.
    pub(super) fn values(&self, kv: Address) -> Address {
        let sizes = self.sizes();
        kv + (sizes.kv_width * sizes.element) as Address
    }

    /// The second half of gate and up, or of their gradients.
    pub(super) fn up(&self, gate_up: &Rows) -> Address {
        let sizes = self.sizes();
        gate_up.address() + (sizes.inner * sizes.element) as Address
    }

    /// The weight of keys and values, behind that of the queries.
    pub(super) fn kv_weight(&self) -> Address {
        let sizes = self.sizes();
        self.weights().qkv + (sizes.q_width * sizes.hidden * sizes.element) as Address
    }
}
