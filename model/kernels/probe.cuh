// For the tests alone: what a warp's lanes hold of a fragment, on the emulator and on a GPU.
#pragma once
#include "mma.cuh"

// One warp: d = d + a b of the registers as they are. d: [32, 4] f32; a: [32, 4]; b: [32, 2].
template <typename T> __device__ void probe_product(float *d, const uint32_t *a, const uint32_t *b) {
    const int lane = threadIdx.x;
    float sums[4];
    uint32_t left[4];
    for (int i = 0; i < 4; i++) {
        sums[i] = d[4 * lane + i];
        left[i] = a[4 * lane + i];
    }
    mma_16x8x16<T>(sums, left, b[2 * lane], b[2 * lane + 1]);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = sums[i];
}

#define PROBE_ROWS 33
#define PROBE_WIDTH 32

// One warp: the four loads of a tile from (row, column), out: [4, 32, 4]; from: [PROBE_ROWS - 1, PROBE_WIDTH], the
// tile's last row is zeros.
template <typename T> __device__ void probe_tile(uint32_t *out, const T *from, int row, int column) {
    DYNAMIC_SHARED(T, shared);
    const Tile<T, PROBE_WIDTH> tile = {shared};
    constexpr int CHUNKS = Tile<T, PROBE_WIDTH>::CHUNKS;
    for (int i = threadIdx.x; i < PROBE_ROWS * CHUNKS; i += 32)
        copy_async(tile.chunk(i / CHUNKS, i % CHUNKS), from + i * 8, i / CHUNKS < PROBE_ROWS - 1);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    uint32_t loaded[4][4];
    tile.load_a(loaded[0], row, column);
    tile.load_b_of_rows(loaded[1], row, column);
    tile.load_b_of_columns(loaded[2], row, column);
    tile.load_a_of_columns(loaded[3], row, column);
    for (int i = 0; i < 16; i++) out[(i / 4 * 32 + threadIdx.x) * 4 + i % 4] = loaded[i / 4][i % 4];
    // The row behind the last: only zeros.
    if (threadIdx.x < CHUNKS)
        for (int i = 0; i < 8; i++)
            if (widen(tile.chunk(PROBE_ROWS - 1, threadIdx.x)[i]) != 0.0f) out[0] = 0xffffffffu;
}

#define PROBE_KERNELS(suffix, T)                                                                                       \
    extern "C" __global__ void probe_product_##suffix(float *d, const uint32_t *a, const uint32_t *b) {                \
        after_earlier();                                                                                               \
        probe_product<T>(d, a, b);                                                                                     \
    }                                                                                                                  \
    REGISTER_KERNEL(probe_product_##suffix)                                                                            \
    extern "C" __global__ void probe_tile_##suffix(uint32_t *out, const T *from, int row, int column) {                \
        after_earlier();                                                                                               \
        probe_tile<T>(out, from, row, column);                                                                         \
    }                                                                                                                  \
    REGISTER_KERNEL(probe_tile_##suffix)

FOR_EACH_HALF(PROBE_KERNELS)
