// Attention of single query rows over the paged cache: decoding. Every row reads its own length and no more.
#pragma once
#include "attention.cuh"

#define ATTEND_ROWS_THREADS 128
// Keys that a group of lanes loads before it computes: hides the latency of the memory.
#define KEYS_AHEAD 4

// One block per (row and G query heads that share a kv head, part of the keys). Blocks of one row follow one another:
// their heads lie side by side in the cache.
//
// `lanes` neighbouring threads hold one key, 16 bytes each; a block has 128 / lanes such groups, each with a running
// softmax of the keys it saw. They are merged at the end: within a warp by shuffles, between warps in shared memory.
// - qkv: [rows of the pass, qkv_width], queries first; rows: which of them; out: [rows of the pass, heads head_dim]
// - tables: [sequences, table_stride] cache blocks; sequence: of each row of the pass
// - partial: [list, heads, splits, head_dim + 2] f32, unused where splits is 1: sums, then maximum and weight
// - scale: of the scores, times log2(e)
// Shared memory: 4 G (head_dim + 2) f32.
template <typename T, int G>
__device__ void attend_rows(T *out, float *partial, const T *qkv, const T *keys, const T *values,
                            const uint32_t *rows, const uint32_t *positions, const uint32_t *sequence,
                            const uint32_t *tables, int table_stride, int heads, int kv_heads, int head_dim,
                            int lanes, int window, int splits, float scale) {
    constexpr int VEC = Pack<T>::SIZE;
    DYNAMIC_SHARED(float, shared);
    const int head_groups = heads / G, listed = blockIdx.x / head_groups;
    const int row = rows[listed], head = blockIdx.x % head_groups * G, split = blockIdx.y;
    const int kv_head = head / (heads / kv_heads), kv_width = kv_heads * head_dim;
    const int qkv_width = heads * head_dim + 2 * kv_width;
    const int groups = blockDim.x / lanes, group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    const bool holds = lane * VEC < head_dim;
    const uint32_t *table = tables + (size_t)sequence[row] * table_stride;

    const int position = positions[row], first = first_visible(position, window);
    const int part = (position + splits - first) / splits; // ceil((position + 1 - first) / splits)
    const int begin = first + split * part, end = min(position + 1, begin + part);

    float q[G][VEC], sum[G][VEC], best[G], weight[G];
#pragma unroll
    for (int g = 0; g < G; g++) {
        best[g] = -INFINITY;
        weight[g] = 0;
        Pack<T> p;
        if (holds) p = load_pack(qkv + (size_t)row * qkv_width + (head + g) * head_dim + lane * VEC);
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            q[g][j] = holds ? widen(p.v[j]) * scale : 0.0f;
            sum[g][j] = 0;
        }
    }

    // The same number of rounds for every thread: shuffles need the whole warp.
    for (int round = begin; round < end; round += groups * KEYS_AHEAD) {
        Pack<T> k[KEYS_AHEAD], v[KEYS_AHEAD];
#pragma unroll
        for (int u = 0; u < KEYS_AHEAD; u++) {
            // Behind the last key that one again: a load under a condition would be waited for before the next begins.
            const int key = min(round + u * groups + group, end - 1);
            const size_t at = cache_slot(table, key) * kv_width + kv_head * head_dim + (holds ? lane * VEC : 0);
            k[u] = load_pack(keys + at);
            v[u] = load_pack(values + at);
        }
#pragma unroll
        for (int u = 0; u < KEYS_AHEAD; u++) {
            const bool valid = round + u * groups + group < end;
#pragma unroll
            for (int g = 0; g < G; g++) {
                float score = 0;
                if (valid && holds) {
#pragma unroll
                    for (int j = 0; j < VEC; j++) score += q[g][j] * widen(k[u].v[j]);
                }
                score = sum_lanes(score, lanes);
                if (valid) {
                    const float top = fmaxf(best[g], score);
                    const float old = exp2f(best[g] - top), now = exp2f(score - top);
                    best[g] = top;
                    weight[g] = weight[g] * old + now;
                    if (holds) {
#pragma unroll
                        for (int j = 0; j < VEC; j++) sum[g][j] = sum[g][j] * old + now * widen(v[u].v[j]);
                    }
                }
            }
        }
    }

    // Groups of one warp.
    for (int offset = lanes; offset < 32; offset *= 2) {
#pragma unroll
        for (int g = 0; g < G; g++) {
            const float other = __shfl_xor_sync(FULL_WARP, best[g], offset);
            const float top = fmaxf(best[g], other);
            const float mine = best[g] == -INFINITY ? 0.0f : exp2f(best[g] - top);
            best[g] = top;
            // Each lane scales its own sums to the common maximum, then adds its neighbour's scaled ones.
            weight[g] *= mine;
            weight[g] += __shfl_xor_sync(FULL_WARP, weight[g], offset);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                sum[g][j] *= mine;
                sum[g][j] += __shfl_xor_sync(FULL_WARP, sum[g][j], offset);
            }
        }
    }

    // Warps of the block.
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, entry = head_dim + 2;
    if ((int)(threadIdx.x % 32) < lanes && holds) {
#pragma unroll
        for (int g = 0; g < G; g++) {
            float *to = shared + (warp * G + g) * entry;
            for (int j = 0; j < VEC; j++) to[lane * VEC + j] = sum[g][j];
            if (lane == 0) {
                to[head_dim] = best[g];
                to[head_dim + 1] = weight[g];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < G * head_dim; i += blockDim.x) {
        const int g = i / head_dim, d = i % head_dim;
        float top = -INFINITY, total = 0, mixed = 0;
        for (int w = 0; w < warps; w++) top = fmaxf(top, shared[(w * G + g) * entry + head_dim]);
        for (int w = 0; w < warps; w++) {
            const float *from = shared + (w * G + g) * entry;
            const float factor = from[head_dim] == -INFINITY ? 0.0f : exp2f(from[head_dim] - top);
            total += factor * from[head_dim + 1];
            mixed += factor * from[d];
        }
        if (splits == 1) {
            out[((size_t)row * heads + head + g) * head_dim + d] = narrow<T>(mixed / total);
        } else {
            float *to = partial + (((size_t)listed * heads + head + g) * splits + split) * entry;
            to[d] = mixed;
            if (d == 0) {
                to[head_dim] = top;
                to[head_dim + 1] = total;
            }
        }
    }
}

// Puts the parts of the keys together; grid (list, heads).
template <typename T>
__device__ void merge_splits(T *out, const float *partial, const uint32_t *rows, int heads, int head_dim, int splits) {
    const int head = blockIdx.y, entry = head_dim + 2;
    const float *parts = partial + ((size_t)blockIdx.x * heads + head) * splits * entry;
    float top = -INFINITY;
    for (int s = 0; s < splits; s++) top = fmaxf(top, parts[s * entry + head_dim]);
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float total = 0, mixed = 0;
        for (int s = 0; s < splits; s++) {
            const float *from = parts + s * entry;
            const float factor = from[head_dim] == -INFINITY ? 0.0f : exp2f(from[head_dim] - top);
            total += factor * from[head_dim + 1];
            mixed += factor * from[d];
        }
        out[((size_t)rows[blockIdx.x] * heads + head) * head_dim + d] = narrow<T>(mixed / total);
    }
}

