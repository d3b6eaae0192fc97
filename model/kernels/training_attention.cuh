// Attention of whole sequences that lie packed, forward and backward, in f32 (training_attention_mma.cuh has the
// others). No matrix of scores is ever in memory: the forward pass notes one number per row and head, and the backward
// pass computes the weights again from it (FlashAttention-2, arXiv 2307.08691). Two backward kernels, one that owns
// queries and one that owns keys, so that no sum is shared between blocks and its order is always the same.
#pragma once
#include "attention.cuh"

#define PACKED_THREADS 128
// Rows that a block owns, and rows of the other side that it takes at once.
#define OWN_ROWS 32
#define OTHER_ROWS 16

// Where the rows of a pass lie. Words of tiles: [tiles, 4]. Of queries: the first, how many, the packed row of their
// sequence's first token, unused. Of keys: the packed row of the first, how many, the first query that sees one of
// them, the query behind the last.
// - q and whatever is like it: [queries, heads D]; k: rows of [kv_heads D], k_stride apart, of all tokens; v, and the
//   gradients of both: kv_stride apart
// - query_positions: [queries]; positions: [tokens]
// - log_sums: [queries, heads] f32, of base two: the weight of a score s is exp2(s - log_sum)
// - scale: of the scores; the kernels multiply by log2(e) themselves
template <typename T> struct PackedInputs {
    const T *q, *k, *v;
    const uint32_t *tiles, *query_positions, *positions;
    int heads, kv_heads, k_stride, kv_stride, window;
    float scale;
};

#define LOG2_E 1.4426950408889634f

// Copies rows of D elements, `stride` apart, into shared memory, `count` of them and then zeros.
template <typename T, int D, int ROWS>
__device__ inline void load_rows(float *to, const T *from, size_t stride, int count) {
    constexpr int VEC = Pack<T>::SIZE;
    for (int i = threadIdx.x * VEC; i < ROWS * D; i += blockDim.x * VEC) {
        const int row = i / D, d = i % D;
        Pack<T> p;
        if (row < count) p = load_pack(from + row * stride + d);
        for (int j = 0; j < VEC; j++) to[row * (D + 1) + d + j] = row < count ? widen(p.v[j]) : 0.0f;
    }
}

// own[row] . other[lane + 4 j] for the four threads that share a row.
template <int D> __device__ inline void row_products(float *sums, const float *own, const float *other, int lane) {
#pragma unroll
    for (int j = 0; j < OTHER_ROWS / 4; j++) sums[j] = 0;
    for (int d = 0; d < D; d++) {
        const float x = own[d];
#pragma unroll
        for (int j = 0; j < OTHER_ROWS / 4; j++) sums[j] += x * other[(lane + 4 * j) * (D + 1) + d];
    }
}

// sum[j] += weights[i] * rows[i][lane + 4 j], over the other side's rows.
template <int D>
__device__ inline void add_mixture(float *sum, const float *weights, const float *rows, int lane) {
    for (int i = 0; i < OTHER_ROWS; i++) {
        const float w = weights[i];
#pragma unroll
        for (int j = 0; j < D / 4; j++) sum[j] += w * rows[i * (D + 1) + lane + 4 * j];
    }
}

// Shared memory of all three kernels: up to 2 OWN_ROWS (D + 1) + OTHER_ROWS (D + 1) + 2 OWN_ROWS (OTHER_ROWS + 1) f32.

