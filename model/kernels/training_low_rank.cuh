// The low-rank terms of a training pass and their gradients: f32 factors and sums on rows of the model's type. Sums
// over rows are made in parts whose number depends on the rows alone, so that two runs agree bit for bit.
#pragma once
#include "common.cuh"

// Ranks that a thread has at once.
#define TERM_AT_ONCE 8
// A thread has two neighbouring columns: every width is even.
// With TERM_AT_ONCE two sums per lane.
#define TERM_DOWN_ROWS 8
#define TERM_UP_ROWS 16
// Rows of a part of a sum over rows.
#define TERM_PART_ROWS 128

// Which inputs are dropped: a function of the seed and the element's place, so that nothing of it is kept. A threshold
// of 0 drops none. `rows`: the rows' places in the forward pass, null where they are the rows themselves.
struct Drop {
    uint64_t seed;
    uint32_t threshold;
    float scale;
    const uint32_t *rows;
};

__device__ inline Drop drop_of(int low, int high, int threshold, float scale, const uint32_t *rows) {
    return {(uint64_t)(uint32_t)high << 32 | (uint32_t)low, (uint32_t)threshold, scale, rows};
}

// What an input is multiplied by: splitmix64's output for its place, the upper half against the threshold.
__device__ inline float drop_factor(const Drop &drop, int row, int width, int i) {
    if (drop.threshold == 0) return 1.0f;
    const uint64_t at = (uint64_t)(drop.rows ? drop.rows[row] : row) * width + i;
    uint64_t z = drop.seed + (at + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    return (uint32_t)(z >> 32) >= drop.threshold ? drop.scale : 0.0f;
}

// Lane i's result is the warp's sum of sums[i]: half as many are left after each exchange. By a warp.
__device__ inline float share_sums(float (&sums)[32]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            if (i >= half) continue;
            const float mine = lane & half ? sums[i + half] : sums[i];
            const float other = lane & half ? sums[i] : sums[i + half];
            sums[i] = mine + __shfl_xor_sync(FULL_WARP, other, half);
        }
    }
    return sums[0];
}

// The next ranks, `left` of them and then zeros. `whole`: whether all are there, on a multiple of 16 bytes.
__device__ inline void load_ranks(float (&to)[TERM_AT_ONCE], const float *from, int left, bool whole) {
    constexpr int SIZE = Pack<float>::SIZE;
#pragma unroll
    for (int k = 0; k < TERM_AT_ONCE; k += SIZE) {
        Pack<float> four;
        if (whole) four = load_pack(from + k);
#pragma unroll
        for (int j = 0; j < SIZE; j++) to[k + j] = whole ? four.v[j] : k + j < left ? from[k + j] : 0.0f;
    }
}

// A factor's element of rank k and column i is m[k step_k + i step_i], and one of the steps is 1.
struct FactorOf {
    const float *m;
    int rank, step_k, step_i;

    // Whether the ranks from `first` on are TERM_AT_ONCE that rows of `rank` have on a multiple of 16 bytes.
    __device__ bool whole(int first) const { return rank % 4 == 0 && first + TERM_AT_ONCE <= rank; }

    // w[k][c]: rank first + k of column i + c, zero where there is no such rank.
    __device__ void load(float (&w)[TERM_AT_ONCE][2], int first, int i) const {
        if (step_k == 1) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float ranks[TERM_AT_ONCE];
                load_ranks(ranks, m + (size_t)(i + c) * step_i + first, rank - first, whole(first));
#pragma unroll
                for (int k = 0; k < TERM_AT_ONCE; k++) w[k][c] = ranks[k];
            }
            return;
        }
#pragma unroll
        for (int k = 0; k < TERM_AT_ONCE; k++) {
            Pair<float> both = {};
            if (first + k < rank) both = load_pair(m + (size_t)(first + k) * step_k + i);
#pragma unroll
            for (int c = 0; c < 2; c++) w[k][c] = both.v[c];
        }
    }
};

