//! A forward pass on the CPU path: slices, panels, and buffers that are kept from pass to pass.

mod linears;

use super::block::Block;
use super::{Llama, Segment};
use crate::ModelError;
use crate::cpu::{Attention, HostCache, Output, PackedMatrix, Span, Workspace, attend, each, multiply_into};
use crate::lora::{AdaptedRows, Adapter, LinearKind};
use crate::ops::{self, RopeTable, host_floats};
use linears::rows;

/// What the layers of one pass share.
pub(super) struct HostPass<'a> {
    /// All new tokens, packed.
    pub tokens: &'a [u32],
    pub spans: &'a [Span<'a>],
    pub adapter: Option<&'a Adapter>,
    /// The rows that the adapter changes, where that is not all.
    pub adapted: Option<&'a AdaptedRows>,
}

/// Where the new tokens of every segment lie among the packed rows.
pub(super) fn spans<'a>(segments: &[Segment<'a>]) -> Vec<Span<'a>> {
    let mut row = 0;
    let span = |segment: &Segment<'a>| {
        let span = Span {
            row,
            rows: segment.tokens.len(),
            start: segment.start,
            blocks: segment.table.blocks(),
        };
        row += span.rows;
        span
    };
    segments.iter().map(span).collect()
}

impl Llama {
    /// Fills `logits` with what follows each span's last token, `[spans, vocab]`.
    pub(super) fn forward_host(
        &self,
        pass: &HostPass,
        cache: &mut HostCache,
        work: &mut Workspace,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let hidden = self.config.hidden_size;
        let embeddings = host_floats(&self.embed_tokens)?;
        work.x.clear();
        for &token in pass.tokens {
            work.x
                .extend_from_slice(&embeddings[token as usize * hidden..][..hidden]);
        }
        let Some(head) = self.lm_head.packed() else {
            unreachable!("a model on the CPU path has packed weights");
        };
        for (number, block) in self.blocks.iter().enumerate() {
            let next = self.blocks.get(number + 1);
            let layer = Layer {
                block,
                number,
                pass,
                next: next.map_or(head, |next| next.packed(LinearKind::QProj)),
                // Behind the last layer the head reads each span's last row alone.
                lasts: next.is_none() && pass.tokens.len() > pass.spans.len(),
            };
            layer.attend(&self.rope, cache, work)?;
            if layer.lasts {
                keep_last_rows(&mut work.x, hidden, pass.spans);
            }
            layer.add_attended(work)?;
            layer.feed_forward(work)?;
        }
        let norm = host_floats(&self.norm)?;
        work.normed.resize(pass.spans.len() * hidden, 0.0);
        for (row, out) in work.normed.chunks_exact_mut(hidden).enumerate() {
            ops::rms_norm_row(
                &work.x[row * hidden..][..hidden],
                &norm,
                self.config.rms_norm_eps as f32,
                out,
            );
        }
        logits.resize(pass.spans.len() * self.config.vocab_size, 0.0);
        multiply_into(head, &work.normed, logits, false, None);
        Ok(())
    }
}

/// A layer of a pass.
struct Layer<'a> {
    block: &'a Block,
    number: usize,
    pass: &'a HostPass<'a>,
    /// What is multiplied behind it.
    next: &'a PackedMatrix,
    /// Whether only the last rows of its spans, of which some have several, are asked for: of the others it gives keys and
    /// values.
    lasts: bool,
}

impl Layer<'_> {
    /// `mixed = attention(norm(x))`, before its last linear layer; of the last rows where only they are asked for.
    fn attend(&self, rope: &RopeTable, cache: &mut HostCache, work: &mut Workspace) -> Result<(), ModelError> {
        let block = self.block;
        let norm = host_floats(&block.input_norm)?;
        normalise(&work.x, &norm, block.eps, &mut work.normed);
        let q = (LinearKind::QProj, &mut work.q);
        let (k, v) = ((LinearKind::KProj, &mut work.k), (LinearKind::VProj, &mut work.v));
        let (x, o) = (rows(&work.normed, norm.len()), block.packed(LinearKind::OProj));
        if self.lasts {
            self.linears(x, [k, v], &mut work.low, block.packed(LinearKind::QProj))?;
            keep_last_rows(&mut work.normed, norm.len(), self.pass.spans);
            self.linears(rows(&work.normed, norm.len()), [q], &mut work.low, o)?;
        } else {
            self.linears(x, [q, k, v], &mut work.low, o)?;
        }
        let norms = block.qk_norms.as_ref();
        let norms = norms.map(|(q, k)| Ok::<_, ModelError>((host_floats(q)?, host_floats(k)?)));
        let norms = norms.transpose()?;
        work.mixed.resize(work.q.len(), 0.0);
        let attention = Attention {
            q: &work.q,
            lasts: self.lasts,
            k: &work.k,
            v: &work.v,
            norms: norms.as_ref().map(|(q, k)| (&**q, &**k)),
            eps: block.eps as f32,
            rope,
            shape: block.shape,
        };
        attend(&attention, cache, self.number, self.pass.spans, &mut work.mixed);
        Ok(())
    }

    /// `x +=` what attention gave.
    fn add_attended(&self, work: &mut Workspace) -> Result<(), ModelError> {
        let next = self.block.packed(LinearKind::GateProj);
        self.add_linear(LinearKind::OProj, &work.mixed, &mut work.x, &mut work.low, next)
    }

    /// `x += feed_forward(norm(x))`.
    fn feed_forward(&self, work: &mut Workspace) -> Result<(), ModelError> {
        let block = self.block;
        let norm = host_floats(&block.post_attention_norm)?;
        normalise(&work.x, &norm, block.eps, &mut work.normed);
        let x = rows(&work.normed, norm.len());
        self.gate(x, &mut work.gate, &mut work.up, &mut work.low)?;
        self.add_linear(LinearKind::DownProj, &work.gate, &mut work.x, &mut work.low, self.next)
    }
}

/// Moves each span's last row to the front and drops the others.
fn keep_last_rows(data: &mut Vec<f32>, width: usize, spans: &[Span]) {
    for (row, span) in spans.iter().enumerate() {
        let last = span.row + span.rows - 1;
        data.copy_within(last * width..(last + 1) * width, row * width);
    }
    data.truncate(spans.len() * width);
}

fn normalise(x: &[f32], w: &[f32], eps: f64, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    let width = w.len();
    by_rows(out, width, |row, out| {
        ops::rms_norm_row(&x[row * width..][..width], w, eps as f32, out)
    });
}

/// Calls `f` with the number and the elements of every row, on several threads where that is worth it.
pub(super) fn by_rows(data: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    /// Elements that a thread takes at once: a microsecond's work, or several.
    const AT_ONCE: usize = 1 << 12;
    let (count, at_once) = (data.len() / width.max(1), AT_ONCE.div_ceil(width.max(1)));
    // SAFETY: each part has rows of its own, and `data` is touched again only when all are done.
    let data = unsafe { Output::shared(data, width) };
    each(count.div_ceil(at_once), rayon::current_num_threads(), |part| {
        for row in part * at_once..((part + 1) * at_once).min(count) {
            f(row, data.part(row, 0, width));
        }
    });
}
