//! Forward passes that end in tokens: drawn on the GPU where that runs the pass, else on the host from the logits.

use rayon::prelude::*;

use super::{Llama, Segment};
#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
use crate::gpu::CopyBack;
use crate::kv_cache::KvCache;
#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
use crate::kv_cache::Store;
use crate::lora::Adapter;
use crate::{ModelError, Sampler};

/// Logits below which one thread draws all tokens: waking another costs some microseconds.
const DRAW_SERIALLY_BELOW: usize = 1 << 16;

/// A pass that was launched, and the tokens that it draws.
#[derive(Debug)]
#[must_use]
pub struct Flight(Drawn);

#[derive(Debug)]
enum Drawn {
    /// On the host: the pass is done.
    Here(Vec<u32>),
    /// On the GPU, which may still be at it.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    There {
        tokens: CopyBack,
        /// Of every segment: whether its token is wanted.
        wanted: Vec<bool>,
    },
}

/// Stands for the token that the pass before drew for its segment number `segment`, which the host need not know yet. A
/// cache that does not run on a GPU knows no such tokens.
pub fn drawn_token(segment: usize) -> u32 {
    DRAWN | segment as u32
}

/// Set in what [`drawn_token`] gives, and in no token of a vocabulary (`FROM_DRAWN` in rows.cuh).
const DRAWN: u32 = 1 << 31;

/// The segment whose token `token` stands for.
pub(super) fn segment_of(token: u32) -> Option<usize> {
    (token & DRAWN != 0).then_some((token & !DRAWN) as usize)
}

impl Flight {
    /// Waits for the pass. Returns a token for each of its segments; where none was wanted, any.
    ///
    /// # Errors
    /// The device failed, or the logits of a segment are not finite.
    pub fn land(self) -> Result<Vec<u32>, ModelError> {
        match self.0 {
            Drawn::Here(tokens) => Ok(tokens),
            #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
            Drawn::There { tokens, wanted } => {
                let tokens = tokens.wait()?;
                // What the kernel says where it found no finite logit.
                let failed = |(token, wanted): (&u32, &bool)| *wanted && *token == u32::MAX;
                match tokens.iter().zip(&wanted).any(failed) {
                    true => Err(ModelError::NonFiniteLogits),
                    false => Ok(tokens),
                }
            }
        }
    }
}

impl Llama {
    /// As [`Llama::forward`], and draws the token that follows each segment. On a GPU it returns before that is done, and
    /// the next pass may already take the tokens ([`crate::drawn_token`]).
    ///
    /// - `samplers`: of every segment, `None` where no token is wanted
    ///
    /// # Errors
    /// As there, or the logits of a segment are not finite.
    pub fn launch(
        &self,
        segments: &[Segment],
        cache: &mut KvCache,
        adapter: Option<&Adapter>,
        samplers: &mut [Option<&mut Sampler>],
    ) -> Result<Flight, ModelError> {
        #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
        if let Store::Gpu(gpu) = &mut cache.store {
            self.check(segments, gpu.last_drawn())?;
            let draw = |sampler: &mut Option<&mut Sampler>| sampler.as_mut().map(|s| s.next_draw());
            let draws: Vec<_> = samplers.iter_mut().map(draw).collect();
            gpu.launch(segments, adapter, &draws)?;
            let (tokens, wanted) = (gpu.drawn()?, draws.iter().map(Option::is_some).collect());
            return Ok(Flight(Drawn::There { tokens, wanted }));
        }
        let vocab = self.config().vocab_size;
        let logits = self.forward(segments, cache, adapter)?;
        let sample = |(sampler, logits): (&mut Option<&mut Sampler>, &[f32])| match sampler {
            Some(sampler) => sampler.sample(logits),
            None => Ok(0),
        };
        // Each request has its own random stream, so the order of the draws does not matter.
        let tokens: Result<Vec<u32>, ModelError> = match logits.len() < DRAW_SERIALLY_BELOW {
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
        };
        Ok(Flight(Drawn::Here(tokens?)))
    }
}
