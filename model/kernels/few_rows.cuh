// Products of few rows with a weight: decoding, where the time is that of reading the weight. Each warp keeps several KiB
// of it on their way through shared memory to its tensor cores, and begins before the kernel ahead has ended. bf16 and f16.
#pragma once
#include "mma.cuh"
#include "swiglu.cuh"

#define FEW_ROWS_WARPS 8
#define FEW_ROWS_THREADS (32 * FEW_ROWS_WARPS)
// Inputs that a warp takes at once, 64 bytes of each row.
#define FEW_ROWS_STEP 32

// What becomes of the sums; `Epilogue` in few_rows.rs.
#define FEW_ROWS_ADD 1   // Added to what `out` holds.
#define FEW_ROWS_F32 2   // `out` is f32.
#define FEW_ROWS_GATED 4 // w is gate and up, one behind the other: out = silu(gate) * up.

// A block's tiles of OUTPUTS outputs, its warps' steps along the inputs, and where both lie in shared memory. The warps
// share out a tile's steps, each the eighth of its turn; ROWS: a multiple of 8.
template <typename T, int ROWS, int OUTPUTS> struct FewRows {
    // Steps of a warp on their way and in use, 8 KiB of the weight.
    static constexpr int DEPTH = 128 / OUTPUTS;
    // A lane copies the same 16 bytes of every eighth row.
    static constexpr int CHUNKS = FEW_ROWS_STEP / 8, LANE_ROWS = 32 / CHUNKS;
    using Step = Tile<T, FEW_ROWS_STEP>;

    const T *x, *w;
    int rows, outputs, inputs;
    bool gated, x_kept;
    T *weights, *xs;

    __device__ int steps() const { return (inputs + FEW_ROWS_STEP - 1) / FEW_ROWS_STEP; }
    // Outputs of a tile as they are written.
    __device__ int width() const { return gated ? OUTPUTS / 2 : OUTPUTS; }
    __device__ int tiles() const { return (outputs + width() - 1) / width(); }

    // The weight's row that is a tile's row `i`; a gated tile's are eight of gate and eight of up in turn. Behind the last
    // some other: what comes of it is not written.
    __device__ int weight_row(int tile, int i) const {
        const int output = tile * width() + (gated ? i / 16 * 8 + i % 8 : i);
        if (output >= outputs) return 0;
        return output + (gated && i % 16 >= 8 ? outputs : 0);
    }

    __device__ Step weight_tile(int warp, int slot) const {
        return {weights + (warp * DEPTH + slot) * OUTPUTS * FEW_ROWS_STEP};
    }
    // Kept: each step's own place; else it goes with the weight's.
    __device__ Step x_tile(int warp, int slot, int step) const {
        return {xs + (x_kept ? step : warp * DEPTH + slot) * ROWS * FEW_ROWS_STEP};
    }
};

// Which step a warp copies next, and where a lane finds its 16 bytes of each row of it.
template <typename T, int ROWS, int OUTPUTS> struct FewRowsCursor {
    using Product = FewRows<T, ROWS, OUTPUTS>;
    static constexpr int WEIGHT_COPIES = OUTPUTS / Product::LANE_ROWS, X_COPIES = ROWS / Product::LANE_ROWS;
    const Product &p;
    const int warp, steps, tiles, lane_row, chunk;
    int tile, step;
    const T *weight[WEIGHT_COPIES], *x[X_COPIES];

    __device__ FewRowsCursor(const Product &p, int warp)
        : p(p), warp(warp), steps(p.steps()), tiles(p.tiles()), lane_row(threadIdx.x % 32 / Product::CHUNKS),
          chunk(threadIdx.x % Product::CHUNKS), tile(blockIdx.x), step(warp) {
        if (step >= steps) tile = tiles; // A warp that has no step at all copies none.
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            const int row = lane_row + i * Product::LANE_ROWS;
            // Behind the last some other, as of the weight.
            x[i] = p.x + (size_t)(row < p.rows ? row : 0) * p.inputs + chunk * 8;
        }
        aim();
    }

    __device__ void aim() {
#pragma unroll
        for (int i = 0; i < WEIGHT_COPIES; i++)
            weight[i] = p.w + (size_t)p.weight_row(tile, lane_row + i * Product::LANE_ROWS) * p.inputs + chunk * 8;
    }

    __device__ void advance() {
        step += FEW_ROWS_WARPS;
        if (step < steps) return;
        step = warp;
        tile += gridDim.x;
        aim();
    }

    // Behind the last input there are zeros.
    __device__ bool there() const { return step * FEW_ROWS_STEP + chunk * 8 < p.inputs; }

    // Begins to copy the step of the weight.
    __device__ void copy_weight(int slot) const {
        if (tile >= tiles) return;
        const auto to = p.weight_tile(warp, slot);
#pragma unroll
        for (int i = 0; i < WEIGHT_COPIES; i++)
            copy_async(to.chunk(lane_row + i * Product::LANE_ROWS, chunk),
                       there() ? weight[i] + step * FEW_ROWS_STEP : p.w, there());
    }

    // Begins to copy the same inputs of x, where they are not there from the tile before.
    __device__ void copy_x(int slot) const {
        if (tile >= tiles || (p.x_kept && tile != (int)blockIdx.x)) return;
        const auto to = p.x_tile(warp, slot, step);
#pragma unroll
        for (int i = 0; i < X_COPIES; i++)
            copy_async(to.chunk(lane_row + i * Product::LANE_ROWS, chunk),
                       there() ? x[i] + step * FEW_ROWS_STEP : p.x, there());
    }
};

