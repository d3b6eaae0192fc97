// Attention of prompts on tensor cores, bf16 and f16: tiles of queries against tiles of keys with a running softmax in
// registers (FlashAttention-2, arXiv:2307.08691). Neither scores nor weights are ever in memory. Loads of the next keys
// and values run beside the products of these.
#pragma once
#include "attention.cuh"
#include "mma.cuh"

// Queries of a block, 16 of each warp; `MMA_TILE` in inputs.rs.
#define MMA_QUERIES 64
#define MMA_KEYS 64
#define MMA_THREADS 128

// A warp's 16 queries: the running softmax of two rows per lane, `group` and `group` + 8, and their part of the output.
template <int D> struct Running {
    // Scores' maximum and sum of weights, each lane's own part of the sum.
    float best[2], weight[2];
    float sum[D / 8][4];
};

// Begins to copy MMA_KEYS keys or values of one head, from position `begin` on; zeros behind position `last`.
template <typename T, int D>
__device__ inline void copy_cached(Tile<T, D> tile, const T *cache, const uint32_t *table, int begin, int last,
                                   int kv_width) {
    constexpr int CHUNKS = D / 8, COPIES = MMA_KEYS * CHUNKS / MMA_THREADS;
    static_assert(MMA_KEYS * CHUNKS % MMA_THREADS == 0, "each thread copies as much");
    // All of the table first: else each copy would wait for its own entry.
    size_t slots[COPIES];
#pragma unroll
    for (int u = 0; u < COPIES; u++)
        slots[u] = cache_slot(table, min(begin + (int)(threadIdx.x + u * MMA_THREADS) / CHUNKS, last));
#pragma unroll
    for (int u = 0; u < COPIES; u++) {
        const int i = threadIdx.x + u * MMA_THREADS, key = i / CHUNKS, chunk = i % CHUNKS;
        // Values behind the last are multiplied by 0: they must be numbers.
        copy_async(tile.chunk(key, chunk), cache + slots[u] * kv_width + chunk * 8, begin + key <= last);
    }
}

// Scores of a warp's queries and MMA_KEYS keys: q kᵀ.
template <typename T, int D>
__device__ inline void score(float (&scores)[MMA_KEYS / 8][4], const uint32_t (&q)[D / 16][4], Tile<T, D> keys) {
#pragma unroll
    for (int n = 0; n < MMA_KEYS / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) scores[n][c] = 0;
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
#pragma unroll
        for (int n = 0; n < MMA_KEYS / 16; n++) {
            uint32_t k[4];
            keys.load_b_of_rows(k, n * 16, d * 16);
            mma_16x8x16<T>(scores[2 * n], q[d], k[0], k[1]);
            mma_16x8x16<T>(scores[2 * n + 1], q[d], k[2], k[3]);
        }
    }
}

// Hides what a query does not see: later keys, and those before the window.
__device__ inline void hide(float (&scores)[MMA_KEYS / 8][4], int begin, int position, int window) {
    const int column = begin + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < MMA_KEYS / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int key = column + 8 * n + c % 2, of = position + 8 * (c / 2);
            if (key > of || key < first_visible(of, window)) scores[n][c] = -INFINITY;
        }
}

// Turns scores into weights, scales what was summed before to the new maximum.
template <int D>
__device__ inline void soften(float (&scores)[MMA_KEYS / 8][4], Running<D> &running, float scale) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float top = running.best[row];
#pragma unroll
        for (int n = 0; n < MMA_KEYS / 8; n++) top = fmaxf(top, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
        top = max_lanes(top, 4);
        // A row that has seen nothing yet keeps nothing: without it, infinity minus infinity.
        const float at = top == -INFINITY ? 0.0f : top * scale;
        const float old = exp2f(running.best[row] * scale - at);
        float added = 0;
#pragma unroll
        for (int n = 0; n < MMA_KEYS / 8; n++)
#pragma unroll
            for (int c = 2 * row; c < 2 * row + 2; c++) {
                scores[n][c] = exp2f(scores[n][c] * scale - at);
                added += scores[n][c];
            }
        running.best[row] = top;
        running.weight[row] = running.weight[row] * old + added;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            running.sum[n][2 * row] *= old;
            running.sum[n][2 * row + 1] *= old;
        }
    }
}

// sum += weights values.
template <typename T, int D>
__device__ inline void mix(Running<D> &running, const float (&weights)[MMA_KEYS / 8][4], Tile<T, D> values) {
#pragma unroll
    for (int k = 0; k < MMA_KEYS / 16; k++) {
        const float(&low)[4] = weights[2 * k], (&high)[4] = weights[2 * k + 1];
        const uint32_t w[4] = {pack_pair<T>(low[0], low[1]), pack_pair<T>(low[2], low[3]), pack_pair<T>(high[0], high[1]),
                               pack_pair<T>(high[2], high[3])};
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            uint32_t v[4];
            values.load_b_of_columns(v, k * 16, d * 16);
            mma_16x8x16<T>(running.sum[2 * d], w, v[0], v[1]);
            mma_16x8x16<T>(running.sum[2 * d + 1], w, v[2], v[3]);
        }
    }
}

