// training_attention.cuh for 16-bit types, on tensor cores: the same kernels by the same names, tiles of 64 rows of
// which a warp owns 16. Weights and their gradients are rounded to T before they are multiplied, sums are f32.
#pragma once
#include "mma.cuh"
#include "training_attention.cuh"

#define MMA_OWN_ROWS 64
// Rows of the other side at once: forward, and backward, where twice as many tiles share the memory.
#define MMA_FORWARD_ROWS 64
#define MMA_BACKWARD_ROWS 32

// Begins to copy rows of D elements, `stride` apart, `count` of them and then zeros.
template <typename T, int D, int ROWS>
__device__ inline void begin_rows(const Tile<T, D> &tile, const T *from, size_t stride, int count) {
    constexpr int CHUNKS = Tile<T, D>::CHUNKS;
    // By PACKED_THREADS, so that the compiler knows each one's place in the tile.
#pragma unroll
    for (int n = 0; n < (ROWS * CHUNKS + PACKED_THREADS - 1) / PACKED_THREADS; n++) {
        const int i = threadIdx.x + n * PACKED_THREADS;
        if (ROWS * CHUNKS % PACKED_THREADS != 0 && i >= ROWS * CHUNKS) break;
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool there = row < count;
        copy_async(tile.chunk(row, chunk), there ? from + row * stride + chunk * 8 : from, there);
    }
}

// products[j] = the warp's 16 rows of `own` times rows 8 j.. of `other`, by a warp: x yᵀ.
template <typename T, int D, int ROWS>
__device__ inline void tile_products(float (&products)[ROWS / 8][4], const Tile<T, D> &own, int row,
                                     const Tile<T, D> &other) {
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) products[j][c] = 0;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t a[4];
        own.load_a(a, row, k);
#pragma unroll
        for (int j = 0; j < ROWS / 16; j++) {
            uint32_t b[4];
            other.load_b_of_rows(b, 16 * j, k);
            mma_16x8x16<T>(products[2 * j], a, b[0], b[1]);
            mma_16x8x16<T>(products[2 * j + 1], a, b[2], b[3]);
        }
    }
}

// sums += weights rounded to T, [16][ROWS] of the warp, times the rows of `other`, by a warp: x y.
template <typename T, int D, int ROWS>
__device__ inline void add_tile_mixture(float (&sums)[D / 8][4], const float (&weights)[ROWS / 8][4],
                                        const Tile<T, D> &other) {
#pragma unroll
    for (int j = 0; j < ROWS / 16; j++) {
        const float(&left)[4] = weights[2 * j], (&right)[4] = weights[2 * j + 1];
        const uint32_t a[4] = {pack_pair<T>(left[0], left[1]), pack_pair<T>(left[2], left[3]),
                               pack_pair<T>(right[0], right[1]), pack_pair<T>(right[2], right[3])};
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            uint32_t b[4];
            other.load_b_of_columns(b, 16 * j, 16 * d);
            mma_16x8x16<T>(sums[2 * d], a, b[0], b[1]);
            mma_16x8x16<T>(sums[2 * d + 1], a, b[2], b[3]);
        }
    }
}

// Writes the warp's 16 rows of sums, row i times factor[i / 8 of the lane's two]; `count` rows are there.
template <typename T, int D>
__device__ inline void store_rows(T *to, size_t stride, const float (&sums)[D / 8][4], int row, int count,
                                  const float (&factor)[2]) {
    const int lane = threadIdx.x % 32, pair = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int own = row + lane / 4 + 8 * half;
        if (own >= count) continue;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            const uint32_t both =
                pack_pair<T>(sums[d][2 * half] * factor[half], sums[d][2 * half + 1] * factor[half]);
            *reinterpret_cast<uint32_t *>(to + own * stride + 8 * d + 2 * pair) = both;
        }
    }
}

template <int N> __device__ inline void clear(float (&sums)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) sums[i][c] = 0;
}

// Shared memory of all three kernels: 384 D bytes, and 12 of each query that the last one has at hand.

