// An adapter's low-rank terms: f32 factors on rows of the model's type, and only on the rows that have the adapter.
#pragma once
#include "common.cuh"

#define LOW_RANK_ROWS 4
#define LOW_RANK_AT_ONCE 8

// Whether any of a block's rows has the adapter.
__device__ inline bool any_scaled(const float *scale, int row, int row_count) {
    bool any = false;
    for (int r = 0; r < row_count; r++) any = any || scale[row + r] != 0.0f;
    return any;
}

// low[r] = scale[r] * (a x[r]), 0 or left as it is where scale[r] is 0.
// - x: [rows, width]; a: [rank, width] f32; low: [rows, rank] f32; scale: [rows] f32
// A block takes LOW_RANK_ROWS rows and LOW_RANK_AT_ONCE ranks, so that a's rows are read once for several rows.
template <typename T>
__device__ void low_rank_down(float *low, const T *x, const float *a, const float *scale, int rows, int width,
                              int rank) {
    const int row = blockIdx.x * LOW_RANK_ROWS, first = blockIdx.y * LOW_RANK_AT_ONCE;
    const int row_count = min(LOW_RANK_ROWS, rows - row), rank_count = min(LOW_RANK_AT_ONCE, rank - first);
    if (!any_scaled(scale, row, row_count)) return; // The whole block.
    float sums[LOW_RANK_ROWS][LOW_RANK_AT_ONCE];
    for (int r = 0; r < LOW_RANK_ROWS; r++)
        for (int k = 0; k < LOW_RANK_AT_ONCE; k++) sums[r][k] = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float xs[LOW_RANK_ROWS];
#pragma unroll
        for (int r = 0; r < LOW_RANK_ROWS; r++) xs[r] = r < row_count ? widen(x[(size_t)(row + r) * width + i]) : 0.0f;
#pragma unroll
        for (int k = 0; k < LOW_RANK_AT_ONCE; k++) {
            const float w = k < rank_count ? a[(size_t)(first + k) * width + i] : 0.0f;
#pragma unroll
            for (int r = 0; r < LOW_RANK_ROWS; r++) sums[r][k] += xs[r] * w;
        }
    }
    // Every warp's sums side by side, so that one barrier does for all of them.
    __shared__ float parts[32][LOW_RANK_ROWS * LOW_RANK_AT_ONCE];
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int r = 0; r < LOW_RANK_ROWS; r++) {
#pragma unroll
        for (int k = 0; k < LOW_RANK_AT_ONCE; k++) {
            const float sum = sum_lanes(sums[r][k], 32);
            if (threadIdx.x % 32 == 0) parts[warp][r * LOW_RANK_AT_ONCE + k] = sum;
        }
    }
    __syncthreads();
    const int r = threadIdx.x / LOW_RANK_AT_ONCE, k = threadIdx.x % LOW_RANK_AT_ONCE;
    if (r >= row_count || k >= rank_count) return;
    float sum = 0;
    for (int w = 0; w < (int)(blockDim.x / 32); w++) sum += parts[w][threadIdx.x];
    low[(size_t)(row + r) * rank + first + k] = scale[row + r] * sum;
}

// out[r] += b low[r] on rows whose scale is not 0; grid (LOW_RANK_ROWS rows each, parts of a row).
// - out: [rows, width], row r begins at r * stride; b: [width, rank] f32; low: [rows, rank] f32
template <typename T>
__device__ void low_rank_up(T *out, const float *low, const float *b, const float *scale, int rows, int width,
                            int stride, int rank) {
    const int row = blockIdx.x * LOW_RANK_ROWS, i = blockIdx.y * blockDim.x + threadIdx.x;
    const int row_count = min(LOW_RANK_ROWS, rows - row);
    if (i >= width || !any_scaled(scale, row, row_count)) return;
    float sums[LOW_RANK_ROWS];
#pragma unroll
    for (int r = 0; r < LOW_RANK_ROWS; r++) sums[r] = 0;
    for (int k = 0; k < rank; k++) {
        const float w = b[(size_t)i * rank + k];
#pragma unroll
        for (int r = 0; r < LOW_RANK_ROWS; r++)
            if (r < row_count) sums[r] += low[(size_t)(row + r) * rank + k] * w;
    }
#pragma unroll
    for (int r = 0; r < LOW_RANK_ROWS; r++) {
        if (r >= row_count || scale[row + r] == 0.0f) continue;
        T *to = out + (size_t)(row + r) * stride + i;
        *to = narrow<T>(widen(*to) + sums[r]);
    }
}

#define LOW_RANK_KERNELS(suffix, T)                                                                                    \
    extern "C" __global__ void low_rank_down_##suffix(float *low, const T *x, const float *a, const float *scale,      \
                                                      int rows, int width, int rank) {                                 \
        after_earlier();                                                                                               \
        low_rank_down<T>(low, x, a, scale, rows, width, rank);                                                         \
    }                                                                                                                  \
    REGISTER_KERNEL(low_rank_down_##suffix)                                                                            \
    extern "C" __global__ void low_rank_up_##suffix(T *out, const float *low, const float *b, const float *scale,      \
                                                    int rows, int width, int stride, int rank) {                       \
        after_earlier();                                                                                               \
        low_rank_up<T>(out, low, b, scale, rows, width, stride, rank);                                                 \
    }                                                                                                                  \
    REGISTER_KERNEL(low_rank_up_##suffix)

FOR_EACH_DTYPE(LOW_RANK_KERNELS)
