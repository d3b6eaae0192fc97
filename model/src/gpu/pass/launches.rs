//! Every layer's launches, in order.

use std::hash::{DefaultHasher, Hash, Hasher};

use candle_core::Result;

use super::GpuCache;
use crate::gpu::inputs::Part;
use crate::gpu::kernels::{AttendInputs, Kernels, Product, RopeInputs, SingleRows};
use crate::gpu::products::Projection;
use crate::gpu::weights::{adapter_id, low_rank};
use crate::gpu::work::Address;
use crate::lora::{Adapter, LinearKind};

/// A pass: its launches with the addresses that they share.
pub(super) struct Launches<'a> {
    pub cache: &'a GpuCache,
    pub kernels: Kernels<'a>,
    pub adapter: Option<&'a Adapter>,
}

impl Launches<'_> {
    /// Everything that the launches depend on, besides the words of the inputs.
    pub fn key(&self) -> u64 {
        let (inputs, cache) = (&self.cache.inputs, self.cache);
        let mut hasher = DefaultHasher::new();
        (
            inputs.rows,
            inputs.singles,
            inputs.table_stride,
            cache.splits(),
            cache.draws,
        )
            .hash(&mut hasher);
        cache.work.generation.hash(&mut hasher);
        self.adapter
            .map(|adapter| adapter_id(adapter, cache.weights.layers.len()))
            .hash(&mut hasher);
        hasher.finish()
    }

    fn input(&self, part: Part) -> Address {
        self.cache.inputs.address(self.cache.work.places.inputs, part)
    }

    pub fn all(&self) -> Result<()> {
        let (config, weights) = (&self.cache.config, &self.cache.weights);
        let (places, hidden) = (self.cache.work.places, config.hidden_size);
        let (rows, segments) = (self.cache.inputs.rows, self.cache.inputs.segments);
        let drawn = self.cache.drawn.address();
        // SAFETY: here and below, the workspace was made for this pass' sizes, the weights have the config's shapes, and
        // the inputs' slots and tables name blocks of this cache.
        unsafe {
            self.kernels
                .embed(places.x, weights.embed, self.input(Part::Tokens), drawn, rows, hidden)?;
        }
        for layer in 0..weights.layers.len() {
            self.attention(layer)?;
            // Behind the last layer the head reads each segment's last row alone.
            let last = layer + 1 == weights.layers.len();
            match last && rows > segments {
                true => self.keep_last_rows(layer)?,
                false => self.feed_forward(layer, places.x, places.mixed, rows)?,
            }
        }
        let x = if rows > segments { places.last_x } else { places.x };
        // SAFETY: as above.
        unsafe {
            self.kernels
                .rms_norm(places.normed, x, weights.norm, segments, hidden, weights.eps)?;
            self.multiply(Projection::Head, &self.product(Projection::Head, 0, segments))?;
            if self.cache.draws {
                self.kernels.sample(
                    drawn,
                    places.logits,
                    self.input(Part::Draws),
                    segments,
                    config.vocab_size,
                )?;
            }
        }
        Ok(())
    }

    /// What each row takes of those before it, into `mixed`.
    fn attention(&self, layer: usize) -> Result<()> {
        let (weights, inputs) = (&self.cache.weights, &self.cache.inputs);
        let (w, shape, cache) = (&weights.layers[layer], weights.shape, self.cache.layer(layer));
        let (places, hidden, rows) = (self.cache.work.places, self.cache.config.hidden_size, inputs.rows);
        let width = shape.q_width() + 2 * shape.kv_width();
        let rope = RopeInputs {
            cos: weights.cos,
            sin: weights.sin,
            positions: self.input(Part::Positions),
            slots: self.input(Part::Slots),
            bias: w.bias,
            q_norm: w.q_norm,
            k_norm: w.k_norm,
            eps: weights.eps,
        };
        let attend = AttendInputs {
            out: places.mixed,
            qkv: places.qkv,
            positions: rope.positions,
            sequence: self.input(Part::Sequence),
            tables: self.input(Part::Tables),
            table_stride: inputs.table_stride,
        };
        let element = self.kernels.dtype.size_in_bytes();
        // SAFETY: see `all`.
        unsafe {
            self.kernels
                .rms_norm(places.normed, places.x, w.input_norm, rows, hidden, weights.eps)?;
            self.multiply(Projection::Qkv, &self.product(Projection::Qkv, layer, rows))?;
            let key = shape.q_width() * element;
            let value = (shape.q_width() + shape.kv_width()) * element;
            for (kind, offset) in [
                (LinearKind::QProj, 0),
                (LinearKind::KProj, key),
                (LinearKind::VProj, value),
            ] {
                let out = places.qkv + offset as Address;
                self.low_rank(layer, kind, out, width, places.normed, Part::Scales, rows)?;
            }
            self.kernels.rope_cache(places.qkv, cache, &rope, rows, shape)?;
            let singles = SingleRows {
                rows: self.input(Part::Singles),
                count: inputs.singles,
                splits: self.cache.splits(),
                partial: places.partial,
            };
            self.kernels.attend_rows(&attend, cache, singles, shape)?;
            let (first, count) = (self.input(Part::TileRows), self.input(Part::TileCounts));
            if inputs.tiles > 0 {
                self.kernels
                    .attend_tiles(&attend, cache, first, count, inputs.tiles, shape)?;
            }
        }
        Ok(())
    }

    /// The last layer's rest on each segment's last row.
    fn keep_last_rows(&self, layer: usize) -> Result<()> {
        let (places, segments) = (self.cache.work.places, self.cache.inputs.segments);
        let wanted = self.input(Part::LastRows);
        let hidden = self.cache.config.hidden_size;
        let q_width = self.cache.weights.shape.q_width();
        // SAFETY: see `all`.
        unsafe {
            self.kernels
                .gather_rows(places.last_x, places.x, wanted, segments, hidden)?;
            self.kernels
                .gather_rows(places.last_mixed, places.mixed, wanted, segments, q_width)?;
        }
        self.feed_forward(layer, places.last_x, places.last_mixed, segments)
    }

    /// `x += o(mixed)`, then `x += feed_forward(norm(x))`, on `rows` rows.
    fn feed_forward(&self, layer: usize, x: Address, mixed: Address, rows: usize) -> Result<()> {
        let (config, weights) = (&self.cache.config, &self.cache.weights);
        let (w, places, hidden) = (&weights.layers[layer], self.cache.work.places, config.hidden_size);
        let scales = if x == places.x { Part::Scales } else { Part::LastScales };
        let o = Product {
            out: x,
            x: mixed,
            ..self.product(Projection::O, layer, rows)
        };
        let down = Product {
            out: x,
            ..self.product(Projection::Down, layer, rows)
        };
        // SAFETY: see `all`.
        unsafe {
            self.multiply(Projection::O, &o)?;
            self.low_rank(layer, LinearKind::OProj, x, hidden, mixed, scales, rows)?;
            self.kernels
                .rms_norm(places.normed, x, w.post_norm, rows, hidden, weights.eps)?;
            self.gate_up(layer, scales, rows)?;
            self.multiply(Projection::Down, &down)?;
            self.low_rank(layer, LinearKind::DownProj, x, hidden, places.active, scales, rows)
        }
    }

    /// `silu(gate) * up` of `normed` into `active`; the adapter's terms come between, where it has any there.
    ///
    /// # Safety
    /// As [`Launches::multiply`].
    unsafe fn gate_up(&self, layer: usize, scales: Part, rows: usize) -> Result<()> {
        let (places, inner) = (self.cache.work.places, self.cache.config.intermediate_size);
        let gated = self.product(Projection::GateUp, layer, rows);
        let kinds = [LinearKind::GateProj, LinearKind::UpProj];
        let adapted = |adapter: &Adapter| kinds.iter().any(|kind| adapter.pair(layer, *kind).is_some());
        // SAFETY: the caller's promise.
        unsafe {
            if !self.adapter.is_some_and(adapted) {
                return self.multiply(Projection::GateUp, &gated);
            }
            self.multiply(Projection::GateUp, &self.ungated(&gated))?;
            for (i, kind) in kinds.into_iter().enumerate() {
                let out = places.gate_up + (i * inner * self.kernels.dtype.size_in_bytes()) as Address;
                self.low_rank(layer, kind, out, 2 * inner, places.normed, scales, rows)?;
            }
            self.kernels.swiglu(places.active, places.gate_up, rows, inner)
        }
    }

    /// The adapter's term of one layer added to rows of `out`, where there is one.
    ///
    /// # Safety
    /// `out` holds `rows` rows, `stride` apart; `x` as many of the layer's inputs.
    #[allow(clippy::too_many_arguments)]
    unsafe fn low_rank(
        &self,
        layer: usize,
        kind: LinearKind,
        out: Address,
        stride: usize,
        x: Address,
        scales: Part,
        rows: usize,
    ) -> Result<()> {
        let Some(adapter) = self.adapter else {
            return Ok(());
        };
        let Some(term) = low_rank(&self.cache.gpu, adapter, layer, kind, stride)? else {
            return Ok(());
        };
        let low = self.cache.work.places.low;
        // SAFETY: the caller's promise.
        unsafe { self.kernels.add_low_rank(out, x, low, self.input(scales), rows, &term) }
    }
}
