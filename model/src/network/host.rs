//! A forward pass on the CPU path: slices, panels, and buffers that are kept from pass to pass.

use super::block::Block;
use super::linear::Linear;
use super::{Llama, Segment};
use crate::ModelError;
use crate::cpu::{Attention, HostCache, Output, PackedMatrix, Product, Rows, Span, Workspace, attend, each, multiply};
use crate::lora::{Adapter, LinearKind};
use crate::ops::{self, host_floats};

/// What the layers of one pass share.
pub(super) struct HostPass<'a> {
    /// All new tokens, packed.
    pub tokens: &'a [u32],
    pub spans: &'a [Span<'a>],
    pub adapter: Option<&'a Adapter>,
    /// Of every span: whether the adapter changes it.
    pub adapted: &'a [bool],
}

impl HostPass<'_> {
    /// Empties the rows of `low` that belong to spans without the adapter; `low` has all rows, or each span's last.
    fn drop_unadapted(&self, low: &mut [f32], rank: usize) {
        if self.adapted.iter().all(|adapted| *adapted) {
            return;
        }
        let one_each = low.len() == self.spans.len() * rank;
        for (i, (span, _)) in self
            .spans
            .iter()
            .zip(self.adapted)
            .enumerate()
            .filter(|(_, (_, a))| !**a)
        {
            let rows = if one_each {
                i..i + 1
            } else {
                span.row..span.row + span.rows
            };
            low[rows.start * rank..rows.end * rank].fill(0.0);
        }
    }
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
        for (layer, block) in self.blocks.iter().enumerate() {
            self.attention_host(block, layer, pass, cache, work)?;
            feed_forward(block, layer, pass, work)?;
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
        let Some(head) = self.lm_head.packed() else {
            unreachable!("a model on the CPU path has packed weights");
        };
        logits.resize(pass.spans.len() * self.config.vocab_size, 0.0);
        multiply_into(head, rows(&work.normed, hidden), logits, false);
        Ok(())
    }

    /// `x += attention(norm(x))`.
    fn attention_host(
        &self,
        block: &Block,
        layer: usize,
        pass: &HostPass,
        cache: &mut HostCache,
        work: &mut Workspace,
    ) -> Result<(), ModelError> {
        let (shape, hidden) = (block.shape, self.config.hidden_size);
        normalise(&work.x, &host_floats(&block.input_norm)?, block.eps, &mut work.normed);
        let x = rows(&work.normed, hidden);
        let wanted = [
            (LinearKind::QProj, &mut work.q),
            (LinearKind::KProj, &mut work.k),
            (LinearKind::VProj, &mut work.v),
        ];
        linears(block, layer, pass, x, wanted, &mut work.low)?;
        let norms = block.qk_norms.as_ref();
        let norms = norms.map(|(q, k)| Ok::<_, ModelError>((host_floats(q)?, host_floats(k)?)));
        let norms = norms.transpose()?;
        work.mixed.resize(work.q.len(), 0.0);
        let attention = Attention {
            q: &work.q,
            k: &work.k,
            v: &work.v,
            norms: norms.as_ref().map(|(q, k)| (&**q, &**k)),
            eps: block.eps as f32,
            rope: &self.rope,
            shape,
        };
        attend(&attention, cache, layer, pass.spans, &mut work.mixed);
        if layer + 1 == self.blocks.len() {
            // Behind the last layer the head reads each span's last row alone.
            keep_last_rows(&mut work.x, hidden, pass.spans);
            keep_last_rows(&mut work.mixed, shape.q_width(), pass.spans);
        }
        let x = rows(&work.mixed, shape.q_width());
        add_linear(block, LinearKind::OProj, layer, pass, x, &mut work.x, &mut work.low)
    }
}

/// `x += feed_forward(norm(x))`.
fn feed_forward(block: &Block, layer: usize, pass: &HostPass, work: &mut Workspace) -> Result<(), ModelError> {
    let norm = host_floats(&block.post_attention_norm)?;
    normalise(&work.x, &norm, block.eps, &mut work.normed);
    let x = rows(&work.normed, norm.len());
    let wanted = [
        (LinearKind::GateProj, &mut work.gate),
        (LinearKind::UpProj, &mut work.up),
    ];
    linears(block, layer, pass, x, wanted, &mut work.low)?;
    let width = packed(&block.linears[LinearKind::GateProj as usize]).shape().0;
    let up = &work.up;
    by_rows(&mut work.gate, width, |row, gate| {
        ops::swiglu_in_place(gate, &up[row * width..][..width])
    });
    let x = rows(&work.gate, width);
    add_linear(block, LinearKind::DownProj, layer, pass, x, &mut work.x, &mut work.low)
}