// One block per (tile of up to MMA_QUERIES queries of one sequence, head); arguments as attend_tiles has them.
// Shared memory: MMA_QUERIES + 4 MMA_KEYS rows of D elements of T.
template <typename T, int D>
__device__ void attend_tiles_mma(T *out, const T *qkv, const T *keys, const T *values, const uint32_t *tile_rows,
                                 const uint32_t *tile_counts, const uint32_t *positions, const uint32_t *sequence,
                                 const uint32_t *tables, int table_stride, int heads, int kv_heads, int window,
                                 float scale) {
    constexpr int CHUNKS = D / 8;
    DYNAMIC_SHARED(T, shared);
    const Tile<T, D> queries = {shared};
    const auto key_tile = [&](int i) { return Tile<T, D>{shared + (MMA_QUERIES + i % 2 * MMA_KEYS) * D}; };
    const auto value_tile = [&](int i) { return Tile<T, D>{shared + (MMA_QUERIES + (2 + i % 2) * MMA_KEYS) * D}; };
    const int row = tile_rows[blockIdx.x], count = tile_counts[blockIdx.x], head = blockIdx.y;
    const int kv_head = head / (heads / kv_heads), kv_width = kv_heads * D;
    const int qkv_width = heads * D + 2 * kv_width;
    const uint32_t *table = tables + (size_t)sequence[row] * table_stride;
    const int start = positions[row], last = start + count - 1;
    const int first = first_visible(start, window) / BLOCK_TOKENS * BLOCK_TOKENS;
    const int rounds = (last - first) / MMA_KEYS + 1;
    keys += kv_head * D;
    values += kv_head * D;

    for (int i = threadIdx.x; i < MMA_QUERIES * CHUNKS; i += MMA_THREADS) {
        const int query = i / CHUNKS, chunk = i % CHUNKS;
        const bool there = query < count;
        copy_async(queries.chunk(query, chunk), qkv + (size_t)(row + (there ? query : 0)) * qkv_width + head * D + chunk * 8,
                   there);
    }
    copy_cached<T, D>(key_tile(0), keys, table, first, last, kv_width);
    commit_copies();
    copy_cached<T, D>(value_tile(0), values, table, first, last, kv_width);
    commit_copies();

    const int own = threadIdx.x / 32 * 16; // The warp's first query; a lane's is `group` behind it.
    const int group = threadIdx.x % 32 / 4, position = start + own + group;
    uint32_t q[D / 16][4];
    Running<D> running;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        running.best[r] = -INFINITY;
        running.weight[r] = 0;
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) running.sum[n][c] = 0;

    for (int i = 0; i < rounds; i++) {
        const int begin = first + i * MMA_KEYS;
        // A warp works on what one of its queries sees. The barriers and copies are everybody's.
        const bool sees = own < count && begin <= start + own + 15 &&
                          begin + MMA_KEYS > first_visible(start + own, window);
        float scores[MMA_KEYS / 8][4];
        wait_for_copies<1>(); // The keys; the values may be on their way.
        __syncthreads();      // Everybody's keys are there, and the keys of the round before have been read.
        if (i == 0) {
#pragma unroll
            for (int d = 0; d < D / 16; d++) queries.load_a(q[d], own, d * 16);
        }
        // Behind the last keys the group is empty, for the count of groups.
        const bool more = i + 1 < rounds;
        if (more) copy_cached<T, D>(key_tile(i + 1), keys, table, begin + MMA_KEYS, last, kv_width);
        commit_copies();
        if (sees) {
            score<T, D>(scores, q, key_tile(i));
            const bool partial = begin + MMA_KEYS - 1 > start + own || begin < first_visible(start + own + 15, window);
            if (partial) hide(scores, begin, position, window);
            soften<D>(scores, running, scale);
        }
        wait_for_copies<1>(); // The values; the next keys may be on their way.
        __syncthreads();
        if (more) copy_cached<T, D>(value_tile(i + 1), values, table, begin + MMA_KEYS, last, kv_width);
        commit_copies();
        if (sees) mix<T, D>(running, scores, value_tile(i));
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float inverse = 1.0f / sum_lanes(running.weight[r], 4);
        const int query = own + group + 8 * r;
        if (query >= count) continue;
        T *to = out + ((size_t)(row + query) * heads + head) * D + 2 * (threadIdx.x % 4);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const uint32_t pair = pack_pair<T>(running.sum[n][2 * r] * inverse, running.sum[n][2 * r + 1] * inverse);
            *reinterpret_cast<uint32_t *>(to + n * 8) = pair;
        }
    }
}

#define ATTEND_TILES_MMA_KERNEL(suffix, T, D)                                                                          \
    extern "C" __global__ void __launch_bounds__(MMA_THREADS) attend_tiles_##suffix##_d##D(                            \
        T *out, const T *qkv, const T *keys, const T *values, const uint32_t *tile_rows, const uint32_t *tile_counts,  \
        const uint32_t *positions, const uint32_t *sequence, const uint32_t *tables, int table_stride, int heads,      \
        int kv_heads, int window, float scale) {                                                                       \
        after_earlier();                                                                                               \
        attend_tiles_mma<T, D>(out, qkv, keys, values, tile_rows, tile_counts, positions, sequence, tables,            \
                               table_stride, heads, kv_heads, window, scale);                                          \
    }                                                                                                                  \
    REGISTER_KERNEL(attend_tiles_##suffix##_d##D)

#define ATTEND_TILES_MMA_KERNELS(suffix, T)  \
    ATTEND_TILES_MMA_KERNEL(suffix, T, 16)   \
    ATTEND_TILES_MMA_KERNEL(suffix, T, 32)   \
    ATTEND_TILES_MMA_KERNEL(suffix, T, 64)   \
    ATTEND_TILES_MMA_KERNEL(suffix, T, 80)   \
    ATTEND_TILES_MMA_KERNEL(suffix, T, 96)   \
    ATTEND_TILES_MMA_KERNEL(suffix, T, 128)

FOR_EACH_HALF(ATTEND_TILES_MMA_KERNELS)