template <typename T, int D>
__device__ void packed_forward_mma(const PackedInputs<T> in, T *out, float *log_sums) {
    constexpr int KEYS = MMA_FORWARD_ROWS;
    DYNAMIC_SHARED(T, shared);
    const Tile<T, D> queries = {shared}, keys = {shared + MMA_OWN_ROWS * D}, values = {keys.at + KEYS * D};
    const uint32_t *tile = in.tiles + 4 * blockIdx.x;
    const int first = tile[0], count = tile[1], head = blockIdx.y, kv_head = head / (in.heads / in.kv_heads);
    const size_t sequence = tile[2], q_stride = (size_t)in.heads * D;
    const T *all_keys = in.k + sequence * in.k_stride + kv_head * D;
    const T *all_values = in.v + sequence * in.kv_stride + kv_head * D;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    begin_rows<T, D, MMA_OWN_ROWS>(queries, in.q + first * q_stride + head * D, q_stride, count);

    int position[2], visible[2];
    float best[2] = {-INFINITY, -INFINITY}, weight[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int own = row + lane / 4 + 8 * half;
        position[half] = own < count ? (int)in.query_positions[first + own] : -1;
        visible[half] = first_visible(position[half], in.window);
    }
    const int last = in.query_positions[first + count - 1];
    float sums[D / 8][4];
    clear(sums);
    for (int begin = first_visible(in.query_positions[first], in.window) / KEYS * KEYS; begin <= last; begin += KEYS) {
        const int there = min(KEYS, last + 1 - begin);
        __syncthreads(); // The round before has been read.
        begin_rows<T, D, KEYS>(keys, all_keys + (size_t)begin * in.k_stride, in.k_stride, there);
        commit_copies();
        begin_rows<T, D, KEYS>(values, all_values + (size_t)begin * in.kv_stride, in.kv_stride, there);
        commit_copies();
        wait_for_copies<1>();
        __syncthreads();
        float scores[KEYS / 8][4];
        tile_products<T, D, KEYS>(scores, queries, row, keys);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = best[half];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                for (int c = 2 * half; c < 2 * half + 2; c++) {
                    const int key = begin + 8 * j + 2 * (lane % 4) + c % 2;
                    const bool seen = key <= position[half] && key >= visible[half];
                    scores[j][c] = seen ? scores[j][c] * in.scale * LOG2_E : -INFINITY;
                    top = fmaxf(top, scores[j][c]);
                }
            }
            top = max_lanes(top, 4);
            const float old = best[half] == -INFINITY ? 0.0f : exp2f(best[half] - top);
            float added = 0;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                for (int c = 2 * half; c < 2 * half + 2; c++) {
                    scores[j][c] = scores[j][c] == -INFINITY ? 0.0f : exp2f(scores[j][c] - top);
                    added += scores[j][c];
                }
            }
            best[half] = top;
            weight[half] = weight[half] * old + added;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                sums[d][2 * half] *= old;
                sums[d][2 * half + 1] *= old;
            }
        }
        wait_for_copies<0>();
        __syncthreads();
        add_tile_mixture<T, D, KEYS>(sums, scores, values);
    }
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float total = sum_lanes(weight[half], 4);
        factor[half] = 1.0f / total;
        const int own = row + lane / 4 + 8 * half;
        if (own < count && lane % 4 == 0)
            log_sums[(size_t)(first + own) * in.heads + head] = best[half] + log2f(total);
    }
    store_rows<T, D>(out + first * q_stride + head * D, q_stride, sums, row, count, factor);
}

template <typename T, int D>
__device__ void packed_grad_queries_mma(const PackedInputs<T> in, T *dq, const T *grad, const float *log_sums,
                                        const float *deltas) {
    constexpr int KEYS = MMA_BACKWARD_ROWS;
    DYNAMIC_SHARED(T, shared);
    const Tile<T, D> queries = {shared}, grads = {shared + MMA_OWN_ROWS * D};
    const Tile<T, D> keys = {grads.at + MMA_OWN_ROWS * D}, values = {keys.at + KEYS * D};
    const uint32_t *tile = in.tiles + 4 * blockIdx.x;
    const int first = tile[0], count = tile[1], head = blockIdx.y, kv_head = head / (in.heads / in.kv_heads);
    const size_t sequence = tile[2], q_stride = (size_t)in.heads * D;
    const T *all_keys = in.k + sequence * in.k_stride + kv_head * D;
    const T *all_values = in.v + sequence * in.kv_stride + kv_head * D;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    begin_rows<T, D, MMA_OWN_ROWS>(queries, in.q + first * q_stride + head * D, q_stride, count);
    begin_rows<T, D, MMA_OWN_ROWS>(grads, grad + first * q_stride + head * D, q_stride, count);

    int position[2], visible[2];
    float log_sum[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int own = row + lane / 4 + 8 * half;
        const size_t at = (size_t)(first + own) * in.heads + head;
        position[half] = own < count ? (int)in.query_positions[first + own] : -1;
        visible[half] = first_visible(position[half], in.window);
        log_sum[half] = own < count ? log_sums[at] : 0.0f;
        delta[half] = own < count ? deltas[at] : 0.0f;
    }
    const int last = in.query_positions[first + count - 1];
    float sums[D / 8][4];
    clear(sums);
    for (int begin = first_visible(in.query_positions[first], in.window) / KEYS * KEYS; begin <= last; begin += KEYS) {
        const int there = min(KEYS, last + 1 - begin);
        __syncthreads(); // The round before has been read.
        begin_rows<T, D, KEYS>(keys, all_keys + (size_t)begin * in.k_stride, in.k_stride, there);
        begin_rows<T, D, KEYS>(values, all_values + (size_t)begin * in.kv_stride, in.kv_stride, there);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        float scores[KEYS / 8][4], dweights[KEYS / 8][4];
        tile_products<T, D, KEYS>(scores, queries, row, keys);
        tile_products<T, D, KEYS>(dweights, grads, row, values);
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int half = c / 2, key = begin + 8 * j + 2 * (lane % 4) + c % 2;
                const bool seen = key <= position[half] && key >= visible[half];
                const float w = seen ? exp2f(scores[j][c] * in.scale * LOG2_E - log_sum[half]) : 0.0f;
                scores[j][c] = w * (dweights[j][c] - delta[half]);
            }
        }
        add_tile_mixture<T, D, KEYS>(sums, scores, keys);
    }
    const float factor[2] = {in.scale, in.scale};
    store_rows<T, D>(dq + first * q_stride + head * D, q_stride, sums, row, count, factor);
}

