//! A pass' products, each in the way that was chosen for it.

use candle_core::Result;

use super::launches::Launches;
use crate::gpu::kernels::{Epilogue, Product};
use crate::gpu::products::{Projection, Way};

impl Launches<'_> {
    /// A weight's product of `rows` rows, from where a pass has its inputs to where it wants its outputs.
    pub fn product(&self, projection: Projection, layer: usize, rows: usize) -> Product {
        let (config, weights) = (&self.cache.config, &self.cache.weights);
        let (w, places, shape) = (&weights.layers[layer], self.cache.work.places, weights.shape);
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (out, x, w, outputs, inputs, epilogue) = match projection {
            Projection::Qkv => {
                let width = shape.q_width() + 2 * shape.kv_width();
                (places.qkv, places.normed, w.qkv, width, hidden, Epilogue::Store)
            }
            Projection::O => (places.x, places.mixed, w.o, hidden, shape.q_width(), Epilogue::Add),
            Projection::GateUp => (places.active, places.normed, w.gate_up, inner, hidden, Epilogue::Gated),
            Projection::Down => (places.x, places.active, w.down, hidden, inner, Epilogue::Add),
            Projection::Head => {
                let vocab = config.vocab_size;
                (
                    places.logits,
                    places.normed,
                    weights.lm_head,
                    vocab,
                    hidden,
                    Epilogue::F32,
                )
            }
        };
        Product {
            out,
            x,
            w,
            rows,
            outputs,
            inputs,
            epilogue,
        }
    }

    /// A gated product before its activation, into `gate_up`.
    pub fn ungated(&self, gated: &Product) -> Product {
        Product {
            out: self.cache.work.places.gate_up,
            outputs: 2 * gated.outputs,
            epilogue: Epilogue::Store,
            ..*gated
        }
    }

    /// # Safety
    /// The addresses hold what is said at the product's fields.
    pub unsafe fn multiply(&self, projection: Projection, product: &Product) -> Result<()> {
        let way = self.cache.products.way(projection, product.rows);
        // SAFETY: the caller's promise.
        unsafe { self.multiply_by(way, product) }
    }

    /// # Safety
    /// As [`Launches::multiply`].
    pub unsafe fn multiply_by(&self, way: Way, product: &Product) -> Result<()> {
        let tile = match way {
            Way::FewRows(outputs) => self.kernels.few_rows_tile(product, outputs),
            Way::Blas => None,
        };
        // SAFETY: the caller's promise.
        unsafe {
            match (tile, product.epilogue) {
                (Some(tile), _) => self.kernels.few_rows(product, tile),
                (None, Epilogue::Gated) => {
                    let both = self.ungated(product);
                    self.kernels.blas(&both)?;
                    self.kernels
                        .swiglu(product.out, both.out, product.rows, product.outputs)
                }
                (None, _) => self.kernels.blas(product),
            }
        }
    }
}