// One block per (tile of queries, head); four threads share a query.
template <typename T, int D>
__device__ void packed_forward(const PackedInputs<T> in, T *out, float *log_sums) {
    constexpr int PITCH = D + 1;
    DYNAMIC_SHARED(float, shared);
    float *queries = shared, *other = queries + OWN_ROWS * PITCH, *weights = other + OTHER_ROWS * PITCH;
    const uint32_t *tile = in.tiles + 4 * blockIdx.x;
    const int first = tile[0], count = tile[1], head = blockIdx.y, kv_head = head / (in.heads / in.kv_heads);
    const size_t sequence = tile[2], q_stride = (size_t)in.heads * D;
    const T *keys = in.k + sequence * in.k_stride + kv_head * D, *values = in.v + sequence * in.kv_stride + kv_head * D;
    const int own = threadIdx.x / 4, lane = threadIdx.x % 4;
    load_rows<T, D, OWN_ROWS>(queries, in.q + first * q_stride + head * D, q_stride, count);

    const int position = own < count ? (int)in.query_positions[first + own] : -1;
    const int visible = first_visible(position, in.window), last = in.query_positions[first + count - 1];
    float best = -INFINITY, weight = 0, sum[D / 4];
#pragma unroll
    for (int j = 0; j < D / 4; j++) sum[j] = 0;
    for (int begin = first_visible(in.query_positions[first], in.window) / OTHER_ROWS * OTHER_ROWS; begin <= last;
         begin += OTHER_ROWS) {
        const int there = min(OTHER_ROWS, last + 1 - begin);
        __syncthreads(); // The values of the round before have been read.
        load_rows<T, D, OTHER_ROWS>(other, keys + (size_t)begin * in.k_stride, in.k_stride, there);
        __syncthreads();
        float scores[OTHER_ROWS / 4];
        row_products<D>(scores, queries + own * PITCH, other, lane);
        float top = best;
#pragma unroll
        for (int j = 0; j < OTHER_ROWS / 4; j++) {
            const int key = begin + lane + 4 * j;
            scores[j] = key > position || key < visible ? -INFINITY : scores[j] * in.scale * LOG2_E;
            top = fmaxf(top, scores[j]);
        }
        top = max_lanes(top, 4);
        const float old = best == -INFINITY ? 0.0f : exp2f(best - top);
        float added = 0;
#pragma unroll
        for (int j = 0; j < OTHER_ROWS / 4; j++) {
            const float w = scores[j] == -INFINITY ? 0.0f : exp2f(scores[j] - top);
            weights[own * (OTHER_ROWS + 1) + lane + 4 * j] = w;
            added += w;
        }
        best = top;
        weight = weight * old + sum_lanes(added, 4);
        __syncthreads(); // The keys have been read; the weights are written.
        load_rows<T, D, OTHER_ROWS>(other, values + (size_t)begin * in.kv_stride, in.kv_stride, there);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < D / 4; j++) sum[j] *= old;
        add_mixture<D>(sum, weights + own * (OTHER_ROWS + 1), other, lane);
    }
    if (own < count) {
        T *to = out + (first + own) * q_stride + head * D;
#pragma unroll
        for (int j = 0; j < D / 4; j++) to[lane + 4 * j] = narrow<T>(sum[j] / weight);
        if (lane == 0) log_sums[(size_t)(first + own) * in.heads + head] = best + log2f(weight);
    }
}

// deltas[r, h] = grad[r, h] . out[r, h]; one warp per row and head.
template <typename T>
__device__ void packed_deltas(float *deltas, const T *grad, const T *out, int heads, int head_dim) {
    const int lane = threadIdx.x % 32, head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= heads) return; // The whole warp.
    const size_t at = (size_t)blockIdx.x * heads + head;
    float sum = 0;
    for (int i = lane; i < head_dim; i += 32) sum += widen(grad[at * head_dim + i]) * widen(out[at * head_dim + i]);
    sum = sum_lanes(sum, 32);
    if (lane == 0) deltas[at] = sum;
}

// The queries' gradients; as packed_forward.
template <typename T, int D>
__device__ void packed_grad_queries(const PackedInputs<T> in, T *dq, const T *grad, const float *log_sums,
                                    const float *deltas) {
    constexpr int PITCH = D + 1;
    DYNAMIC_SHARED(float, shared);
    float *queries = shared, *grads = queries + OWN_ROWS * PITCH, *other = grads + OWN_ROWS * PITCH;
    float *dscores = other + OTHER_ROWS * PITCH;
    const uint32_t *tile = in.tiles + 4 * blockIdx.x;
    const int first = tile[0], count = tile[1], head = blockIdx.y, kv_head = head / (in.heads / in.kv_heads);
    const size_t sequence = tile[2], q_stride = (size_t)in.heads * D;
    const T *keys = in.k + sequence * in.k_stride + kv_head * D, *values = in.v + sequence * in.kv_stride + kv_head * D;
    const int own = threadIdx.x / 4, lane = threadIdx.x % 4;
    load_rows<T, D, OWN_ROWS>(queries, in.q + first * q_stride + head * D, q_stride, count);
    load_rows<T, D, OWN_ROWS>(grads, grad + first * q_stride + head * D, q_stride, count);

    const int position = own < count ? (int)in.query_positions[first + own] : -1;
    const int visible = first_visible(position, in.window), last = in.query_positions[first + count - 1];
    const size_t at = (size_t)(first + own) * in.heads + head;
    const float log_sum = own < count ? log_sums[at] : 0.0f, delta = own < count ? deltas[at] : 0.0f;
    float sum[D / 4];
#pragma unroll
    for (int j = 0; j < D / 4; j++) sum[j] = 0;
    for (int begin = first_visible(in.query_positions[first], in.window) / OTHER_ROWS * OTHER_ROWS; begin <= last;
         begin += OTHER_ROWS) {
        const int there = min(OTHER_ROWS, last + 1 - begin);
        __syncthreads(); // The keys of the round before have been read.
        load_rows<T, D, OTHER_ROWS>(other, values + (size_t)begin * in.kv_stride, in.kv_stride, there);
        __syncthreads();
        float dweights[OTHER_ROWS / 4], scores[OTHER_ROWS / 4];
        row_products<D>(dweights, grads + own * PITCH, other, lane);
        __syncthreads();
        load_rows<T, D, OTHER_ROWS>(other, keys + (size_t)begin * in.k_stride, in.k_stride, there);
        __syncthreads();
        row_products<D>(scores, queries + own * PITCH, other, lane);
#pragma unroll
        for (int j = 0; j < OTHER_ROWS / 4; j++) {
            const int key = begin + lane + 4 * j;
            const bool seen = key <= position && key >= visible;
            const float w = seen ? exp2f(scores[j] * in.scale * LOG2_E - log_sum) : 0.0f;
            dscores[own * (OTHER_ROWS + 1) + lane + 4 * j] = w * (dweights[j] - delta);
        }
        __syncthreads();
        add_mixture<D>(sum, dscores + own * (OTHER_ROWS + 1), other, lane);
    }
    if (own < count) {
        T *to = dq + (first + own) * q_stride + head * D;
#pragma unroll
        for (int j = 0; j < D / 4; j++) to[lane + 4 * j] = narrow<T>(sum[j] * in.scale);
    }
}