template <typename T, int D>
__device__ void packed_grad_keys_mma(const PackedInputs<T> in, T *dk, T *dv, const T *grad, const float *log_sums,
                                     const float *deltas) {
    constexpr int QUERIES = MMA_BACKWARD_ROWS;
    DYNAMIC_SHARED(T, shared);
    const Tile<T, D> keys = {shared}, values = {shared + MMA_OWN_ROWS * D};
    const Tile<T, D> queries = {values.at + MMA_OWN_ROWS * D}, grads = {queries.at + QUERIES * D};
    // Of the queries at hand.
    float *query_sums = reinterpret_cast<float *>(grads.at + QUERIES * D), *query_deltas = query_sums + QUERIES;
    int *asking = reinterpret_cast<int *>(query_deltas + QUERIES);
    const uint32_t *tile = in.tiles + 4 * blockIdx.x;
    const int count = tile[1], query_begin = tile[2], query_end = tile[3], kv_head = blockIdx.y;
    const size_t first = tile[0], q_stride = (size_t)in.heads * D, kv_at = first * in.kv_stride + kv_head * D;
    const int group = in.heads / in.kv_heads, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    begin_rows<T, D, MMA_OWN_ROWS>(keys, in.k + first * in.k_stride + kv_head * D, in.k_stride, count);
    begin_rows<T, D, MMA_OWN_ROWS>(values, in.v + kv_at, in.kv_stride, count);

    int position[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int own = row + lane / 4 + 8 * half;
        // A key that is not there is behind every query.
        position[half] = own < count ? (int)in.positions[first + own] : 0x7fffffff;
    }
    float dkey[D / 8][4], dvalue[D / 8][4];
    clear(dkey);
    clear(dvalue);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int begin = query_begin; begin < query_end; begin += QUERIES) {
            const int there = min(QUERIES, query_end - begin);
            const size_t at = (size_t)begin * q_stride + head * D;
            __syncthreads(); // The round before has been read.
            begin_rows<T, D, QUERIES>(queries, in.q + at, q_stride, there);
            begin_rows<T, D, QUERIES>(grads, grad + at, q_stride, there);
            commit_copies();
            if (threadIdx.x < QUERIES) {
                const bool is = (int)threadIdx.x < there;
                const size_t query = (size_t)(begin + threadIdx.x), of = query * in.heads + head;
                asking[threadIdx.x] = is ? (int)in.query_positions[query] : -1;
                query_sums[threadIdx.x] = is ? log_sums[of] : 0.0f;
                query_deltas[threadIdx.x] = is ? deltas[of] : 0.0f;
            }
            wait_for_copies<0>();
            __syncthreads();
            // Keys by queries.
            float weights[QUERIES / 8][4], dweights[QUERIES / 8][4];
            tile_products<T, D, QUERIES>(weights, keys, row, queries);
            tile_products<T, D, QUERIES>(dweights, values, row, grads);
#pragma unroll
            for (int j = 0; j < QUERIES / 8; j++) {
#pragma unroll
                for (int next = 0; next < 2; next++) {
                    const int query = 8 * j + 2 * (lane % 4) + next, asks = asking[query];
                    const float log_sum = query_sums[query], delta = query_deltas[query];
                    const int visible = first_visible(asks, in.window);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int c = 2 * half + next;
                        const bool seen = position[half] <= asks && position[half] >= visible;
                        const float w = seen ? exp2f(weights[j][c] * in.scale * LOG2_E - log_sum) : 0.0f;
                        weights[j][c] = w;
                        dweights[j][c] = w * (dweights[j][c] - delta);
                    }
                }
            }
            add_tile_mixture<T, D, QUERIES>(dvalue, weights, grads);
            add_tile_mixture<T, D, QUERIES>(dkey, dweights, queries);
        }
    }
    const float scaled[2] = {in.scale, in.scale}, plain[2] = {1.0f, 1.0f};
    store_rows<T, D>(dk + kv_at, in.kv_stride, dkey, row, count, scaled);
    store_rows<T, D>(dv + kv_at, in.kv_stride, dvalue, row, count, plain);
}

PACKED_KERNELS(bf16, __nv_bfloat16, _mma)
PACKED_KERNELS(f16, __half, _mma)