// sums += a step's weight times its x, by a warp.
template <typename T, int ROWS, int OUTPUTS>
__device__ inline void multiply_step(float (&sums)[OUTPUTS / 16][ROWS / 8][4], Tile<T, FEW_ROWS_STEP> w,
                                     Tile<T, FEW_ROWS_STEP> x) {
    const int lane = threadIdx.x % 32;
    uint32_t b[ROWS / 8][4];
    // Eight rows, their four chunks: the operands of both products below.
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++) load_matrices(b[n], x.chunk(n * 8 + lane % 8, lane / 8));
#pragma unroll
    for (int m = 0; m < OUTPUTS / 16; m++) {
#pragma unroll
        for (int k = 0; k < FEW_ROWS_STEP / 16; k++) {
            uint32_t a[4];
            w.load_a(a, m * 16, k * 16);
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) mma_16x8x16<T>(sums[m][n], a, b[n][2 * k], b[n][2 * k + 1]);
        }
    }
}

// Leaves a warp's sums for the block, `[ROWS][OUTPUTS]`.
template <int ROWS, int OUTPUTS>
__device__ inline void leave_sums(float *to, const float (&sums)[OUTPUTS / 16][ROWS / 8][4]) {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < OUTPUTS / 16; m++)
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                to[(n * 8 + 2 * pair + c % 2) * OUTPUTS + m * 16 + group + c / 2 * 8] = sums[m][n][c];
}