/// Several linear layers of the same input, side by side, each into its own buffer.
fn linears<const N: usize>(
    block: &Block,
    layer: usize,
    pass: &HostPass,
    x: Rows,
    mut wanted: [(LinearKind, &mut Vec<f32>); N],
    low: &mut Vec<f32>,
) -> Result<(), ModelError> {
    let tokens = x.data.len() / x.stride;
    let mut products = Vec::with_capacity(N);
    for (kind, out) in &mut wanted {
        let linear = &block.linears[*kind as usize];
        let matrix = packed(linear);
        let width = matrix.shape().0;
        out.resize(tokens * width, 0.0);
        if let Some(bias) = &linear.bias {
            let bias = host_floats(bias)?;
            out.chunks_exact_mut(width).for_each(|row| row.copy_from_slice(&bias));
        }
        products.push(Product {
            matrix,
            // SAFETY: each product has a buffer of its own, `multiply` shares out its columns, and it is read only when
            // that has returned.
            out: unsafe { Output::shared(out, width) },
            accumulate: linear.bias.is_some(),
        });
    }
    multiply(x, tokens, &products);
    for (kind, out) in wanted {
        add_low_rank(kind, layer, pass, x, out, low)?;
    }
    Ok(())
}

/// `sum += linear(x)`; the layers that end a residual branch have no bias.
fn add_linear(
    block: &Block,
    kind: LinearKind,
    layer: usize,
    pass: &HostPass,
    x: Rows,
    sum: &mut [f32],
    low: &mut Vec<f32>,
) -> Result<(), ModelError> {
    multiply_into(packed(&block.linears[kind as usize]), x, sum, true);
    add_low_rank(kind, layer, pass, x, sum, low)
}

/// `sum += scale * B A x` where the adapter changes this layer.
fn add_low_rank(
    kind: LinearKind,
    layer: usize,
    pass: &HostPass,
    x: Rows,
    sum: &mut [f32],
    low: &mut Vec<f32>,
) -> Result<(), ModelError> {
    let Some((adapter, pair)) = pass.adapter.and_then(|a| Some((a, a.pair(layer, kind)?))) else {
        return Ok(());
    };
    let (pair, tokens) = (pair.packed()?, x.data.len() / x.stride);
    let (rank, _) = pair.a.shape();
    low.resize(tokens * rank, 0.0);
    multiply_into(&pair.a, x, low, false);
    pass.drop_unadapted(low, rank);
    let scale = adapter.config().scale() as f32;
    low.iter_mut().for_each(|v| *v *= scale);
    multiply_into(&pair.b, rows(low, rank), sum, true);
    Ok(())
}

/// `out = x wᵀ`, or `out += x wᵀ`.
fn multiply_into(matrix: &PackedMatrix, x: Rows, out: &mut [f32], accumulate: bool) {
    let product = Product {
        matrix,
        // SAFETY: `multiply` shares out columns, and `out` is read only when it has returned.
        out: unsafe { Output::shared(out, matrix.shape().0) },
        accumulate,
    };
    multiply(x, x.data.len() / x.stride, &[product]);
}

/// Moves each span's last row to the front and drops the others.
fn keep_last_rows(data: &mut Vec<f32>, width: usize, spans: &[Span]) {
    for (row, span) in spans.iter().enumerate() {
        let last = span.row + span.rows - 1;
        data.copy_within(last * width..(last + 1) * width, row * width);
    }
    data.truncate(spans.len() * width);
}

fn packed(linear: &Linear) -> &PackedMatrix {
    match linear.weight.packed() {
        Some(weight) => weight,
        None => unreachable!("a model on the CPU path has packed weights"),
    }
}

fn rows(data: &[f32], stride: usize) -> Rows<'_> {
    Rows { data, stride }
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
