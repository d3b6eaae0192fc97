//! The layer's backward pass.

use candle_core::Result;

use super::layer::{GpuLayer, Kept};
use super::pool::Rows;
use super::terms::{Low, Strided};
use super::{Locked, Place};
use crate::gpu::kernels::PackedGrads;
use crate::gpu::work::Address;
use crate::lora::LinearKind::{self, DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};

/// The terms of a pass, their factors and those' gradients.
struct Factors {
    low: Vec<Low>,
    values: Place,
    grads: Place,
}

impl GpuLayer {
    /// `Layer::backward`.
    pub(super) fn run_back(
        &self,
        on: &mut Locked,
        [x, grad]: [Address; 2],
        mut kept: Kept,
        deep: bool,
        dfactors: Place,
    ) -> Result<Option<Rows>> {
        on.gpu().bind()?;
        let factors = Factors {
            low: std::mem::take(&mut kept.low),
            values: kept.factors,
            grads: dfactors,
        };
        let dmiddle = self.feed_forward_backward(on, &kept, grad, &factors)?;

        // Below attention there may be nothing that is trained.
        let below = deep || self.terms.has_any(&[QProj, KProj, VProj]);
        let (sizes, w) = (self.sizes(), self.weights());
        let (n, hidden) = (sizes.queries, sizes.hidden);
        let dmixed = on.take(n * sizes.q_width)?;
        if below {
            let shape = (n, hidden, sizes.q_width);
            // SAFETY: here and below, as in the forward pass.
            unsafe {
                on.kernels()
                    .linear_grad(dmixed.address(), dmiddle.address(), w.o, shape, false)?
            };
        }
        let of = [Some(kept.mixed.address()), below.then(|| dmixed.address())];
        self.through(on, OProj, of, (dmiddle.address(), hidden), &factors)?;
        let mut dx = None;
        if below {
            let grads = self.attention_backward(on, &kept, &dmixed)?;
            dx = self.input_backward(on, x, grads, &dmiddle, deep, &factors)?;
        }
        on.give([dmiddle, dmixed]);
        kept.low = factors.low;
        on.give(kept.into_rows());
        Ok(dx)
    }

    /// Through the term of one linear layer, if it has one.
    ///
    /// - `of`: the term's input and, where it is wanted, the gradient of that
    fn through(
        &self,
        on: &mut Locked,
        kind: LinearKind,
        of: [Option<Address>; 2],
        grad: Strided,
        factors: &Factors,
    ) -> Result<()> {
        match factors.low.iter().find(|low| low.kind == kind) {
            Some(low) => self.term_back(on, low, of, grad, [factors.values, factors.grads]),
            None => Ok(()),
        }
    }

    /// The gradient of the residual stream between the halves. Gate and up become their own gradients.
    fn feed_forward_backward(&self, on: &mut Locked, kept: &Kept, grad: Address, factors: &Factors) -> Result<Rows> {
        let (sizes, w) = (self.sizes(), self.weights());
        let (n, hidden, inner) = (sizes.queries, sizes.hidden, sizes.inner);
        let (gate_up, middle) = (kept.gate_up.address(), kept.middle.address());
        let dactive = on.take(n * inner)?;
        // SAFETY: see `run_back`.
        unsafe {
            on.kernels()
                .linear_grad(dactive.address(), grad, w.down, (n, hidden, inner), false)?
        };
        if self.terms.has(DownProj) {
            let active = on.take(n * inner)?;
            // SAFETY: see `run_back`.
            unsafe { on.kernels().swiglu(active.address(), gate_up, n, inner)? };
            let of = [Some(active.address()), Some(dactive.address())];
            self.through(on, DownProj, of, (grad, hidden), factors)?;
            on.give([active]);
        }
        let dnormed = on.take(n * hidden)?;
        // SAFETY: see `run_back`.
        unsafe {
            let kernels = on.kernels();
            kernels.swiglu_grad(gate_up, dactive.address(), (n, inner))?;
            kernels.linear_grad(dnormed.address(), gate_up, w.gate_up, (n, 2 * inner, hidden), false)?;
        }
        on.give([dactive]);
        if self.terms.has_any(&[GateProj, UpProj]) {
            let normed = on.take(n * hidden)?;
            // SAFETY: see `run_back`.
            unsafe {
                on.kernels()
                    .rms_norm(normed.address(), middle, w.post_norm, n, hidden, self.eps())?
            };
            let of = [Some(normed.address()), Some(dnormed.address())];
            for (kind, grad) in [(GateProj, gate_up), (UpProj, self.up(&kept.gate_up))] {
                self.through(on, kind, of, (grad, 2 * inner), factors)?;
            }
            on.give([normed]);
        }
        let dmiddle = on.take(n * hidden)?;
        let of = [grad, middle, w.post_norm, dnormed.address()];
        // SAFETY: see `run_back`.
        unsafe {
            on.kernels()
                .rms_norm_grad(dmiddle.address(), of, (n, hidden), self.eps())?
        };
        on.give([dnormed]);
        Ok(dmiddle)
    }