// out[r] = x[r] wᵀ for up to ROWS rows; block b takes tiles b, b + gridDim.x, ...
// - out: [rows, outputs]; x: [rows, inputs]; w: [outputs, inputs], [2 outputs, inputs] where gated
// - x_kept: x stays in shared memory from the first tile on
// Shared memory (`few_rows_shared` in few_rows.rs): the warps' steps of the weight; x, all of it or the warps' steps of it;
// two times the warps' sums, [FEW_ROWS_WARPS][ROWS][OUTPUTS] f32, in turn, so that one barrier per tile does.
// How a row's sum is ordered depends on the inputs alone, not on ROWS, OUTPUTS or the other rows.
template <typename T, int ROWS, int OUTPUTS>
__device__ void few_rows(void *out, const T *x, const T *w, int rows, int outputs, int inputs, int epilogue, int x_kept) {
    using Product = FewRows<T, ROWS, OUTPUTS>;
    constexpr int DEPTH = Product::DEPTH, SUMS = FEW_ROWS_WARPS * ROWS * OUTPUTS;
    DYNAMIC_SHARED(T, shared);
    T *xs = shared + FEW_ROWS_WARPS * DEPTH * OUTPUTS * FEW_ROWS_STEP;
    const bool gated = epilogue & FEW_ROWS_GATED;
    const Product p = {x, w, rows, outputs, inputs, gated, x_kept != 0, shared, xs};
    const int warp = threadIdx.x / 32, steps = p.steps(), tiles = p.tiles();
    float *parts = reinterpret_cast<float *>(xs + (x_kept ? steps : FEW_ROWS_WARPS * DEPTH) * ROWS * FEW_ROWS_STEP);

    FewRowsCursor<T, ROWS, OUTPUTS> weight(p, warp);
    auto next = weight;
    // The weight is nobody's output: its first steps may come before the kernel ahead has ended. x may not.
#pragma unroll
    for (unsigned slot = 0; slot < DEPTH - 1; slot++, weight.advance()) weight.copy_weight(slot);
    after_earlier();
#pragma unroll
    for (unsigned slot = 0; slot < DEPTH - 1; slot++, next.advance()) {
        next.copy_x(slot);
        commit_copies();
    }

    unsigned slot = 0;
    for (int tile = blockIdx.x, turn = 0; tile < tiles; tile += gridDim.x, turn ^= 1) {
        float sums[OUTPUTS / 16][ROWS / 8][4] = {};
        for (int step = warp; step < steps; step += FEW_ROWS_WARPS, slot = (slot + 1) % DEPTH) {
            wait_for_copies<DEPTH - 2>();
            __syncwarp(); // Every lane's copies of this step are there, and the slot that is filled next has been read.
            const unsigned filled = (slot + DEPTH - 1) % DEPTH;
            next.copy_weight(filled);
            next.copy_x(filled);
            next.advance();
            commit_copies(); // Empty behind the last, for the count of groups.
            multiply_step<T, ROWS, OUTPUTS>(sums, p.weight_tile(warp, slot), p.x_tile(warp, slot, step));
        }
        float *own = parts + turn * SUMS;
        leave_sums<ROWS, OUTPUTS>(own + warp * ROWS * OUTPUTS, sums);
        __syncthreads();
        const auto sum = [&](int row, int output) {
            float all = 0;
#pragma unroll
            for (int of = 0; of < FEW_ROWS_WARPS; of++) all += own[(of * ROWS + row) * OUTPUTS + output];
            return all;
        };
        for (int i = threadIdx.x; i < rows * OUTPUTS; i += FEW_ROWS_THREADS) {
            const int row = i / OUTPUTS, column = i % OUTPUTS, output = tile * p.width() + column;
            if (column >= p.width() || output >= outputs) continue;
            const size_t at = (size_t)row * outputs + output;
            if (gated) {
                const int gate = column / 8 * 16 + column % 8;
                static_cast<T *>(out)[at] = swiglu_of(narrow<T>(sum(row, gate)), narrow<T>(sum(row, gate + 8)));
            } else if (epilogue & FEW_ROWS_F32) {
                static_cast<float *>(out)[at] = sum(row, column);
            } else {
                T *to = static_cast<T *>(out) + at;
                const float before = epilogue & FEW_ROWS_ADD ? widen(*to) : 0.0f;
                *to = narrow<T>(before + sum(row, column));
            }
        }
    }
}

#define FEW_ROWS_KERNEL(suffix, T, ROWS, OUTPUTS)                                                                      \
    extern "C" __global__ void __launch_bounds__(FEW_ROWS_THREADS) few_rows_##suffix##_r##ROWS##_o##OUTPUTS(           \
        void *out, const T *x, const T *w, int rows, int outputs, int inputs, int epilogue, int x_kept) {              \
        few_rows<T, ROWS, OUTPUTS>(out, x, w, rows, outputs, inputs, epilogue, x_kept);                                \
    }                                                                                                                  \
    REGISTER_KERNEL(few_rows_##suffix##_r##ROWS##_o##OUTPUTS)

#define FEW_ROWS_KERNELS(suffix, T)       \
    FEW_ROWS_KERNEL(suffix, T, 8, 16)     \
    FEW_ROWS_KERNEL(suffix, T, 8, 32)     \
    FEW_ROWS_KERNEL(suffix, T, 16, 16)    \
    FEW_ROWS_KERNEL(suffix, T, 16, 32)    \
    FEW_ROWS_KERNEL(suffix, T, 32, 16)    \
    FEW_ROWS_KERNEL(suffix, T, 32, 32)

FOR_EACH_HALF(FEW_ROWS_KERNELS)