// The gradients of keys and values; one block per (tile of keys, kv head), which goes through the query heads and the
// queries that see the keys. Four threads share a key.
template <typename T, int D>
__device__ void packed_grad_keys(const PackedInputs<T> in, T *dk, T *dv, const T *grad, const float *log_sums,
                                 const float *deltas) {
    constexpr int PITCH = D + 1;
    DYNAMIC_SHARED(float, shared);
    float *keys = shared, *values = keys + OWN_ROWS * PITCH, *other = values + OWN_ROWS * PITCH;
    float *weights = other + OTHER_ROWS * PITCH, *dscores = weights + OWN_ROWS * (OTHER_ROWS + 1);
    const uint32_t *tile = in.tiles + 4 * blockIdx.x;
    const int count = tile[1], query_begin = tile[2], query_end = tile[3], kv_head = blockIdx.y;
    const size_t first = tile[0], q_stride = (size_t)in.heads * D;
    const int group = in.heads / in.kv_heads, own = threadIdx.x / 4, lane = threadIdx.x % 4;
    load_rows<T, D, OWN_ROWS>(keys, in.k + first * in.k_stride + kv_head * D, in.k_stride, count);
    load_rows<T, D, OWN_ROWS>(values, in.v + first * in.kv_stride + kv_head * D, in.kv_stride, count);
    // A key that is not there is behind every query.
    const int position = own < count ? (int)in.positions[first + own] : 0x7fffffff;
    float dkey[D / 4], dvalue[D / 4];
#pragma unroll
    for (int j = 0; j < D / 4; j++) dkey[j] = dvalue[j] = 0;

    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int begin = query_begin; begin < query_end; begin += OTHER_ROWS) {
            const int there = min(OTHER_ROWS, query_end - begin);
            const T *queries = in.q + (size_t)begin * q_stride + head * D;
            float scores[OTHER_ROWS / 4], dweights[OTHER_ROWS / 4];
            __syncthreads(); // The queries of the round before have been read.
            load_rows<T, D, OTHER_ROWS>(other, queries, q_stride, there);
            __syncthreads();
            row_products<D>(scores, keys + own * PITCH, other, lane);
            __syncthreads();
            load_rows<T, D, OTHER_ROWS>(other, grad + (size_t)begin * q_stride + head * D, q_stride, there);
            __syncthreads();
            row_products<D>(dweights, values + own * PITCH, other, lane);
#pragma unroll
            for (int j = 0; j < OTHER_ROWS / 4; j++) {
                const int query = begin + lane + 4 * j, to = own * (OTHER_ROWS + 1) + lane + 4 * j;
                float w = 0, delta = 0;
                if (query < query_end) {
                    const int asks = in.query_positions[query];
                    const size_t at = (size_t)query * in.heads + head;
                    if (position <= asks && position >= first_visible(asks, in.window))
                        w = exp2f(scores[j] * in.scale * LOG2_E - log_sums[at]);
                    delta = deltas[at];
                }
                weights[to] = w;
                dscores[to] = w * (dweights[j] - delta);
            }
            __syncthreads();
            add_mixture<D>(dvalue, weights + own * (OTHER_ROWS + 1), other, lane);
            __syncthreads();
            load_rows<T, D, OTHER_ROWS>(other, queries, q_stride, there);
            __syncthreads();
            add_mixture<D>(dkey, dscores + own * (OTHER_ROWS + 1), other, lane);
        }
    }
    if (own < count) {
        const size_t at = (first + own) * in.kv_stride + kv_head * D;
#pragma unroll
        for (int j = 0; j < D / 4; j++) {
            dk[at + lane + 4 * j] = narrow<T>(dkey[j] * in.scale);
            dv[at + lane + 4 * j] = narrow<T>(dvalue[j]);
        }
    }
}

