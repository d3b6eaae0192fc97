//! Forward passes that end in tokens, drawn on the GPU where that runs the pass, else on the host from the logits; and in
//! hidden states.

use std::sync::{Mutex, PoisonError};

use super::{Llama, Segment};
use crate::cpu::each;
#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
use crate::gpu::{CopyBack, GpuCache, HiddenCopy};
use crate::kv_cache::KvCache;
#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
use crate::kv_cache::Store;
use crate::lora::Adapter;
use crate::{ModelError, Sampler};

/// Logits that are worth a thread: it takes some five microseconds to find the largest of them.
const LOGITS_PER_THREAD: usize = 1 << 14;

/// What a pass is to give of a segment.
#[derive(Debug)]
pub enum Wanted<'a> {
    /// Nothing but the keys and values in the cache.
    Nothing,
    /// The token that follows it, drawn by this sampler.
    Token(&'a mut Sampler),
    /// Its last token's hidden state, behind the last norm: what a [`crate::LengthHead`] reads.
    Hidden,
}

/// What a pass gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Landed {
    /// A token for each segment; where none was wanted, any.
    pub tokens: Vec<u32>,
    /// The hidden states of the segments that they were wanted of, in their order, `[hidden]` each.
    pub hidden: Vec<Vec<f32>>,
}

/// A pass that was launched, and what it gives.
#[derive(Debug)]
#[must_use]
pub struct Flight(Place);

#[derive(Debug)]
enum Place {
    /// On the host: the pass is done.
    Here(Landed),
    /// On the GPU, which may still be at it.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    There {
        tokens: CopyBack,
        /// Of every segment: whether its token is wanted.
        wanted: Vec<bool>,
        hidden: Option<HiddenCopy>,
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
    /// Waits for the pass.
    ///
    /// # Errors
    /// The device failed, or the logits of a segment whose token is wanted are not finite.
    pub fn land(self) -> Result<Landed, ModelError> {
        match self.0 {
            Place::Here(landed) => Ok(landed),
            #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
            Place::There { tokens, wanted, hidden } => {
                let tokens = tokens.wait()?;
                // What the kernel says where it found no finite logit.
                let failed = |(token, wanted): (&u32, &bool)| *wanted && *token == u32::MAX;
                if tokens.iter().zip(&wanted).any(failed) {
                    return Err(ModelError::NonFiniteLogits);
                }
                let hidden = hidden.map(HiddenCopy::wait).transpose()?;
                Ok(Landed {
                    tokens,
                    hidden: hidden.unwrap_or_default(),
                })
            }
        }
    }
}

impl Llama {
    /// As [`Llama::forward`], and gives of each segment what is wanted of it. On a GPU it returns before that is done, and
    /// the next pass may already take the tokens ([`crate::drawn_token`]).
    ///
    /// - `wanted`: of every segment
    ///
    /// # Errors
    /// As there, or the logits of a segment whose token is wanted are not finite.
    pub fn launch(
        &self,
        segments: &[Segment],
        cache: &mut KvCache,
        adapter: Option<&Adapter>,
        wanted: &mut [Wanted],
    ) -> Result<Flight, ModelError> {
        #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
        if let Store::Gpu(gpu) = &mut cache.store {
            self.check(segments, gpu.last_drawn())?;
            return Ok(Flight(launch_there(gpu, segments, adapter, wanted)?));
        }
        let logits = self.forward(segments, cache, adapter)?;
        let tokens = draw_all(logits, self.config().vocab_size, wanted)?;
        let width = self.config().hidden_size;
        let hidden = hidden_segments(wanted).map(|segment| cache.hidden_of(segment, width));
        let hidden = hidden.collect::<Result<_, _>>()?;
        Ok(Flight(Place::Here(Landed { tokens, hidden })))
    }
}

/// Which segments' hidden states are wanted, ascending.
fn hidden_segments(wanted: &[Wanted]) -> impl Iterator<Item = usize> {
    let hidden = wanted.iter().enumerate().filter(|(_, w)| matches!(w, Wanted::Hidden));
    hidden.map(|(segment, _)| segment)
}

/// A token for each segment from its logits, `[segments, vocab]`; 0 where none is wanted.
fn draw_all(logits: &[f32], vocab: usize, wanted: &mut [Wanted]) -> Result<Vec<u32>, ModelError> {
    let threads = (logits.len() / LOGITS_PER_THREAD).clamp(1, rayon::current_num_threads());
    // A row is one thread's alone, so that nobody waits for a lock; each request has its own random stream, so that the order
    // of the draws does not matter.
    let rows: Vec<_> = wanted.iter_mut().map(|wanted| Mutex::new((wanted, Ok(0)))).collect();
    each(rows.len(), threads, |row| {
        let mut place = rows[row].lock().unwrap_or_else(PoisonError::into_inner);
        if let (Wanted::Token(sampler), token) = &mut *place {
            *token = sampler.sample(&logits[row * vocab..][..vocab]);
        }
    });
    let tokens = rows
        .into_iter()
        .map(|row| row.into_inner().unwrap_or_else(PoisonError::into_inner).1);
    tokens.collect()
}

#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
fn launch_there(
    gpu: &mut GpuCache,
    segments: &[Segment],
    adapter: Option<&Adapter>,
    wanted: &mut [Wanted],
) -> Result<Place, ModelError> {
    let draw = |wanted: &mut Wanted| match wanted {
        Wanted::Token(sampler) => Some(sampler.next_draw()),
        Wanted::Nothing | Wanted::Hidden => None,
    };
    let draws: Vec<_> = wanted.iter_mut().map(draw).collect();
    gpu.launch(segments, adapter, &draws)?;
    let hidden: Vec<usize> = hidden_segments(wanted).collect();
    Ok(Place::There {
        tokens: gpu.drawn()?,
        wanted: draws.iter().map(Option::is_some).collect(),
        hidden: gpu.hidden(hidden)?,
    })
}