// low[r, k] = scales[r] * sum over i of dropped x[r, i] * factor[k, i]: A x forward, Bᵀ grad backward.
// - x: rows of `width`, x_stride apart; low: [rows, rank] f32; scales: [rows], 0 of those that the adapter leaves alone
// A block takes TERM_DOWN_ROWS rows and TERM_AT_ONCE ranks.
template <typename T>
__device__ void term_down(float *low, const T *x, FactorOf factor, int rows, int width, int x_stride,
                          const float *scales, Drop drop) {
    __shared__ float parts[8][TERM_DOWN_ROWS * TERM_AT_ONCE];
    const int row = blockIdx.x * TERM_DOWN_ROWS, first = blockIdx.y * TERM_AT_ONCE;
    bool any = false;
#pragma unroll 1
    for (int r = row; r < min(row + TERM_DOWN_ROWS, rows); r++) any |= scales[r] != 0;
    // Where the adapter leaves them all alone, nothing is read or dropped.
    if (!any) width = 0;
    // Half of the rows each.
    float sums[2][32];
#pragma unroll
    for (int i = 0; i < 32; i++) sums[0][i] = sums[1][i] = 0;
    for (int i = 2 * threadIdx.x; i < width; i += 2 * blockDim.x) {
        float w[TERM_AT_ONCE][2];
        factor.load(w, first, i);
#pragma unroll
        for (int r = 0; r < TERM_DOWN_ROWS; r++) {
            Pair<T> both = {};
            if (row + r < rows) both = load_pair(x + (size_t)(row + r) * x_stride + i);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float value = row + r < rows ? widen(both.v[c]) * drop_factor(drop, row + r, width, i + c) : 0.0f;
#pragma unroll
                for (int k = 0; k < TERM_AT_ONCE; k++)
                    sums[r / 4][r % 4 * TERM_AT_ONCE + k] += value * w[k][c];
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
        parts[threadIdx.x / 32][32 * half + threadIdx.x % 32] = share_sums(sums[half]);
    __syncthreads();
    const int r = threadIdx.x / TERM_AT_ONCE, k = threadIdx.x % TERM_AT_ONCE;
    if (r >= TERM_DOWN_ROWS || row + r >= rows || first + k >= factor.rank) return;
    float sum = 0;
    for (int w = 0; w < (int)(blockDim.x / 32); w++) sum += parts[w][threadIdx.x];
    low[(size_t)(row + r) * factor.rank + first + k] = scales[row + r] * sum;
}

// out[r, i] += dropped sum over k of low[r, k] * factor[k, i]: B low forward, Aᵀ low backward.
// - out: rows of `width`, out_stride apart. Grid (groups of TERM_UP_ROWS rows, parts of a row).
template <typename T>
__device__ void term_up(T *out, const float *low, FactorOf factor, int rows, int width, int out_stride, Drop drop) {
    const int row = blockIdx.x * TERM_UP_ROWS, i = 2 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (i >= width) return;
    float sums[TERM_UP_ROWS][2];
#pragma unroll
    for (int r = 0; r < TERM_UP_ROWS; r++)
#pragma unroll
        for (int c = 0; c < 2; c++) sums[r][c] = 0;
    for (int first = 0; first < factor.rank; first += TERM_AT_ONCE) {
        float w[TERM_AT_ONCE][2];
        factor.load(w, first, i);
#pragma unroll
        for (int r = 0; r < TERM_UP_ROWS; r++) {
            if (row + r >= rows) break;
            float ranks[TERM_AT_ONCE];
            load_ranks(ranks, low + (size_t)(row + r) * factor.rank + first, factor.rank - first, factor.whole(first));
#pragma unroll
            for (int k = 0; k < TERM_AT_ONCE; k++)
#pragma unroll
                for (int c = 0; c < 2; c++) sums[r][c] += ranks[k] * w[k][c];
        }
    }
#pragma unroll
    for (int r = 0; r < TERM_UP_ROWS; r++) {
        if (row + r >= rows) break;
        T *to = out + (size_t)(row + r) * out_stride + i;
        Pair<T> both = load_pair(to);
#pragma unroll
        for (int c = 0; c < 2; c++)
            both.v[c] = narrow<T>(widen(both.v[c]) + sums[r][c] * drop_factor(drop, row + r, width, i + c));
        store_pair(to, both);
    }
}

// parts[p, k, c] = sum over the part's rows of dropped wide[r, c] * low[r, k].
// - wide: rows of `width`, stride apart; low: [rows, rank] f32; parts: [parts, rank, width] f32
// Grid (columns, parts, groups of TERM_AT_ONCE ranks).
template <typename T>
__device__ void term_outer(float *parts, const T *wide, const float *low, int rows, int width, int stride, int rank,
                           Drop drop) {
    const int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x), first = blockIdx.z * TERM_AT_ONCE;
    if (i >= width) return;
    const int begin = blockIdx.y * TERM_PART_ROWS, end = min(rows, begin + TERM_PART_ROWS);
    const bool whole = FactorOf{low, rank, 1, rank}.whole(first);
    float sums[TERM_AT_ONCE][2];
#pragma unroll
    for (int k = 0; k < TERM_AT_ONCE; k++)
#pragma unroll
        for (int c = 0; c < 2; c++) sums[k][c] = 0;
#pragma unroll 8
    for (int row = begin; row < end; row++) {
        const Pair<T> both = load_pair(wide + (size_t)row * stride + i);
        float ranks[TERM_AT_ONCE];
        load_ranks(ranks, low + (size_t)row * rank + first, rank - first, whole);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float x = widen(both.v[c]) * drop_factor(drop, row, width, i + c);
#pragma unroll
            for (int k = 0; k < TERM_AT_ONCE; k++) sums[k][c] += x * ranks[k];
        }
    }
#pragma unroll
    for (int k = 0; k < TERM_AT_ONCE; k++) {
        if (first + k >= rank) break;
        store_pair(parts + ((size_t)blockIdx.y * rank + first + k) * width + i, {sums[k][0], sums[k][1]});
    }
}

