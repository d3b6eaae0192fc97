//! Buffers of a forward pass.

/// Kept from one pass to the next, so that a decode step allocates no activations.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// The residual stream, `[tokens, hidden]`.
    pub x: Vec<f32>,
    /// It normalised.
    pub normed: Vec<f32>,
    /// Queries, `[tokens, heads * head_dim]`.
    pub q: Vec<f32>,
    /// Keys, `[tokens, kv_heads * head_dim]`.
    pub k: Vec<f32>,
    /// Values, as the keys.
    pub v: Vec<f32>,
    /// What attention gives, as the queries.
    pub mixed: Vec<f32>,
    /// The gate and then the activation of the feed-forward layer, `[tokens, intermediate]`.
    pub gate: Vec<f32>,
    /// Its other half.
    pub up: Vec<f32>,
    /// The inner side of a low-rank term, `[tokens, rank]`.
    pub low: Vec<f32>,
}