#define ATTEND_ROWS_KERNEL(suffix, T, G)                                                                               \
    extern "C" __global__ void __launch_bounds__(ATTEND_ROWS_THREADS) attend_rows_##suffix##_g##G(                     \
        T *out, float *partial, const T *qkv, const T *keys, const T *values, const uint32_t *rows,                    \
        const uint32_t *positions, const uint32_t *sequence, const uint32_t *tables, int table_stride, int heads,      \
        int kv_heads, int head_dim, int lanes, int window, int splits, float scale) {                                  \
        after_earlier();                                                                                               \
        attend_rows<T, G>(out, partial, qkv, keys, values, rows, positions, sequence, tables, table_stride, heads,     \
                          kv_heads, head_dim, lanes, window, splits, scale);                                           \
    }                                                                                                                  \
    REGISTER_KERNEL(attend_rows_##suffix##_g##G)

// Heads per kv head: 1 (Llama 1 and 2), 4 (Llama 3, Mistral), 7 (Qwen2.5-7B), 8 (Llama 3 70B), 2 (Qwen3 0.6B).
#define ATTEND_ROWS_KERNELS(suffix, T)                                                                                 \
    ATTEND_ROWS_KERNEL(suffix, T, 1)                                                                                   \
    ATTEND_ROWS_KERNEL(suffix, T, 2)                                                                                   \
    ATTEND_ROWS_KERNEL(suffix, T, 4)                                                                                   \
    ATTEND_ROWS_KERNEL(suffix, T, 7)                                                                                   \
    ATTEND_ROWS_KERNEL(suffix, T, 8)                                                                                   \
    extern "C" __global__ void merge_splits_##suffix(T *out, const float *partial, const uint32_t *rows, int heads,    \
                                                     int head_dim, int splits) {                                       \
        after_earlier();                                                                                               \
        merge_splits<T>(out, partial, rows, heads, head_dim, splits);                                                  \
    }                                                                                                                  \
    REGISTER_KERNEL(merge_splits_##suffix)

FOR_EACH_DTYPE(ATTEND_ROWS_KERNELS)
