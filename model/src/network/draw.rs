//! Forward passes that end in tokens: drawn on the GPU where that runs the pass, else on the host from the logits.

use rayon::prelude::*;

use super::{Llama, Segment};
use crate::kv_cache::{KvCache, Store};
use crate::lora::Adapter;
use crate::{ModelError, Sampler};

/// Logits below which one thread draws all tokens: waking another costs some microseconds.
const DRAW_SERIALLY_BELOW: usize = 1 << 16;

impl Llama {
    /// As [`Llama::forward`], and draws the token that follows each segment.
    ///
    /// - `samplers`: of every segment, `None` where no token is wanted
    ///
    /// Returns a token for each sampler; where there is none, any.
    ///
    /// # Errors
    /// As there, or the logits of a segment are not finite.
    pub fn draw(
        &self,
        segments: &[Segment],
        cache: &mut KvCache,
        adapter: Option<&Adapter>,
        samplers: &mut [Option<&mut Sampler>],
    ) -> Result<Vec<u32>, ModelError> {
        #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
        if let Store::Gpu(gpu) = &mut cache.store {
            self.check(segments)?;
            let draws: Vec<_> = samplers
                .iter_mut()
                .map(|s| s.as_mut().map(|sampler| sampler.next_draw()))
                .collect();
            gpu.launch(segments, adapter, &draws)?;
            let mut tokens = Vec::new();
            gpu.drawn(&mut tokens)?;
            let wanted = tokens.iter().zip(samplers.iter()).filter(|(_, s)| s.is_some());
            match wanted.into_iter().any(|(token, _)| *token == u32::MAX) {
                true => return Err(ModelError::NonFiniteLogits),
                false => return Ok(tokens),
            }
        }
        let vocab = self.config().vocab_size;
        let logits = self.forward(segments, cache, adapter)?;
        let sample = |(sampler, logits): (&mut Option<&mut Sampler>, &[f32])| match sampler {
            Some(sampler) => sampler.sample(logits),
            None => Ok(0),
        };
        // Each request has its own random stream, so the order of the draws does not matter.
        match logits.len() < DRAW_SERIALLY_BELOW {
            true => samplers
                .iter_mut()
                .zip(logits.chunks_exact(vocab))
                .map(sample)
                .collect(),
            false => samplers
                .par_iter_mut()
                .zip(logits.par_chunks_exact(vocab))
                .map(sample)
                .collect(),
        }
    }
}
