// Attention of prompts in f32, which tensor cores do not take: tiles of queries against tiles of keys from the cache, with
// a running softmax, so that no matrix of scores is ever in memory. The causal mask and the window are positions compared.
#pragma once
#include "attention.cuh"

#define TILE 32
#define ATTEND_TILES_THREADS 128

// Copies TILE keys or values of one head, from position `begin` on, into shared memory; 0 behind position `last`.
template <typename T, int D>
__device__ inline void load_tile(float *tile, const T *cache, const uint32_t *table, int begin, int last, int kv_width,
                                 int kv_head) {
    constexpr int VEC = Pack<T>::SIZE;
    for (int i = threadIdx.x * VEC; i < TILE * D; i += blockDim.x * VEC) {
        const int key = i / D, d = i % D;
        Pack<T> p;
        const bool there = begin + key <= last;
        if (there) p = load_pack(cache + cache_slot(table, begin + key) * kv_width + kv_head * D + d);
        for (int j = 0; j < VEC; j++) tile[key * (D + 1) + d + j] = there ? widen(p.v[j]) : 0.0f;
    }
}

// One block per (tile of up to TILE queries of one sequence, head). Four threads share a query: each has the scores of
// every fourth key, and every fourth element of the output.
// - tile_rows: first row of each tile; tile_counts: its queries, whose positions follow one another
// - the others as attend_rows has them
// Shared memory: 2 TILE (D + 1) + TILE (TILE + 1) f32.
template <typename T, int D>
__device__ void attend_tiles(T *out, const T *qkv, const T *keys, const T *values, const uint32_t *tile_rows,
                             const uint32_t *tile_counts, const uint32_t *positions, const uint32_t *sequence,
                             const uint32_t *tables, int table_stride, int heads, int kv_heads, int window,
                             float scale) {
    constexpr int VEC = Pack<T>::SIZE, PITCH = D + 1, OWN = D / 4;
    DYNAMIC_SHARED(float, shared);
    float *queries = shared, *tile = queries + TILE * PITCH, *weights = tile + TILE * PITCH;
    const int row = tile_rows[blockIdx.x], count = tile_counts[blockIdx.x], head = blockIdx.y;
    const int kv_head = head / (heads / kv_heads), kv_width = kv_heads * D;
    const int qkv_width = heads * D + 2 * kv_width;
    const uint32_t *table = tables + (size_t)sequence[row] * table_stride;
    const int start = positions[row], last = start + count - 1;

    for (int i = threadIdx.x * VEC; i < TILE * D; i += blockDim.x * VEC) {
        const int query = i / D, d = i % D;
        Pack<T> p;
        if (query < count) p = load_pack(qkv + (size_t)(row + query) * qkv_width + head * D + d);
        for (int j = 0; j < VEC; j++) queries[query * PITCH + d + j] = query < count ? widen(p.v[j]) * scale : 0.0f;
    }

    const int query = threadIdx.x / 4, lane = threadIdx.x % 4, position = start + query;
    const int visible = first_visible(position, window);
    float best = -INFINITY, weight = 0, sum[OWN];
#pragma unroll
    for (int j = 0; j < OWN; j++) sum[j] = 0;

    for (int begin = first_visible(start, window) / TILE * TILE; begin <= last; begin += TILE) {
        __syncthreads(); // The values of the round before have been read.
        load_tile<T, D>(tile, keys, table, begin, last, kv_width, kv_head);
        __syncthreads();
        float scores[TILE / 4];
#pragma unroll
        for (int j = 0; j < TILE / 4; j++) scores[j] = 0;
        for (int d = 0; d < D; d++) {
            const float q = queries[query * PITCH + d];
#pragma unroll
            for (int j = 0; j < TILE / 4; j++) scores[j] += q * tile[(lane + 4 * j) * PITCH + d];
        }
        float top = best;
#pragma unroll
        for (int j = 0; j < TILE / 4; j++) {
            const int key = begin + lane + 4 * j;
            if (query >= count || key > position || key < visible) scores[j] = -INFINITY;
            top = fmaxf(top, scores[j]);
        }
        top = max_lanes(top, 4);
        const float old = best == -INFINITY ? 0.0f : exp2f(best - top);
        float added = 0;
#pragma unroll
        for (int j = 0; j < TILE / 4; j++) {
            const float w = scores[j] == -INFINITY ? 0.0f : exp2f(scores[j] - top);
            weights[query * (TILE + 1) + lane + 4 * j] = w;
            added += w;
        }
        best = top;
        weight = weight * old + sum_lanes(added, 4);
        __syncthreads(); // The keys have been read; the weights are written.
        load_tile<T, D>(tile, values, table, begin, last, kv_width, kv_head);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < OWN; j++) sum[j] *= old;
        for (int key = 0; key < TILE; key++) {
            const float w = weights[query * (TILE + 1) + key];
#pragma unroll
            for (int j = 0; j < OWN; j++) sum[j] += w * tile[key * PITCH + lane + 4 * j];
        }
    }
    if (query < count) {
        T *to = out + ((size_t)(row + query) * heads + head) * D;
#pragma unroll
        for (int j = 0; j < OWN; j++) to[lane + 4 * j] = narrow<T>(sum[j] / weight);
    }
}

#define ATTEND_TILES_KERNEL(suffix, T, D)                                                                              \
    extern "C" __global__ void __launch_bounds__(ATTEND_TILES_THREADS) attend_tiles_##suffix##_d##D(                   \
        T *out, const T *qkv, const T *keys, const T *values, const uint32_t *tile_rows, const uint32_t *tile_counts,  \
        const uint32_t *positions, const uint32_t *sequence, const uint32_t *tables, int table_stride, int heads,      \
        int kv_heads, int window, float scale) {                                                                       \
        after_earlier();                                                                                               \
        attend_tiles<T, D>(out, qkv, keys, values, tile_rows, tile_counts, positions, sequence, tables, table_stride,  \
                           heads, kv_heads, window, scale);                                                            \
    }                                                                                                                  \
    REGISTER_KERNEL(attend_tiles_##suffix##_d##D)

#define ATTEND_TILES_KERNELS(suffix, T)  \
    ATTEND_TILES_KERNEL(suffix, T, 16)   \
    ATTEND_TILES_KERNEL(suffix, T, 32)   \
    ATTEND_TILES_KERNEL(suffix, T, 64)   \
    ATTEND_TILES_KERNEL(suffix, T, 80)   \
    ATTEND_TILES_KERNEL(suffix, T, 96)   \
    ATTEND_TILES_KERNEL(suffix, T, 128)

ATTEND_TILES_KERNELS(f32, float)