// out[k step_k + c step_c] = the sum of the parts, in their order; grid (columns, rank).
__device__ inline void sum_parts(float *out, const float *parts, int count, int width, int rank, int step_k,
                                 int step_c) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, k = blockIdx.y;
    if (c >= width) return;
    float sum = 0;
#pragma unroll 8
    for (int part = 0; part < count; part++) sum += parts[((size_t)part * rank + k) * width + c];
    out[(size_t)k * step_k + (size_t)c * step_c] = sum;
}

// A kernel's arguments that are its Drop.
#define DROP_ARGUMENTS int seed_low, int seed_high, int threshold, float drop_scale, const uint32_t *drop_rows
#define DROP drop_of(seed_low, seed_high, threshold, drop_scale, drop_rows)

// Two blocks of term_down at once: without a bound it takes more registers than that leaves.
#define TERM_KERNELS(suffix, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                               \
        term_down_##suffix(float *low, const T *x, const float *m, int rows, int width, int x_stride, int rank,        \
                           int step_k, int step_i, const float *scales, DROP_ARGUMENTS) {                              \
        after_earlier();                                                                                               \
        term_down<T>(low, x, {m, rank, step_k, step_i}, rows, width, x_stride, scales, DROP);                          \
    }                                                                                                                  \
    REGISTER_KERNEL(term_down_##suffix)                                                                                \
    extern "C" __global__ void term_up_##suffix(T *out, const float *low, const float *m, int rows, int width,         \
                                                int out_stride, int rank, int step_k, int step_i, DROP_ARGUMENTS) {    \
        after_earlier();                                                                                               \
        term_up<T>(out, low, {m, rank, step_k, step_i}, rows, width, out_stride, DROP);                                \
    }                                                                                                                  \
    REGISTER_KERNEL(term_up_##suffix)                                                                                  \
    extern "C" __global__ void term_outer_##suffix(float *parts, const T *wide, const float *low, int rows, int width, \
                                                   int stride, int rank, DROP_ARGUMENTS) {                             \
        after_earlier();                                                                                               \
        term_outer<T>(parts, wide, low, rows, width, stride, rank, DROP);                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(term_outer_##suffix)

FOR_EACH_DTYPE(TERM_KERNELS)

extern "C" __global__ void term_sum(float *out, const float *parts, int count, int width, int rank, int step_k,
                                    int step_c) {
    after_earlier();
    sum_parts(out, parts, count, width, rank, step_k, step_c);
}
REGISTER_KERNEL(term_sum)