    /// The gradients of what the linear layers of queries, and of keys and values, gave.
    fn attention_backward(&self, on: &mut Locked, kept: &Kept, dmixed: &Rows) -> Result<[Rows; 2]> {
        let sizes = self.sizes();
        let turned = self.turned(on, &kept.q, &kept.kv)?;
        let (dq, dkv) = (
            on.take(sizes.queries * sizes.q_width)?,
            on.take(sizes.tokens * 2 * sizes.kv_width)?,
        );
        let deltas = on.take_floats(sizes.queries * self.shape().heads)?;
        let packed = self.packed(&turned, &kept.kv);
        let grads = PackedGrads {
            grad: dmixed.address(),
            out: kept.mixed.address(),
            log_sums: kept.log_sums.address(),
            deltas: deltas.address(),
            dq: dq.address(),
            dk: dkv.address(),
            dv: self.values(dkv.address()),
        };
        // SAFETY: see `run_back`.
        unsafe {
            let kernels = on.kernels();
            kernels.packed_backward(&packed, &grads)?;
            kernels.turn_heads_back(dq.address(), sizes.q_width, &self.heads(QProj, &kept.q))?;
            kernels.turn_heads_back(dkv.address(), 2 * sizes.kv_width, &self.heads(KProj, &kept.kv))?;
        }
        on.give(turned.into_iter().chain([deltas]));
        Ok([dq, dkv])
    }

    /// From the gradients of queries, keys and values to that of the layer's input, where `deep` asks for it.
    fn input_backward(
        &self,
        on: &mut Locked,
        all: Address,
        [dq, dkv]: [Rows; 2],
        dmiddle: &Rows,
        deep: bool,
        factors: &Factors,
    ) -> Result<Option<Rows>> {
        let (sizes, w) = (self.sizes(), self.weights());
        let (m, n, hidden) = (sizes.inputs, sizes.queries, sizes.hidden);
        let (q_width, kv_width) = (sizes.q_width, sizes.kv_width);
        // The rows whose input has a gradient, where those are not all.
        let (mut picked, mut dkv) = (None, dkv);
        if let Some(changed) = &self.inputs.changed {
            picked = Some(self.pick(on, changed, all, hidden)?);
            let changed_dkv = self.pick(on, changed, dkv.address(), 2 * kv_width)?;
            on.give([std::mem::replace(&mut dkv, changed_dkv)]);
        }
        let x = picked.as_ref().map_or(all, Rows::address);
        let normed = self.normed(on, x, m)?;
        // The rows that ask, where those are others, and the gradient of theirs.
        let apart = self.read().places != 0;
        let asking = match apart && self.terms.has(QProj) {
            true => Some(self.asking(on, all)?),
            false => None,
        };
        let part = if apart && deep {
            Some(on.take(n * hidden)?)
        } else {
            None
        };
        let dnormed = on.take(m * hidden)?;
        let of_asking = part.as_ref().unwrap_or(&dnormed).address();
        if deep {
            let shape = (m, 2 * kv_width, hidden);
            // SAFETY: see `run_back`.
            unsafe {
                let kernels = on.kernels();
                kernels.linear_grad(dnormed.address(), dkv.address(), self.kv_weight(), shape, false)?;
                kernels.linear_grad(of_asking, dq.address(), w.qkv, (n, q_width, hidden), part.is_none())?;
            }
        }
        let of = [Some(normed.address()), deep.then(|| dnormed.address())];
        for (kind, grad) in [(KProj, dkv.address()), (VProj, self.values(dkv.address()))] {
            self.through(on, kind, of, (grad, 2 * kv_width), factors)?;
        }
        let asks = asking.as_ref().unwrap_or(&normed).address();
        let of = [Some(asks), deep.then_some(of_asking)];
        self.through(on, QProj, of, (dq.address(), q_width), factors)?;
        let mut dx = None;
        if deep {
            dx = Some(self.residual_backward(on, x, [dmiddle, &dnormed], part.as_ref())?);
        }
        on.give(
            [asking, part, picked]
                .into_iter()
                .flatten()
                .chain([normed, dnormed, dq, dkv]),
        );
        Ok(dx)
    }

    /// The normalised rows that ask, of all.
    fn asking(&self, on: &mut Locked, all: Address) -> Result<Rows> {
        let read = self.read();
        let rows = self.pick(on, read, all, self.sizes().hidden)?;
        let normed = self.normed(on, rows.address(), read.queries)?;
        on.give([rows]);
        Ok(normed)
    }

    /// The gradient of the layer's input: through its norm, and past everything.
    ///
    /// - `part`: what belongs to the rows of `dnormed` that are read, where those are others than have a gradient
    fn residual_backward(
        &self,
        on: &mut Locked,
        x: Address,
        [dmiddle, dnormed]: [&Rows; 2],
        part: Option<&Rows>,
    ) -> Result<Rows> {
        let (sizes, w, places) = (self.sizes(), self.weights(), self.read().places);
        let size = (sizes.inputs, sizes.hidden);
        let dx = on.take(size.0 * size.1)?;
        let dnormed = dnormed.address();
        // SAFETY: see `run_back`.
        unsafe {
            let kernels = on.kernels();
            if let Some(part) = part {
                kernels.place_rows(dnormed, dnormed, part.address(), places, size)?;
            }
            let past = match places {
                0 => dmiddle.address(),
                _ => {
                    kernels.place_rows(dx.address(), 0, dmiddle.address(), places, size)?;
                    dx.address()
                }
            };
            kernels.rms_norm_grad(dx.address(), [past, x, w.input_norm, dnormed], size, self.eps())?;
        }
        Ok(dx)
    }
}