// WAY is empty, or _mma for training_attention_mma.cuh.
#define PACKED_INPUTS(T)                                                                                               \
    const T *q, const T *k, const T *v, const uint32_t *tiles, const uint32_t *query_positions,                        \
        const uint32_t *positions, int heads, int kv_heads, int k_stride, int kv_stride, int window, float scale

#define PACKED_KERNELS_OF(suffix, T, D, WAY)                                                                           \
    extern "C" __global__ void __launch_bounds__(PACKED_THREADS)                                                       \
        packed_forward_##suffix##_d##D(PACKED_INPUTS(T), T *out, float *log_sums) {                                    \
        after_earlier();                                                                                               \
        packed_forward##WAY<T, D>({q, k, v, tiles, query_positions, positions, heads, kv_heads, k_stride, kv_stride,   \
                                   window, scale},                                                                     \
                                  out, log_sums);                                                                      \
    }                                                                                                                  \
    REGISTER_KERNEL(packed_forward_##suffix##_d##D)                                                                    \
    extern "C" __global__ void __launch_bounds__(PACKED_THREADS)                                                       \
        packed_grad_queries_##suffix##_d##D(PACKED_INPUTS(T), T *dq, const T *grad, const float *log_sums,             \
                                            const float *deltas) {                                                     \
        after_earlier();                                                                                               \
        packed_grad_queries##WAY<T, D>({q, k, v, tiles, query_positions, positions, heads, kv_heads, k_stride,         \
                                        kv_stride, window, scale},                                                     \
                                       dq, grad, log_sums, deltas);                                                    \
    }                                                                                                                  \
    REGISTER_KERNEL(packed_grad_queries_##suffix##_d##D)                                                               \
    extern "C" __global__ void __launch_bounds__(PACKED_THREADS)                                                       \
        packed_grad_keys_##suffix##_d##D(PACKED_INPUTS(T), T *dk, T *dv, const T *grad, const float *log_sums,         \
                                         const float *deltas) {                                                        \
        after_earlier();                                                                                               \
        packed_grad_keys##WAY<T, D>({q, k, v, tiles, query_positions, positions, heads, kv_heads, k_stride, kv_stride, \
                                     window, scale},                                                                   \
                                    dk, dv, grad, log_sums, deltas);                                                   \
    }                                                                                                                  \
    REGISTER_KERNEL(packed_grad_keys_##suffix##_d##D)

#define PACKED_KERNELS(suffix, T, WAY)                                                                                 \
    PACKED_KERNELS_OF(suffix, T, 16, WAY)                                                                              \
    PACKED_KERNELS_OF(suffix, T, 32, WAY)                                                                              \
    PACKED_KERNELS_OF(suffix, T, 64, WAY)                                                                              \
    PACKED_KERNELS_OF(suffix, T, 80, WAY)                                                                              \
    PACKED_KERNELS_OF(suffix, T, 96, WAY)                                                                              \
    PACKED_KERNELS_OF(suffix, T, 128, WAY)

PACKED_KERNELS(f32, float, )
// The heads of very small models.
PACKED_KERNELS_OF(f32, float, 8, )
PACKED_KERNELS_OF(f32, float, 12, )

#define PACKED_DELTAS(suffix, T)                                                                                       \
    extern "C" __global__ void packed_deltas_##suffix(float *deltas, const T *grad, const T *out, int heads,           \
                                                      int head_dim) {                                                  \
        after_earlier();                                                                                               \
        packed_deltas<T>(deltas, grad, out, heads, head_dim);                                                          \
    }                                                                                                                  \
    REGISTER_KERNEL(packed_deltas_##suffix)

FOR_EACH_DTYPE(PACKED_DELTAS)
