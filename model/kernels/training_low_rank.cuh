// The low-rank terms of a training pass and their gradients: f32 factors and sums on rows of the model's type. Sums
// over rows are made in parts whose number depends on the rows alone, so that two runs agree bit for bit.
#pragma once
#include "common.cuh"

#define TERM_AT_ONCE 8
// Together one sum per lane.
#define TERM_DOWN_ROWS 4
#define TERM_UP_ROWS 8
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

// low[r, k] = scales[r] * sum over i of dropped x[r, i] * m[k step_k + i step_i]: A x forward, Bᵀ grad backward.
// - x: rows of `width`, x_stride apart; low: [rows, rank] f32; scales: [rows], 0 of those that the adapter leaves alone
// A block takes TERM_DOWN_ROWS rows and TERM_AT_ONCE ranks.
template <typename T>
__device__ void term_down(float *low, const T *x, const float *m, int rows, int width, int x_stride, int rank,
                          int step_k, int step_i, const float *scales, Drop drop) {
    __shared__ float parts[8][TERM_DOWN_ROWS * TERM_AT_ONCE];
    const int row = blockIdx.x * TERM_DOWN_ROWS, first = blockIdx.y * TERM_AT_ONCE;
    float sums[TERM_DOWN_ROWS * TERM_AT_ONCE];
#pragma unroll
    for (int i = 0; i < TERM_DOWN_ROWS * TERM_AT_ONCE; i++) sums[i] = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float xs[TERM_DOWN_ROWS];
#pragma unroll
        for (int r = 0; r < TERM_DOWN_ROWS; r++)
            xs[r] = row + r < rows ? widen(x[(size_t)(row + r) * x_stride + i]) *
                                         drop_factor(drop, row + r, width, i)
                                   : 0.0f;
#pragma unroll
        for (int k = 0; k < TERM_AT_ONCE; k++) {
            const float w = first + k < rank ? m[(size_t)(first + k) * step_k + (size_t)i * step_i] : 0.0f;
#pragma unroll
            for (int r = 0; r < TERM_DOWN_ROWS; r++) sums[r * TERM_AT_ONCE + k] += xs[r] * w;
        }
    }
    parts[threadIdx.x / 32][threadIdx.x % 32] = share_sums(sums);
    __syncthreads();
    const int r = threadIdx.x / TERM_AT_ONCE, k = threadIdx.x % TERM_AT_ONCE;
    if (r >= TERM_DOWN_ROWS || row + r >= rows || first + k >= rank) return;
    float sum = 0;
    for (int w = 0; w < (int)(blockDim.x / 32); w++) sum += parts[w][threadIdx.x];
    low[(size_t)(row + r) * rank + first + k] = scales[row + r] * sum;
}

// out[r, i] += dropped sum over k of low[r, k] * m[k step_k + i step_i]: B low forward, Aᵀ low backward.
// - out: rows of `width`, out_stride apart. Grid (groups of TERM_UP_ROWS rows, parts of a row).
template <typename T>
__device__ void term_up(T *out, const float *low, const float *m, int rows, int width, int out_stride, int rank,
                        int step_k, int step_i, Drop drop) {
    const int row = blockIdx.x * TERM_UP_ROWS, i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= width) return;
    float sums[TERM_UP_ROWS];
#pragma unroll
    for (int r = 0; r < TERM_UP_ROWS; r++) sums[r] = 0;
    for (int k = 0; k < rank; k++) {
        const float w = m[(size_t)k * step_k + (size_t)i * step_i];
#pragma unroll
        for (int r = 0; r < TERM_UP_ROWS; r++)
            if (row + r < rows) sums[r] += low[(size_t)(row + r) * rank + k] * w;
    }
#pragma unroll
    for (int r = 0; r < TERM_UP_ROWS; r++) {
        if (row + r >= rows) continue;
        T *to = out + (size_t)(row + r) * out_stride + i;
        *to = narrow<T>(widen(*to) + sums[r] * drop_factor(drop, row + r, width, i));
    }
}

// parts[p, k, c] = sum over the part's rows of dropped wide[r, c] * low[r, k].
// - wide: rows of `width`, stride apart; low: [rows, rank] f32; parts: [parts, rank, width] f32
// Grid (columns, parts, groups of TERM_AT_ONCE ranks).
template <typename T>
__device__ void term_outer(float *parts, const T *wide, const float *low, int rows, int width, int stride, int rank,
                           Drop drop) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.z * TERM_AT_ONCE;
    if (c >= width) return;
    const int begin = blockIdx.y * TERM_PART_ROWS, end = min(rows, begin + TERM_PART_ROWS);
    float sums[TERM_AT_ONCE];
#pragma unroll
    for (int k = 0; k < TERM_AT_ONCE; k++) sums[k] = 0;
    for (int row = begin; row < end; row++) {
        const float x = widen(wide[(size_t)row * stride + c]) * drop_factor(drop, row, width, c);
#pragma unroll
        for (int k = 0; k < TERM_AT_ONCE; k++)
            if (first + k < rank) sums[k] += x * low[(size_t)row * rank + first + k];
    }
#pragma unroll
    for (int k = 0; k < TERM_AT_ONCE; k++)
        if (first + k < rank) parts[((size_t)blockIdx.y * rank + first + k) * width + c] = sums[k];
}

// out[k step_k + c step_c] = the sum of the parts, in their order; grid (columns, rank).
__device__ inline void sum_parts(float *out, const float *parts, int count, int width, int rank, int step_k,
                                 int step_c) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, k = blockIdx.y;
    if (c >= width) return;
    float sum = 0;
    for (int part = 0; part < count; part++) sum += parts[((size_t)part * rank + k) * width + c];
    out[(size_t)k * step_k + (size_t)c * step_c] = sum;
}

// A kernel's arguments that are its Drop.
#define DROP_ARGUMENTS int seed_low, int seed_high, int threshold, float drop_scale, const uint32_t *drop_rows
#define DROP drop_of(seed_low, seed_high, threshold, drop_scale, drop_rows)

#define TERM_KERNELS(suffix, T)                                                                                        \
    extern "C" __global__ void term_down_##suffix(float *low, const T *x, const float *m, int rows, int width,         \
                                                  int x_stride, int rank, int step_k, int step_i, const float *scales, \
                                                  DROP_ARGUMENTS) {                                                    \
        after_earlier();                                                                                               \
        term_down<T>(low, x, m, rows, width, x_stride, rank, step_k, step_i, scales, DROP);                            \
    }                                                                                                                  \
    REGISTER_KERNEL(term_down_##suffix)                                                                                \
    extern "C" __global__ void term_up_##suffix(T *out, const float *low, const float *m, int rows, int width,         \
                                                int out_stride, int rank, int step_k, int step_i, DROP_ARGUMENTS) {    \
        after_earlier();                                                                                               \
        term_up<T>(out, low, m, rows, width, out_stride, rank, step_k, step_i, DROP);                                  \
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
